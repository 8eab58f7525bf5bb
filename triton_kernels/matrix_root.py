"""Inverse roots of many symmetric matrices at once, by minimax polynomials and coupled Newton steps.

Papers: Higham, Functions of Matrices, 2008; Anil et al. 2020, arXiv:2002.09018.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepladder.reference.matrix_root import (
    EXPONENTS,
    FAST_CONDITION,
    FAST_SIZE,
    FAST_STEPS,
    GROWTH,
    MULTIPLICATIONS,
    NEAR_IDENTITY,
    SQUARINGS,
    WIDE_CONDITION,
    WIDE_STEPS,
    RootInfo,
)
from stepladder.root_starts import starts
from stepladder.triton_kernels import newton_schulz, root_elements, root_on_chip, root_products, root_records
from stepladder.triton_kernels import root_table as table
from stepladder.triton_kernels.upload import together

WORDS = table.WORDS.value
FAST, WIDE = table.FAST.value, table.WIDE.value
TYPES = {FAST: "fp32", WIDE: "fp64"}
# By the arithmetic of an attempt. One list of tiles serves all launches.
TILE = 64
TILINGS = {FAST: newton_schulz.Tiling(TILE, 32, 8, 3), WIDE: newton_schulz.Tiling(TILE, 16, 8, 2)}
# Warps of a program that keeps a matrix on the chip, by its side, up to each of these. One of 64 spills registers.
ON_CHIP = {16: 1, 32: 4}
# Columns that a program of the power method takes at a time.
DEPTH = 32
# Programs for each multiprocessor, which go through the tiles of a launch.
PROGRAMS = 4
# What the workspace of matrices that share launches may take; a matrix that takes more has launches of its own.
WORKSPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class Kernel(newton_schulz.Kernel):
    """A Triton function and the constants that its launches pass.

    Attributes:
        element: Of the workspace.
    """

    element: str = "fp32"

    def signature(self) -> dict[str, str]:
        """Types of the parameters, as a launch on a GPU passes them."""
        pointers = dict.fromkeys(("words", "tiles", "counters"), "*i64") | {"narrow": "*fp32", "wide": "*fp64"}
        pointers |= dict.fromkeys(("sums", "starts", "damping"), "*fp64") | {"workspace": f"*{self.element}"}
        return {name: "constexpr" if name in self.constants else pointers.get(name, "i32")
                for name in self.function.arg_names}  # fmt: skip


def _kernel(
    function: Any, name: str, warps: int = 4, stages: int = 3, element: str = "fp32", **constants: Any
) -> Kernel:
    return Kernel(f"matrix_root_{name}", function, constants, warps, stages, element)


def product_kernel(attempt: int) -> Kernel:
    tiling = TILINGS[attempt]
    return _kernel(root_products.product, f"product_{TYPES[attempt]}", tiling.warps, tiling.stages, TYPES[attempt],
                   TILE=tiling.tile, DEPTH=tiling.depth)  # fmt: skip


def elements_kernel(function: Any, attempt: int = FAST) -> Kernel:
    """A pass over elements."""
    element = TYPES[attempt]
    return _kernel(function, f"{function.__name__}_{element}", 8, element=element, TILE=TILE)


def vector_kernel() -> Kernel:
    return _kernel(root_elements.multiply_vector, "multiply_vector", 8, TILE=TILE, DEPTH=DEPTH)


def record_kernel(function: Any) -> Kernel:
    """One program a matrix. Of a single warp, all of which has read a record before it writes there."""
    constants = {"NEAR": NEAR_IDENTITY, "GROWTH": GROWTH} if function is root_records.decide else {}
    return _kernel(function, function.__name__, 1, **constants)


def on_chip_kernel(side: int) -> Kernel:
    """The whole fast attempt on matrices of at most `side` rows."""
    return _kernel(
        root_on_chip.whole_root, f"whole_root_{side}", ON_CHIP[side], 2, NEAR=NEAR_IDENTITY, GROWTH=GROWTH,
        SQUARINGS=SQUARINGS, MULTIPLICATIONS=MULTIPLICATIONS, SIDE=side,
    )  # fmt: skip


def kernels() -> list[Kernel]:
    """Every kernel that is ever launched."""
    found = [elements_kernel(root_elements.measure), elements_kernel(root_elements.finish), vector_kernel()]
    records = (
        root_records.prepare,
        root_records.note_norm,
        root_records.damp,
        root_records.settle,
        root_records.decide,
    )
    found += [record_kernel(function) for function in records]
    found += [on_chip_kernel(side) for side in ON_CHIP]
    for attempt in (FAST, WIDE):
        found += [product_kernel(attempt)]
        found += [elements_kernel(function, attempt) for function in (root_elements.form, root_elements.begin)]
    return found


@dataclass
class Batch:
    """Matrices of one tensor [B, n, n] and their roots.

    Attributes:
        words: Their words in the table, [B, WORDS].
        size: n.
        source: The matrices.
        result: The roots, and what is known of them.
    """

    words: np.ndarray[Any, np.dtype[np.int64]]
    size: int
    source: Tensor
    result: tuple[Tensor, RootInfo]

    @property
    def bytes(self) -> int:
        """Of one matrix's buffers."""
        return 8 * _room(self.size)


def _room(n: int) -> int:
    """Doubles of the buffers of a matrix."""
    return _ceil(table.BUFFERS_OF_A_MATRIX.value * n * _ceil(n, 8) * 8, 64) * 64


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)


def _side(n: int) -> int:
    """The side of the kernel that keeps a matrix on the chip, or 0."""
    return min((side for side in ON_CHIP if n <= side), default=0)


def _tiles(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tiles on and below the diagonal: row and column of each, 16 bits for both."""
    rows, columns = np.tril_indices(_ceil(n, TILE))
    return rows << 16 | columns


def _describe(source: Tensor) -> Batch:
    count, n = len(source), source.shape[-1]
    device = source.device
    result = torch.empty(source.shape, dtype=torch.float32, device=device)
    iterations = torch.zeros(count, dtype=torch.int32, device=device)
    status = torch.zeros(count, dtype=torch.int8, device=device)
    residual = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
    words = np.zeros((count, WORDS), np.int64)
    each = np.arange(count)
    for tensor, at in ((source, table.INPUT), (result, table.OUTPUT), (iterations, table.ITERATIONS),
                       (status, table.STATUS)):  # fmt: skip
        words[:, at.value] = tensor.data_ptr() + each * (tensor.stride(0) * tensor.element_size())
    # The matrix is symmetric: it may as well be read the other way.
    by_row, by_column = source.stride()[1:] if source.stride(2) == 1 else source.stride()[:0:-1]
    words[:, table.INPUT_ROW.value], words[:, table.INPUT_COLUMN.value] = by_row, by_column
    words[:, table.SIZE.value], words[:, table.STRIDE.value] = n, _ceil(n, 8)
    return Batch(words, n, source, (result, RootInfo(iterations, residual, status)))


@torch.no_grad()
def inverse_roots(stacks: Sequence[Tensor], p: int, eps: float, relative_eps: float) -> list[tuple[Tensor, RootInfo]]:
    """(A + δI)^(-1/p) of symmetric matrices of any sizes, as `reference.matrix_root.newton_roots`.

    Each kind of work is one launch for all of them, and the host waits for nothing: how each matrix fares is decided on
    the device, and the launches that it no longer needs leave it alone.

    Args:
        stacks: [B, n, n] each, of float32, with any strides, on one GPU.
        p: 1, 2 or 4.
        eps: The absolute part of δ.
        relative_eps: Its part relative to the largest eigenvalue.

    Returns:
        For each stack the roots, and what is known of each but its residual, which is left NaN.

    Raises:
        TypeError: A stack has another dtype.
        ValueError: It has another shape, or is on another device than the first, or p is out of range.
    """
    if p not in EXPONENTS:
        raise ValueError(f"p={p!r} is not supported, expected one of {', '.join(map(repr, EXPONENTS))}")
    for i, a in enumerate(stacks):
        if a.dtype != torch.float32:
            raise TypeError(f"stacks[{i}] has dtype {a.dtype}, expected torch.float32")
        if a.ndim != 3 or a.shape[1] != a.shape[2]:
            raise ValueError(f"stacks[{i}] has shape {tuple(a.shape)}, expected matrices (B, n, n)")
        if a.device != stacks[0].device:
            raise ValueError(f"stacks[{i}] is on {a.device}, expected {stacks[0].device} as the first")
    batches = [_describe(a.resolve_neg()) for a in stacks]
    todo = [batch for batch in batches if batch.source.numel() > 0]
    if todo:
        device = stacks[0].device
        # Those that take longest begin.
        todo.sort(key=lambda batch: -batch.size)
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            for group in _groups(todo):
                Launches(group, p, device).run(eps, relative_eps)
    return [batch.result for batch in batches]


def _groups(batches: list[Batch]) -> list[list[Batch]]:
    """Matrices that share a workspace, parts of batches among them."""
    groups: list[list[Batch]] = [[]]
    left = WORKSPACE_BYTES
    for batch in batches:
        begin = 0
        while begin < len(batch.words):
            count = min(len(batch.words) - begin, left // batch.bytes)
            if count == 0 and groups[-1]:
                groups.append([])
                left = WORKSPACE_BYTES
                continue
            count = max(count, 1)
            part = batch.words[begin : begin + count]
            groups[-1].append(Batch(part, batch.size, batch.source, batch.result))
            left -= count * batch.bytes
            begin += count
    return groups


class Launches:
    """The launches for some matrices.

    Args:
        batches: Of matrices that share a workspace.
        p: Which root.
        device: Where they are.
    """

    def __init__(self, batches: list[Batch], p: int, device: torch.device) -> None:
        self.words = np.concatenate([batch.words for batch in batches])
        self.count, self.p, self.device = len(self.words), p, device
        self._limit = PROGRAMS * newton_schulz._multiprocessors(device)
        sides = [_side(batch.size) for batch in batches]
        sizes, counts = [batch.size for batch in batches], [len(batch.words) for batch in batches]
        # Those that are iterated by many programs each come first.
        grouped = sum(count for side, count in zip(sides, counts, strict=True) if side == 0)
        self._sides = {
            side: sum(count for own, count in zip(sides, counts, strict=True) if own == side)
            for side in sorted(ON_CHIP, reverse=True)
        }
        self._tiles = self._number([_tiles(n) for n in sizes], counts, table.FIRST_TILE, table.TILES)
        rows = [np.arange(_ceil(n, TILE)) << 16 for n in sizes]
        self._rows = self._number(rows, counts, table.FIRST_ROWS, table.ROWS)
        # Matrices, tiles and blocks of rows, of those that come first and of all.
        own = [int(self.words[:grouped, word.value].sum()) for word in (table.TILES, table.ROWS)]
        self._reach = {FAST: (grouped, *own), WIDE: (self.count, len(self._tiles), len(self._rows))}
        rooms = np.repeat([_room(n) // 64 for n in sizes], counts)
        self.words[:, table.BUFFERS.value] = np.cumsum(rooms) - rooms
        self._doubles = 64 * int(rooms.sum())

    def _number(self, tiles: list[np.ndarray[Any, Any]], counts: list[int], first: Any, own: Any) -> Any:
        """Lists the tiles of all matrices, and writes to their words which are a matrix's own."""
        lengths = np.repeat([len(each) for each in tiles], counts)
        self.words[:, first.value], self.words[:, own.value] = np.cumsum(lengths) - lengths, lengths
        places = np.concatenate([np.tile(each, count) for each, count in zip(tiles, counts, strict=True)])
        return np.repeat(np.arange(self.count), lengths) << 32 | places

    def _allocate(self, schedules: dict[int, list[tuple[float, ...]]], damping: tuple[float, float]) -> None:
        """One piece of memory; the table is copied there behind the host's back."""
        reals = np.array([number for rows in schedules.values() for row in rows for number in row])
        gates = self._number_gates(schedules)
        # Behind the buffers, what is summed by tiles, or in turn in two vectors by rows.
        room = self._doubles + max(len(self._tiles), 2 * len(self._rows))
        parts = [self.words.reshape(-1), self._tiles, self._rows, gates, reals, np.array(damping)]
        copies, memory = together(parts, room, self.device)
        self.table, self.tiles, self.rows, self.counters, starts, damped = copies
        self.starts, self.damping = starts.view(torch.float64), damped.view(torch.float64)
        buffers, self.sums = memory[: self._doubles], memory[self._doubles :].view(torch.float64)
        self.workspaces = {FAST: buffers.view(torch.float32), WIDE: buffers.view(torch.float64)}

    def _number_gates(self, schedules: dict[int, list[tuple[float, ...]]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Counters of who is left: 1, then for each attempt those to which it is due, and those before each step."""
        self._gates, total = {}, 1
        for attempt, schedule in schedules.items():
            self._gates[attempt] = total
            total += 2 + len(schedule) + _MOST[attempt]
        counters = np.zeros(total, np.int64)
        counters[0] = 1
        return counters

    def run(self, eps: float, relative_eps: float) -> None:
        """The roots of all matrices."""
        conditions = {FAST: FAST_CONDITION, WIDE: WIDE_CONDITION}
        schedules = {
            attempt: [(s.a, s.b, s.c, s.condition) for s in starts(self.p, condition)]
            for attempt, condition in conditions.items()
        }
        self._allocate(schedules, (eps, relative_eps))
        first = 0
        for attempt, schedule in schedules.items():
            end = first + len(schedule)
            if attempt == FAST:
                self._keep_on_chip(end, relative_eps > 0.0)
                self._prepare(relative_eps > 0.0)
            self._attempt(attempt, first, end)
            first = end
        self._over_tiles(WIDE, elements_kernel(root_elements.finish), *self.workspaces.values(), after=(self.p,))

    def _over_tiles(
        self, attempt: int, kernel: Kernel, *pointers: Tensor, after: tuple[int, ...] = (), parts: int = 1
    ) -> None:
        """A kernel whose programs go through the tiles of the matrices that an attempt may be due to."""
        count = self._reach[attempt][1]
        if count > 0:
            kernel.launch(min(parts * count, self._limit), self.table, self.tiles, *pointers, count, *after)

    def _over_matrices(self, attempt: int, function: Any, *arguments: Any) -> None:
        """A kernel with one program for each of these matrices."""
        count = self._reach[attempt][0]
        if count > 0:
            record_kernel(function).launch(count, self.table, *arguments)

    def _keep_on_chip(self, end_start: int, relative: bool) -> None:
        """The fast attempt on small matrices."""
        begin = self._reach[FAST][0]
        for side, count in self._sides.items():
            if count > 0:
                on_chip_kernel(side).launch(
                    count, self.table[begin * WORDS :], self.counters, self.starts, self.damping, int(relative),
                    end_start, _MOST[FAST], self.p, self._gates[WIDE],
                )  # fmt: skip
            begin += count

    def _prepare(self, relative: bool) -> None:
        """Units and dampings of the others."""
        self._over_tiles(FAST, elements_kernel(root_elements.measure), self.sums)
        fast_size = int(FAST_SIZE * FAST_SIZE) * self.p * self.p
        self._over_matrices(FAST, root_records.prepare, self.counters, self.sums, self.damping, fast_size,
                            *self._gates.values())  # fmt: skip
        rows = self._reach[FAST][2]
        if not relative or rows == 0:
            return
        self._form(FAST, 0, table.NONE.value, 0)
        for k in range(SQUARINGS):
            self._over_matrices(FAST, root_records.note_norm, self.sums, int(k == 0))
            self._product(FAST, 0, root_products.REDUCE, k)
        for turn in range(MULTIPLICATIONS + 1):
            last = int(turn == MULTIPLICATIONS)
            vector_kernel().launch(
                min(rows, self._limit), self.table, self.rows, self.workspaces[FAST], self.counters, self.sums, rows,
                0, 0 if last else SQUARINGS, turn, last,
            )  # fmt: skip
        self._over_matrices(FAST, root_records.damp, self.sums, self.damping, rows, MULTIPLICATIONS)

    def _product(self, attempt: int, gate: int, role: Any, slot: int = 0) -> None:
        self._over_tiles(attempt, product_kernel(attempt), self.workspaces[attempt], self.counters, self.sums,
                         self.starts, after=(gate, role.value, slot, self.p),
                         parts=2 if role is root_products.STEP else 1)  # fmt: skip

    def _form(self, attempt: int, gate: int, due: int, shifted: int) -> None:
        kernel = elements_kernel(root_elements.form, attempt)
        self._over_tiles(attempt, kernel, self.workspaces[attempt], self.counters, self.sums,
                         after=(gate, due, shifted))  # fmt: skip

    def _attempt(self, attempt: int, first_start: int, end_start: int) -> None:
        """One attempt, by as many steps as it may take."""
        gate = self._gates[attempt]
        self._form(attempt, gate, attempt, 1)
        self._product(attempt, gate, root_products.SQUARE)
        gate += 1
        self._over_matrices(attempt, root_records.settle, self.counters, self.sums, self.starts, attempt, first_start,
                            end_start, gate)  # fmt: skip
        self._over_tiles(attempt, elements_kernel(root_elements.begin, attempt), self.workspaces[attempt],
                         self.counters, self.starts, after=(gate,))  # fmt: skip
        for step in range(end_start - first_start + _MOST[attempt]):
            if 0 < step < end_start - first_start:
                self._product(attempt, gate, root_products.QUADRATIC)
            self._product(attempt, gate, root_products.STEP)
            if self.p == 4:
                self._product(attempt, gate, root_products.POWER)
            if self.p > 1:
                self._product(attempt, gate, root_products.LAST)
            gate += 1
            self._over_matrices(attempt, root_records.decide, self.counters, self.sums, attempt, end_start,
                                _MOST[attempt], self.p, gate, self._gates[WIDE])  # fmt: skip


# Newton steps of each attempt.
_MOST = {FAST: FAST_STEPS, WIDE: WIDE_STEPS}
