"""Test data: every update rule with hyper-parameters that exercise all of its terms, and ugly numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import stepladder as sl

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Edges of the vector loops, of the 4096-element leaves, and more than one chunk for each thread.
SIZES = (0, 1, 3, 31, 4097, 1_000_003)


@dataclass(frozen=True)
class Kernels:
    """What is held against the reference, and how large the tensors may be.

    Attributes:
        backend: As the optimizers take it.
        device: Where the parameters are.
        largest: Elements; kernels that are emulated are slow.
    """

    backend: str
    device: str = "cpu"
    largest: int = SIZES[-1]

    @property
    def sizes(self) -> list[int]:
        """SIZES as far as they go; the last tensor is empty."""
        return [*(min(n, self.largest) for n in SIZES), 0]


@dataclass(frozen=True)
class Case:
    """One optimizer with hyper-parameters that select one rule of rules.def."""

    rule: str
    optimizer: type[torch.optim.Optimizer]
    hyper: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **options: Any) -> Any:
        return self.optimizer(params, **(self.hyper | options))

    def __str__(self) -> str:
        shown = ",".join(f"{key}={value}" for key, value in self.hyper.items() if key != "lr")
        return f"{self.rule}[{shown}]"


CASES = (
    Case("sgd", sl.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    Case("sgd", sl.SGD, {"lr": 0.1, "maximize": True}),
    Case("momentum", sl.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    Case("momentum", sl.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    Case("adagrad", sl.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.5}),
    Case("rmsprop", sl.RMSprop, {"lr": 0.01, "weight_decay": 0.01}),
    Case("rmsprop_momentum", sl.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    Case("rmsprop_centered", sl.RMSprop, {"lr": 0.01, "centered": True}),
    Case("rmsprop_centered_momentum", sl.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "alpha": 0.4}),
    Case("adam", sl.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    Case("adam_amsgrad", sl.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.3, 0.9)}),
    Case("adamw", sl.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    Case("adamw_amsgrad", sl.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    Case("signsgd", sl.SignSGD, {"lr": 0.01, "weight_decay": 0.1}),
    Case("signum", sl.SignSGD, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    Case("lion", sl.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    Case("lars", sl.LARS, {"lr": 0.1, "weight_decay": 0.01}),
    Case("lamb", sl.LAMB, {"lr": 0.01, "weight_decay": 0.01}),
)

# The part of a dtype's range that arithmetic rarely visits.
_SUBNORMAL = {torch.float64: 5e-324, torch.float32: 1e-45, torch.bfloat16: 1e-40, torch.float16: 6e-8}


def gradient(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal gradients over several magnitudes, with zeros of both signs and subnormal numbers among them."""
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    g *= 10.0 ** torch.randint(-4, 2, g.shape, generator=generator)
    g = g.to(dtype)
    flat = g.view(-1)
    flat[::7] = 0.0
    flat[3::11] = -0.0
    flat[5::13] = _SUBNORMAL[dtype]
    flat[6::17] = -_SUBNORMAL[dtype]
    return g


def with_infinities(g: Tensor) -> Tensor:
    """The same with Inf, -Inf, NaN and the largest finite numbers sprinkled in."""
    flat = g.view(-1)
    flat[1::19] = float("inf")
    flat[2::23] = -float("inf")
    flat[4::29] = float("nan")
    flat[8::31] = torch.finfo(g.dtype).max
    return g


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal integer views, except that NaN need only meet NaN."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    equal = (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


def assert_same(ours: Any, reference: Any) -> None:
    """Two optimizers agree bit for bit: parameters, gradients, every state."""
    for group, other_group in zip(ours.param_groups, reference.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], other_group["params"], strict=True)):
            where = f"parameter {i} of shape {tuple(p.shape)}, {p.dtype}"
            assert same_bits(p, q), f"{where}: values differ {_first_difference(p, q)}"
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert same_bits(p.grad, q.grad), f"{where}: gradients differ"
            state, other = ours.state.get(p, {}), reference.state.get(q, {})
            assert state.keys() == other.keys()
            for name, value in state.items():
                if isinstance(value, Tensor):
                    assert same_bits(value, other[name]), (
                        f"{where}: {name} differs {_first_difference(value, other[name])}"
                    )
                else:
                    assert value == other[name]


def _first_difference(a: Tensor, b: Tensor) -> str:
    a, b = a.detach().cpu().reshape(-1), b.detach().cpu().reshape(-1)
    at = ((a != b) & ~(a.isnan() & b.isnan())).nonzero().view(-1)
    if len(at) == 0:
        return "in the sign of a zero"
    i = int(at[0])
    return f"at {len(at)} of {a.numel()} places, first {i}: {a[i].item()!r} against {b[i].item()!r}"


def moved(x: Tensor, device: str) -> Tensor:
    """The same view, strides and offset too, of the same storage on another device."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def twins(tensors: list[Tensor], device: str = "cpu") -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Two lists of parameters with the same values and layouts, the first on `device`."""

    def copy(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)

    return (
        [torch.nn.Parameter(moved(copy(x.detach()), device)) for x in tensors],
        [torch.nn.Parameter(copy(x.detach())) for x in tensors],
    )
