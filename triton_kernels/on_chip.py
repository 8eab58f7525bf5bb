"""Whole Newton-Schulz iterations, one program a matrix: its Gram matrix stays on the chip.

The long side is streamed past it where it does not fit (`stream`), from one buffer into the other. That happens once
in the beginning and once wherever X changes, in a pass that multiplies X, stores it, and sums up the next Gram matrix.

A step is told by four numbers: a, b, c, and whether X is multiplied after it, as it always is in the standard form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.matrix_access import put, read_by, rounded, take, write_by
from stepladder.triton_kernels.matrix_table import COLUMNS, ROWS, WORDS, wide_buffer, word
from stepladder.triton_kernels.normalise import divisor_of, joined, normalised, root_of_sums, sum_squares


@triton.jit
def read_step(steps, k):
    at = steps + 4 * k
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3) != 0


@triton.jit
def next_polynomial(r, b, c):
    """Z = bR + cR² in fp32."""
    return b * r.to(tl.float32) + c * tl.dot(r, r)


@triton.jit
def next_factor(q, r, fresh, a, b, c, ends, SIDE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Z, and Q and q₀: X is to be multiplied by Q + q₀I.

    That is Z + aI, times the factor so far unless fresh. The identity is kept apart in a factor of one step alone: in
    the product of several Q - q₀I would be far larger than Q, and so its rounding.
    """
    wide = next_polynomial(r, b, c)
    z = rounded(wide, INTERPRETED)
    if fresh:
        lanes = tl.arange(0, SIDE)
        shift = tl.where(ends, 0.0, a)
        q = rounded(wide + tl.where(lanes[:, None] == lanes[None, :], shift, 0.0), INTERPRETED)
        q0 = a - shift
    else:
        q = rounded(tl.dot(q, z, a * q.to(tl.float32)), INTERPRETED)
        q0 = a * 0.0
    return z, q, q0


@triton.jit
def next_gram(r, z, a, INTERPRETED: tl.constexpr):
    """R of the multiplied X: (aI + Z)R(aI + Z)."""
    p = rounded(tl.dot(r, z, a * r.to(tl.float32)), INTERPRETED)
    return rounded(tl.dot(z, p, a * p.to(tl.float32)), INTERPRETED)


@triton.jit
def multiplied(x, q, q0):
    return tl.dot(q, x, q0 * x.to(tl.float32))


@triton.jit
def prescaled(x, r):
    """Rows by the root of the sums of |R|, in fp32."""
    by = root_of_sums(tl.sum(tl.abs(r.to(tl.float32)), 1))
    x = x.to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + by)


@triton.jit
def own_matrix(words):
    """Words of this program's matrix."""
    return words + tl.program_id(0).to(tl.int64) * WORDS


@triton.jit(do_not_specialize=["count", "aol"])
def hold(
    words, steps, count, aol, eps, divisor,
    SIDE: tl.constexpr, LENGTH: tl.constexpr, GRAM: tl.constexpr, BY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Matrices of at most SIDE rows and LENGTH columns, which stay on the chip themselves; `count` steps."""
    matrix = own_matrix(words)
    row = tl.arange(0, SIDE)
    column = tl.arange(0, LENGTH)
    x = read_by(matrix, row, column, BY)
    exponent, total = sum_squares(x)
    x = rounded(normalised(x, exponent, divisor_of(exponent, total, eps, divisor)), INTERPRETED)
    r = rounded(tl.dot(x, tl.trans(x)), INTERPRETED)
    if aol != 0:
        x = rounded(prescaled(x, r), INTERPRETED)
        r = rounded(tl.dot(x, tl.trans(x)), INTERPRETED)
    if GRAM:
        q = r
        fresh = True
    for k in range(count - 1):
        a, b, c, ends = read_step(steps, k)
        if GRAM:
            z, q, q0 = next_factor(q, r, fresh, a, b, c, ends, SIDE, INTERPRETED)
            fresh = ends
            if ends:
                x = rounded(multiplied(x, q, q0), INTERPRETED)
                r = rounded(tl.dot(x, tl.trans(x)), INTERPRETED)
            else:
                r = next_gram(r, z, a, INTERPRETED)
        else:
            x = rounded(multiplied(x, rounded(next_polynomial(r, b, c), INTERPRETED), a), INTERPRETED)
            r = rounded(tl.dot(x, tl.trans(x)), INTERPRETED)
    a, b, c, ends = read_step(steps, count - 1)
    if GRAM:
        z, q, q0 = next_factor(q, r, fresh, a, b, c, ends, SIDE, INTERPRETED)
        write_by(matrix, row, column, multiplied(x, q, q0), BY)
    else:
        write_by(matrix, row, column, multiplied(x, rounded(next_polynomial(r, b, c), INTERPRETED), a), BY)


@triton.jit
def stored(matrix, workspace, i, row, begin, LENGTH: tl.constexpr):
    """Pointers to the columns [begin, begin + LENGTH) of a buffer, and their mask."""
    at, stride = wide_buffer(matrix, workspace, i)
    column = begin + tl.arange(0, LENGTH)
    mask = (row < word(matrix, ROWS))[:, None] & (column < stride)[None, :]
    return at + row[:, None] * stride + column[None, :], mask


@triton.jit
def multiply_stored(
    matrix, workspace, source, row, q, q0, SIDE: tl.constexpr, LENGTH: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """X ← QX + q₀X from one buffer into the other; returns the next R."""
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for begin in range(0, word(matrix, COLUMNS), LENGTH):
        at, mask = stored(matrix, workspace, source, row, begin, LENGTH)
        x = rounded(multiplied(take(at, mask, INTERPRETED), q, q0), INTERPRETED)
        to, mask = stored(matrix, workspace, 1 - source, row, begin, LENGTH)
        put(to, x, mask, INTERPRETED)
        sums = tl.dot(x, tl.trans(x), sums)
    # The next pass reads what other threads of the program have stored in this one.
    tl.debug_barrier()
    return rounded(sums, INTERPRETED)


@triton.jit
def finish_stored(
    matrix, workspace, source, row, q, q0, LENGTH: tl.constexpr, BY: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """QX + q₀X into the output."""
    for begin in range(0, word(matrix, COLUMNS), LENGTH):
        at, mask = stored(matrix, workspace, source, row, begin, LENGTH)
        write_by(matrix, row, begin + tl.arange(0, LENGTH), multiplied(take(at, mask, INTERPRETED), q, q0), BY)


@triton.jit(do_not_specialize=["count", "aol"])
def stream(
    words, workspace, steps, count, aol, eps, divisor,
    SIDE: tl.constexpr, LENGTH: tl.constexpr, GRAM: tl.constexpr, BY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Matrices of at most SIDE rows, LENGTH columns at a time; `count` steps."""
    matrix = own_matrix(words)
    row = tl.arange(0, SIDE)
    lanes = tl.arange(0, LENGTH)
    columns = word(matrix, COLUMNS)
    exponent = tl.full((), -126, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, LENGTH):
        e, s = sum_squares(read_by(matrix, row, begin + lanes, BY))
        exponent, total = joined(exponent, total, e, s)
    by = divisor_of(exponent, total, eps, divisor)
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for begin in range(0, columns, LENGTH):
        x = rounded(normalised(read_by(matrix, row, begin + lanes, BY), exponent, by), INTERPRETED)
        at, mask = stored(matrix, workspace, 0, row, begin, LENGTH)
        put(at, x, mask, INTERPRETED)
        sums = tl.dot(x, tl.trans(x), sums)
    r = rounded(sums, INTERPRETED)
    source = tl.full((), 0, tl.int32)
    tl.debug_barrier()
    if aol != 0:
        sums = tl.zeros((SIDE, SIDE), tl.float32)
        for begin in range(0, columns, LENGTH):
            at, mask = stored(matrix, workspace, 0, row, begin, LENGTH)
            x = rounded(prescaled(take(at, mask, INTERPRETED), r), INTERPRETED)
            to, mask = stored(matrix, workspace, 1, row, begin, LENGTH)
            put(to, x, mask, INTERPRETED)
            sums = tl.dot(x, tl.trans(x), sums)
        r = rounded(sums, INTERPRETED)
        source = 1 - source
        tl.debug_barrier()
    if GRAM:
        q = r
        fresh = True
    for k in range(count - 1):
        a, b, c, ends = read_step(steps, k)
        if GRAM:
            z, q, q0 = next_factor(q, r, fresh, a, b, c, ends, SIDE, INTERPRETED)
            fresh = ends
            if ends:
                r = multiply_stored(matrix, workspace, source, row, q, q0, SIDE, LENGTH, INTERPRETED)
                source = 1 - source
            else:
                r = next_gram(r, z, a, INTERPRETED)
        else:
            z = rounded(next_polynomial(r, b, c), INTERPRETED)
            r = multiply_stored(matrix, workspace, source, row, z, a, SIDE, LENGTH, INTERPRETED)
            source = 1 - source
    a, b, c, ends = read_step(steps, count - 1)
    if GRAM:
        z, q, q0 = next_factor(q, r, fresh, a, b, c, ends, SIDE, INTERPRETED)
        finish_stored(matrix, workspace, source, row, q, q0, LENGTH, BY, INTERPRETED)
    else:
        z = rounded(next_polynomial(r, b, c), INTERPRETED)
        finish_stored(matrix, workspace, source, row, z, a, LENGTH, BY, INTERPRETED)
