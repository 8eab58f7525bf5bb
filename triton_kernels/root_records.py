"""How far each matrix has come on its way to the inverse root: one program a matrix, between the products."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.root_table import (
    BEST,
    CONVERGED,
    DELTA,
    DONE,
    DUE,
    ENDING,
    FAILED,
    FAST,
    FIRST_ROWS,
    FIRST_TILE,
    FRESH,
    IDLE,
    NEAREST,
    NON_FINITE,
    NONE,
    NORM,
    PHASE,
    RESULT,
    ROWS,
    SCALE,
    SIZE,
    STALLED,
    START,
    START_WORDS,
    STARTING,
    STEPPING,
    STEPS,
    TILES,
    TRIED,
    UNIT,
    WIDE,
    WORDS,
    M,
    X,
    fold,
    next_x,
    number,
    set_number,
    set_word,
    word,
)

# Sums that are folded at a time.
BLOCK = tl.constexpr(128)


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most x, a double; 0 for 0."""
    # What is below the normal numbers is brought among them.
    small = x < 2.2250738585072014e-308
    bits = tl.where(small, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
    power = (bits & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where(small, power * 5.551115123125783e-17, power)


@triton.jit
def own_words(words):
    return words + tl.program_id(0).to(tl.int64) * WORDS


@triton.jit(do_not_specialize=["fast_size", "gate_fast", "gate_wide"])
def prepare(words, counters, sums, damping, fast_size, gate_fast, gate_wide):
    """The unit, the absolute part of δ, and which attempt is due first; for matrices whose tiles were measured.

    The fast one is for those of at most `fast_size` rows. damping: eps, relative_eps, in fp64.
    """
    matrix = own_words(words)
    n = word(matrix, SIZE)
    eps = tl.load(damping)
    tiles = word(matrix, TILES)
    lanes = tl.arange(0, BLOCK)
    greatest = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, tiles, BLOCK):
        at = sums + word(matrix, FIRST_TILE) + first + lanes
        greatest = tl.maximum(greatest, tl.load(at, mask=first + lanes < tiles, other=0.0))
    bits = tl.max(greatest, 0).to(tl.int32)
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True).to(tl.float64)
    unit = power_of_two(tl.where(finite, tl.maximum(largest, eps), 1.0))
    good = finite & (unit > 0)
    fast = good & (n <= fast_size)
    due = tl.where(good, tl.where(fast, FAST, WIDE), NONE)
    unit = tl.where(unit > 0, unit, 1.0)
    set_number(matrix, UNIT, unit)
    set_number(matrix, SCALE, unit * 0.0 + 1.0)
    set_number(matrix, DELTA, eps / unit)
    set_word(matrix, DUE, due)
    set_word(matrix, DONE, NONE)
    set_word(matrix, PHASE, IDLE)
    set_word(matrix, STEPS, 0)
    set_word(matrix, NEAREST, 0)
    set_word(matrix, RESULT, tl.where(finite, FAILED, NON_FINITE))
    if good:
        tl.atomic_add(counters + tl.where(fast, gate_fast, gate_wide), 1)


@triton.jit(do_not_specialize=["first"])
def note_norm(words, sums, first):
    """The norm of the matrix whose tiles were summed last; 0 if an earlier one was, unless this is the first."""
    matrix = own_words(words)
    if word(matrix, DUE) != NONE:
        before = number(matrix, NORM)
        norm = tl.sqrt(fold(sums + word(matrix, FIRST_TILE), word(matrix, TILES)))
        tl.debug_barrier()
        set_number(matrix, NORM, tl.where((first == 0) & (before == 0), 0.0, norm))


@triton.jit(do_not_specialize=["rows", "turn"])
def damp(words, sums, damping, rows, turn):
    """Adds the part of δ that is relative to the largest eigenvalue, which the power method's last turn has summed."""
    matrix = own_words(words)
    if word(matrix, DUE) != NONE:
        top = fold(sums + (1 - (turn & 1)) * rows + word(matrix, FIRST_ROWS), word(matrix, ROWS))
        delta = number(matrix, DELTA) + tl.load(damping + 1) * tl.where(number(matrix, NORM) == 0, 0.0, top)
        tl.debug_barrier()
        set_number(matrix, DELTA, delta)


@triton.jit
def first_start_for(starts, delta, scale, first_start, end_start):
    """The last of the polynomials that allows for what is known of the condition; else the first of them."""
    known = tl.where(delta > 0, scale / delta, float("inf"))
    start = tl.full((), first_start, tl.int32)
    for i in range(first_start, end_start):
        start = tl.where(tl.load(starts + i * START_WORDS + 3) >= known, i, start)
    return start


@triton.jit(do_not_specialize=["due", "first_start", "end_start", "gate"])
def settle(words, counters, sums, starts, due, first_start, end_start, gate):
    """From the sums of D²: the scale s = √‖D²‖F, and the first polynomial, the last that allows for what is known."""
    matrix = own_words(words)
    if word(matrix, DUE) == due:
        squares = fold(sums + word(matrix, FIRST_TILE), word(matrix, TILES))
        scale = tl.sqrt(tl.sqrt(squares)) * 1.0009765625
        start = first_start_for(starts, number(matrix, DELTA), scale, first_start, end_start)
        tl.debug_barrier()
        set_number(matrix, SCALE, scale)
        set_number(matrix, BEST, scale * 0.0 + float("inf"))
        set_word(matrix, PHASE, STARTING)
        set_word(matrix, START, start)
        set_word(matrix, FRESH, 1)
        set_word(matrix, TRIED, 0)
        set_word(matrix, M, 0)
        set_word(matrix, X, 0)
        set_word(matrix, NEAREST, 0)
        tl.atomic_add(counters + gate, 1)


@triton.jit
def next_phase(distance, best, tried, most, NEAR: tl.constexpr, GROWTH: tl.constexpr):
    """Whether Newton's steps go on from M at this distance from I, and whether it is the nearest so far; the phase."""
    goes_on = (tried < most) & (distance <= GROWTH * best) & (distance < float("inf"))
    nearer = goes_on & (distance < best)
    phase = tl.where(goes_on, tl.where(distance <= NEAR, ENDING, STEPPING), IDLE)
    return nearer, phase


@triton.jit
def status_of(best, NEAR: tl.constexpr):
    return tl.where(best <= NEAR, CONVERGED, tl.where(best < 1.0, STALLED, FAILED))


@triton.jit(do_not_specialize=["due", "end_start", "most", "p", "gate", "gate_wide"])
def decide(
    words, counters, sums, due, end_start, most, p, gate, gate_wide,
    NEAR: tl.constexpr, GROWTH: tl.constexpr,
):  # fmt: skip
    """After the products of one step: where they are, and what comes next. Who goes on is counted for the next step."""
    matrix = own_words(words)
    phase = word(matrix, PHASE)
    if phase != IDLE:
        fresh, x, nearest = word(matrix, FRESH), word(matrix, X), word(matrix, NEAREST)
        m, start, tried = word(matrix, M), word(matrix, START), word(matrix, TRIED)
        steps, best = word(matrix, STEPS), number(matrix, BEST)
        distance = tl.sqrt(fold(sums + word(matrix, FIRST_TILE), word(matrix, TILES)))
        tl.debug_barrier()
        x = tl.where(fresh != 0, x, next_x(x, nearest))
        if phase == ENDING:
            nearest = x
            after = phase * 0 + IDLE
        else:
            m = (m + tl.where(p == 1, 2, 1)) & 3
            starting = (phase == STARTING) & (start + 1 < end_start)
            start += 1
            nearer, after = next_phase(distance, best, tried, most, NEAR, GROWTH)
            nearer = nearer & (starting == 0)
            nearest = tl.where(nearer | starting, x, nearest)
            best = tl.where(nearer, distance, best)
            tried += tl.where(starting, 0, 1)
            after = tl.where(starting, STARTING, after).to(tl.int64)
        set_word(matrix, PHASE, after)
        set_word(matrix, FRESH, 0)
        set_word(matrix, X, x)
        set_word(matrix, NEAREST, nearest)
        set_word(matrix, M, m)
        set_word(matrix, START, start)
        set_word(matrix, TRIED, tried)
        set_word(matrix, STEPS, steps + 1)
        set_number(matrix, BEST, best)
        if after != IDLE:
            tl.atomic_add(counters + gate, 1)
        else:
            status = status_of(best, NEAR)
            again = (due == FAST) & (status != CONVERGED)
            set_word(matrix, DUE, tl.where(again, WIDE, NONE))
            set_word(matrix, DONE, tl.where(status == FAILED, NONE, due))
            set_word(matrix, RESULT, status)
            if again:
                tl.atomic_add(counters + gate_wide, 1)
