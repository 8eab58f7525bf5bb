"""Products of symmetric matrices that commute, over matrices of different sizes in one launch.

Tiles on and below the diagonal alone are computed, and stored to both places: what is read by rows and by columns is
one matrix, to the last bit. fp32 as three products of tf32, or fp64, by the dtype of the workspace.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.root_table import (
    DUE,
    ENDING,
    FAST,
    FIRST_X,
    FRESH,
    IDLE,
    NEAREST,
    NONE,
    NORM,
    PHASE,
    SIZE,
    START,
    START_WORDS,
    STARTING,
    WIDE,
    M,
    X,
    below,
    buffer,
    diagonal,
    find,
    next_x,
    number,
    offsets,
    put_both,
    sum_both,
    word,
)

# What a launch multiplies: D by itself; a normalised power of D by itself, for the largest eigenvalue; M by itself,
# for T; X by T, and T by itself or, for p = 1, by M; T² by itself; the power of T by M.
SQUARE, REDUCE, QUADRATIC, STEP, POWER, LAST = (tl.constexpr(code) for code in range(6))


@triton.jit
def is_due(matrix, role, part, ATTEMPT: tl.constexpr):
    phase = word(matrix, PHASE)
    iterating = phase != IDLE
    if role == STEP:
        iterating = tl.where(part == 0, iterating & (word(matrix, FRESH) == 0), iterating & (phase != ENDING))
    elif role == QUADRATIC:
        iterating = (phase == STARTING) & (word(matrix, FRESH) == 0)
    elif role == REDUCE:
        iterating = word(matrix, DUE) != NONE
    elif role == SQUARE:
        iterating = word(matrix, DUE) == ATTEMPT
    else:
        iterating = iterating & (phase != ENDING)
    return iterating


@triton.jit
def operands(matrix, role, part, slot, p):
    """Buffers of both factors and of the product."""
    m = word(matrix, M)
    left = tl.full((), slot, tl.int64)
    right, to = left, left + 1
    if role == SQUARE:
        to = left + 2
    elif role == QUADRATIC:
        left, right, to = m, m, (m + 1) & 3
    elif role == STEP:
        left = tl.where(part == 0, FIRST_X + word(matrix, X), (m + 1) & 3)
        right = tl.where((part == 0) | (p != 1), (m + 1) & 3, m)
        x = FIRST_X + next_x(word(matrix, X), word(matrix, NEAREST))
        to = tl.where(part == 0, x, tl.where(p == 2, (m + 3) & 3, (m + 2) & 3))
    elif role == POWER:
        left, right, to = (m + 2) & 3, (m + 2) & 3, (m + 3) & 3
    elif role == LAST:
        left, right, to = (m + 3) & 3, m, (m + 1) & 3
    return left, right, to


@triton.jit
def multiply_tile(
    left, right, stride, n, top, begin, T: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """The tile of LR at (top, begin), where R is symmetric: both factors are read by rows."""
    row = tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    from_left = left + top * stride + offsets(row, k, stride)
    from_right = right + begin * stride + offsets(row, k, stride)
    rows, columns = (row < (n - top).to(tl.int32))[:, None], (row < (n - begin).to(tl.int32))[:, None]
    total = tl.zeros((TILE, TILE), T)
    depth = stride.to(tl.int32)
    for first in range(0, depth, DEPTH):
        inside = (first + k < depth)[None, :]
        a = tl.load(from_left + first, mask=inside & rows, other=0.0)
        b = tl.load(from_right + first, mask=inside & columns, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3", out_dtype=T)
    return total


@triton.jit(do_not_specialize=["count", "gate", "role", "slot", "p"])
def product(
    words, tiles, workspace, counters, sums, starts, count, gate, role, slot, p, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """One product of each matrix that has this one to do, or two of STEP; nothing where no matrix is left."""
    T: tl.constexpr = workspace.dtype.element_ty
    if tl.load(counters + gate) != 0:
        parts = tl.where(role == STEP, 2, 1)
        for index in range(tl.program_id(0), count * parts, tl.num_programs(0)):
            part = tl.where(index < count, 0, 1)
            tile = index - part * count
            matrix, top, begin = find(words, tiles, tile, TILE)
            if is_due(matrix, role, part, WIDE if T == tl.float64 else FAST):
                n = word(matrix, SIZE)
                from_left, from_right, to = operands(matrix, role, part, slot, p)
                left, stride = buffer(matrix, workspace, from_left)
                right, _ = buffer(matrix, workspace, from_right)
                x = multiply_tile(left, right, stride, n, top, begin, T, TILE, DEPTH)
                row = tl.arange(0, TILE)
                identity = diagonal(row, row, top, begin)
                if role == QUADRATIC:
                    start = starts + word(matrix, START) * START_WORDS
                    inside = below(row, row, top, begin) & (row < (n - top).to(tl.int32))[:, None]
                    m = tl.load(left + (top * stride + begin) + offsets(row, row, stride), mask=inside, other=0.0)
                    x = tl.load(start + 1).to(T) * m + tl.load(start + 2).to(T) * x
                    x += tl.where(identity, tl.load(start).to(T), 0.0)
                if role == REDUCE:
                    norm = number(matrix, NORM)
                    x = x * tl.where(norm > 0, 1.0 / (norm * norm), 0.0).to(T)
                at, _ = buffer(matrix, workspace, to)
                put_both(at, stride, n, top, begin, x)
                if (role == LAST) | ((role == STEP) & (part == 1) & (p == 1)):
                    # M, and Newton's T for it: ((p + 1)I - M)/p.
                    inverse = (1.0 / p).to(T)
                    at, _ = buffer(matrix, workspace, (to + 1) & 3)
                    put_both(at, stride, n, top, begin, tl.where(identity, 1.0 + inverse, 0.0) - x * inverse)
                    x -= tl.where(identity, 1.0, 0.0).to(T)
                if (part == 1) | (role != STEP):
                    tl.store(sums + tile, sum_both(x, n, top, begin))
