"""What can be profiled: every optimizer, and the functions of `stepladder.ops`, on tensors of given shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepladder import ops
from stepladder.bench.cases import CASES, MATRIX_OPTIMIZERS
from stepladder.bench.measure import LEARNING_RATE
from stepladder.bench.shapes import APART, Shape, Shapes, shapes_of
from stepladder.bench.traffic import bytes_per_element
from stepladder.bench.workload import Source, grouped, make_parameters
from stepladder.optim.base import Optimizer

# A longer side of more than this many times the shorter one is that of an embedding, which is no matrix to Muon.
LONGEST_ASPECT = 32
# For what takes minutes on all of GPT-2.
LAYER = "gpt2-layer"
KERNELS = ("newton_schulz", "inverse_root", "orthonormalize", "update_gram_", "clip_grad_norm_")
OPTIMIZERS = (*CASES, *MATRIX_OPTIMIZERS)
NAMES = (*OPTIMIZERS, *KERNELS)
# What `ALIASES` lists may be said, too.
ALIASES = {"clip": "clip_grad_norm_", "gram": "update_gram_", "update_gram": "update_gram_"}
ROOT_EXPONENT, ROOT_DAMPING = 4, 1e-6


@dataclass(frozen=True)
class Subject:
    """A step that can be taken again and again.

    Attributes:
        name: What was asked for.
        title: The range around a step in a trace.
        step: Takes one.
        cycle: How many steps do the same as the next so many: what is refreshed now and then is so once among them.
        shapes: Of the tensors that it works on.
        touched: Bytes of their memory.
        moved: Bytes that the elementwise updates of a step must move.
        notes: What is to be known of it.
    """

    name: str
    title: str
    step: Callable[[], Any]
    shapes: Shapes
    touched: int
    cycle: int = 1
    moved: int = 0
    notes: tuple[str, ...] = ()


def default_shapes(name: str) -> str:
    """What is profiled where no shapes are given."""
    return LAYER if name in ("shampoo", "soap", "inverse_root", "orthonormalize", "update_gram_") else "gpt2"


def make(name: str, shapes_name: str, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    """The subject on random data, which no step has touched yet.

    Raises:
        ValueError: The shapes are not for it.
        RuntimeError: The backend cannot run, or the memory does not suffice.
        TypeError: The dtype is not for it.
    """
    shapes = shapes_of(shapes_name)
    if name in KERNELS:
        return _KERNELS[name](shapes, dtype, device, backend)
    if name in CASES:
        return _elementwise(name, shapes, shapes_name in APART, dtype, device, backend)
    return _matrix_optimizer(name, shapes, dtype, device, backend)


def _title(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__name__}.step"


def _touched(optimizer: Optimizer, params: list[torch.nn.Parameter]) -> int:
    """After the first step, by which states are made."""
    return sum(2 * p.nbytes for p in params) + optimizer.state_bytes()


def _moved(optimizer: Optimizer) -> int:
    """Of the groups that follow a rule of rules.def."""
    total = 0
    for group in optimizer.elementwise(optimizer.param_groups):
        family = optimizer.of(group)
        for p in group["params"]:
            sizes = [x.element_size() for x in optimizer.state[p].values() if x.numel() == p.numel() > 1]
            each = bytes_per_element(family.rule(group), p.element_size(), p.element_size(), max(sizes, default=0))
            total += each * p.numel()
    return total


def _elementwise(
    name: str, shapes: Shapes, apart: bool, dtype: torch.dtype, device: torch.device | str, backend: str | None
) -> Subject:
    case = CASES[name]
    params = make_parameters(shapes, dtype, device)
    options = case.options | {"lr": LEARNING_RATE}
    optimizer = case.ours(grouped(params, LEARNING_RATE, apart), **options, backend=backend)
    optimizer.step()
    return Subject(
        name, _title(optimizer), optimizer.step, shapes, _touched(optimizer, params), moved=_moved(optimizer)
    )


def as_matrices(shape: Shape) -> Shape:
    """As Muon takes it: three dimensions are a batch of matrices, of more all but the first make one."""
    return shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))


def is_hidden(shape: Shape) -> bool:
    """Whether a tensor counts as a hidden matrix, or a batch of them."""
    sides = as_matrices(shape)[-2:]
    return len(sides) == 2 and max(sides) <= LONGEST_ASPECT * min(sides)


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def _matrix_optimizer(
    name: str, shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None
) -> Subject:
    hidden = [is_hidden(shape) for shape in shapes]
    if not any(hidden):
        raise ValueError(
            f"{name} has nothing to do for these shapes: none has two or more dimensions, with a side of at most "
            f"{LONGEST_ASPECT} times the other"
        )
    params = make_parameters(shapes, dtype, device)
    groups: list[dict[str, Any]] = [{"params": [p for p, own in zip(params, hidden, strict=True) if own]}]
    rest = [p for p, own in zip(params, hidden, strict=True) if not own]
    if rest:
        groups.append({"params": rest, "algorithm": "adamw", "lr": LEARNING_RATE})
    optimizer = MATRIX_OPTIMIZERS[name](groups, lr=LEARNING_RATE, backend=backend)
    cycle = int(optimizer.param_groups[0].get("precondition_frequency", 1))
    optimizer.step()
    notes: tuple[str, ...] = ()
    if rest:
        own = f"{len(hidden) - len(rest)} of the tensors by {type(optimizer).__name__}"
        notes += (f"{own}, the other {len(rest)} by AdamW",)
    if cycle > 1:
        notes += (f"times are means over cycles of {cycle} steps, each with one refresh",)
    moved = _moved(optimizer)
    return Subject(name, _title(optimizer), optimizer.step, shapes, _touched(optimizer, params), cycle, moved, notes)


def _left_out(shapes: Shapes, found: Shapes) -> tuple[str, ...]:
    count = len(shapes) - len(found)
    return (
        (f"without {counted(count, 'tensor')} that {'is' if count == 1 else 'are'} no hidden matrix",) if count else ()
    )


def _matrices(shapes: Shapes, name: str) -> Shapes:
    found = [as_matrices(shape) for shape in shapes if is_hidden(shape)]
    if not found:
        raise ValueError(
            f"{name} takes matrices, and none of these shapes is one, with a side of at most {LONGEST_ASPECT} times "
            "the other"
        )
    return found


def _op(name: str, step: Callable[[], Any], tensors: list[Tensor], shapes: Shapes, *notes: str) -> Subject:
    step()
    return Subject(name, f"ops.{name}", step, shapes, sum(x.nbytes for x in tensors), notes=notes)


def _newton_schulz(shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    source = Source(device)
    found = _matrices(shapes, "newton_schulz")
    given = [source.tensor(shape, dtype) for shape in found]
    step = partial(ops.newton_schulz, given, backend=backend)
    return _op("newton_schulz", step, given, found, *_left_out(shapes, found))


def _inverse_root(shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    source = Source(device)
    found = _matrices(shapes, "inverse_root")
    sides = [n for shape in found for n in dict.fromkeys(shape[-2:])]
    given = []
    for n in sides:
        g = source.tensor((n, 2 * n), torch.float32)
        given.append((g @ g.mT / (2 * n)).to(dtype))
    step = partial(ops.inverse_root, given, ROOT_EXPONENT, relative_eps=ROOT_DAMPING, backend=backend)
    note = f"p = {ROOT_EXPONENT}, one matrix for each side of each shape, with a condition of about 30"
    return _op("inverse_root", step, given, [(n, n) for n in sides], note, *_left_out(shapes, found))


def _orthonormalize(shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    source = Source(device)
    found = _matrices(shapes, "orthonormalize")
    turned = [(*shape[:-2], *sorted(shape[-2:], reverse=True)) for shape in found]
    given = [source.tensor(shape, dtype) for shape in turned]

    def step() -> None:
        for x in given:
            ops.orthonormalize(x, backend=backend)

    note = "one call for each tensor, wide matrices transposed"
    return _op("orthonormalize", step, given, turned, note, *_left_out(shapes, found))


def _update_gram(shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    source = Source(device)
    found = _matrices(shapes, "update_gram_")
    given = [source.tensor(shape, dtype) for shape in found]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grams = [torch.zeros(*g.shape[:-1], g.shape[-2], dtype=wide, device=device) for g in given]
    step = partial(ops.update_gram_, grams, given, 0.95, backend=backend)
    return _op("update_gram_", step, [*given, *grams], found, *_left_out(shapes, found))


def _clip(shapes: Shapes, dtype: torch.dtype, device: torch.device | str, backend: str | None) -> Subject:
    if backend is not None:
        raise ValueError(f"backend={backend!r}: clip_grad_norm_ chooses by the device, and takes no backend")
    params = make_parameters(shapes, dtype, device)
    limit = float(ops.clip_grad_norm_(params, math.inf))

    def step() -> None:
        nonlocal limit
        limit *= 0.999  # so that there is always something to scale
        ops.clip_grad_norm_(params, limit)

    return _op("clip_grad_norm_", step, [p.grad for p in params if p.grad is not None], shapes)


_KERNELS: dict[str, Callable[[Shapes, torch.dtype, torch.device | str, str | None], Subject]] = {
    "newton_schulz": _newton_schulz,
    "inverse_root": _inverse_root,
    "orthonormalize": _orthonormalize,
    "update_gram_": _update_gram,
    "clip_grad_norm_": _clip,
}
