"""Tiles of matrices: those of the caller, in any dtype and layout, and those of the workspace, in bf16.

Triton's interpreter is wrong about bf16, in silence: arithmetic, products, stores and some loads. INTERPRETED kernels
therefore keep an operand of a product as fp32 that integers have rounded to bf16, and the workspace as int16: the
same values as on a GPU, where operands and workspace are bf16. Products are accumulated in fp32 in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.access import narrow, pointer, widen
from stepladder.triton_kernels.matrix_table import (
    BFLOAT16,
    BY_COLUMNS,
    BY_ROWS,
    COLUMNS,
    FLOAT32,
    INPUT,
    INPUT_COLUMN,
    INPUT_ROW,
    META,
    OUTPUT,
    OUTPUT_COLUMN,
    OUTPUT_ROW,
    ROWS,
    STRIDED,
    word,
)


@triton.jit
def rounded(x, INTERPRETED: tl.constexpr):
    """fp32 as an operand of a product: rounded to bf16, to nearest."""
    if INTERPRETED:
        return widen(narrow(x, tl.bfloat16), tl.bfloat16, tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def take(pointers, mask, INTERPRETED: tl.constexpr):
    """Operands out of the workspace, 0 outside of the mask."""
    x = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED:
        x = widen(x, tl.bfloat16, tl.float32)
    return x


@triton.jit
def put(pointers, x, mask, INTERPRETED: tl.constexpr):
    """Stores to the workspace, rounded to nearest."""
    if INTERPRETED:
        tl.store(pointers, narrow(x, tl.bfloat16), mask=mask)
    else:
        tl.store(pointers, x.to(tl.bfloat16), mask=mask)


@triton.jit
def place(matrix, row, column, ROW: tl.constexpr, COLUMN: tl.constexpr, BY: tl.constexpr):
    """Offsets and mask of the caller's elements. Where rows or columns go by 16 bytes, the compiler is to see it."""
    rows, columns = word(matrix, ROWS), word(matrix, COLUMNS)
    if BY == BY_ROWS:
        offsets = row[:, None] * (word(matrix, ROW) // 8 * 8) + column[None, :]
        columns = columns // 8 * 8
    elif BY == BY_COLUMNS:
        offsets = row[:, None] + column[None, :] * (word(matrix, COLUMN) // 8 * 8)
        rows = rows // 8 * 8
    else:
        offsets = row[:, None] * word(matrix, ROW) + column[None, :] * word(matrix, COLUMN)
    return offsets, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def read_as(matrix, row, column, S: tl.constexpr, BY: tl.constexpr):
    offsets, mask = place(matrix, row, column, INPUT_ROW, INPUT_COLUMN, BY)
    at = pointer(word(matrix, INPUT), S, BY != STRIDED)
    return widen(tl.load(at + offsets, mask=mask, other=0), S, tl.float32)


@triton.jit
def read_by(matrix, row, column, BY: tl.constexpr):
    """Elements of the input in fp32, [rows, columns], 0 outside of it."""
    dtype = word(matrix, META) & 3
    if dtype == FLOAT32:
        x = read_as(matrix, row, column, tl.float32, BY)
    elif dtype == BFLOAT16:
        x = read_as(matrix, row, column, tl.bfloat16, BY)
    else:
        x = read_as(matrix, row, column, tl.float16, BY)
    return x


@triton.jit
def read(matrix, row, column):
    """The same, however it lies in memory."""
    by = (word(matrix, META) >> 2) & 3
    if by == BY_ROWS:
        x = read_by(matrix, row, column, BY_ROWS)
    elif by == BY_COLUMNS:
        x = read_by(matrix, row, column, BY_COLUMNS)
    else:
        x = read_by(matrix, row, column, STRIDED)
    return x


@triton.jit
def write_as(matrix, row, column, x, S: tl.constexpr, BY: tl.constexpr):
    offsets, mask = place(matrix, row, column, OUTPUT_ROW, OUTPUT_COLUMN, BY)
    tl.store(pointer(word(matrix, OUTPUT), S, BY != STRIDED) + offsets, narrow(x, S), mask=mask)


@triton.jit
def write_by(matrix, row, column, x, BY: tl.constexpr):
    """fp32 elements to the output, rounded to its dtype."""
    dtype = word(matrix, META) & 3
    if dtype == FLOAT32:
        write_as(matrix, row, column, x, tl.float32, BY)
    elif dtype == BFLOAT16:
        write_as(matrix, row, column, x, tl.bfloat16, BY)
    else:
        write_as(matrix, row, column, x, tl.float16, BY)
