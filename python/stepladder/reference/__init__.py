"""The slow versions of everything: the specification that the kernels are held to, bit for bit.

Each update rule is a pure function of tensors in the arithmetic type (any float dtype); `step_parameter` adds
storage: loads, gradient scaling, rounding. `stepladder.reference.AdamW(...)` and so on are the optimizers
with `backend="reference"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepladder.reference.adagrad import adagrad
from stepladder.reference.adam import adam
from stepladder.reference.adamw import adamw
from stepladder.reference.arithmetic import round_stochastically, tree_sum
from stepladder.reference.clip import clip_grad_norm_, partial_norm, total_norm, widened
from stepladder.reference.gram import update_gram_
from stepladder.reference.lamb import lamb
from stepladder.reference.lars import lars
from stepladder.reference.lion import lion
from stepladder.reference.matrix_root import inverse_root
from stepladder.reference.muon import adamuon, adjustment, muon, muonh, normuon, qk_clip
from stepladder.reference.newton_schulz import newton_schulz
from stepladder.reference.orthonormalize import orthonormalize
from stepladder.reference.rmsprop import rmsprop
from stepladder.reference.sgd import momentum, sgd
from stepladder.reference.shampoo import shampoo
from stepladder.reference.signsgd import signsgd, signum
from stepladder.reference.soap import soap

__all__ = [
    "RULES",
    "adamuon",
    "adjustment",
    "clip_grad_norm_",
    "inverse_root",
    "muon",
    "muonh",
    "newton_schulz",
    "norm_squares",
    "normuon",
    "orthonormalize",
    "partial_norm",
    "qk_clip",
    "shampoo",
    "soap",
    "step_parameter",
    "total_norm",
    "update_gram_",
    "widened",
]

Rule = Callable[..., tuple[Tensor, ...]]

#: The elementwise rules by their names in csrc/rules/rules.def.
RULES: dict[str, Rule] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "rmsprop_momentum": partial(rmsprop, with_momentum=True),
    "rmsprop_centered": partial(rmsprop, centered=True),
    "rmsprop_centered_momentum": partial(rmsprop, centered=True, with_momentum=True),
    "adam": adam,
    "adam_amsgrad": adam,
    "adamw": adamw,
    "adamw_amsgrad": adamw,
    "signsgd": signsgd,
    "signum": signum,
    "lion": lion,
    "lars": lars,
    "lamb": lamb,
}


@torch.no_grad()
def step_parameter(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    hyper: dict[str, Any],
    time: int,
    *,
    inverse_scale: float | None = None,
    clip_factor: float = 1.0,
    negate: bool = False,
    rounding: tuple[int, int, int] | None = None,
    first: int = 0,
    norms: Tensor | None = None,
) -> None:
    """Step one parameter and its states in place.

    Args:
        rule: A name in rules.def.
        param: Of any supported dtype.
        grad: Its gradient.
        states: The rule's states, in the rule's order.
        hyper: The rule's hyper-parameters by name.
        time: The rule's step count t, from 1.
        inverse_scale: Multiplies the gradient first, and the product is written back to it.
        clip_factor: Multiplies the gradient next.
        negate: Changes its sign (maximize).
        rounding: (seed, step, parameter index) of the stochastic rounding of a bf16 parameter.
        first: Logical index of param's first element in the parameter of which param is a shard, for the rounding.
        norms: Those that the rule takes, of whole parameters where param is a shard; None computes them.

    Raises:
        KeyError: There is no such rule.
    """
    g = _seen(param, grad, inverse_scale, clip_factor, negate)
    if inverse_scale is not None:
        _real(grad).copy_(inverse_scale * widened(grad, param))
    known = None if norms is None else iter(norms.to(g.dtype))
    updated = _updated(rule, param, g, states, hyper, time, None if known is None else lambda _: next(known))
    if rounding is not None:
        param.copy_(round_stochastically(updated[0], *rounding, first))
    else:
        _real(param).copy_(updated[0])
    for state, value in zip(states, updated[1:], strict=True):
        _real(state).copy_(value)


@torch.no_grad()
def norm_squares(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    hyper: dict[str, Any],
    time: int,
    *,
    inverse_scale: float | None = None,
    clip_factor: float = 1.0,
    negate: bool = False,
) -> Tensor:
    """Sums of squares whose roots are the norms that a step would take, as far as this shard goes; writes nothing.

    Args:
        rule: A norm-based one.
        param: As for `step_parameter`, like all that follows.
        grad: Its gradient.
        states: The rule's states.
        hyper: The rule's hyper-parameters.
        time: The rule's step count.
        inverse_scale: Multiplies the gradient first.
        clip_factor: Multiplies it next.
        negate: Changes its sign.

    Returns:
        One sum for each norm, in the arithmetic type.
    """
    squares: list[Tensor] = []

    def norm(x: Tensor) -> Tensor:
        squares.append(tree_sum(x * x))
        return squares[-1]

    _updated(rule, param, _seen(param, grad, inverse_scale, clip_factor, negate), states, hyper, time, norm)
    return torch.stack(squares)


def _seen(param: Tensor, grad: Tensor, inverse_scale: float | None, clip_factor: float, negate: bool) -> Tensor:
    """The gradient as the rule sees it."""
    g = widened(grad, param)
    if inverse_scale is not None:
        g = inverse_scale * g
    if clip_factor != 1.0:
        g = clip_factor * g
    return -g if negate else g


def _updated(
    rule: str,
    param: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    hyper: dict[str, Any],
    time: int,
    norm: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, ...]:
    """The parameter and its states after the step, in the arithmetic type."""
    extra: dict[str, Any] = {"state_dtype": _real(states[0]).dtype} if rule == "lamb" else {}
    if norm is not None:
        extra["norm"] = norm
    return RULES[rule](widened(param, param), g, *(widened(s, param) for s in states), **hyper, **extra, time=time)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def __getattr__(name: str) -> Any:
    from stepladder import optim

    if name in optim.__all__:
        return partial(getattr(optim, name), backend="reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
