"""AdaGrad (Duchi, Hazan & Singer, JMLR 2011)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import decayed, divide, root
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, lr_decay, weight_decay, eps = hyper[0], hyper[1], hyper[2], hyper[3]
    rate = lr / (1.0 + (time - 1).to(tl.float64) * lr_decay)
    return rate.to(T), weight_decay.to(T), eps.to(T)


@triton.jit
def update(s, w, g, states):
    """g ← g + λw; G ← G + g²; w ← w − η/(1 + (t − 1)δ) · g/(√G + ε)."""
    rate, weight_decay, eps = s
    g = decayed(g, w, weight_decay)
    total = states[0] + g * g
    return w - divide(rate * g, root(total) + eps), (total,)


ADAGRAD = Rule(scalars, update)
