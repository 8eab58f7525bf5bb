"""RMSprop (Tieleman & Hinton, Coursera lecture 6.5, 2012); centered as in Graves, arXiv:1308.0850."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import decayed, divide, lerp, lerp_weight, root
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, alpha, eps, weight_decay, momentum = hyper
    average = lerp_weight(1.0 - alpha, T)
    return lr.to(T), alpha.to(T), (1.0 - alpha).to(T), eps.to(T), weight_decay.to(T), momentum.to(T), average


@triton.jit
def form(s, w, g, states, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    """v ← αv + (1 − α)g²; d = √v + ε, centered √(v − a²) + ε; w ← w − ηg/d, momentum b ← μb + g/d, w ← w − ηb."""
    lr, alpha, one_minus_alpha, eps, weight_decay, momentum, average = s
    g = decayed(g, w, weight_decay)
    v = alpha * states[0] + one_minus_alpha * g * g
    changed = (v,)
    variance = v
    if CENTERED:
        a = lerp(states[1], g, average)
        variance = v - a * a
        changed = changed + (a,)
    denominator = root(variance) + eps
    if MOMENTUM:
        b = momentum * states[1 + CENTERED] + divide(g, denominator)
        w = w - lr * b
        changed = changed + (b,)
    else:
        w = w - divide(lr * g, denominator)
    return w, changed


@triton.jit
def update(s, w, g, states):
    return form(s, w, g, states, False, False)


@triton.jit
def momentum_update(s, w, g, states):
    return form(s, w, g, states, False, True)


@triton.jit
def centered_update(s, w, g, states):
    return form(s, w, g, states, True, False)


@triton.jit
def centered_momentum_update(s, w, g, states):
    return form(s, w, g, states, True, True)


RMSPROP = Rule(scalars, update)
RMSPROP_MOMENTUM = Rule(scalars, momentum_update)
RMSPROP_CENTERED = Rule(scalars, centered_update)
RMSPROP_CENTERED_MOMENTUM = Rule(scalars, centered_momentum_update)
