"""Adam (Kingma & Ba, arXiv:1412.6980) and AMSGrad (Reddi, Kale & Kumar, ICLR 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepladder.reference.arithmetic import decayed, lerp, power, sqrt


def adam(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    largest: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    time: int,
    decoupled: bool = False,
) -> tuple[Tensor, ...]:
    """m ← m + (1 − β₁)(g − m); v ← β₂v + (1 − β₂)g²; w ← w − (η/bc₁)m/(√v/√bc₂ + ε), AMSGrad with max v.

    Decay λw is added to g, or where `decoupled` applied first as w ← (1 − ηλ)w.
    """
    beta1, beta2 = betas
    if decoupled:
        w = (1.0 - lr * weight_decay) * w
    else:
        g = decayed(g, w, weight_decay)
    m = lerp(m, g, 1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * g * g
    second = v if largest is None else torch.maximum(largest, v)
    step_size = lr / (1.0 - power(beta1, time))
    inverse_root_bias2 = 1.0 / math.sqrt(1.0 - power(beta2, time))
    w = w - step_size * m / (sqrt(second) * inverse_root_bias2 + eps)
    return (w, m, v) if largest is None else (w, m, v, second)
