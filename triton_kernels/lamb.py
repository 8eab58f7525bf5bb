"""LAMB (You et al., arXiv:1904.00962)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import divide, lerp, lerp_weight, power, root
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay = hyper
    average = lerp_weight(1.0 - beta1, T)
    inverse_bias1 = (1.0 / (1.0 - power(beta1, time))).to(T)
    inverse_root_bias2 = (1.0 / tl.sqrt(1.0 - power(beta2, time))).to(T)
    squares = beta2.to(T), (1.0 - beta2).to(T)
    return average, squares, inverse_bias1, inverse_root_bias2, lr.to(T), eps.to(T), weight_decay.to(T)


@triton.jit
def prepare(s, g, states):
    """m ← m + (1 − β₁)(g − m); v ← β₂v + (1 − β₂)g²."""
    average, squares = s[0], s[1]
    return lerp(states[0], g, average), squares[0] * states[1] + squares[1] * g * g


@triton.jit
def direction(s, w, states):
    """r = (m/bc₁)/(√v/√bc₂ + ε) + λw, from the moments as they are stored."""
    inverse_bias1, inverse_root_bias2, eps, weight_decay = s[2], s[3], s[5], s[6]
    return divide(inverse_bias1 * states[0], root(states[1]) * inverse_root_bias2 + eps) + weight_decay * w


@triton.jit
def measure(s, w, g, states):
    return w, direction(s, w, states)


@triton.jit
def ratio(s, weight_norm, direction_norm):
    """‖w‖/‖r‖, 1 where a norm is 0."""
    return tl.where((weight_norm == 0) | (direction_norm == 0), 1.0, divide(weight_norm, direction_norm))


@triton.jit
def apply(s, ratio, w, g, states):
    """w ← w − η(‖w‖/‖r‖)r."""
    lr = s[4]
    return w - lr * ratio * direction(s, w, states), states


LAMB = Rule(scalars, prepare=prepare, measure=measure, ratio=ratio, apply=apply, prepared=2)
