"""AdaGrad (Duchi, Hazan & Singer, JMLR 2011)."""

from __future__ import annotations

from torch import Tensor

from stepladder.reference.arithmetic import decayed, sqrt


def adagrad(
    w: Tensor, g: Tensor, total: Tensor, *, lr: float, lr_decay: float, weight_decay: float, eps: float, time: int
) -> tuple[Tensor, ...]:
    """g ← g + λw; G ← G + g²; w ← w − η/(1 + (t − 1)δ) · g/(√G + ε). The essay puts ε inside the root."""
    g = decayed(g, w, weight_decay)
    total = total + g * g
    rate = lr / (1.0 + float(time - 1) * lr_decay)
    return w - rate * g / (sqrt(total) + eps), total
