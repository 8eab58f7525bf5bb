"""The fixed reduction tree: leaves of 4096 elements are 128 lanes summed row after row; lanes, then leaves, are
folded in halves in index order. `tl.sum` has no order of its own and is not used.

KIND is Norm of csrc/multi_tensor/tensor.h: sums of magnitudes (0) or squares (1), or the largest magnitude (2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.arithmetic import maximum

LANES = tl.constexpr(128)
LEAF = tl.constexpr(4096)


@triton.jit
def join(a, b, KIND: tl.constexpr):
    return maximum(a, b) if KIND == 2 else a + b


@triton.jit
def combine(total, x, KIND: tl.constexpr):
    """A lane with one more element."""
    if KIND == 1:
        return total + x * x
    else:
        return join(total, tl.where(x < 0, x * -1.0, x), KIND)


@triton.jit
def fold_lanes(x, KIND: tl.constexpr):
    """[leaves, 128] to [leaves]."""
    for _ in tl.static_range(7):
        halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        a, b = tl.split(tl.permute(halves, (0, 2, 1)))
        x = join(a, b, KIND)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def fold_leaves(sums, n, T: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Folds n > 0 sums of type T, kept as fp64, in place; returns the total."""
    lanes = tl.arange(0, BLOCK)
    tl.debug_barrier()
    while n > 1:
        half = (n + 1) // 2
        for begin in range(0, n - half, BLOCK):
            mask = begin + lanes < n - half
            a = tl.load(sums + begin + lanes, mask=mask, other=0.0).to(T)
            b = tl.load(sums + half + begin + lanes, mask=mask, other=0.0).to(T)
            tl.store(sums + begin + lanes, join(a, b, KIND).to(tl.float64), mask=mask)
        tl.debug_barrier()
        n = half
    return tl.load(sums).to(T)
