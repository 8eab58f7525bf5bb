"""Runs the tensors of a plan that live on one device: what csrc/table_executor.cpp calls."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepladder import _C
from stepladder.triton_kernels import table as words
from stepladder.triton_kernels.specialize import SCALE, SUM_TILE, TILE, Kernel, norm_kernels, rule_kernels

# Programs to each multiprocessor, below which a chunk takes but one tile.
_PROGRAMS = 64
_PINNED = 4
HEADER = words.HEADER.value


def _bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


class PlacedTable:
    """A table behind its header, on the host and on the device.

    Args:
        table: Of the plan; its words are read where they are.
        device: Where the copy goes.
        addresses: Of the executor's own memory, by header word.
    """

    def __init__(self, table: _C.Table, device: torch.device, addresses: dict[Any, Tensor]) -> None:
        self.table = table
        self.tensors = table.shape["tensors"]
        self._words = np.asarray(table)
        self._host = np.zeros(HEADER + len(self._words), np.int64)
        self._uploaded = np.zeros_like(self._host)
        self._device = torch.zeros(len(self._host), dtype=torch.int64, device=device)
        self._memory = addresses
        # Copies run behind the host: a buffer is written again only when its own is done.
        self._slots: list[tuple[Tensor, Any]] = []
        self._next = 0
        # Of captured steps, whose graphs may be replayed at any time: kept, and never written again.
        self.frozen: list[tuple[Tensor, Tensor]] = []
        self._spare = [self._pinned_pair()] if device.type == "cuda" else []  # nothing is pinned during a capture
        for name, at in table.shape.items():
            self._host[getattr(words, "SUMS_AT" if name == "sums" else name.upper()).value] = at
        self._host[words.CHUNKS.value] = table.chunks
        self._host[words.CHUNK_TILES.value] = table.chunk_tiles
        for word, memory in addresses.items():
            self._host[word.value] = memory.data_ptr()

    def set(self, values: dict[Any, int]) -> None:
        """Header words that one launch differs in from another."""
        for word, value in values.items():
            self._host[word.value] = value

    def launch(self, kernels: Sequence[Kernel]) -> None:
        """Run kernels over the table, one after another."""
        words_there = self._place()
        for kernel in kernels:
            kernel.launch(self.tensors, self.table.chunks, words_there)

    def _place(self) -> Tensor:
        """The words on the device, what has changed of them copied there."""
        self._host[HEADER:] = self._words
        if _is_capturing(self._device.device):
            return self._freeze()
        changed = np.flatnonzero(self._host != self._uploaded)
        if len(changed) > 0:
            begin, end = int(changed[0]), int(changed[-1]) + 1
            self._upload(begin, end)
            self._uploaded[begin:end] = self._host[begin:end]
        return self._device

    def _upload(self, begin: int, end: int) -> None:
        if self._device.device.type == "cpu":
            self._device.numpy()[begin:end] = self._host[begin:end]
            return
        if len(self._slots) < _PINNED:
            event = torch.get_device_module(self._device.device).Event()
            self._slots.append((torch.empty(len(self._host), dtype=torch.int64, pin_memory=True), event))
            self._next = len(self._slots) - 1
        pinned, done = self._slots[self._next]
        self._next = (self._next + 1) % _PINNED
        done.synchronize()
        pinned.numpy()[begin:end] = self._host[begin:end]
        self._device[begin:end].copy_(pinned[begin:end], non_blocking=True)
        done.record()

    def _pinned_pair(self) -> tuple[Tensor, Tensor]:
        return torch.empty(len(self._host), dtype=torch.int64, pin_memory=True), torch.empty_like(self._device)

    def _freeze(self) -> Tensor:
        """The words for a captured step. Every graph makes the copy itself, whichever is replayed first."""
        same = [pair for pair in self.frozen if np.array_equal(pair[0].numpy(), self._host)]
        pinned, device = same[0] if same else self._spare.pop() if self._spare else self._pinned_pair()
        if not same:
            pinned.numpy()[:] = self._host
            self.frozen.append((pinned, device))
        device.copy_(pinned, non_blocking=True)
        return device


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Executor:
    """Launches the kernels over the plan's tables.

    Args:
        device: A GPU, or the CPU under Triton's interpreter.
    """

    tile = TILE
    sum_tile = SUM_TILE

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self.programs = 1  # in the interpreter, one takes what it can
        if device.type != "cpu":
            properties = self._module.get_device_properties(device)
            self.programs = _PROGRAMS * (getattr(properties, "multi_processor_count", 0) or properties.gpu_eu_count)
        self._batches: list[tuple[PlacedTable, list[Kernel]]] = []
        self._norms: PlacedTable | None = None
        self._kept: list[PlacedTable] = []  # graphs read them
        self._ticket = self._zeros(1, torch.int32)
        self._norm = self._zeros(2)
        self._flags = self._zeros(1, torch.int32), self._zeros(1, torch.float32)
        self._partials = self._zeros(0)
        self._stream: Any = None
        self._moved = False  # between streams, since the memory was allocated

    def _zeros(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=self.device)

    def schedule(self, tables: list[_C.Table]) -> None:
        """Take over the tables of the steps to come, in the order in which they run."""
        if self._moved:
            self._module.synchronize(self.device)  # memory is given back to the first stream, used on another
            self._moved = False
        known = [placed for placed, _ in self._batches] + ([self._norms] if self._norms else [])
        self._kept += [placed for placed in known if placed.frozen]
        self._batches = []
        self._norms = None
        for table in tables:
            memory = {words.TICKET: self._ticket}
            if table.num_sums > 0:
                memory |= {words.SUMS: self._zeros(table.num_sums), words.RATIOS: self._zeros(table.shape["tensors"])}
            kernels = rule_kernels(table.rule, table.param, table.state)
            placed = PlacedTable(table, self.device, memory)
            if len(kernels) > 1:
                placed.set({words.CHUNK_TILES: SUM_TILE // TILE})  # the same chunks for the last pass
            self._batches.append((placed, kernels))

    def schedule_norms(self, table: _C.Table) -> None:
        """Take over the table of all gradients."""
        self._partials = self._zeros(2 * table.shape["tensors"])
        memory = {
            words.TICKET: self._ticket,
            words.SUMS: self._zeros(max(table.num_sums, 1)),
            words.PARTIALS: self._partials,
            words.NOT_FINITE: self._flags[0],
        }
        self._norms = PlacedTable(table, self.device, memory)

    def run(self, scale: _C.GradientScale) -> None:
        """The step."""
        with self._turn():
            for placed, kernels in self._batches:
                placed.set(_scale_words(scale))
                placed.launch(kernels)

    def measure(self, kind: int, scale: _C.GradientScale, max_norm: float, result: int, found_inf: int) -> None:
        """Norm, clip factor and found-inf of all gradients, left on the device."""
        assert self._norms is not None
        self._norms.set(_scale_words(scale))
        self._norms.set(
            {
                words.MAX_NORM: _bits(max_norm),
                words.NORM: result or self._norm.data_ptr(),
                words.FOUND: found_inf or self._flags[1].data_ptr(),
            }
        )
        with self._turn():
            self._norms.launch(norm_kernels(kind))

    def scale_gradients(self, factor_address: int, factor: float) -> None:
        """Multiply all gradients by a factor on the device, or by `factor`."""
        assert self._norms is not None
        self._norms.set({words.CLIP_ADDRESS: factor_address, words.CLIP_FACTOR: _bits(factor)})
        with self._turn():
            self._norms.launch([SCALE])

    def clip_factor(self) -> int:
        """Address of the factor that `measure` leaves where no other place is given."""
        return self._norm.data_ptr() + self._norm.element_size()

    def partials(self) -> tuple[list[float], bool]:
        """Each tensor's part of the norm, and whether all elements are finite; waits for the device."""
        assert self._norms is not None
        with self._turn():
            return self._partials[: self._norms.tensors].tolist(), float(self._flags[1]) == 0.0

    def norm(self) -> float:
        """The norm as `measure` left it; waits for the device."""
        with self._turn():
            return float(self._norm[0])

    def _turn(self) -> Any:
        """The device made current. Tables and sums are the executor's own: work on another stream waits."""
        if self.device.type == "cpu":
            return nullcontext()
        stream = self._module.current_stream(self.device)
        if self._stream is not None and stream != self._stream and not _is_capturing(self.device):
            stream.wait_stream(self._stream)
            self._moved = True
        self._stream = stream
        return self._module.device(self.device)


def _scale_words(scale: _C.GradientScale) -> dict[Any, int]:
    return {
        words.UNSCALE: int(scale.unscale),
        words.INVERSE_SCALE: _bits(scale.inverse_scale),
        words.GRAD_SCALE: scale.grad_scale,
        words.CLIP: int(scale.clip),
        words.CLIP_FACTOR: _bits(scale.clip_factor),
        words.CLIP_ADDRESS: scale.clip_address,
        words.FOUND_INF: scale.found_inf,
    }
