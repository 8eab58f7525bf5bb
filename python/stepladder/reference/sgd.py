"""SGD (Robbins & Monro 1951), momentum (Polyak 1964), Nesterov (Sutskever et al. 2013)."""

from __future__ import annotations

from torch import Tensor

from stepladder.reference.arithmetic import decayed


def sgd(w: Tensor, g: Tensor, *, lr: float, weight_decay: float, time: int) -> tuple[Tensor, ...]:
    """g ← g + λw; w ← w − ηg."""
    g = decayed(g, w, weight_decay)
    return (w - lr * g,)


def momentum(
    w: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    time: int,
) -> tuple[Tensor, ...]:
    """g ← g + λw; v ← μv + (1 − τ)g, v = g at first; w ← w − ηv, Nesterov w − η(g + μv)."""
    g = decayed(g, w, weight_decay)
    v = g.clone() if time == 1 else momentum * v + (1.0 - dampening) * g
    return w - lr * (g + momentum * v if nesterov else v), v
