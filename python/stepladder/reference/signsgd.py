"""SignSGD and Signum (Bernstein et al., arXiv:1802.04434), with decoupled decay."""

from __future__ import annotations

from torch import Tensor

from stepladder.reference.arithmetic import sign


def signsgd(w: Tensor, g: Tensor, *, lr: float, weight_decay: float, time: int) -> tuple[Tensor, ...]:
    """w ← (1 − ηλ)w − η sign(g)."""
    return ((1.0 - lr * weight_decay) * w - lr * sign(g),)


def signum(
    w: Tensor, g: Tensor, m: Tensor, *, lr: float, momentum: float, weight_decay: float, time: int
) -> tuple[Tensor, ...]:
    """m ← βm + (1 − β)g; w ← (1 − ηλ)w − η sign(m)."""
    m = momentum * m + (1.0 - momentum) * g
    return (1.0 - lr * weight_decay) * w - lr * sign(m), m
