"""The step's kernels. One program works on one chunk of one tensor; no rule is named here."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.access import (
    PART,
    VECTOR,
    is_aligned,
    layout_of,
    load,
    load_gradient,
    load_states,
    narrow,
    narrow_stochastically,
    read_scale,
    rounding_bits,
    seen,
    store,
    store_gradient,
    unscaled,
    widen,
)
from stepladder.triton_kernels.arithmetic import root
from stepladder.triton_kernels.sums import LANES, LEAF, fold_lanes, fold_leaves
from stepladder.triton_kernels.table import (
    CHUNK_TILES,
    CHUNKS,
    FIRST,
    META,
    NUMEL,
    RATIOS,
    SEED,
    STOCHASTIC,
    SUMS,
    SUMS_AT,
    addresses,
    column,
    count_steps,
    find_tensor,
    group_of,
    group_word,
    is_last_program,
    is_skipped,
    next_step,
    next_time,
    read_hyper,
)


@triton.jit
def change(
    table, tensor, columns, layout, meta, begin, end, s, ratio, scale,
    CHANGE: tl.constexpr, STATES: tl.constexpr, NORMS: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Steps elements [begin, begin + TILE) of a tensor, those before `end`, by 16-byte accesses where VECTORS."""
    index = begin + tl.arange(0, TILE)  # [TILE]
    mask = index < (end // VECTOR * VECTOR if VECTORS else end)  # a multiple, so that the compiler sees it
    w = load(table, columns, layout, 0, index, mask, P, T, VECTORS)
    states = load_states(table, columns, layout, index, mask, STATES, S, T, VECTORS)
    g = unscaled(load_gradient(table, columns, layout, meta, index, mask, T, VECTORS), scale)
    if scale[0]:
        store_gradient(table, columns, layout, meta, index, mask, g, VECTORS)
    g = seen(g, scale)
    if NORMS:
        w, states = CHANGE(s, ratio, w, g, states)
    else:
        w, states = CHANGE(s, w, g, states)
    bits = narrow(w, P)
    if P == tl.bfloat16:
        if (meta & STOCHASTIC) != 0:
            seed = group_word(table, group_of(meta), SEED)
            step = next_step(table, tensor, meta)
            random = rounding_bits(seed, step, (meta >> 32) & 0xFFFFFFFF, begin // 8, TILE // 8)
            bits = narrow_stochastically(w, random)
    store(table, columns, layout, 0, index, mask, bits, P, VECTORS)
    for k in tl.static_range(STATES):
        store(table, columns, layout, 2 + k, index, mask, narrow(states[k], S), S, VECTORS)


@triton.jit
def step(
    table,
    SCALARS: tl.constexpr, CHANGE: tl.constexpr, STATES: tl.constexpr, NORMS: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """An elementwise rule, or where NORMS the last pass of a norm-based one."""
    if not is_skipped(table):
        chunk = tl.program_id(0).to(tl.int64)
        if chunk < tl.load(table + CHUNKS):
            tensor = find_tensor(table, chunk)
            meta = column(table, META, tensor)
            numel = column(table, NUMEL, tensor)
            layout = layout_of(table, tensor)
            columns = addresses(table, tensor, 2 + STATES)
            aligned = is_aligned(columns, layout, 2 + STATES)
            s = SCALARS(read_hyper(table, group_of(meta)), next_time(table, tensor, meta), T)
            scale = read_scale(table, meta, T)
            ratio = 1.0
            if NORMS:
                ratio = tl.load(tl.load(table + RATIOS).to(tl.pointer_type(tl.float64)) + tensor).to(T)
            tiles = tl.load(table + CHUNK_TILES)
            first = (chunk - column(table, FIRST, tensor)) * tiles
            tiles = tl.minimum(tiles, (numel + TILE - 1) // TILE - first)
            for tile in range(tiles):
                begin = (first + tile) * TILE
                end = tl.minimum(begin + TILE, numel)
                if aligned & (end % VECTOR == 0):
                    change(
                        table, tensor, columns, layout, meta, begin, end, s, ratio, scale,
                        CHANGE, STATES, NORMS, P, S, T, TILE, True,
                    )  # fmt: skip
                else:
                    for part in range((end - begin + PART - 1) // PART):
                        change(
                            table, tensor, columns, layout, meta, begin + part * PART, end, s, ratio, scale,
                            CHANGE, STATES, NORMS, P, S, T, PART, False,
                        )  # fmt: skip
        if is_last_program(table):
            count_steps(table, 128)


@triton.jit
def sum_leaves(
    table, tensor, columns, layout, meta, leaf, numel, s, scale,
    PREPARE: tl.constexpr, MEASURE: tl.constexpr, PREPARED: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, T: tl.constexpr, LEAVES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """The first pass over leaves [leaf, leaf + LEAVES): states, and the two sums of each."""
    here = leaf + tl.arange(0, LEAVES)
    begin = here[:, None] * LEAF + tl.arange(0, LANES)[None, :]  # [LEAVES, LANES]
    limit = numel // VECTOR * VECTOR if VECTORS else numel
    first = tl.zeros((LEAVES, LANES), T)
    second = tl.zeros((LEAVES, LANES), T)
    for row in range(tl.minimum((numel - leaf * LEAF + LANES - 1) // LANES, LEAF // LANES)):
        index = begin + row * LANES
        mask = index < limit
        w = load(table, columns, layout, 0, index, mask, P, T, VECTORS)
        g = seen(unscaled(load_gradient(table, columns, layout, meta, index, mask, T, VECTORS), scale), scale)
        states = load_states(table, columns, layout, index, mask, PREPARED, S, T, VECTORS)
        if PREPARED > 0:
            changed = PREPARE(s, g, states)
            # What follows sees the states as they are stored.
            states = ()
            for k in tl.static_range(PREPARED):
                bits = narrow(changed[k], S)
                store(table, columns, layout, 2 + k, index, mask, bits, S, VECTORS)
                states = states + (widen(bits, S, T),)
        a, b = MEASURE(s, w, g, states)
        # Lanes beyond the end add zero, which changes no bit.
        a = tl.where(mask, a, 0.0)
        b = tl.where(mask, b, 0.0)
        first = first + a * a
        second = second + b * b
    leaves = (numel + LEAF - 1) // LEAF
    sums = tl.load(table + SUMS).to(tl.pointer_type(tl.float64)) + column(table, SUMS_AT, tensor) + here
    tl.store(sums, fold_lanes(first, 1).to(tl.float64), mask=here < leaves)
    tl.store(sums + leaves, fold_lanes(second, 1).to(tl.float64), mask=here < leaves)


@triton.jit
def prepare(
    table,
    SCALARS: tl.constexpr, PREPARE: tl.constexpr, MEASURE: tl.constexpr, PREPARED: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, T: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """The first pass of a norm-based rule: states, and the two sums of each leaf, by the fixed tree."""
    if not is_skipped(table):
        chunk = tl.program_id(0).to(tl.int64)
        if chunk < tl.load(table + CHUNKS):
            tensor = find_tensor(table, chunk)
            meta = column(table, META, tensor)
            numel = column(table, NUMEL, tensor)
            layout = layout_of(table, tensor)
            columns = addresses(table, tensor, 2 + PREPARED)
            s = SCALARS(read_hyper(table, group_of(meta)), next_time(table, tensor, meta), T)
            scale = read_scale(table, meta, T)
            leaf = (chunk - column(table, FIRST, tensor)) * LEAVES
            if is_aligned(columns, layout, 2 + PREPARED) & (numel % VECTOR == 0):
                sum_leaves(
                    table, tensor, columns, layout, meta, leaf, numel, s, scale,
                    PREPARE, MEASURE, PREPARED, P, S, T, LEAVES, True,
                )  # fmt: skip
            else:
                for k in range(tl.minimum(LEAVES, (numel + LEAF - 1) // LEAF - leaf)):
                    sum_leaves(
                        table, tensor, columns, layout, meta, leaf + k, numel, s, scale,
                        PREPARE, MEASURE, PREPARED, P, S, T, 1, False,
                    )  # fmt: skip


@triton.jit
def ratio(table, SCALARS: tl.constexpr, RATIO: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each tensor: its leaves folded, and the ratio from the two norms."""
    if not is_skipped(table):
        tensor = tl.program_id(0).to(tl.int64)
        meta = column(table, META, tensor)
        leaves = (column(table, NUMEL, tensor) + LEAF - 1) // LEAF
        if leaves > 0:
            s = SCALARS(read_hyper(table, group_of(meta)), next_time(table, tensor, meta), T)
            sums = tl.load(table + SUMS).to(tl.pointer_type(tl.float64)) + column(table, SUMS_AT, tensor)
            first = root(fold_leaves(sums, leaves, T, 1, BLOCK))
            second = root(fold_leaves(sums + leaves, leaves, T, 1, BLOCK))
            ratios = tl.load(table + RATIOS).to(tl.pointer_type(tl.float64))
            tl.store(ratios + tensor, RATIO(s, first, second).to(tl.float64))
