"""Test data for the comparison with torch.optim: shared optimizers, their options, and measures of agreement."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import stepladder as sl

# A matrix with a remainder for every vector width, more than one leaf of 4096, a scalar.
SHAPES = ((17, 5), (5003,), ())
SMALL_SHAPES = ((3,), (17, 5), (), (0, 4))
FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
has_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")


@dataclass(frozen=True)
class Case:
    """One of the optimizers that torch.optim has too, with hyper-parameters."""

    name: str
    hyper: dict[str, Any] = field(default_factory=dict)
    tensor_lr: bool = False

    def ours(self, params: Any, **options: Any) -> Any:
        return self._make(getattr(sl, self.name), params, options)

    def theirs(self, params: Any, **options: Any) -> Any:
        return self._make(getattr(torch.optim, self.name), params, options)

    def _make(self, cls: type[torch.optim.Optimizer], params: Any, options: dict[str, Any]) -> Any:
        hyper = self.hyper | options
        if self.tensor_lr:
            # torch computes with a tensor lr in its own dtype: fp32 would cost fp64 parameters their precision.
            wide = any(p.dtype == torch.float64 for p in params)
            hyper["lr"] = torch.tensor(hyper["lr"], dtype=torch.float64 if wide else torch.float32)
        return cls(params, **hyper)

    def __str__(self) -> str:
        shown = ",".join(f"{key}={value}" for key, value in self.hyper.items())
        return f"{self.name}[{shown}{',tensor lr' * self.tensor_lr}]".replace(" ", "")


_BETAS = ((0.9, 0.999), (0.0, 0.999), (0.3, 0.95))
_ADAM = {"betas": _BETAS, "weight_decay": (0, 0.05), "amsgrad": (False, True), "maximize": (False, True)}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {
        "momentum": (0, 0.9),
        "dampening": (0, 0.1),
        "weight_decay": (0, 0.05),
        "nesterov": (False, True),
        "maximize": (False, True),
    },
    "Adagrad": {
        "lr_decay": (0, 0.1),
        "weight_decay": (0, 0.05),
        "initial_accumulator_value": (0, 0.5),
        "eps": (1e-10, 1e-3),
        "maximize": (False, True),
    },
    "RMSprop": {
        "alpha": (0.99, 0.5),
        "weight_decay": (0, 0.05),
        "momentum": (0, 0.9),
        "centered": (False, True),
        "maximize": (False, True),
    },
    "Adam": _ADAM | {"decoupled_weight_decay": (False, True)},
    "AdamW": _ADAM,
}


def _combinations() -> list[Case]:
    cases = []
    for name, options in OPTIONS.items():
        for values in itertools.product(*options.values()):
            hyper = dict(zip(options, values, strict=True)) | {"lr": 0.01}
            if hyper.get("nesterov") and (hyper["momentum"] == 0 or hyper["dampening"] != 0):
                continue
            cases += [Case(name, hyper), Case(name, hyper, tensor_lr=True)]
    return cases


# Every combination of options, for the numbers.
COMBINATIONS = _combinations()
# One for each rule and each kind of state, for everything else.
VARIANTS = (
    Case("SGD", {"lr": 0.05, "weight_decay": 0.05}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Case("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    Case("RMSprop", {"lr": 0.01, "weight_decay": 0.05}),
    Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    Case("Adam", {"lr": 0.05, "weight_decay": 0.05}),
    Case("Adam", {"lr": 0.05, "amsgrad": True}),
    Case("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
)
# One for each class.
CLASSES = (VARIANTS[1], VARIANTS[3], VARIANTS[5], VARIANTS[7], VARIANTS[8])


def normal(shapes: Iterable[Sequence[int]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Normally distributed tensors, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(shape, generator=generator, dtype=wide).to(dtype) for shape in shapes]


def copy_of(x: Tensor) -> torch.nn.Parameter:
    """A parameter with the values and strides of `x` in memory of its own."""
    memory = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return torch.nn.Parameter(memory.copy_(x.detach()))


@functools.cache
def adagrad_makes_states() -> bool:
    """Whether torch's makes them in its step, and not when it is constructed alone."""
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])
    late = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


class Pair:
    """The same parameters under an optimizer of ours and under torch.optim's.

    Attributes:
        p, q: The parameters of `ours` and of `theirs`.
    """

    def __init__(self, case: Case, tensors: Iterable[Tensor], **options: Any) -> None:
        tensors = list(tensors)
        self.p = [copy_of(x) for x in tensors]
        self.q = [copy_of(x) for x in tensors]
        self.ours = case.ours(self.p, **options)
        self.theirs = case.theirs(self.q, **options)

    def give(self, gradients: Iterable[Tensor | None]) -> None:
        """Let every parameter have its gradient, a tensor of its own on each side."""
        for p, q, g in zip(self.p, self.q, gradients, strict=True):
            p.grad, q.grad = (None, None) if g is None else (g, g.clone())

    def step(self, gradients: Iterable[Tensor | None]) -> None:
        self.give(gradients)
        self.ours.step()
        if isinstance(self.theirs, torch.optim.Adagrad) and not adagrad_makes_states():
            graded = [q for q in self.q if q.grad is not None]
            if any("sum" not in self.theirs.state.get(q, {}) for q in graded):
                pytest.skip("this torch's Adagrad cannot step what came, or lost its state, after it was made")
        self.theirs.step()

    def run(self, steps: int, seed: int = 1) -> None:
        """Steps with random gradients, then a check."""
        for step in range(steps):
            self.step(random_gradients(self.p, seed + step))
        self.check()

    def check(self, **tolerance: Any) -> None:
        assert_close(self.ours, self.theirs, **tolerance)


def random_gradients(params: Iterable[Tensor], seed: int) -> list[Tensor]:
    params = list(params)
    return [normal([p.shape], p.dtype, 1000 * seed + i)[0] for i, p in enumerate(params)]


def assert_close(ours: Any, theirs: Any, **tolerance: Any) -> None:
    """Parameters, and all states by name, dtype and layout, agree at assert_close's tolerances; steps exactly."""
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            state, expected = ours.state.get(p, {}), theirs.state.get(q, {})
            assert state.keys() == expected.keys(), f"parameter {i}"
            assert state.get("step") == expected.get("step"), f"parameter {i}"
            pairs = [("value", p, q), *((name, state[name], expected[name]) for name in state)]
            for name, a, b in pairs:
                # SGD's buffer is laid out as the first gradient was, in torch; ours as the parameter is.
                assert a.stride() == b.stride() or (name == "momentum_buffer" and "step" not in state)
                torch.testing.assert_close(
                    a.detach(), b.detach(), msg=lambda text, n=name, i=i: f"{n} of parameter {i}: {text}", **tolerance
                )


def snapshot(optimizer: Any) -> list[Any]:
    """Everything that a refused call must leave as it is: groups, values, gradients, states, state's owners."""

    def frozen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.layout != torch.strided or value.is_meta:
            return id(value)
        return (id(value), value.dtype, value.stride(), value.detach().clone())

    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        {key: frozen(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    states = [
        (id(p), {name: frozen(value) for name, value in optimizer.state[p].items()}) for p in list(optimizer.state)
    ]
    owned = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return [groups, owned, [frozen(p) for p in params], [frozen(p.grad) for p in params], states]


def assert_unchanged(before: Any, now: Any) -> None:
    """Two snapshots hold the same objects with the same values, bit for bit."""
    if isinstance(before, Tensor):
        assert torch.equal(before.isnan(), now.isnan())
        assert torch.equal(before.nan_to_num(), now.nan_to_num())
    elif isinstance(before, dict):
        assert before.keys() == now.keys()
        for key in before:
            assert_unchanged(before[key], now[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(now)
        for a, b in zip(before, now, strict=True):
            assert_unchanged(a, b)
    else:
        assert before == now


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many values of their half type lie between the elements of two tensors; NaN meets only NaN.

    Both zeros count as one value: no rule here can tell them apart (a root, a sum, a quotient by √v + ε with
    ε > 0 give results that compare equal), and which one an underflow leaves depends on the order of operations.
    """
    assert a.dtype == b.dtype
    assert a.dtype in HALF

    def place(x: Tensor) -> Tensor:
        bits = x.detach().contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    distance = (place(a) - place(b)).abs()
    distance[a.isnan() != b.isnan()] = 0x10000
    distance[a.isnan() & b.isnan()] = 0
    return distance
