"""Gradient norms for clipping: sums of each leaf, then norm and factor, then scaling in place."""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.access import (
    PART,
    VECTOR,
    clip_factor,
    inverse_scale,
    layout_of,
    load_gradient,
    store_gradient,
)
from stepladder.triton_kernels.sums import LANES, LEAF, combine, fold_lanes, fold_leaves
from stepladder.triton_kernels.table import (
    CHUNKS,
    FIRST,
    FOUND,
    MAX_NORM,
    META,
    NORM,
    NOT_FINITE,
    NUMEL,
    PARTIALS,
    SUMS,
    SUMS_AT,
    TENSORS,
    WIDE,
    addresses,
    column,
    find_tensor,
    is_last_program,
    number,
)


@triton.jit
def sum_leaves(
    table, tensor, columns, layout, meta, leaf, numel,
    T: tl.constexpr, KIND: tl.constexpr, LEAVES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """The sums of leaves [leaf, leaf + LEAVES); notes elements that are not finite."""
    here = leaf + tl.arange(0, LEAVES)
    begin = here[:, None] * LEAF + tl.arange(0, LANES)[None, :]  # [LEAVES, LANES]
    limit = numel // VECTOR * VECTOR if VECTORS else numel
    inverse = inverse_scale(table, T)
    total = tl.zeros((LEAVES, LANES), T)
    strange = tl.zeros((LEAVES, LANES), tl.int32)
    for row in range(tl.minimum((numel - leaf * LEAF + LANES - 1) // LANES, LEAF // LANES)):
        index = begin + row * LANES
        g = load_gradient(table, columns, layout, meta, index, index < limit, T, VECTORS)
        strange = strange | (g - g != 0).to(tl.int32)
        # Lanes beyond the end add zero, which changes no bit.
        total = combine(total, g * inverse, KIND)
    # Every writer writes the same.
    flag = tl.load(table + NOT_FINITE).to(tl.pointer_type(tl.int32)) + strange * 0
    tl.store(flag, strange, mask=strange != 0)
    sums = tl.load(table + SUMS).to(tl.pointer_type(tl.float64)) + column(table, SUMS_AT, tensor) + here
    tl.store(sums, fold_lanes(total, KIND).to(tl.float64), mask=here * LEAF < numel)


@triton.jit
def measure_chunk(
    table, tensor, columns, layout, meta, leaf, numel, T: tl.constexpr, KIND: tl.constexpr, LEAVES: tl.constexpr
):
    if (layout == 0) & (columns[1] % 16 == 0) & (numel % VECTOR == 0):
        sum_leaves(table, tensor, columns, layout, meta, leaf, numel, T, KIND, LEAVES, True)
    else:
        for k in range(tl.minimum(LEAVES, (numel + LEAF - 1) // LEAF - leaf)):
            sum_leaves(table, tensor, columns, layout, meta, leaf + k, numel, T, KIND, 1, False)


@triton.jit
def measure(table, KIND: tl.constexpr, LEAVES: tl.constexpr):
    """The sum of each leaf of the gradients, in each parameter's arithmetic type."""
    chunk = tl.program_id(0).to(tl.int64)
    if chunk < tl.load(table + CHUNKS):
        tensor = find_tensor(table, chunk)
        meta = column(table, META, tensor)
        numel = column(table, NUMEL, tensor)
        layout = layout_of(table, tensor)
        columns = addresses(table, tensor, 2)
        leaf = (chunk - column(table, FIRST, tensor)) * LEAVES
        if (meta & WIDE) != 0:
            measure_chunk(table, tensor, columns, layout, meta, leaf, numel, tl.float64, KIND, LEAVES)
        else:
            measure_chunk(table, tensor, columns, layout, meta, leaf, numel, tl.float32, KIND, LEAVES)


@triton.jit
def fold(table, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each tensor; the last one to end folds the tensors' parts, leaving norm and factor behind."""
    tensor = tl.program_id(0).to(tl.int64)
    partials = tl.load(table + PARTIALS).to(tl.pointer_type(tl.float64))
    leaves = (column(table, NUMEL, tensor) + LEAF - 1) // LEAF
    part = tl.full((), 0.0, tl.float64)
    if leaves > 0:
        sums = tl.load(table + SUMS).to(tl.pointer_type(tl.float64)) + column(table, SUMS_AT, tensor)
        if (column(table, META, tensor) & WIDE) != 0:
            part = fold_leaves(sums, leaves, tl.float64, KIND, BLOCK)
        else:
            part = fold_leaves(sums, leaves, tl.float32, KIND, BLOCK).to(tl.float64)
    tl.store(partials + tensor, part)
    if is_last_program(table):
        # The parts themselves are kept for whoever asks: they are folded in a copy behind them.
        n = tl.load(table + TENSORS)
        folded = partials + n
        lanes = tl.arange(0, BLOCK)
        for begin in range(0, n, BLOCK):
            mask = begin + lanes < n
            tl.store(folded + begin + lanes, tl.load(partials + begin + lanes, mask=mask, other=0.0), mask=mask)
        total = fold_leaves(folded, n, tl.float64, KIND, BLOCK)
        norm = tl.sqrt(total) if KIND == 1 else total
        # Added before dividing, as torch.nn.utils.clip_grad_norm_ does.
        factor = number(table, MAX_NORM) / (norm + tl.full((), 1e-6, tl.float64))
        to = tl.load(table + NORM).to(tl.pointer_type(tl.float64))
        tl.store(to, norm)
        tl.store(to + 1, tl.where(factor > 1.0, 1.0, factor))
        not_finite = tl.load(table + NOT_FINITE).to(tl.pointer_type(tl.int32))
        found = tl.load(not_finite)
        tl.store(tl.load(table + FOUND).to(tl.pointer_type(tl.float32)), tl.where(found != 0, 1.0, 0.0))
        tl.debug_barrier()
        tl.store(not_finite, 0)


@triton.jit
def scale_part(
    table, columns, layout, meta, begin, end, factor, T: tl.constexpr, TILE: tl.constexpr, VECTORS: tl.constexpr
):
    index = begin + tl.arange(0, TILE)
    mask = index < (end // VECTOR * VECTOR if VECTORS else end)
    g = load_gradient(table, columns, layout, meta, index, mask, T, VECTORS) * factor.to(T)
    store_gradient(table, columns, layout, meta, index, mask, g, VECTORS)


@triton.jit
def scale_chunk(table, columns, layout, meta, begin, end, factor, T: tl.constexpr, TILE: tl.constexpr):
    if (layout == 0) & (columns[1] % 16 == 0) & (end % VECTOR == 0):
        for tile in range((end - begin + TILE - 1) // TILE):
            scale_part(table, columns, layout, meta, begin + tile * TILE, end, factor, T, TILE, True)
    else:
        for part in range((end - begin + PART - 1) // PART):
            scale_part(table, columns, layout, meta, begin + part * PART, end, factor, T, PART, False)


@triton.jit
def scale(table, TILE: tl.constexpr, SUM_TILE: tl.constexpr):
    """Multiplies the gradients by the clip factor; where it is 1, nothing is written."""
    factor = clip_factor(table)
    chunk = tl.program_id(0).to(tl.int64)
    if (chunk < tl.load(table + CHUNKS)) & (factor != 1.0):
        tensor = find_tensor(table, chunk)
        meta = column(table, META, tensor)
        layout = layout_of(table, tensor)
        columns = addresses(table, tensor, 2)
        begin = (chunk - column(table, FIRST, tensor)) * SUM_TILE
        end = tl.minimum(begin + SUM_TILE, column(table, NUMEL, tensor))
        if (meta & WIDE) != 0:
            scale_chunk(table, columns, layout, meta, begin, end, factor, tl.float64, TILE)
        else:
            scale_chunk(table, columns, layout, meta, begin, end, factor, tl.float32, TILE)
