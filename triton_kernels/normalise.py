"""X / (max(‖X‖F, ε)·d) in bf16, and the AOL prescale: what an iteration begins with.

Sums of squares are kept with a power of two near the largest element, so that none over- or underflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.matrix_access import put, read, take
from stepladder.triton_kernels.matrix_table import (
    COLUMNS,
    FIRST_BAND,
    FIRST_CHUNK,
    ROWS,
    find_matrix,
    square_buffer,
    wide_buffer,
    word,
)

# A chunk is this many tiles of a row of them.
CHUNK_TILES = tl.constexpr(8)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent, and 0 for what is below the normal numbers; at most 127."""
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent < -126, 0.0, power)


@triton.jit
def sum_squares(x):
    """A tile's exponent e and s: its sum of squares is 4^e·s. s is not finite where an element is not."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    # Within what the power and its inverse can be: the elements are then still below 4, or above 2^-23.
    exponent = tl.where(exponent < -126, -126, tl.where(exponent > 126, 126, exponent))
    x = x * power_of_two(-exponent)
    return exponent, tl.sum(tl.sum(x * x, 1), 0)


@triton.jit
def joined(exponent, total, other_exponent, other_total):
    """Two such sums as one."""
    greater = tl.maximum(exponent, other_exponent)
    first = total * power_of_two(2 * (exponent - greater))
    return greater, first + other_total * power_of_two(2 * (other_exponent - greater))


@triton.jit
def divisor_of(exponent, total, eps, divisor):
    """By which elements times 2^-exponent are divided; NaN where one of them is not finite."""
    norm = tl.sqrt_rn(total)
    floor = eps * power_of_two(-exponent)
    by = tl.where(norm < floor, floor, norm) * divisor
    by = tl.where(total == 0, 1.0, by)
    return tl.where(total - total == 0, by, total - total)


@triton.jit
def normalised(x, exponent, by):
    return tl.div_rn(x * power_of_two(-exponent), tl.zeros_like(x) + by)


@triton.jit
def chunk_of(matrix, program, TILE: tl.constexpr):
    """First row and column of a chunk, and how many chunks the matrix has."""
    across = (word(matrix, COLUMNS) + TILE * CHUNK_TILES - 1) // (TILE * CHUNK_TILES)
    down = (word(matrix, ROWS) + TILE - 1) // TILE
    chunk = program - word(matrix, FIRST_CHUNK)
    return chunk // across * TILE, chunk % across * (TILE * CHUNK_TILES), across * down


@triton.jit
def tiles_from(matrix, begin, TILE: tl.constexpr):
    """Of a chunk that begins at a column."""
    left = (word(matrix, COLUMNS) - begin + TILE - 1) // TILE
    return tl.minimum(left, CHUNK_TILES)


@triton.jit(do_not_specialize=["count"])
def measure(words, sums, count, TILE: tl.constexpr):
    """The sum of squares of each chunk: exponents of all of a matrix's chunks, then sums."""
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_CHUNK)
    first_row, first_column, chunks = chunk_of(matrix, program, TILE)
    row = first_row + tl.arange(0, TILE)
    exponent = tl.full((), -126, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    for tile in range(tiles_from(matrix, first_column, TILE)):
        column = first_column + tile * TILE + tl.arange(0, TILE)
        e, s = sum_squares(read(matrix, row, column))
        exponent, total = joined(exponent, total, e, s)
    at = sums + program + word(matrix, FIRST_CHUNK)
    tl.store(at, exponent.to(tl.float32))
    tl.store(at + chunks, total)


@triton.jit
def fold(sums, chunks, BLOCK: tl.constexpr):
    """Exponent and sum of a matrix."""
    lanes = tl.arange(0, BLOCK)
    exponents = tl.full((BLOCK,), -126, tl.int32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, chunks, BLOCK):
        mask = begin + lanes < chunks
        e = tl.load(sums + begin + lanes, mask=mask, other=-126.0).to(tl.int32)
        s = tl.load(sums + chunks + begin + lanes, mask=mask, other=0.0)
        exponents, totals = joined(exponents, totals, e, s)
    greatest = tl.max(exponents, 0)
    return greatest, tl.sum(totals * power_of_two(2 * (exponents - greatest)), 0)


@triton.jit(do_not_specialize=["count"])
def normalise(words, workspace, sums, count, eps, divisor, TILE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The first buffer of each matrix, one chunk a program."""
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_CHUNK)
    first_row, first_column, chunks = chunk_of(matrix, program, TILE)
    exponent, total = fold(sums + 2 * word(matrix, FIRST_CHUNK), chunks, 256)
    by = divisor_of(exponent, total, eps, divisor)
    to, stride = wide_buffer(matrix, workspace, 0)
    row = first_row + tl.arange(0, TILE)
    for tile in range(tiles_from(matrix, first_column, TILE)):
        column = first_column + tile * TILE + tl.arange(0, TILE)
        x = normalised(read(matrix, row, column), exponent, by)
        mask = (row < word(matrix, ROWS))[:, None] & (column < stride)[None, :]
        put(to + row[:, None] * stride + column[None, :], x, mask, INTERPRETED)


@triton.jit
def root_of_sums(sums):
    """√(Σⱼ|Aᵢⱼ|) of each row, and 1 for a row of zeros; [rows, 1]."""
    return tl.where(sums != 0, tl.sqrt_rn(sums), 1.0)[:, None]


@triton.jit(do_not_specialize=["count"])
def rescale_rows(
    words, workspace, count, BAND: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr
):
    """The AOL prescale: rows of the first buffer by the root of the sums of |A|, A the product in the first square.

    A program takes BAND rows and CHUNK columns of them, TILE at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    matrix = find_matrix(words, count, program, FIRST_BAND)
    across = (word(matrix, COLUMNS) + CHUNK - 1) // CHUNK
    band = program - word(matrix, FIRST_BAND)
    row = band // across * BAND + tl.arange(0, BAND)
    rows = word(matrix, ROWS)
    gram, gram_stride = square_buffer(matrix, workspace, 0)
    sums = tl.zeros((BAND,), tl.float32)
    for begin in range(0, gram_stride, TILE):
        column = begin + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & (column < gram_stride)[None, :]
        a = take(gram + row[:, None] * gram_stride + column[None, :], mask, INTERPRETED)
        sums += tl.sum(tl.abs(a.to(tl.float32)), 1)
    by = root_of_sums(sums)
    to, stride = wide_buffer(matrix, workspace, 0)
    first = band % across * CHUNK
    for begin in range(first, tl.minimum(first + CHUNK, stride), TILE):
        column = begin + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & (column < stride)[None, :]
        at = to + row[:, None] * stride + column[None, :]
        x = take(at, mask, INTERPRETED).to(tl.float32)
        put(at, tl.div_rn(x, tl.zeros_like(x) + by), mask, INTERPRETED)
