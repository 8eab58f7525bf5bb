"""Lion (Chen et al., arXiv:2302.06675)."""

from __future__ import annotations

from torch import Tensor

from stepladder.reference.arithmetic import sign


def lion(
    w: Tensor, g: Tensor, m: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float, time: int
) -> tuple[Tensor, ...]:
    """w ← (1 − ηλ)w − η sign(β₁m + (1 − β₁)g); m ← β₂m + (1 − β₂)g."""
    beta1, beta2 = betas
    w = (1.0 - lr * weight_decay) * w - lr * sign(beta1 * m + (1.0 - beta1) * g)
    return w, beta2 * m + (1.0 - beta2) * g
