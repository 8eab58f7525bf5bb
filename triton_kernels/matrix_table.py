"""The table that kernels over many matrices of different shapes are told by: some words for each matrix.

A matrix is seen with no more rows than columns; tall ones are read and written with their strides exchanged. In the
workspace its elements are bf16, row after row, each row filled up with zeros to a multiple of 8 elements: 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Words of a matrix. Tensors of the caller:
INPUT = tl.constexpr(0)
INPUT_ROW = tl.constexpr(1)  # strides
INPUT_COLUMN = tl.constexpr(2)
OUTPUT = tl.constexpr(3)
OUTPUT_ROW = tl.constexpr(4)
OUTPUT_COLUMN = tl.constexpr(5)
META = tl.constexpr(6)
# Sizes, and strides of a row in units of 8 elements:
ROWS = tl.constexpr(7)
COLUMNS = tl.constexpr(8)
WIDE_STRIDE = tl.constexpr(9)
SQUARE_STRIDE = tl.constexpr(10)
# Where the first of its buffers of each shape begins in the workspace, in units of 64 elements; by how much they are
# apart, in units of 8:
WIDE = tl.constexpr(11)
SQUARE = tl.constexpr(12)
WIDE_STEP = tl.constexpr(13)
SQUARE_STEP = tl.constexpr(14)
# The first program of each kind of launch, and the first sum of its chunks:
FIRST_CHUNK = tl.constexpr(15)
FIRST_PAIR = tl.constexpr(16)
FIRST_TILE = tl.constexpr(17)
FIRST_BAND = tl.constexpr(18)
FIRST_RESULT = tl.constexpr(19)
WORDS = tl.constexpr(20)

# The meta word: a dtype, then how both tensors lie in memory.
FLOAT32, BFLOAT16, FLOAT16 = (tl.constexpr(code) for code in range(3))
# Rows, or columns, can be accessed by 16 bytes, or neither.
BY_ROWS, BY_COLUMNS, STRIDED = (tl.constexpr(code) for code in range(3))


@triton.jit
def word(matrix, i: tl.constexpr):
    return tl.load(matrix + i)


@triton.jit
def find_matrix(words, count, program, FIRST: tl.constexpr):
    """Words of the last matrix whose first program is not beyond `program`."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) >> 1
        begins = tl.load(words + middle.to(tl.int64) * WORDS + FIRST) <= program
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return words + low.to(tl.int64) * WORDS


@triton.jit
def wide_buffer(matrix, workspace, i):
    """A buffer for the matrix itself, and its stride."""
    at = word(matrix, WIDE) * 64 + word(matrix, WIDE_STEP) * 8 * i
    return workspace + at, word(matrix, WIDE_STRIDE) * 8


@triton.jit
def square_buffer(matrix, workspace, i):
    """A buffer for a product, [rows, rows], and its stride."""
    at = word(matrix, SQUARE) * 64 + word(matrix, SQUARE_STEP) * 8 * i
    return workspace + at, word(matrix, SQUARE_STRIDE) * 8
