"""RMSprop (Tieleman & Hinton, Coursera lecture 6.5, 2012); centered as in Graves, arXiv:1308.0850."""

from __future__ import annotations

from torch import Tensor

from stepladder.reference.arithmetic import decayed, lerp, sqrt


def rmsprop(
    w: Tensor,
    g: Tensor,
    v: Tensor,
    *others: Tensor,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    time: int,
    centered: bool = False,
    with_momentum: bool = False,
) -> tuple[Tensor, ...]:
    """v ← αv + (1 − α)g²; d = √v + ε, centered √(v − a²) + ε; w ← w − ηg/d, momentum b ← μb + g/d, w ← w − ηb.

    `others`: the gradient's average a where centered, then the momentum buffer b where there is momentum.
    The essay puts ε inside the root.
    """
    g = decayed(g, w, weight_decay)
    v = alpha * v + (1.0 - alpha) * g * g
    states = [v]
    variance = v
    if centered:
        a = lerp(others[0], g, 1.0 - alpha)
        variance = v - a * a
        states.append(a)
    denominator = sqrt(variance) + eps
    if not with_momentum:
        return (w - lr * g / denominator, *states)
    b = momentum * others[-1] + g / denominator
    return (w - lr * b, *states, b)
