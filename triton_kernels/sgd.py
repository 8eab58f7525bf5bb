"""SGD (Robbins & Monro 1951), momentum (Polyak 1964), Nesterov (Sutskever et al. 2013)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import decayed
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, weight_decay = hyper[0], hyper[1]
    return lr.to(T), weight_decay.to(T)


@triton.jit
def update(s, w, g, states):
    """g ← g + λw; w ← w − ηg."""
    lr, weight_decay = s
    g = decayed(g, w, weight_decay)
    return w - lr * g, states


@triton.jit
def momentum_scalars(hyper, time, T: tl.constexpr):
    lr, momentum, dampening, weight_decay, nesterov = hyper
    return lr.to(T), momentum.to(T), (1.0 - dampening).to(T), weight_decay.to(T), nesterov != 0.0, time == 1


@triton.jit
def momentum_update(s, w, g, states):
    """g ← g + λw; v ← μv + (1 − τ)g, v = g at first; w ← w − ηv, Nesterov w − η(g + μv)."""
    lr, momentum, one_minus_dampening, weight_decay, nesterov, first = s
    g = decayed(g, w, weight_decay)
    v = tl.where(first, g, momentum * states[0] + one_minus_dampening * g)
    return w - lr * tl.where(nesterov, g + momentum * v, v), (v,)


SGD = Rule(scalars, update)
MOMENTUM = Rule(momentum_scalars, momentum_update)
