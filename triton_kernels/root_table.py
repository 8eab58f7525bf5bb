"""The table that kernels for inverse roots are told by: some words for each matrix, of which they write the last.

A buffer holds a symmetric matrix row after row, each row filled up with zeros to a multiple of 8 elements. A matrix has
seven of them, in fp32 or fp64: four squares that rotate, M and T and powers of T, and three for X.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tensors of the caller, fp32 but for the last two, which are an int32 and an int8:
INPUT = tl.constexpr(0)
INPUT_ROW = tl.constexpr(1)  # strides
INPUT_COLUMN = tl.constexpr(2)
OUTPUT = tl.constexpr(3)
ITERATIONS = tl.constexpr(4)
STATUS = tl.constexpr(5)
# Rows, the stride of a buffer's row in units of 8 elements, and the first buffer in units of 64 doubles:
SIZE = tl.constexpr(6)
STRIDE = tl.constexpr(7)
BUFFERS = tl.constexpr(8)
# Which of all tiles are its own, and which blocks of rows:
FIRST_TILE = tl.constexpr(9)
TILES = tl.constexpr(10)
FIRST_ROWS = tl.constexpr(11)
ROWS = tl.constexpr(12)
# What kernels write. Which attempt is due, whose result is the root, and how far that has come:
DUE = tl.constexpr(13)
DONE = tl.constexpr(14)
PHASE = tl.constexpr(15)
START = tl.constexpr(16)  # the polynomial that T is made by
FRESH = tl.constexpr(17)  # whether that is the first, and X its T already
TRIED = tl.constexpr(18)  # Newton steps
STEPS = tl.constexpr(19)  # of both attempts
RESULT = tl.constexpr(20)  # a RootStatus
# M's square, X's buffer, and that of the nearest X so far:
M = tl.constexpr(21)
X = tl.constexpr(22)
NEAREST = tl.constexpr(23)
# Doubles:
UNIT = tl.constexpr(24)
DELTA = tl.constexpr(25)
SCALE = tl.constexpr(26)
BEST = tl.constexpr(27)
NORM = tl.constexpr(28)
WORDS = tl.constexpr(29)

# Attempts; the last is that of the kernels that keep a matrix on the chip, which write the root themselves.
NONE, FAST, WIDE, ON_CHIP = (tl.constexpr(code) for code in range(4))
# Nothing to do; T by a polynomial; T by Newton; the same for the last time.
IDLE, STARTING, STEPPING, ENDING = (tl.constexpr(code) for code in range(4))
# Values of RootStatus.
CONVERGED, STALLED, FAILED, NON_FINITE = (tl.constexpr(code) for code in range(4))
# Buffers of X follow four squares.
FIRST_X = tl.constexpr(4)
BUFFERS_OF_A_MATRIX = tl.constexpr(7)
# Doubles of a start: a, b, c, condition.
START_WORDS = tl.constexpr(4)


@triton.jit
def word(matrix, i: tl.constexpr):
    return tl.load(matrix + i)


@triton.jit
def number(matrix, i: tl.constexpr):
    return tl.load(matrix + i).to(tl.float64, bitcast=True)


@triton.jit
def set_word(matrix, i: tl.constexpr, value):
    tl.store(matrix + i, value)


@triton.jit
def set_number(matrix, i: tl.constexpr, value):
    tl.store(matrix + i, value.to(tl.int64, bitcast=True))


@triton.jit
def find(words, tiles, index, TILE: tl.constexpr):
    """The matrix of a tile, and the tile's first row and column. A tile is an index and two numbers of 16 bits."""
    tile = tl.load(tiles + index)
    return words + (tile >> 32) * WORDS, ((tile >> 16) & 0xFFFF) * TILE, (tile & 0xFFFF) * TILE


@triton.jit
def buffer(matrix, workspace, i):
    """A buffer in the workspace's dtype, and its stride. Their places are those that doubles would have."""
    if workspace.dtype.element_ty == tl.float64:
        at = word(matrix, BUFFERS) * 64
    else:
        at = word(matrix, BUFFERS) * 128
    stride = word(matrix, STRIDE) * 8
    return workspace + at + i * (word(matrix, SIZE) * stride), stride


@triton.jit
def next_x(x, nearest):
    """The buffer after X's that holds neither X nor the nearest."""
    return tl.where(x == nearest, (x + 1) % 3, 3 - x - nearest)


@triton.jit
def offsets(row, column, stride):
    """Of a tile's elements from its first one, in 32 bits."""
    return row[:, None] * stride.to(tl.int32) + column[None, :]


@triton.jit
def below(row, column, top, left):
    """Which elements of the tile that begins at (top, left) are on or below the matrix's diagonal."""
    return row[:, None] - column[None, :] >= (left - top).to(tl.int32)


@triton.jit
def diagonal(row, column, top, left):
    return row[:, None] - column[None, :] == (left - top).to(tl.int32)


@triton.jit
def put_both(at, stride, n, top, left, x):
    """What a tile on or below the diagonal has there, and its mirror image; zeros behind the last column included."""
    row = tl.arange(0, x.shape[0])
    lower = below(row, row, top, left)
    tl.store(at + (top * stride + left) + offsets(row, row, stride), x,
             mask=lower & (row < (n - top).to(tl.int32))[:, None])  # fmt: skip
    upper = lower & (row[:, None] - row[None, :] != (left - top).to(tl.int32))
    upper = upper & (row < (stride - top).to(tl.int32))[:, None] & (row < (n - left).to(tl.int32))[None, :]
    tl.store(at + (left * stride + top) + row[None, :] * stride.to(tl.int32) + row[:, None], x, mask=upper)


@triton.jit
def sum_both(x, n, top, left):
    """The sum of the squares of such a tile and its mirror image."""
    row = tl.arange(0, x.shape[0])
    once = below(row, row, top, left) & (row < (n - top).to(tl.int32))[:, None]
    square = tl.where(once, x * x, 0.0)
    square = tl.where(diagonal(row, row, top, left), square, 2.0 * square)
    return tl.sum(tl.sum(square, 1), 0).to(tl.float64)


@triton.jit
def fold(sums, count):
    """The sum of doubles, always in the same order."""
    BLOCK: tl.constexpr = 128
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        total += tl.load(sums + begin + lanes, mask=begin + lanes < count, other=0.0)
    return tl.sum(total, 0)
