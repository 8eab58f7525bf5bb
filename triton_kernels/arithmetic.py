"""Correctly rounded building blocks of the rules: what plain Triton operators leave to chance is settled here."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's `/` and `tl.sqrt` are approximate in fp32 and IEEE's in fp64; `div_rn` and `sqrt_rn` take fp32 alone. The
# interpreter computes all of them exactly, so that only the PTX shows a mistake.


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """Correctly rounded square root."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def negated(x):
    """-x; Triton's own minus subtracts from 0, which loses the sign of a zero."""
    return x * -1.0


@triton.jit
def power(base, exponent):
    """base ** exponent in fp64 by repeated squaring, the same operations as csrc/common/math.h."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def sign(x):
    """-1, 0 or 1; a zero stays itself and NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def maximum(a, b):
    """The greater of two; NaN in either wins."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def lerp_weight(weight, T: tl.constexpr):
    """What `lerp` takes for a weight in fp64: the weight from the nearer end, and whether that is the far one."""
    from_end = weight >= 0.5
    return (tl.where(from_end, 1.0 - weight, weight).to(T), from_end)


@triton.jit
def lerp(a, b, weight):
    """A + weight (b - a), from the nearer end."""
    difference = b - a
    return tl.where(weight[1], b - difference * weight[0], a + weight[0] * difference)


@triton.jit
def decayed(g, w, weight_decay):
    """Coupled (L2) decay: g + weight_decay * w, and g itself where there is none."""
    return tl.where(weight_decay != 0, g + weight_decay * w, g)
