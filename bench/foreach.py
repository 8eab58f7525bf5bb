"""The rules that torch.optim lacks, written with torch._foreach_* as its own foreach forms are.

They are rivals, not products: one dtype in a group, dense gradients for all parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

Tensors = list[Tensor]


class ForeachOptimizer(torch.optim.Optimizer):
    """Collects lists of tensors and hands them to `update`.

    Args:
        params: Parameters, all with gradients when step() is called.
        options: Every hyper-parameter that the rule reads.
    """

    states: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            params: Tensors = group["params"]
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                for name in self.states:
                    if name not in state:
                        state[name] = torch.zeros_like(p)
            columns = [[state[name] for state in states] for name in self.states]
            self.update(group, params, [p.grad for p in params if p.grad is not None], *columns)

    @abstractmethod
    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        """Step all parameters of a group in place."""


class Lion(ForeachOptimizer):
    """w ← (1 − ηλ)w − η sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g."""

    states = ("exp_avg",)

    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        (exp_avgs,) = states
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        signs = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_add_(params, signs, alpha=-group["lr"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


class SignSGD(ForeachOptimizer):
    """w ← w − η sign(g)."""

    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        torch._foreach_add_(params, torch._foreach_sign(grads), alpha=-group["lr"])


class Signum(ForeachOptimizer):
    """m ← βm + (1 − β)g;  w ← w − η sign(m)."""

    states = ("exp_avg",)

    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        (exp_avgs,) = states
        torch._foreach_lerp_(exp_avgs, grads, 1 - group["momentum"])
        torch._foreach_add_(params, torch._foreach_sign(exp_avgs), alpha=-group["lr"])


class LARS(ForeachOptimizer):
    """ρ = ξ‖w‖/(‖g‖ + λ‖w‖ + ε), 1 where a norm is 0;  v ← μv + ρ(g + λw);  w ← w − ηv."""

    states = ("momentum_buffer",)
    trust_coefficient = 1e-3
    eps = 1e-8

    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        (buffers,) = states
        decay = group["weight_decay"]
        w, g = _norms(params), _norms(grads)
        trusted = self.trust_coefficient * w / (g + decay * w + self.eps)
        ratios = torch.where((w > 0) & (g > 0), trusted, 1.0)
        updates = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_mul_(updates, ratios.tolist())
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


class LAMB(ForeachOptimizer):
    """r = (m/bc₁)/(√v/√bc₂ + ε) + λw with Adam's m and v;  w ← w − η(‖w‖/‖r‖)r, the ratio 1 where a norm is 0."""

    states = ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], params: Tensors, grads: Tensors, *states: Tensors) -> None:
        exp_avgs, exp_avg_sqs = states
        beta1, beta2 = group["betas"]
        step = group["step"] = group.get("step", 0) + 1
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(exp_avgs, denominators)
        torch._foreach_div_(updates, 1 - beta1**step)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        w, r = _norms(params), _norms(updates)
        ratios = torch.where((w > 0) & (r > 0), w / r, 1.0)
        torch._foreach_mul_(updates, (-group["lr"] * ratios).tolist())
        torch._foreach_add_(params, updates)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=wide))
