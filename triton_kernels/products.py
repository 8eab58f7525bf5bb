"""Matrix products of a Newton-Schulz iteration, over matrices of different shapes in one launch.

bf16 operands, fp32 accumulation, sums in the epilogue, one rounding to bf16 at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.matrix_access import put, take, write_by
from stepladder.triton_kernels.matrix_table import (
    COLUMNS,
    FIRST_PAIR,
    FIRST_RESULT,
    FIRST_TILE,
    ROWS,
    find_matrix,
    square_buffer,
    wide_buffer,
    word,
)


@triton.jit
def pair_of(index):
    """Tile (i, j), j <= i, of a lower triangle that is counted row by row."""
    i = ((tl.sqrt_rn((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int64)
    # The root is rounded.
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def multiply_rows(
    x, stride, rows, i, j, TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Tile (i, j) of XXᵀ in fp32."""
    k = tl.arange(0, DEPTH)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    left = x + row[:, None] * stride + k[None, :]
    right = x + column[:, None] * stride + k[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for begin in range(0, stride, DEPTH):
        inside = (begin + k < stride)[None, :]
        a = take(left + begin, inside & (row < rows)[:, None], INTERPRETED)
        b = take(right + begin, inside & (column < rows)[:, None], INTERPRETED)
        total = tl.dot(a, tl.trans(b), total)
    return total


@triton.jit
def multiply(
    square, square_stride, x, stride, rows, depth, i, j,
    TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of a square times X in fp32, of which the first `depth` columns and rows are multiplied."""
    k = tl.arange(0, DEPTH)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    left = square + row[:, None] * square_stride + k[None, :]
    right = x + k[:, None] * stride + column[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for begin in range(0, depth, DEPTH):
        a = take(left + begin, (row < rows)[:, None] & (begin + k < square_stride)[None, :], INTERPRETED)
        b = take(right + begin * stride, (begin + k < rows)[:, None] & (column < stride)[None, :], INTERPRETED)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def put_both(matrix, workspace, to, x, i, j, TILE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Tile (i, j) of a symmetric matrix and its mirror image, columns of zeros behind the last one included."""
    at, stride = square_buffer(matrix, workspace, to)
    rows = word(matrix, ROWS)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    put(at + row[:, None] * stride + column[None, :], x, (row < rows)[:, None] & (column < stride)[None, :],
        INTERPRETED)  # fmt: skip
    if i != j:
        put(at + column[None, :] * stride + row[:, None], x, (column < rows)[None, :] & (row < stride)[:, None],
            INTERPRETED)  # fmt: skip


@triton.jit(do_not_specialize=["count", "source", "to"])
def gram(
    words, workspace, count, source, to, alpha, TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr
):
    """αXXᵀ for each matrix: half of the tiles are computed."""
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_PAIR)
    i, j = pair_of(program - word(matrix, FIRST_PAIR))
    x, stride = wide_buffer(matrix, workspace, source)
    total = multiply_rows(x, stride, word(matrix, ROWS), i, j, TILE, DEPTH, INTERPRETED)
    put_both(matrix, workspace, to, total * alpha, i, j, TILE, INTERPRETED)


@triton.jit(do_not_specialize=["count", "left", "right", "to", "addend", "shifted"])
def combine(
    words, workspace, count, left, right, to, gamma, addend, beta, shifted, delta,
    TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """γLR + βS for each matrix, where the product of the squares L and R is symmetric: half of the tiles.

    That plus δI goes to the square `shifted` too, unless it is -1. Without a product, γ = 0, none is computed.
    """
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_PAIR)
    i, j = pair_of(program - word(matrix, FIRST_PAIR))
    rows = word(matrix, ROWS)
    a, stride = square_buffer(matrix, workspace, left)
    b, _ = square_buffer(matrix, workspace, right)
    depth = tl.where(gamma == 0, 0, rows)
    total = gamma * multiply(a, stride, b, stride, rows, depth, i, j, TILE, DEPTH, INTERPRETED)
    s, _ = square_buffer(matrix, workspace, addend)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < stride)[None, :]
    total += beta * take(s + row[:, None] * stride + column[None, :], mask, INTERPRETED).to(tl.float32)
    put_both(matrix, workspace, to, total, i, j, TILE, INTERPRETED)
    if shifted >= 0:
        total += tl.where(row[:, None] == column[None, :], delta, 0.0)
        put_both(matrix, workspace, shifted, total, i, j, TILE, INTERPRETED)


# Rows of tiles that neighbouring programs share columns of.
GROUP = tl.constexpr(8)


@triton.jit
def tile_of(index, down, across):
    """Tile (i, j): column by column within groups of GROUP rows of tiles, for the sake of the cache."""
    group = index // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = index - group * GROUP * across
    return group * GROUP + within % height, within // height


@triton.jit
def product_tile(
    matrix, workspace, index, source, square, scale, TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """A tile of sX + BX in fp32, its rows and columns."""
    rows = word(matrix, ROWS)
    down, across = (rows + TILE - 1) // TILE, (word(matrix, COLUMNS) + TILE - 1) // TILE
    i, j = tile_of(index, down, across)
    b, b_stride = square_buffer(matrix, workspace, square)
    x, stride = wide_buffer(matrix, workspace, source)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    total = multiply(b, b_stride, x, stride, rows, rows, i, j, TILE, DEPTH, INTERPRETED)
    mask = (row < rows)[:, None] & (column < stride)[None, :]
    total += scale * take(x + row[:, None] * stride + column[None, :], mask, INTERPRETED).to(tl.float32)
    return total, row, column


@triton.jit(do_not_specialize=["count", "source", "square", "to"])
def apply(
    words, workspace, count, source, square, to, scale,
    TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """X ← sX + BX for each matrix, into another buffer."""
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_TILE)
    index = program - word(matrix, FIRST_TILE)
    total, row, column = product_tile(matrix, workspace, index, source, square, scale, TILE, DEPTH, INTERPRETED)
    at, stride = wide_buffer(matrix, workspace, to)
    mask = (row < word(matrix, ROWS))[:, None] & (column < stride)[None, :]
    put(at + row[:, None] * stride + column[None, :], total, mask, INTERPRETED)


@triton.jit(do_not_specialize=["count", "source", "square"])
def finish(
    words, workspace, count, source, square, scale,
    BY: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same into the outputs of matrices that all lie the same way in memory."""
    program = tl.program_id(0).to(tl.int64) + tl.load(words + FIRST_RESULT)
    matrix = find_matrix(words, count, program, FIRST_RESULT)
    index = program - word(matrix, FIRST_RESULT)
    total, row, column = product_tile(matrix, workspace, index, source, square, scale, TILE, DEPTH, INTERPRETED)
    write_by(matrix, row, column, total, BY)
