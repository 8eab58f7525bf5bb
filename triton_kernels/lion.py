"""Lion (Chen et al., arXiv:2302.06675)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import sign
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, beta1, beta2, weight_decay = hyper[0], hyper[1], hyper[2], hyper[3]
    shrink = (1.0 - lr * weight_decay).to(T)
    return lr.to(T), beta1.to(T), (1.0 - beta1).to(T), beta2.to(T), (1.0 - beta2).to(T), shrink


@triton.jit
def update(s, w, g, states):
    """w ← (1 − ηλ)w − η sign(β₁m + (1 − β₁)g); m ← β₂m + (1 − β₂)g."""
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, shrink = s
    m = states[0]
    w = shrink * w - lr * sign(beta1 * m + one_minus_beta1 * g)
    return w, (beta2 * m + one_minus_beta2 * g,)


LION = Rule(scalars, update)
