"""The check before the measurement: our bits against the reference's, and everyone's values against ours.

What is checked are the tensors of the shape set, cut to what the slow reference can take: each distinct shape,
its first dimension shortened, to 1 if need be, until it has at most 65536 elements, and again as often as it
occurs while all together have at most a million elements. Three steps, each with other gradients.
On a GPU the reference steps copies on the CPU, and a set that was cut is also stepped once in full, by us and by
torch, as sizes themselves can go wrong there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from stepladder.bench.cases import Case
from stepladder.bench.rivals import Rival, standard
from stepladder.bench.shapes import Shape, Shapes, elements
from stepladder.bench.workload import WEIGHT, Source, grouped

STEPS = 3
TENSOR_ELEMENTS = 2**16
TOTAL_ELEMENTS = 2**20
# From one step's gradients to the next's: so fast that none cancels the momentum of those before, whose sign
# would then hang on a rounding.
GROWTH = 4.0
# What rounding may do to an update, in the dtype's epsilon: torch's forms store a few intermediate results in it.
ROUNDINGS = 16
# Of an error's text, in characters: compilers write pages.
LONGEST_REASON = 400

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        red: None, or how ours fails it.
        wrong: Rivals that are to be left out, and why: values far from ours, or no step at all.
        writers: Rivals whose step changes the gradients.
    """

    red: str | None
    wrong: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Walk:
    optimizer: torch.optim.Optimizer
    params: list[Parameter]
    changed_gradients: bool


def check(
    case: Case,
    shapes: Shapes,
    dtype: torch.dtype,
    rivals: Sequence[Rival],
    *,
    apart: bool = False,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Verdict:
    """Step ours, the reference and the rivals from the same values with the same gradients.

    Ours is red where its bits are not the reference's, or its values are far from those of torch's own plain form.

    Args:
        case: The optimizer.
        shapes: The shape set, in full.
        dtype: Of parameters, gradients and states.
        rivals: Those that are to be measured.
        apart: A group for each parameter.
        device: Where ours and the rivals step.
        backend: Of ours; None leaves the choice to it.

    Raises:
        Exception: One of torch's own optimizers raised.
    """
    source, cut = Source(), sample(shapes)
    start = [source.tensor(shape, dtype, WEIGHT) for shape in cut]
    gradients = [[source.tensor(shape, dtype, GROWTH**step) for shape in cut] for step in range(STEPS)]
    reference = partial(_walk, options=case.options, start=start, gradients=gradients, apart=apart)
    start = [value.to(device) for value in start]
    gradients = [[value.to(device) for value in step] for step in gradients]
    walk = partial(_walk, options=case.options, start=start, gradients=gradients, apart=apart)
    distance = partial(_distance, start=start)
    roundings = _roundings(case, cut, dtype)

    ours = walk(partial(case.ours, backend=backend) if backend else case.ours)
    if difference := _first_difference(ours, reference(partial(case.ours, backend="reference"))):
        return Verdict(difference)
    plain = standard(case)
    verdict = Verdict(_far(distance(ours, walk(plain.make), roundings=roundings), f"torch's {plain.name} form"))
    for rival in rivals:
        if rival.checked_in_full:
            continue
        try:
            theirs = walk(rival.make)
        # Any failure of a foreign package is a reason to leave it out, and no error of ours.
        except Exception as error:
            if not rival.foreign:
                raise
            verdict.wrong[rival.name] = said(error)
            continue
        if theirs.changed_gradients:
            verdict.writers.add(rival.name)
        slack = roundings + (_single_precision_scalars(case, dtype) if rival.foreign else 0.0)
        if rival.same_rule and (far := _far(distance(ours, theirs, roundings=slack), "ours")):
            verdict.wrong[rival.name] = far
    return verdict


def check_in_full(
    case: Case,
    shapes: Shapes,
    dtype: torch.dtype,
    rivals: Sequence[Rival],
    *,
    device: torch.device | str,
    backends: Sequence[str],
    apart: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Hold one step on the whole set near that of torch's plainest form.

    Args:
        case: The optimizer.
        shapes: The shape set, in full.
        dtype: Of parameters, gradients and states.
        rivals: Those that were not checked on the sample.
        device: Where all step.
        backends: Of ours.
        apart: A group for each parameter.

    Returns:
        What is wrong, by backend and by rival.
    """
    source = Source(device)
    start = [source.tensor(shape, dtype, WEIGHT) for shape in shapes]
    gradients = [[source.tensor(shape, dtype) for shape in shapes]]
    walk = partial(_walk, options=case.options, start=start, gradients=gradients, apart=apart)
    roundings = _roundings(case, shapes, dtype)
    plain = walk(standard(case).make)
    # Only its values are needed, and states take the most memory.
    plain.optimizer.state.clear()

    def judged(make: Callable[..., torch.optim.Optimizer], slack: float = 0.0) -> str | None:
        try:
            distance = _distance(walk(make), plain, start, roundings + slack)
        # A contender that cannot run must not keep the others from being measured.
        except Exception as error:
            return said(error)
        return _far(distance, f"torch's {standard(case).name} form on the whole set")

    red = {backend: judged(partial(case.ours, backend=backend)) for backend in backends}
    slack = _single_precision_scalars(case, dtype)
    wrong = {rival.name: judged(rival.make, slack if rival.foreign else 0.0) for rival in rivals}
    return {k: v for k, v in red.items() if v}, {k: v for k, v in wrong.items() if v}


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]


def sample(shapes: Shapes) -> Shapes:
    """The shapes that are checked in place of these."""
    known: set[Shape] = set()
    taken: Shapes = []
    room = TOTAL_ELEMENTS
    for shape in shapes:
        rows = max(1, TENSOR_ELEMENTS // math.prod(shape[1:]))
        cut = (min(shape[0], rows), *shape[1:])
        if shape not in known or elements([cut]) <= room:
            known.add(shape)
            taken.append(cut)
            room -= elements([cut])
    return taken


def _walk(
    make: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    start: list[Tensor],
    gradients: list[list[Tensor]],
    apart: bool,
) -> _Walk:
    params = [Parameter(value.clone()) for value in start]
    optimizer = make(grouped(params, options["lr"], apart), **options)
    changed = False
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
        changed = changed or not all(
            p.grad is not None and torch.equal(p.grad, g) for p, g in zip(params, step, strict=True)
        )
    return _Walk(optimizer, params, changed)


def _first_difference(ours: _Walk, reference: _Walk) -> str | None:
    """None where parameters and states have the same bits, NaN standing for any NaN."""
    for index, (param, expected) in enumerate(zip(ours.params, reference.params, strict=True)):
        columns = {"parameter": (param.detach(), expected.detach())}
        if param in ours.optimizer.state:
            theirs = reference.optimizer.state[expected]
            columns |= {name: (value, theirs[name]) for name, value in ours.optimizer.state[param].items()}
        for name, (column, want) in columns.items():
            got = column.cpu()
            integer = _INTEGERS[got.element_size()]
            differs = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
            if count := int(differs.sum()):
                first = int(differs.flatten().nonzero()[0])
                return (
                    f"{name} {index}, shape {tuple(got.shape)}: {count} elements differ from the reference, "
                    f"first {first}: {got.flatten()[first]:.9g}, not {want.flatten()[first]:.9g}"
                )
    return None


def _roundings(case: Case, shapes: Shapes, dtype: torch.dtype) -> float:
    """How many epsilons of its dtype an update may be off, whoever computes it."""
    if not case.norms:
        return ROUNDINGS
    # A norm summed in any order of n terms is off by about √n epsilons of the arithmetic.
    arithmetic = torch.promote_types(dtype, torch.float32)
    largest = max(elements([shape]) for shape in shapes)
    return ROUNDINGS + math.sqrt(largest) * torch.finfo(arithmetic).eps / torch.finfo(dtype).eps


def _single_precision_scalars(case: Case, dtype: torch.dtype) -> float:
    """What another package may be off beyond that, in the same unit, for computing 1 − β in float32."""
    largest: float = max(case.options.get("betas", (0.0,)))
    return torch.finfo(torch.float32).eps / (1.0 - largest) / torch.finfo(dtype).eps


def _distance(a: _Walk, b: _Walk, start: list[Tensor], roundings: float) -> float:
    """The largest difference between two optimizers' parameters, over what rounding explains.

    That is one epsilon of the parameter for each step, as it is stored, and `roundings` of the way it has gone.
    """
    worst = 0.0
    epsilon = torch.finfo(start[0].dtype).eps
    for ours, theirs, begin in zip(a.params, b.params, start, strict=True):
        x, y, s = (tensor.detach().double() for tensor in (ours, theirs, begin))
        largest = torch.maximum(x.abs().max(), s.abs().max())
        allowed = epsilon * (STEPS * largest + roundings * (x - s).abs().max())
        distance = float((y - x).abs().max() / allowed)
        worst = max(worst, math.inf if math.isnan(distance) else distance)
    return worst


def _far(distance: float, what: str) -> str | None:
    return f"values differ from {what} by {distance:.2g} times what rounding explains" if distance > 1.0 else None
