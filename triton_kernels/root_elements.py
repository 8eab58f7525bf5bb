"""What is done to the elements of matrices on the way to their inverse roots, over matrices of different sizes.

Tiles on and below the diagonal are gone through; of the caller's matrix they alone are read, but for the measure.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.root_table import (
    DELTA,
    DONE,
    DUE,
    FAST,
    FIRST_ROWS,
    FIRST_X,
    IDLE,
    INPUT,
    INPUT_COLUMN,
    INPUT_ROW,
    ITERATIONS,
    NEAREST,
    NONE,
    ON_CHIP,
    OUTPUT,
    PHASE,
    RESULT,
    ROWS,
    SCALE,
    SIZE,
    START,
    START_WORDS,
    STATUS,
    STEPS,
    UNIT,
    WIDE,
    below,
    buffer,
    diagonal,
    find,
    fold,
    number,
    offsets,
    put_both,
    sum_both,
    word,
)


@triton.jit
def read(matrix, top, left, row, column):
    """Elements of the caller's matrix, those of a tile that begins at (top, left), 0 outside of it."""
    n = word(matrix, SIZE)
    at = word(matrix, INPUT).to(tl.pointer_type(tl.float32))
    from_row = (top + row)[:, None] * word(matrix, INPUT_ROW)
    mask = (top + row < n)[:, None] & (left + column < n)[None, :]
    return tl.load(at + from_row + (left + column)[None, :] * word(matrix, INPUT_COLUMN), mask=mask, other=0.0)


@triton.jit
def from_below(at, stride, n, top, left, TILE: tl.constexpr):
    """Pointers to a tile's elements, and which of them are on or below the diagonal."""
    row = tl.arange(0, TILE)
    mask = below(row, row, top, left) & (row < (n - top).to(tl.int32))[:, None]
    return at + (top * stride + left) + offsets(row, row, stride), mask


@triton.jit
def largest_bits(x):
    """The bits of the largest magnitude: as integers, those of NaN are the largest."""
    return tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)


@triton.jit(do_not_specialize=["count"])
def measure(words, tiles, sums, count, TILE: tl.constexpr):
    """The largest magnitude of each tile and its mirror image, as the number that its bits are."""
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        matrix, top, left = find(words, tiles, index, TILE)
        row = tl.arange(0, TILE)
        lower = largest_bits(read(matrix, top, left, row, row))
        upper = largest_bits(read(matrix, left, top, row, row))
        tl.store(sums + index, tl.maximum(lower, upper).to(tl.float64))


@triton.jit(do_not_specialize=["count", "gate", "due", "shifted"])
def form(words, tiles, workspace, counters, sums, count, gate, due, shifted, TILE: tl.constexpr):
    """D = A/unit, and where shifted + δI, into the first square; the sums of squares of its tiles.

    `due` says of which attempt's matrices, NONE of all that are not done.
    """
    T: tl.constexpr = workspace.dtype.element_ty
    if tl.load(counters + gate) != 0:
        for index in range(tl.program_id(0), count, tl.num_programs(0)):
            matrix, top, left = find(words, tiles, index, TILE)
            own = word(matrix, DUE)
            if (own != NONE) & ((own == due) | (due == NONE)):
                row = tl.arange(0, TILE)
                n = word(matrix, SIZE)
                x = read(matrix, top, left, row, row).to(tl.float64) / number(matrix, UNIT)
                delta = tl.where(shifted != 0, number(matrix, DELTA), 0.0)
                x = (x + tl.where(diagonal(row, row, top, left), delta, 0.0)).to(T)
                at, stride = buffer(matrix, workspace, 0)
                put_both(at, stride, n, top, left, x)
                tl.store(sums + index, sum_both(x, n, top, left))


@triton.jit(do_not_specialize=["count", "gate"])
def begin(words, tiles, workspace, counters, starts, count, gate, TILE: tl.constexpr):
    """From D and D²: M = D/s, the first T, and X, which is that T."""
    T: tl.constexpr = workspace.dtype.element_ty
    if tl.load(counters + gate) != 0:
        for index in range(tl.program_id(0), count, tl.num_programs(0)):
            matrix, top, left = find(words, tiles, index, TILE)
            if word(matrix, PHASE) != IDLE:
                row = tl.arange(0, TILE)
                n = word(matrix, SIZE)
                at, stride = buffer(matrix, workspace, 0)
                square, _ = buffer(matrix, workspace, 2)
                inverse = 1.0 / number(matrix, SCALE)
                of, mask = from_below(at, stride, n, top, left, TILE)
                m = tl.load(of, mask=mask, other=0.0).to(tl.float64) * inverse
                of, mask = from_below(square, stride, n, top, left, TILE)
                squared = tl.load(of, mask=mask, other=0.0).to(tl.float64) * (inverse * inverse)
                start = starts + word(matrix, START) * START_WORDS
                t = tl.load(start + 1) * m + tl.load(start + 2) * squared
                t = (t + tl.where(diagonal(row, row, top, left), tl.load(start), 0.0)).to(T)
                put_both(at, stride, n, top, left, m.to(T))
                at, _ = buffer(matrix, workspace, 1)
                put_both(at, stride, n, top, left, t)
                at, _ = buffer(matrix, workspace, FIRST_X)
                put_both(at, stride, n, top, left, t)


@triton.jit
def probe_at(i):
    """An element of a vector without a pattern, as the reference's `probe`."""
    mixed = ((i.to(tl.int64) + 1) * 2654435769) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 13)
    return (2 * (mixed & 0xFFFF) - 0xFFFF).to(tl.float32) * 1.52587890625e-05


@triton.jit
def vector(matrix, workspace, i):
    """One of two vectors, which lie where X will."""
    at, _ = buffer(matrix, workspace, FIRST_X + 1 + i)
    return at


@triton.jit(do_not_specialize=["count", "gate", "slot", "turn", "last"])
def multiply_vector(
    words, tiles, workspace, counters, sums, count, gate, slot, turn, last, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """One step of the power method, y = Sv/‖v‖ from one vector to the other; some rows a program.

    In turn 0 v is the probe. The sums of squares of each turn serve the next; those of the last turn are v·y/‖v‖².
    """
    if tl.load(counters + gate) != 0:
        for index in range(tl.program_id(0), count, tl.num_programs(0)):
            matrix, top, _ = find(words, tiles, index, TILE)
            if word(matrix, DUE) != NONE:
                n = word(matrix, SIZE)
                of = vector(matrix, workspace, turn & 1)
                square = n.to(tl.float64)
                if turn != 0:
                    square = fold(sums + (turn & 1) * count + word(matrix, FIRST_ROWS), word(matrix, ROWS))
                inverse = (1.0 / tl.sqrt(square)).to(tl.float32)
                row = top + tl.arange(0, TILE)
                at, stride = buffer(matrix, workspace, slot)
                total = tl.zeros((TILE, DEPTH), tl.float32)
                for first in range(0, n, DEPTH):
                    column = first + tl.arange(0, DEPTH)
                    mask = column < n
                    v = tl.load(of + column, mask=column < tl.where(turn == 0, 0, n), other=0.0)
                    v = tl.where(turn == 0, probe_at(column), v)
                    s = tl.load(at + row[:, None] * stride + column[None, :],
                                mask=(row < n)[:, None] & mask[None, :], other=0.0)  # fmt: skip
                    total += s * (v * inverse)[None, :]
                y = tl.sum(total, 1)
                mask = row < n
                if last != 0:
                    v = tl.load(of + row, mask=mask, other=0.0) * inverse
                    square = tl.sum(v * y, 0).to(tl.float64)
                else:
                    square = tl.sum(y * y, 0).to(tl.float64)
                    tl.store(vector(matrix, workspace, 1 - (turn & 1)) + row, y, mask=mask)
                tl.store(sums + (1 - (turn & 1)) * count + index, square)


@triton.jit
def root_of_power(x, p):
    """x^(-1/p) in fp64."""
    x = tl.where(p == 1, x, tl.sqrt(x))
    x = tl.where(p == 4, tl.sqrt(x), x)
    return 1.0 / x


@triton.jit(do_not_specialize=["count", "p"])
def finish(words, tiles, narrow, wide, count, p, TILE: tl.constexpr):
    """The root from the nearest X, NaN where that is none; steps and status. Both dtypes of one workspace."""
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        matrix, top, left = find(words, tiles, index, TILE)
        done, n = word(matrix, DONE), word(matrix, SIZE)
        if top == 0:
            tl.store(word(matrix, ITERATIONS).to(tl.pointer_type(tl.int32)), word(matrix, STEPS).to(tl.int32))
            tl.store(word(matrix, STATUS).to(tl.pointer_type(tl.int8)), word(matrix, RESULT).to(tl.int8))
        if done != ON_CHIP:
            at, stride = buffer(matrix, narrow, FIRST_X + word(matrix, NEAREST))
            of, mask = from_below(at, stride, tl.where(done == FAST, n, 0), top, left, TILE)
            x = tl.load(of, mask=mask, other=0.0).to(tl.float64)
            at, stride = buffer(matrix, wide, FIRST_X + word(matrix, NEAREST))
            of, mask = from_below(at, stride, tl.where(done == WIDE, n, 0), top, left, TILE)
            x += tl.load(of, mask=mask, other=0.0)
            factor = root_of_power(number(matrix, SCALE), p) * root_of_power(number(matrix, UNIT), p)
            x = tl.where(done == NONE, float("nan"), x * factor).to(tl.float32)
            at = word(matrix, OUTPUT).to(tl.pointer_type(tl.float32))
            put_both(at, n, n, top, left, x)
