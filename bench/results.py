"""One case of an element-wise rule from start to end."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import psutil

from stepladder.bench.cases import DTYPES, Case
from stepladder.bench.check import Verdict, check
from stepladder.bench.measure import YARDSTICK_MOST, Settings, Timing, measure
from stepladder.bench.measurement import MEASURE, OURS, OWN, RIVAL, SCALE, YARDSTICK, Contender, Measurement
from stepladder.bench.rivals import Rival, rivals_of
from stepladder.bench.roofline import operations
from stepladder.bench.shapes import APART, elements, shapes_of

# Left for everything else on the machine, beside the check's own tensors.
RESERVE = 2**30
GREEN = "ok"


def run(
    case: Case,
    shapes_name: str,
    dtype_name: str,
    rival_names: Collection[str],
    settings: Settings,
    known: Measurement | None = None,
) -> Measurement:
    """Check a case, and measure it where the check is green and the memory suffices.

    Args:
        case: The optimizer.
        shapes_name: What `--shapes` takes.
        dtype_name: fp32 and so on.
        rival_names: Who is to be measured beside ours.
        settings: How long.
        known: The case as another process has checked it: it is not checked again.
    """
    shapes, dtype = shapes_of(shapes_name), DTYPES[dtype_name]
    result = Measurement("optimizer", case.name, shapes_name, dtype_name, len(shapes), elements(shapes))
    column = result.elements * dtype.itemsize
    result.skipped = shortage(case, column, settings.fresh_grads)
    if result.skipped:
        return result

    rivals, result.absent = rivals_of(case, rival_names)
    apart = shapes_name in APART
    if known is None:
        verdict = check(case, shapes, dtype, rivals, apart=apart)
    else:
        verdict = Verdict(known.red, known.absent, set(known.writers))
    result.absent |= verdict.wrong
    result.writers = sorted(verdict.writers)
    result.red = verdict.red
    if verdict.red:
        return result
    rivals = [rival for rival in rivals if rival.name not in result.absent]
    fresh = settings.fresh_grads or any(rival.name in verdict.writers for rival in rivals)
    rivals, without_room = fit(rivals, column, _free() - own_memory(case, column, fresh))
    result.absent |= without_room
    timing = measure(case, shapes, dtype, rivals, verdict.writers, settings, apart)
    same_rule = {rival.name for rival in rivals if rival.same_rule}
    result.contenders = _contenders(timing, same_rule, operations(case) * result.elements)
    return result


def shortage(case: Case, column: int, fresh_grads: bool = False) -> str | None:
    """Why the memory does not suffice even for our own optimizer, or None where it does.

    Args:
        case: The optimizer.
        column: Bytes of a copy of all parameters.
        fresh_grads: Gradients are kept twice.
    """
    need, free = own_memory(case, column, fresh_grads), _free()
    return f"needs {gib(need)} of memory, {gib(free)} are free" if need > free else None


def own_memory(case: Case, column: int, fresh_grads: bool, optimizers: int = 1) -> int:
    """Bytes of parameters, gradients and the states of this many optimizers of ours."""
    return (2 + optimizers * len(case.states) + fresh_grads) * column


def _free() -> int:
    available: int = psutil.virtual_memory().available
    return available - YARDSTICK_MOST - RESERVE


def fit(rivals: Sequence[Rival], column: int, room: int) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that fit into `room` bytes at once, in their order, and the reason for each of the others.

    Args:
        rivals: With the memory that they need, in copies of all parameters.
        column: Bytes of such a copy.
        room: Bytes that are free beside our own optimizer.
    """
    taken: list[Rival] = []
    absent = {}
    for rival in rivals:
        together = [*taken, rival]
        states = sum(r.states for r in together if not r.shares_states)
        states += max((r.states for r in together if r.shares_states), default=0)
        need = column * (states + max(r.scratch for r in together))
        if need <= room:
            taken = together
        else:
            absent[rival.name] = f"needs {gib(need)} of memory beside ours, {gib(room)} are free"
    return taken, absent


def gib(size: int) -> str:
    """A size in words."""
    return f"{size / 2**30:.1f} GiB"


def _contenders(timing: Timing, same_rule: Collection[str], flops: float) -> dict[str, Contender]:
    found = {}
    for name, steps in timing.steps.items():
        contender = Contender(SCALE, [steps.tolist()], "another rule", state_bytes=timing.state_bytes.get(name))
        if name == OURS:
            contender.role, contender.check = OWN, GREEN
            contender.host_ms = timing.host.tolist()
        elif name == YARDSTICK:
            contender.role, contender.check, contender.moved = MEASURE, "", timing.yardstick_moved
        elif name in same_rule:
            contender.role, contender.check = RIVAL, "near ours"
        if name == OURS or name in same_rule:
            contender.moved, contender.flops = timing.moved, flops
        found[name] = contender
    return found
