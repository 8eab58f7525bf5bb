"""LARS (You, Gitman & Ginsburg, arXiv:1708.03888)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepladder.reference.arithmetic import norm


def lars(
    w: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    time: int,
    norm: Callable[[Tensor], Tensor] = norm,
) -> tuple[Tensor, ...]:
    """ρ = ξ‖w‖/(‖g‖ + λ‖w‖ + ε), 1 where a norm is 0; v ← μv + ρ(g + λw); w ← w − ηv.

    `norm` is that of the whole tensors, ‖w‖ before ‖g‖.
    """
    weight_norm, gradient_norm = norm(w), norm(g)
    trust = trust_coefficient * weight_norm / (gradient_norm + weight_decay * weight_norm + eps)
    ratio = torch.where((weight_norm == 0) | (gradient_norm == 0), 1.0, trust).to(w.dtype)
    v = momentum * v + ratio * (g + weight_decay * w)
    return w - lr * v, v
