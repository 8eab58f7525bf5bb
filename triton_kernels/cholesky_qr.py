"""Orthonormal bases of the columns of matrices by shifted Cholesky-QR, in fp64, over matrices of different shapes.

A matrix is kept transposed, W = Xᵀ: W ← L⁻¹W with WWᵀ = LLᵀ, by blocks of rows. Where that fails, columns are
orthogonalised one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.root_table import fold

# Words of a matrix. Tensors of the caller and their strides; the result is contiguous, the flags are bytes:
INPUT = tl.constexpr(0)
INPUT_ROW = tl.constexpr(1)
INPUT_COLUMN = tl.constexpr(2)
OUTPUT = tl.constexpr(3)
FALLBACK = tl.constexpr(4)
FINITE = tl.constexpr(5)
ROWS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
# Strides of rows of W and of L in units of 8 doubles; W, L, and the inverses of L's diagonal blocks, in units of 64:
LENGTH = tl.constexpr(8)
SIDE = tl.constexpr(9)
WIDE = tl.constexpr(10)
SQUARE = tl.constexpr(11)
INVERSES = tl.constexpr(12)
# Its own among all tiles of matrices, of L, and blocks of rows of X:
FIRST_TILE = tl.constexpr(13)
TILES = tl.constexpr(14)
FIRST_LOWER = tl.constexpr(15)
LOWERS = tl.constexpr(16)
FIRST_BAND = tl.constexpr(17)
BANDS = tl.constexpr(18)
# What kernels write: the largest magnitude, a double, and one of the states below.
SCALE = tl.constexpr(19)
STATE = tl.constexpr(20)
WORDS = tl.constexpr(21)
GOOD, BAD, NON_FINITE = (tl.constexpr(code) for code in range(3))
# Rows that L⁻¹ is applied to at a time.
BLOCK = tl.constexpr(32)


@triton.jit
def word(matrix, i: tl.constexpr):
    return tl.load(matrix + i)


@triton.jit
def find(words, tiles, TILE: tl.constexpr):
    """This program's matrix, and the first row and column of its tile."""
    tile = tl.load(tiles + tl.program_id(0))
    return words + (tile >> 32) * WORDS, ((tile >> 16) & 0xFFFF) * TILE, (tile & 0xFFFF) * TILE


@triton.jit
def own_words(words):
    return words + tl.program_id(0).to(tl.int64) * WORDS


@triton.jit
def wide(matrix, workspace):
    return workspace + word(matrix, WIDE) * 64, word(matrix, LENGTH) * 8


@triton.jit
def square(matrix, workspace):
    return workspace + word(matrix, SQUARE) * 64, word(matrix, SIDE) * 8


@triton.jit
def read(matrix, row, column, X: tl.constexpr):
    """Elements of the caller's matrix in fp64, [rows, columns], 0 outside of it."""
    at = word(matrix, INPUT).to(tl.pointer_type(X))
    mask = (row < word(matrix, ROWS))[:, None] & (column < word(matrix, COLUMNS))[None, :]
    offsets = row[:, None] * word(matrix, INPUT_ROW) + column[None, :] * word(matrix, INPUT_COLUMN)
    return tl.load(at + offsets, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def measure(words, tiles, sums, X: tl.constexpr, TILE: tl.constexpr):
    """The largest magnitude of each tile, infinite where an element is not finite."""
    matrix, top, left = find(words, tiles, TILE)
    x = tl.abs(read(matrix, top + tl.arange(0, TILE), left + tl.arange(0, TILE), X))
    x = tl.where(x < float("inf"), x, float("inf"))
    tl.store(sums + tl.program_id(0), tl.max(tl.max(x, 1), 0))


@triton.jit
def settle(words, sums):
    """The largest magnitude of each matrix, and whether it is finite."""
    matrix = own_words(words)
    count = word(matrix, TILES)
    lanes = tl.arange(0, 128)
    greatest = tl.zeros((128,), tl.float64)
    for first in range(0, count, 128):
        at = sums + word(matrix, FIRST_TILE) + first + lanes
        greatest = tl.maximum(greatest, tl.load(at, mask=first + lanes < count, other=0.0))
    largest = tl.max(greatest, 0)
    finite = largest < float("inf")
    scale = tl.where(finite & (largest > 0), largest, 1.0)
    tl.store(matrix + SCALE, scale.to(tl.int64, bitcast=True))
    tl.store(matrix + STATE, tl.where(finite, GOOD, NON_FINITE).to(tl.int64))


@triton.jit
def form(words, tiles, workspace, X: tl.constexpr, TILE: tl.constexpr):
    """W = Xᵀ over its largest magnitude, zeros for what is not finite and behind the last row of X."""
    matrix, top, left = find(words, tiles, TILE)
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    x = read(matrix, row, column, X) / word(matrix, SCALE).to(tl.float64, bitcast=True)
    x = tl.where(word(matrix, STATE) == NON_FINITE, 0.0, x)
    at, stride = wide(matrix, workspace)
    mask = (row < stride)[:, None] & (column < word(matrix, COLUMNS))[None, :]
    tl.store(at + column[None, :] * stride + row[:, None], x, mask=mask)


@triton.jit
def gram(words, tiles, workspace, sums, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """WWᵀ, on and below the diagonal; the sums of squares of its difference from I by tiles."""
    matrix, top, left = find(words, tiles, TILE)
    n = word(matrix, COLUMNS)
    of, length = wide(matrix, workspace)
    k = tl.arange(0, DEPTH)
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float64)
    for begin in range(0, length, DEPTH):
        inside = (begin + k < length)[None, :]
        along = of + (begin + k)[None, :]
        a = tl.load(along + row[:, None] * length, mask=inside & (row < n)[:, None], other=0.0)
        b = tl.load(along + column[:, None] * length, mask=inside & (column < n)[:, None], other=0.0)
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.float64)
    at, stride = square(matrix, workspace)
    lower = (row[:, None] >= column[None, :]) & (row < n)[:, None]
    tl.store(at + row[:, None] * stride + column[None, :], total, mask=lower)
    identity = row[:, None] == column[None, :]
    error = tl.where(lower, total - tl.where(identity, 1.0, 0.0), 0.0)
    error = error * error
    error = tl.where(identity, error, 2.0 * error)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(error, 1), 0))


@triton.jit
def factor(a):
    """L with LLᵀ = A for a block A, its inverse, and whether a pivot was not positive."""
    lanes = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK, BLOCK), tl.float64)
    inverse = tl.where(lanes[:, None] == lanes[None, :], 1.0, 0.0).to(tl.float64)
    failed = tl.full((), 0, tl.int32)
    for c in range(BLOCK):
        here = lanes == c
        column = tl.sum(tl.where(here[None, :], a, 0.0), 1)
        across = tl.sum(tl.where(here[:, None], a, 0.0), 0)
        pivot = tl.sum(tl.where(here, across, 0.0), 0)
        failed = tl.where(pivot > 0, failed, 1)
        root = tl.sqrt(tl.where(pivot > 0, pivot, 1.0))
        column = tl.where(lanes > c, column, 0.0) / root
        across = tl.where(lanes > c, across, 0.0) / root
        lower = tl.where(here[None, :], tl.where(here, root, column)[:, None], lower)
        a = a - column[:, None] * across[None, :]
        solved = tl.sum(tl.where(here[:, None], inverse, 0.0), 0) / root
        inverse = tl.where(here[:, None], solved[None, :], inverse - column[:, None] * solved[None, :])
    return lower, inverse, failed


@triton.jit
def cholesky(words, workspace, SHIFT: tl.constexpr, TALL: tl.constexpr):
    """WWᵀ + SHIFT·trace·I = LLᵀ in place, one program a matrix, block column after block column."""
    matrix = own_words(words)
    n = word(matrix, COLUMNS)
    at, stride = square(matrix, workspace)
    inverses = workspace + word(matrix, INVERSES) * 64
    lanes = tl.arange(0, BLOCK)
    tall = tl.arange(0, TALL)
    diagonal = tl.zeros((TALL,), tl.float64)
    for begin in range(0, n, TALL):
        diagonal += tl.load(at + (begin + tall) * (stride + 1), mask=begin + tall < n, other=0.0)
    shift = SHIFT * tl.sum(diagonal, 0)
    failed = tl.full((), 0, tl.int32)
    for begin in range(0, n, BLOCK):
        row = begin + lanes
        high, low = tl.maximum(row[:, None], row[None, :]), tl.minimum(row[:, None], row[None, :])
        identity = row[:, None] == row[None, :]
        # Behind the last row stands the identity.
        a = tl.load(at + high * stride + low, mask=high < n, other=0.0)
        a += tl.where(identity, tl.where(row < n, shift, 1.0)[:, None], 0.0)
        for first in range(0, begin, BLOCK):
            done = tl.load(at + row[:, None] * stride + (first + lanes)[None, :], mask=(row < n)[:, None], other=0.0)
            a -= tl.dot(done, tl.trans(done), out_dtype=tl.float64)
        lower, inverse, fails = factor(a)
        failed = failed | fails
        tl.debug_barrier()
        tl.store(at + row[:, None] * stride + row[None, :], lower,
                 mask=(row[:, None] >= row[None, :]) & (row < n)[:, None])  # fmt: skip
        tl.store(inverses + row[:, None] * BLOCK + lanes[None, :], inverse)
        for next_row in range(begin + BLOCK, n, TALL):
            below = (next_row + tall)[:, None]
            here = at + below * stride + row[None, :]
            x = tl.load(here, mask=below < n, other=0.0)
            for first in range(0, begin, BLOCK):
                k = (first + lanes)[None, :]
                left = tl.load(at + below * stride + k, mask=below < n, other=0.0)
                right = tl.load(at + row[:, None] * stride + k, mask=(row < n)[:, None], other=0.0)
                x -= tl.dot(left, tl.trans(right), out_dtype=tl.float64)
            tl.store(here, tl.dot(x, tl.trans(inverse), out_dtype=tl.float64), mask=below < n)
        # The next blocks read what other threads have stored.
        tl.debug_barrier()
    if failed != 0:
        if word(matrix, STATE) == GOOD:
            tl.store(matrix + STATE, tl.full((), BAD, tl.int64))


@triton.jit
def solve(words, tiles, workspace, TILE: tl.constexpr):
    """W ← L⁻¹W, some columns of W a program."""
    matrix, top, _ = find(words, tiles, TILE)
    n = word(matrix, COLUMNS)
    of, length = wide(matrix, workspace)
    at, stride = square(matrix, workspace)
    inverses = workspace + word(matrix, INVERSES) * 64
    lanes = tl.arange(0, BLOCK)
    column = top + tl.arange(0, TILE)
    inside = (column < length)[None, :]
    for begin in range(0, n, BLOCK):
        row = begin + lanes
        mask = (row < n)[:, None] & inside
        here = of + row[:, None] * length + column[None, :]
        x = tl.load(here, mask=mask, other=0.0)
        for first in range(0, begin, BLOCK):
            k = first + lanes
            left = tl.load(at + row[:, None] * stride + k[None, :], mask=(row < n)[:, None], other=0.0)
            right = tl.load(of + k[:, None] * length + column[None, :], mask=inside, other=0.0)
            x -= tl.dot(left, right, out_dtype=tl.float64)
        inverse = tl.load(inverses + row[:, None] * BLOCK + lanes[None, :])
        x = tl.dot(inverse, x, out_dtype=tl.float64)
        tl.debug_barrier()
        tl.store(here, x, mask=mask)
        tl.debug_barrier()


@triton.jit
def judge(words, sums, LIMIT: tl.constexpr):
    """Who is further from orthonormal than the limit."""
    matrix = own_words(words)
    state = word(matrix, STATE)
    error = tl.sqrt(fold(sums + word(matrix, FIRST_LOWER), word(matrix, LOWERS)))
    tl.debug_barrier()
    if (state == GOOD) & ((error <= LIMIT) == 0):
        tl.store(matrix + STATE, tl.full((), BAD, tl.int64))


@triton.jit
def norm_of(at, m, DEPTH: tl.constexpr):
    """Of a row of W."""
    k = tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH,), tl.float64)
    for begin in range(0, m, DEPTH):
        v = tl.load(at + begin + k, mask=begin + k < m, other=0.0)
        total += v * v
    norm = tl.sqrt(tl.sum(total, 0))
    tl.debug_barrier()
    return norm


@triton.jit
def scale_by(at, m, factor, DEPTH: tl.constexpr):
    """Multiplies a row of W."""
    k = tl.arange(0, DEPTH)
    for begin in range(0, m, DEPTH):
        v = tl.load(at + begin + k, mask=begin + k < m, other=0.0)
        tl.store(at + begin + k, v * factor, mask=begin + k < m)
    tl.debug_barrier()


@triton.jit
def project(of, length, m, j, DEPTH: tl.constexpr):
    """Takes from row j of W what lies along those before it."""
    k = tl.arange(0, DEPTH)
    lanes = tl.arange(0, BLOCK)
    own = of + j * length
    for first in range(0, j, BLOCK):
        row = first + lanes
        along = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, m, DEPTH):
            mask = (row < j)[:, None] & (begin + k < m)[None, :]
            q = tl.load(of + row[:, None] * length + (begin + k)[None, :], mask=mask, other=0.0)
            v = tl.load(own + begin + k, mask=begin + k < m, other=0.0)
            along += tl.sum(q * v[None, :], 1)
        tl.debug_barrier()
        for begin in range(0, m, DEPTH):
            mask = (row < j)[:, None] & (begin + k < m)[None, :]
            q = tl.load(of + row[:, None] * length + (begin + k)[None, :], mask=mask, other=0.0)
            v = tl.load(own + begin + k, mask=begin + k < m, other=0.0)
            tl.store(own + begin + k, v - tl.sum(q * along[:, None], 0), mask=begin + k < m)
        tl.debug_barrier()


@triton.jit
def redo(words, workspace, X: tl.constexpr, DEPTH: tl.constexpr):
    """Bases of those that Cholesky-QR failed on, by Gram and Schmidt's method with reorthogonalisation.

    A column is projected until that leaves half of it, which is then orthogonal to rounding (Kahan's criterion); one
    that lies in the span of those before it gives way to a unit vector, one of which does not.
    """
    matrix = own_words(words)
    if word(matrix, STATE) == BAD:
        m, n = word(matrix, ROWS), word(matrix, COLUMNS)
        of, length = wide(matrix, workspace)
        k = tl.arange(0, DEPTH)
        inverse = 1.0 / word(matrix, SCALE).to(tl.float64, bitcast=True)
        for j in range(n):
            own = of + j * length
            at = word(matrix, INPUT).to(tl.pointer_type(X)) + j * word(matrix, INPUT_COLUMN)
            for begin in range(0, m, DEPTH):
                mask = begin + k < m
                x = tl.load(at + (begin + k) * word(matrix, INPUT_ROW), mask=mask, other=0.0).to(tl.float64)
                tl.store(own + begin + k, x * inverse, mask=mask)
            tl.debug_barrier()
            tried = m * 0
            norm = norm_of(own, m, DEPTH)
            left = norm * 0.0
            while (left <= 0.5) & (tried <= m):
                if (norm < 1e-290) | ((left > 0) & (left < 1e-14)):
                    for begin in range(0, m, DEPTH):
                        unit = tl.where(begin + k == tried, 1.0, 0.0).to(tl.float64)
                        tl.store(own + begin + k, unit, mask=begin + k < m)
                    tl.debug_barrier()
                    tried += 1
                    norm = left * 0.0 + 1.0
                scale_by(own, m, 1.0 / norm, DEPTH)
                project(of, length, m, j, DEPTH)
                norm = norm_of(own, m, DEPTH)
                left = norm
            scale_by(own, m, 1.0 / norm, DEPTH)


@triton.jit
def finish(words, tiles, workspace, X: tl.constexpr, TILE: tl.constexpr):
    """Q = Wᵀ in the dtype of X, NaN where that is not finite, and the flags."""
    matrix, top, left = find(words, tiles, TILE)
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    m, n, state = word(matrix, ROWS), word(matrix, COLUMNS), word(matrix, STATE)
    of, length = wide(matrix, workspace)
    mask = (row < m)[:, None] & (column < n)[None, :]
    q = tl.load(of + column[None, :] * length + row[:, None], mask=mask, other=0.0)
    q = tl.where(state == NON_FINITE, float("nan"), q).to(X)
    tl.store(word(matrix, OUTPUT).to(tl.pointer_type(X)) + row[:, None] * n + column[None, :], q, mask=mask)
    if (top == 0) & (left == 0):
        tl.store(word(matrix, FALLBACK).to(tl.pointer_type(tl.int8)), (state == BAD).to(tl.int8))
        tl.store(word(matrix, FINITE).to(tl.pointer_type(tl.int8)), (state != NON_FINITE).to(tl.int8))
