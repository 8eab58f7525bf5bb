"""Adam (Kingma & Ba, arXiv:1412.6980) and AMSGrad (Reddi, Kale & Kumar, ICLR 2018)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import decayed, divide, lerp, lerp_weight, maximum, power, root
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay = hyper
    average = lerp_weight(1.0 - beta1, T)
    step_size = (lr / (1.0 - power(beta1, time))).to(T)
    inverse_root_bias2 = (1.0 / tl.sqrt(1.0 - power(beta2, time))).to(T)
    shrink = (1.0 - lr * weight_decay).to(T)
    squares = beta2.to(T), (1.0 - beta2).to(T)
    return average, squares, step_size, inverse_root_bias2, eps.to(T), weight_decay.to(T), shrink


@triton.jit
def form(s, w, g, states, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr):
    """m ← m + (1 − β₁)(g − m); v ← β₂v + (1 − β₂)g²; w ← w − (η/bc₁)m/(√v/√bc₂ + ε), AMSGrad with max v.

    Decay λw is added to g, or where DECOUPLED applied first as w ← (1 − ηλ)w.
    """
    average, squares, step_size, inverse_root_bias2, eps, weight_decay, shrink = s
    if DECOUPLED:
        w = shrink * w
    else:
        g = decayed(g, w, weight_decay)
    m = lerp(states[0], g, average)
    v = squares[0] * states[1] + squares[1] * g * g
    changed = (m, v)
    second = v
    if AMSGRAD:
        second = maximum(states[2], v)
        changed = changed + (second,)
    w = w - divide(step_size * m, root(second) * inverse_root_bias2 + eps)
    return w, changed


@triton.jit
def update(s, w, g, states):
    return form(s, w, g, states, False, False)


@triton.jit
def amsgrad_update(s, w, g, states):
    return form(s, w, g, states, False, True)


ADAM = Rule(scalars, update)
ADAM_AMSGRAD = Rule(scalars, amsgrad_update)
