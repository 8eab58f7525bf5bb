"""out ← left·right over matrices of different shapes in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.access import pointer
from stepladder.triton_kernels.matrix_table import BY_COLUMNS, BY_ROWS, STRIDED

# Words of a product. Addresses, and strides in elements; rows of the left, columns of the right, what is summed over:
LEFT = tl.constexpr(0)
RIGHT = tl.constexpr(3)
OUT = tl.constexpr(6)
ROW, COLUMN = tl.constexpr(1), tl.constexpr(2)  # after each of these
ROWS = tl.constexpr(9)
COLUMNS = tl.constexpr(10)
DEPTH_OF = tl.constexpr(11)
WORDS = tl.constexpr(12)


@triton.jit
def operand(matrix, WHICH: tl.constexpr, row, column, T: tl.constexpr, BY: tl.constexpr):
    """Pointers to elements of an operand. Where rows or columns go by 16 bytes, the compiler is to see it."""
    by_row, by_column = tl.load(matrix + WHICH + ROW), tl.load(matrix + WHICH + COLUMN)
    if BY == BY_ROWS:
        offsets = row[:, None] * (by_row // 8 * 8) + column[None, :]
    elif BY == BY_COLUMNS:
        offsets = row[:, None] + column[None, :] * (by_column // 8 * 8)
    else:
        offsets = row[:, None] * by_row + column[None, :] * by_column
    return pointer(tl.load(matrix + WHICH), T, BY != STRIDED) + offsets


@triton.jit
def multiple(size, ALIGNED: tl.constexpr):
    """A size that is known to be a multiple of 8, or any."""
    return size // 8 * 8 if ALIGNED else size


@triton.jit
def multiply(
    words, tiles,
    T: tl.constexpr, LEFT_BY: tl.constexpr, RIGHT_BY: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile a program: which matrix's, and which of its tiles, row after row of them."""
    tile = tl.load(tiles + tl.program_id(0))
    matrix = words + (tile >> 32) * WORDS
    place, across = tile & 0xFFFFFFFF, tl.cdiv(tl.load(matrix + COLUMNS), TILE)
    row = place // across * TILE + tl.arange(0, TILE)
    column = place % across * TILE + tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    rows = multiple(tl.load(matrix + ROWS), LEFT_BY == BY_COLUMNS)
    columns = multiple(tl.load(matrix + COLUMNS), RIGHT_BY == BY_ROWS)
    depth = multiple(tl.load(matrix + DEPTH_OF), (LEFT_BY == BY_ROWS) | (RIGHT_BY == BY_COLUMNS))
    left = operand(matrix, LEFT, row, k, T, LEFT_BY)
    right = operand(matrix, RIGHT, k, column, T, RIGHT_BY)
    left_step, right_step = tl.load(matrix + LEFT + COLUMN), tl.load(matrix + RIGHT + ROW)
    if LEFT_BY == BY_ROWS:
        left_step = left_step * 0 + 1
    elif LEFT_BY == BY_COLUMNS:
        left_step = left_step // 8 * 8
    if RIGHT_BY == BY_COLUMNS:
        right_step = right_step * 0 + 1
    elif RIGHT_BY == BY_ROWS:
        right_step = right_step // 8 * 8
    total = tl.zeros((TILE, TILE), T)
    for begin in range(0, depth, DEPTH):
        inside = begin + k < depth
        a = tl.load(left + begin * left_step, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + begin * right_step, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3", out_dtype=T)
    out = operand(matrix, OUT, row, column, T, STRIDED)
    tl.store(out, total, mask=(row < rows)[:, None] & (column < columns)[None, :])
