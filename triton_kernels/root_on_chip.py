"""Whole inverse roots in fp32, one program a matrix, which stays on the chip.

What fp32 does not bring to convergence is left to the attempt in fp64, whose launches these matrices share with others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.root_elements import largest_bits, probe_at, read, root_of_power
from stepladder.triton_kernels.root_records import first_start_for, next_phase, own_words, power_of_two, status_of
from stepladder.triton_kernels.root_table import (
    CONVERGED,
    DELTA,
    DONE,
    DUE,
    FAILED,
    IDLE,
    INPUT,
    INPUT_COLUMN,
    INPUT_ROW,
    NEAREST,
    NON_FINITE,
    NONE,
    ON_CHIP,
    OUTPUT,
    PHASE,
    RESULT,
    SCALE,
    SIZE,
    START_WORDS,
    STEPPING,
    STEPS,
    UNIT,
    WIDE,
    offsets,
    set_number,
    set_word,
    word,
)


@triton.jit
def multiplied(a, b, lower):
    """The product of two symmetric matrices that commute, made symmetric."""
    x = tl.dot(a, b, input_precision="tf32x3")
    return tl.where(lower, x, tl.trans(x))


@triton.jit
def raised(t, squarings, lower):
    for _ in range(squarings):
        t = multiplied(t, t, lower)
    return t


@triton.jit
def sum_of_squares(x):
    return tl.sum(tl.sum(x * x, 1), 0)


@triton.jit
def largest_eigenvalue(d, n, lower, SIDE: tl.constexpr, SQUARINGS: tl.constexpr, MULTIPLICATIONS: tl.constexpr):
    """From below, by a power method on a power of D."""
    lanes = tl.arange(0, SIDE)
    power = d
    vanished = False
    for _ in range(SQUARINGS):
        norm = tl.sqrt(sum_of_squares(power))
        vanished = vanished | (norm == 0)
        power = power * tl.where(norm > 0, 1.0 / norm, 0.0)
        power = multiplied(power, power, lower)
    v = tl.where(lanes < n, probe_at(lanes), 0.0)
    v = v / tl.sqrt(n.to(tl.float32))
    for _ in range(MULTIPLICATIONS):
        v = tl.sum(power * v[None, :], 1)
        v = v / tl.sqrt(tl.sum(v * v, 0))
    top = tl.sum(v * tl.sum(d * v[None, :], 1), 0) / tl.sum(v * v, 0)
    return tl.where(vanished, 0.0, top)


@triton.jit(do_not_specialize=["relative", "end_start", "most", "p", "gate"])
def whole_root(
    words, counters, starts, damping, relative, end_start, most, p, gate,
    NEAR: tl.constexpr, GROWTH: tl.constexpr, SQUARINGS: tl.constexpr, MULTIPLICATIONS: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """The fast attempt on matrices of at most SIDE rows. Those that it leaves are counted at the gate."""
    matrix = own_words(words)
    n = word(matrix, SIZE)
    eps = tl.load(damping)
    row = tl.arange(0, SIDE)
    greatest = largest_bits(read(matrix, 0, 0, row, row))
    finite = greatest < 0x7F800000
    largest = greatest.to(tl.float32, bitcast=True).to(tl.float64)
    unit = power_of_two(tl.where(finite, tl.maximum(largest, eps), 1.0))
    good = finite & (unit > 0)
    unit = tl.where(unit > 0, unit, 1.0)
    delta = eps / unit
    scale = unit * 0.0 + 1.0
    best = scale * 0.0 + float("inf")
    steps = n * 0
    if good:
        inside = row < n
        lower = row[:, None] >= row[None, :]
        identity = tl.where((row[:, None] == row[None, :]) & inside[:, None], 1.0, 0.0)
        # What is above the diagonal is read below it.
        of = word(matrix, INPUT).to(tl.pointer_type(tl.float32))
        down, across = tl.maximum(row[:, None], row[None, :]), tl.minimum(row[:, None], row[None, :])
        of_row, of_column = word(matrix, INPUT_ROW), word(matrix, INPUT_COLUMN)
        a = tl.load(of + down * of_row + across * of_column, mask=inside[:, None] & inside[None, :], other=0.0)
        if relative != 0:
            d = (a.to(tl.float64) / unit).to(tl.float32)
            top = largest_eigenvalue(d, n, lower, SIDE, SQUARINGS, MULTIPLICATIONS)
            delta += tl.load(damping + 1) * top
        d = (a.to(tl.float64) / unit + identity * delta).to(tl.float32)
        squared = multiplied(d, d, lower)
        scale = tl.sqrt(tl.sqrt(sum_of_squares(squared)).to(tl.float64)) * 1.0009765625
        inverse = (1.0 / scale).to(tl.float32)
        m = d * inverse
        first = first_start_for(starts, delta, scale, 0, end_start)
        at = starts + first * START_WORDS
        t = tl.load(at + 1).to(tl.float32) * m + tl.load(at + 2).to(tl.float32) * (squared * inverse * inverse)
        x = t + tl.load(at).to(tl.float32) * identity
        squarings = p >> 1
        m = multiplied(raised(x, squarings, lower), m, lower)
        for k in range(first + 1, end_start):
            at = starts + k * START_WORDS
            t = tl.load(at + 1).to(tl.float32) * m + tl.load(at + 2).to(tl.float32) * multiplied(m, m, lower)
            t += tl.load(at).to(tl.float32) * identity
            x = multiplied(x, t, lower)
            m = multiplied(raised(t, squarings, lower), m, lower)
        steps += end_start - first
        over = (1.0 / p).to(tl.float32)
        tried = 0
        phase = STEPPING + tried
        while phase == STEPPING:
            distance = tl.sqrt(sum_of_squares(m - identity)).to(tl.float64)
            nearer, phase = next_phase(distance, best, tried, most, NEAR, GROWTH)
            best = tl.where(nearer, distance, best)
            if phase != IDLE:
                t = (1.0 + over) * identity - m * over
                x = multiplied(x, t, lower)
                steps += 1
            if phase == STEPPING:
                m = multiplied(raised(t, squarings, lower), m, lower)
            tried += 1
        if status_of(best, NEAR) == CONVERGED:
            factor = root_of_power(scale, p) * root_of_power(unit, p)
            to = word(matrix, OUTPUT).to(tl.pointer_type(tl.float32))
            x = (x.to(tl.float64) * factor).to(tl.float32)
            tl.store(to + offsets(row, row, n), x, mask=inside[:, None] & inside[None, :])
    done = good & (status_of(best, NEAR) == CONVERGED)
    tl.debug_barrier()
    set_number(matrix, UNIT, unit)
    set_number(matrix, SCALE, scale)
    set_number(matrix, DELTA, delta)
    set_word(matrix, DUE, tl.where(good & (done == 0), WIDE, NONE))
    set_word(matrix, DONE, tl.where(done, ON_CHIP, NONE))
    set_word(matrix, PHASE, IDLE)
    set_word(matrix, STEPS, steps)
    set_word(matrix, NEAREST, 0)
    set_word(matrix, RESULT, tl.where(done, CONVERGED, tl.where(finite, FAILED, NON_FINITE)))
    if good & (done == 0):
        tl.atomic_add(counters + gate, 1)
