"""LAMB (You et al., arXiv:1904.00962)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stepladder.reference.arithmetic import lerp, norm, power, sqrt


def lamb(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    time: int,
    state_dtype: torch.dtype | None = None,
    norm: Callable[[Tensor], Tensor] = norm,
) -> tuple[Tensor, ...]:
    """r = (m/bc₁)/(√v/√bc₂ + ε) + λw with Adam's m and v; w ← w − η(‖w‖/‖r‖)r, the ratio 1 where a norm is 0.

    r is made from the moments as `state_dtype` stores them. `norm` is that of the whole tensors, ‖w‖ before ‖r‖.
    """
    beta1, beta2 = betas
    m = lerp(m, g, 1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * g * g
    if state_dtype is not None:
        m, v = m.to(state_dtype).to(w.dtype), v.to(state_dtype).to(w.dtype)
    inverse_bias1 = 1.0 / (1.0 - power(beta1, time))
    inverse_root_bias2 = 1.0 / math.sqrt(1.0 - power(beta2, time))
    r = inverse_bias1 * m / (sqrt(v) * inverse_root_bias2 + eps) + weight_decay * w
    weight_norm, direction_norm = norm(w), norm(r)
    ratio = torch.where((weight_norm == 0) | (direction_norm == 0), 1.0, weight_norm / direction_norm).to(w.dtype)
    return w - lr * ratio * r, m, v
