"""All that `stepladder bench` measures: each optimizer and each kernel, by one interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Parameter

from stepladder.bench import gpu, gpu_report, matrices, preconditioners, results, roots
from stepladder.bench.cases import CASES, DTYPES, MATRIX_OPTIMIZERS, Case
from stepladder.bench.matrices import Machine, OnGpu, Row, timed
from stepladder.bench.measure import Settings, state_bytes
from stepladder.bench.measurement import OURS, OWN, RIVAL, SCALE, Contender, Measurement
from stepladder.bench.shapes import MATRIX_SETS, SETS, Shapes, elements, shapes_of
from stepladder.optim.base import Optimizer

ROOT_ORDER = 4
# Tensors of which an optimizer of matrices is checked against its reference.
SMALL = ((40, 30), (33, 33), (24, 64))


# Who measures, what, in which dtype, beside whom, how long, and what another process has found.
Measure = Callable[[Machine, str, str, Collection[str], Settings, Measurement | None], Measurement]


@dataclass(frozen=True)
class Subject:
    """One optimizer or kernel.

    Attributes:
        kind: "optimizer" or "kernel".
        name: What `--optimizer` or `--kernel` takes.
        sets: Shapes that are measured where none are named.
        dtypes: Those that it can be measured in.
        measure: Checks and measures a set of shapes.
        misfit: Why it cannot take such shapes, or None where it can.
        cpu_only: It is not measured on a GPU.
    """

    kind: str
    name: str
    sets: tuple[str, ...]
    dtypes: tuple[str, ...]
    measure: Measure
    misfit: Callable[[Shapes], str | None]
    cpu_only: bool = False


def _element_wise(case: Case) -> Subject:
    def measure(
        machine: Machine, shapes: str, dtype: str, rivals: Collection[str], settings: Settings, known: Any
    ) -> Measurement:
        # Looked up, so that a test can put another in its place.
        case_now = CASES[case.name]
        if isinstance(machine, OnGpu):
            ours = [backend for backend in machine.ours.values() if backend]
            return gpu_report.measurement(gpu.run(machine.clock, case_now, shapes, dtype, rivals, settings, ours))
        return results.run(case_now, shapes, dtype, rivals, settings, known)

    return Subject("optimizer", case.name, tuple(SETS), tuple(DTYPES), measure, lambda shapes: None)


def _of_rows(
    kind: str,
    name: str,
    sets: Sequence[str],
    run: Callable[[Machine, Shapes, float], Any],
    misfit: Callable[[Shapes], str | None],
    moved: Callable[[Shapes], int] | None = None,
    missing: Callable[[], dict[str, str]] = dict,
    cpu_only: bool = False,
) -> Subject:
    """What gives rows as `matrices.timed` does, of fp32 matrices.

    Args:
        kind: As of `Subject`.
        name: As of `Subject`.
        sets: As of `Subject`.
        run: Checks and measures the shapes, for so many seconds.
        misfit: As of `Subject`.
        moved: Bytes that every contender must move.
        missing: Rivals that cannot be had here, and why.
        cpu_only: As of `Subject`.
    """

    def measure(
        machine: Machine, shapes_name: str, dtype: str, rivals: Collection[str], settings: Settings, known: Any
    ) -> Measurement:
        shapes = shapes_of(shapes_name)
        result = Measurement(kind, name, shapes_name, dtype, len(shapes), elements(shapes), absent=missing())
        row = run(machine, shapes, settings.seconds)
        errors: dict[str, float] = row.errors if isinstance(row, Row) else {OURS: row.error}
        flops = row.flops if isinstance(row, Row) and not math.isnan(row.flops) else None
        for contender, ms in row.samples.items():
            role = OWN if contender in errors else _role(contender)
            checks = {OWN: results.GREEN, SCALE: "another rule"}
            measured = Contender(role, [ms], checks.get(role, ""), error=errors.get(contender))
            measured.state_bytes = row.state_bytes.get(contender)
            if role != SCALE:
                measured.flops, measured.moved = flops, moved(shapes) if moved else None
            result.contenders[contender] = measured
        wrong = (row.red if isinstance(row, Row) else errors) if row.red else ()
        result.refuse({contender: f"relative error {errors[contender]:.2g}, above its limit" for contender in wrong})
        return result

    return Subject(kind, name, tuple(sets), ("fp32",), measure, misfit, cpu_only)


def _role(contender: str) -> str:
    """Of a contender that is not checked: other rules, and other ways of ours, are there for scale."""
    return SCALE if contender.startswith(OURS) or contender.endswith(ANOTHER) else RIVAL


ANOTHER = "(another rule)"


def _matrices(shapes: Shapes) -> str | None:
    odd = next((shape for shape in shapes if len(shape) != 2), None)
    return None if odd is None else f"it takes matrices, as 16*256x512, and a tensor there is {'x'.join(map(str, odd))}"


def _alike(shapes: Shapes) -> str | None:
    return _matrices(shapes) or ("it takes matrices of one shape, as 16*256x512" if len(set(shapes)) > 1 else None)


def _square(shapes: Shapes) -> str | None:
    rows, columns = shapes[0] if not _alike(shapes) else (0, 0)
    return _alike(shapes) or (None if rows == columns else f"it takes square matrices, and these are {rows}x{columns}")


def _iteration(machine: Machine, shapes: Shapes, seconds: float) -> Row:
    m, n = sorted(shapes[0])
    return matrices.measure_iteration(machine, len(shapes), m, n, seconds)


def _roots(machine: Machine, shapes: Shapes, seconds: float) -> Row:
    return roots.measure_roots(machine, len(shapes), shapes[0][0], ROOT_ORDER, seconds)


def _bases(machine: Machine, shapes: Shapes, seconds: float) -> Row:
    return roots.measure_bases(machine, len(shapes), shapes[0][0], seconds)


def _in_and_out(shapes: Shapes) -> int:
    """Bytes of fp32 matrices, read once and written once."""
    return 2 * 4 * elements(shapes)


def _muons(make: Callable[..., Optimizer], rule: str, machine: Machine, shapes: Shapes, seconds: float) -> Row:
    """A step of one of Muon's kin beside torch's Muon.

    Args:
        make: Our constructor.
        rule: The name of torch's Muon among the contenders: it is a rival where it is of the same rule.
        machine: Where.
        shapes: Of the parameters.
        seconds: For the rounds.
    """
    row = Row("", sum(matrices.flops(min(s), max(s)) for s in shapes))
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for contender, backend in machine.ours.items():
        row.errors[contender] = _distance(make, backend, machine.device)
        if contender not in row.red:
            optimizers[contender] = make(_params(shapes, machine.device), backend=backend)
    optimizers[rule] = torch.optim.Muon(_params(shapes, machine.device))
    row = timed(row, machine, {name: optimizer.step for name, optimizer in optimizers.items()}, seconds)
    row.state_bytes = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    return row


def _params(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        params.append(Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)))
        params[-1].grad = torch.randn(shape, generator=generator).to(device)
    return params


def _distance(make: Callable[..., Optimizer], backend: str | None, device: torch.device) -> float:
    """How far three steps of small matrices are from the reference's, relative."""
    moved = []
    for tried in (backend, "reference"):
        params = _params(SMALL, device)
        before = [p.detach().clone() for p in params]
        optimizer = make(params, backend=tried)
        for _ in range(3):
            optimizer.step()
        moved.append(torch.cat([(p.detach() - w).flatten() for p, w in zip(params, before, strict=True)]))
    return float((moved[0] - moved[1]).norm() / moved[1].norm())


def _preconditioned(family: str, machine: Machine, shapes: Shapes, seconds: float) -> preconditioners.Row:
    makes, _ = preconditioners.contenders(family)
    matrices_of = [(shape[0], shape[1]) for shape in shapes]
    return preconditioners.measure(family, "", matrices_of, makes, seconds)


def _missing_preconditioners(family: str) -> dict[str, str]:
    return {name: reason.partition(":")[0] for name, reason in preconditioners.contenders(family)[1].items()}


def _all() -> Iterator[Subject]:
    yield from map(_element_wise, CASES.values())
    another = f"torch Muon {ANOTHER}"
    for name, rule in (("muon", "torch"), ("normuon", another), ("muonh", another)):
        run = partial(_muons, MATRIX_OPTIMIZERS[name], rule)
        yield _of_rows("optimizer", name, tuple(MATRIX_SETS), run, _matrices)
    for family in ("Shampoo", "SOAP"):
        stepped = partial(_preconditioned, family)
        missing = partial(_missing_preconditioners, family)
        yield _of_rows("optimizer", family.lower(), ["4*256x256"], stepped, _matrices, missing=missing, cpu_only=True)
    sizes = ["256x1024", "16*256x256", "1024x1024"]
    yield _of_rows("kernel", "newton_schulz", sizes, _iteration, _alike, _in_and_out)
    yield _of_rows("kernel", "inverse_root", ["64*128x128", "4*512x512"], _roots, _square, _in_and_out)
    yield _of_rows("kernel", "orthonormalize", ["64*128x128", "4*512x512"], _bases, _square, _in_and_out)


SUBJECTS: Mapping[str, Subject] = MappingProxyType({subject.name: subject for subject in _all()})
OPTIMIZERS = tuple(name for name, subject in SUBJECTS.items() if subject.kind == "optimizer")
KERNELS = tuple(name for name, subject in SUBJECTS.items() if subject.kind == "kernel")
