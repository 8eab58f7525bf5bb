"""SignSGD and Signum (Bernstein et al., arXiv:1802.04434), with decoupled decay."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import sign
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, weight_decay = hyper[0], hyper[1]
    return lr.to(T), (1.0 - lr * weight_decay).to(T)


@triton.jit
def update(s, w, g, states):
    """w ← (1 − ηλ)w − η sign(g)."""
    lr, shrink = s
    return shrink * w - lr * sign(g), states


@triton.jit
def signum_scalars(hyper, time, T: tl.constexpr):
    lr, momentum, weight_decay = hyper[0], hyper[1], hyper[2]
    return lr.to(T), momentum.to(T), (1.0 - momentum).to(T), (1.0 - lr * weight_decay).to(T)


@triton.jit
def signum_update(s, w, g, states):
    """m ← βm + (1 − β)g; w ← (1 − ηλ)w − η sign(m)."""
    lr, momentum, one_minus_momentum, shrink = s
    m = momentum * states[0] + one_minus_momentum * g
    return shrink * w - lr * sign(m), (m,)


SIGNSGD = Rule(scalars, update)
SIGNUM = Rule(signum_scalars, signum_update)
