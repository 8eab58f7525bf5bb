"""One case from start to end, and what is known of it then."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import psutil

from stepladder.bench.cases import DTYPES, Case
from stepladder.bench.check import check
from stepladder.bench.measure import OURS, YARDSTICK, YARDSTICK_MOST, Milliseconds, Settings, Timing, measure
from stepladder.bench.rivals import Rival, rivals_of
from stepladder.bench.shapes import APART, SETS, elements

# Left for everything else on the machine, beside the check's own tensors.
RESERVE = 2**30


class Quantiles(NamedTuple):
    """Median and the quantiles 0.2 and 0.8."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Milliseconds) -> Quantiles:
        return cls(*map(float, np.quantile(values, (0.5, 0.2, 0.8))))


@dataclass(frozen=True)
class Result:
    """A case that was measured, or was not and why.

    Attributes:
        optimizer: The case's name.
        shapes: The shape set's name.
        dtype: fp32 and so on.
        tensors: How many the set has.
        elements: How many they have together.
        skipped: Why it was not run; everything below is then empty.
        red: How the check failed; everything below but `absent` is then empty.
        absent: Rivals that have no number, and why.
        rounds: Samples behind each number.
        milliseconds: Of a step, by contender.
        ratios: A rival's step over ours in the same round, by rival.
        host: Milliseconds of our step outside the kernels.
        gigabytes_per_second: What our step moves.
        bandwidth: What the yardstick moves beside it, in GB/s.
    """

    optimizer: str
    shapes: str
    dtype: str
    tensors: int
    elements: int
    skipped: str | None = None
    red: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    milliseconds: dict[str, Quantiles] = field(default_factory=dict)
    ratios: dict[str, Quantiles] = field(default_factory=dict)
    host: Quantiles | None = None
    gigabytes_per_second: float | None = None
    bandwidth: float | None = None

    @property
    def share(self) -> float | None:
        """The part of the yardstick's bandwidth that our step reaches."""
        return self.gigabytes_per_second / self.bandwidth if self.gigabytes_per_second and self.bandwidth else None


def run(case: Case, shapes_name: str, dtype_name: str, rival_names: Collection[str], settings: Settings) -> Result:
    """Check a case, and measure it where the check is green and the memory suffices."""
    shapes, dtype = SETS[shapes_name](), DTYPES[dtype_name]
    count = elements(shapes)
    result = Result(case.name, shapes_name, dtype_name, len(shapes), count)
    column = count * dtype.itemsize
    if skipped := shortage(case, column, settings.fresh_grads):
        return replace(result, skipped=skipped)

    rivals, absent = rivals_of(case, rival_names)
    apart = shapes_name in APART
    verdict = check(case, shapes, dtype, rivals, apart=apart)
    absent |= verdict.wrong
    if verdict.red:
        return replace(result, red=verdict.red, absent=absent)
    rivals = [rival for rival in rivals if rival.name not in absent]
    fresh = settings.fresh_grads or any(rival.name in verdict.writers for rival in rivals)
    rivals, without_room = fit(rivals, column, _free() - own_memory(case, column, fresh))
    timing = measure(case, shapes, dtype, rivals, verdict.writers, settings, apart)
    return _evaluated(result, timing, absent | without_room)


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


def _evaluated(result: Result, timing: Timing, absent: dict[str, str]) -> Result:
    ours, yardstick = timing.steps[OURS], timing.steps[YARDSTICK]
    contenders = {name: steps for name, steps in timing.steps.items() if name != YARDSTICK}
    return replace(
        result,
        absent=absent,
        rounds=len(ours),
        milliseconds={name: Quantiles.of(steps) for name, steps in contenders.items()},
        ratios={name: Quantiles.of(steps / ours) for name, steps in contenders.items() if name != OURS},
        host=Quantiles.of(timing.host),
        gigabytes_per_second=timing.moved / float(np.median(ours)) / 1e6,
        bandwidth=timing.yardstick_moved / float(np.median(yardstick)) / 1e6,
    )
