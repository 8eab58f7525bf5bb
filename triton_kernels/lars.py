"""LARS (You, Gitman & Ginsburg, arXiv:1708.03888)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import divide
from stepladder.triton_kernels.rule import Rule


@triton.jit
def scalars(hyper, time, T: tl.constexpr):
    lr, momentum, weight_decay, trust_coefficient, eps = hyper
    return lr.to(T), momentum.to(T), weight_decay.to(T), trust_coefficient.to(T), eps.to(T)


@triton.jit
def measure(s, w, g, states):
    return w, g


@triton.jit
def ratio(s, weight_norm, gradient_norm):
    """ρ = ξ‖w‖/(‖g‖ + λ‖w‖ + ε), 1 where a norm is 0."""
    weight_decay, trust_coefficient, eps = s[2], s[3], s[4]
    trust = divide(trust_coefficient * weight_norm, gradient_norm + weight_decay * weight_norm + eps)
    return tl.where((weight_norm == 0) | (gradient_norm == 0), 1.0, trust)


@triton.jit
def apply(s, ratio, w, g, states):
    """v ← μv + ρ(g + λw); w ← w − ηv."""
    lr, momentum, weight_decay = s[0], s[1], s[2]
    v = momentum * states[0] + ratio * (g + weight_decay * w)
    return w - lr * v, (v,)


LARS = Rule(scalars, measure=measure, ratio=ratio, apply=apply)
