"""L ← βL + w·GGᵀ over matrices of different shapes in one launch: tiles on and below the diagonal, stored twice."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.access import pointer, widen
from stepladder.triton_kernels.matrix_table import BY_COLUMNS, BY_ROWS, STRIDED

# Words of a matrix. Tensors of the caller and their strides, rows of both, columns of G:
SQUARE = tl.constexpr(0)
SQUARE_ROW = tl.constexpr(1)
SQUARE_COLUMN = tl.constexpr(2)
INPUT = tl.constexpr(3)
INPUT_ROW = tl.constexpr(4)
INPUT_COLUMN = tl.constexpr(5)
ROWS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
WORDS = tl.constexpr(8)


@triton.jit
def band(matrix, first, k, G: tl.constexpr, BY: tl.constexpr, TILE: tl.constexpr):
    """Pointers to rows of G from one of them on, and which of them there are; by how much a column moves them."""
    row = first + tl.arange(0, TILE)
    by_row, by_column = tl.load(matrix + INPUT_ROW), tl.load(matrix + INPUT_COLUMN)
    rows = tl.load(matrix + ROWS)
    if BY == BY_ROWS:
        offsets = row[:, None] * (by_row // 8 * 8) + k[None, :]
        by_column = by_column * 0 + 1
    elif BY == BY_COLUMNS:
        by_column = by_column // 8 * 8
        offsets = row[:, None] + k[None, :] * by_column
        rows = rows // 8 * 8
    else:
        offsets = row[:, None] * by_row + k[None, :] * by_column
    return pointer(tl.load(matrix + INPUT), G, BY != STRIDED) + offsets, (row < rows)[:, None], by_column


@triton.jit
def operand(pointers, mask, G: tl.constexpr, INTERPRETED: tl.constexpr):
    """Elements of G for a product: the interpreter multiplies none of half precision."""
    x = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED:
        return widen(x, G, tl.float64 if G == tl.float64 else tl.float32)
    elif G == tl.bfloat16:
        return x.to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def update(
    words, tiles, scalars,
    T: tl.constexpr, G: tl.constexpr, BY: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile a program. scalars: β and w, in fp64."""
    tile = tl.load(tiles + tl.program_id(0))
    matrix = words + (tile >> 32) * WORDS
    top, left = ((tile >> 16) & 0xFFFF) * TILE, (tile & 0xFFFF) * TILE
    k = tl.arange(0, DEPTH)
    a_at, a_rows, step = band(matrix, top, k, G, BY, TILE)
    b_at, b_rows, _ = band(matrix, left, k, G, BY, TILE)
    columns = tl.load(matrix + COLUMNS)
    if BY == BY_ROWS:
        columns = columns // 8 * 8
    total = tl.zeros((TILE, TILE), T)
    for begin in range(0, columns, DEPTH):
        inside = (begin + k < columns)[None, :]
        a = operand(a_at + begin * step, inside & a_rows, G, INTERPRETED)
        b = operand(b_at + begin * step, inside & b_rows, G, INTERPRETED)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3", out_dtype=T)
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    rows = tl.load(matrix + ROWS)
    at = tl.load(matrix + SQUARE).to(tl.pointer_type(T))
    by_row, by_column = tl.load(matrix + SQUARE_ROW), tl.load(matrix + SQUARE_COLUMN)
    lower = (row[:, None] >= column[None, :]) & (row < rows)[:, None]
    here = at + row[:, None] * by_row + column[None, :] * by_column
    x = tl.load(here, mask=lower, other=0.0)
    x = tl.load(scalars).to(T) * x + tl.load(scalars + 1).to(T) * total
    tl.store(here, x, mask=lower)
    there = at + column[None, :] * by_row + row[:, None] * by_column
    tl.store(there, x, mask=lower & (row[:, None] > column[None, :]))
