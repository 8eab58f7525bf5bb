"""Newton-Schulz iterations of many matrices at once, in bf16 with fp32 accumulation.

Paper: Bernstein & Newhouse 2024, arXiv:2409.20325; Jordan 2024; Gram form: Dao-AILab 2025, gram-newton-schulz.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from stepladder.coefficients import CoefficientSet, Triple
from stepladder.reference.newton_schulz import RESTART_EVERY
from stepladder.triton_kernels import matrix_table as table
from stepladder.triton_kernels import normalise, on_chip, products

METHODS = ("standard", "gram")
DTYPES = {
    torch.float32: table.FLOAT32.value,
    torch.bfloat16: table.BFLOAT16.value,
    torch.float16: table.FLOAT16.value,
}
# How the elements of a matrix and its result can be accessed: 16 bytes of a row, or of a column, or one by one.
BY = {"rows": table.BY_ROWS.value, "columns": table.BY_COLUMNS.value, "elements": table.STRIDED.value}
K = TypeVar("K")

INTERPRETED = isinstance(products.gram, InterpretedFunction)
WORDS = table.WORDS.value


@dataclass(frozen=True)
class Tiling:
    """How the products of a launch are cut up.

    Attributes:
        tile: Rows and columns that a program computes.
        depth: How far along the sum it goes at a time.
        warps: Of a program.
        stages: Of its pipeline of loads.
    """

    tile: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Of a kernel."""
        return {"TILE": self.tile, "DEPTH": self.depth, "warps": self.warps, "stages": self.stages}


LARGE = Tiling(128, 64, 8, 3)
SMALL = Tiling(64, 64, 4, 4)


@dataclass(frozen=True)
class OnChip:
    """How a matrix is worked on whose products stay on the chip: as much of it at a time as registers take.

    Attributes:
        held: The most columns that stay there too, in the standard form.
        held_gram: The same in the Gram form, which has more squares.
        streamed: Columns of longer matrices that are taken at a time.
        warps: Of a program.
    """

    held: int
    held_gram: int
    streamed: int
    warps: int


# By the smaller side, up to each of these.
ON_CHIP = {
    16: OnChip(128, 128, 128, 4),
    32: OnChip(128, 128, 64, 4),
    64: OnChip(64, 0, 32, 4),
    128: OnChip(0, 0, 32, 8),
}
# The largest of these sides where the squares of the Gram form fit into registers.
LARGEST_GRAM = 64
# Columns beyond which one program would take too long over a matrix.
LONGEST = 2048
# Tiles of elementwise passes, rows and columns of a band of the AOL prescale.
TILE = 64
BAND, BAND_COLUMNS = 16, 2048
_SQUARES = {"standard": 2, "gram": 4}


@dataclass(frozen=True)
class Kernel:
    """A Triton function and the constants that its launches pass.

    Attributes:
        name: With its sizes.
        function: Of Triton.
        constants: By the names of its parameters.
        warps: Of a program.
        stages: Of its pipelines of loads.
    """

    name: str
    function: Any
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def options(self) -> dict[str, Any]:
        """Of the compiler. Nothing here promises bits, and fused sums are the more accurate ones."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def signature(self) -> dict[str, str]:
        """Types of the parameters, as a launch on a GPU passes them."""
        pointers = {"words": "*i64", "workspace": "*bf16", "sums": "*fp32", "steps": "*fp32"}
        scalars = dict.fromkeys(("alpha", "beta", "gamma", "delta", "scale", "eps", "divisor"), "fp32")
        names = self.function.arg_names
        return {
            name: "constexpr" if name in self.constants else (pointers | scalars).get(name, "i32") for name in names
        }

    def launch(self, programs: int, *arguments: Any) -> None:
        self.function[(programs,)](*arguments, **self.constants, **self.options())


def _kernel(function: Any, name: str, warps: int = 4, stages: int = 3, **constants: Any) -> Kernel:
    if "INTERPRETED" in function.arg_names:
        constants["INTERPRETED"] = INTERPRETED
    return Kernel(f"newton_schulz_{name}", function, constants, warps, stages)


def product_kernels(tiling: Tiling) -> dict[str, Kernel]:
    """The kernels of products cut up so."""
    names = ("gram", "combine", "apply")
    return {name: _kernel(getattr(products, name), f"{name}_{tiling.tile}", **tiling.constants()) for name in names}


def finish_kernel(tiling: Tiling, by: str) -> Kernel:
    """The last product of all, into the result."""
    return _kernel(products.finish, f"finish_{tiling.tile}_{by}", BY=BY[by], **tiling.constants())


def tiling_of_results(tiling: Tiling, by: str) -> Tiling:
    """Tiles stay small where every element has an address: those take registers."""
    return SMALL if by == "elements" else tiling


def measure_kernel() -> Kernel:
    return _kernel(normalise.measure, "measure", TILE=TILE)


def normalise_kernel() -> Kernel:
    return _kernel(normalise.normalise, "normalise", TILE=TILE)


def rescale_kernel() -> Kernel:
    return _kernel(normalise.rescale_rows, "rescale_rows", BAND=BAND, TILE=128, CHUNK=BAND_COLUMNS)


def on_chip_kernel(side: int, held: bool, gram: bool, by: str) -> Kernel:
    """The whole iteration for a smaller side of at most `side`; the longer one is held where it fits, or streamed."""
    sizes = ON_CHIP[side]
    function, length = (on_chip.hold, held_columns(side, gram)) if held else (on_chip.stream, sizes.streamed)
    name = f"{'hold' if held else 'stream'}_{side}_{'gram' if gram else 'standard'}_{by}"
    return _kernel(function, name, sizes.warps, 2, SIDE=side, LENGTH=length, GRAM=gram, BY=BY[by])


def held_columns(side: int, gram: bool) -> int:
    return ON_CHIP[side].held_gram if gram else ON_CHIP[side].held


def kernels() -> list[Kernel]:
    """Every kernel that is ever launched."""
    found = [measure_kernel(), normalise_kernel(), rescale_kernel()]
    for tiling in (SMALL, LARGE):
        found += product_kernels(tiling).values()
        found += [finish_kernel(tiling, by) for by in BY if tiling_of_results(tiling, by) == tiling]
    for side in ON_CHIP:
        for gram in (False, True) if side <= LARGEST_GRAM else (False,):
            ways = (True, False) if held_columns(side, gram) > 0 else (False,)
            found += [on_chip_kernel(side, held, gram, by) for held in ways for by in BY]
    return found


@dataclass
class Batch:
    """Matrices of one tensor on their way: no more rows than columns.

    Attributes:
        words: Their words in the table, [B, WORDS].
        rows: The smaller side.
        columns: The longer one.
        by: How both tensors can be accessed, a key of BY.
    """

    words: np.ndarray[Any, np.dtype[np.int64]]
    rows: int
    columns: int
    by: str


def _describe(source: Tensor, result: Tensor) -> Batch:
    """Of tensors [B, m, n]."""
    sides = (1, 2) if source.shape[1] <= source.shape[2] else (2, 1)
    rows, columns = (source.shape[side] for side in sides)
    words = np.zeros((len(source), WORDS), np.int64)
    ways = set()
    for tensor, at in ((source, table.INPUT), (result, table.OUTPUT)):
        strides = [tensor.stride(side) for side in sides]
        words[:, at.value] = tensor.data_ptr() + np.arange(len(source)) * (tensor.stride(0) * tensor.element_size())
        words[:, at.value + 1 : at.value + 3] = strides
        ways.add(_access(tensor, rows, columns, *strides))
    by = ways.pop() if len(ways) == 1 else "elements"
    words[:, table.META.value] = DTYPES[source.dtype] | BY[by] << 2
    words[:, table.ROWS.value : table.SQUARE_STRIDE.value + 1] = rows, columns, _ceil(columns, 8), _ceil(rows, 8)
    return Batch(words, rows, columns, by)


def _access(tensor: Tensor, rows: int, columns: int, by_row: int, by_column: int) -> str:
    if tensor.data_ptr() % 16 == 0 and (len(tensor) == 1 or tensor.stride(0) % 8 == 0):
        if by_column == 1 and columns % 8 == 0 and by_row % 8 == 0:
            return "rows"
        if by_row == 1 and rows % 8 == 0 and by_column % 8 == 0:
            return "columns"
    return "elements"


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)


class Workspace:
    """The one allocation of a call: table, steps, sums of chunks, buffers.

    Args:
        device: Where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._elements = 0  # of buffers, in bf16

    def reserve(self, batch: Batch, wides: int, squares: int) -> None:
        """Room for buffers of each matrix."""
        each = np.arange(len(batch.words))
        for count, at, stride, step in (
            (wides, table.WIDE, table.WIDE_STRIDE, table.WIDE_STEP),
            (squares, table.SQUARE, table.SQUARE_STRIDE, table.SQUARE_STEP),
        ):
            size = batch.rows * int(batch.words[0, stride.value])
            room = _ceil(count * size * 8, 64)
            batch.words[:, at.value] = self._elements // 64 + each * room
            batch.words[:, step.value] = size
            self._elements += 64 * room * len(each)

    def allocate(self, batches: list[Batch], steps: list[tuple[float, ...]], chunks: int) -> None:
        """Everything; the table and the steps are copied there behind the host's back."""
        words = np.concatenate([batch.words for batch in batches])
        host = np.concatenate([words.reshape(-1), np.array(steps, np.float32).reshape(-1).view(np.int64)])
        sums = chunks  # two of 4 bytes for each
        buffers = len(host) + sums + (len(host) + sums) % 2
        memory = torch.empty(buffers + self._elements // 4, dtype=torch.int64, device=self.device)
        _upload(host, memory[: len(host)])
        self.words = memory[: words.size].view(-1, WORDS)
        self.steps = memory[words.size : len(host)].view(torch.float32)
        self.sums = memory[len(host) : len(host) + sums].view(torch.float32)
        self.buffers = memory[buffers:].view(torch.int16 if INTERPRETED else torch.bfloat16)


# Pinned memory that captured copies read at every replay, and some for a capture to come: during one, none is pinned.
_captured: list[Tensor] = []
_spare: list[Tensor] = []


def _upload(host: np.ndarray[Any, Any], to: Tensor) -> None:
    """Copies without waiting."""
    source = torch.from_numpy(host)
    if to.device.type != "cuda":
        to.copy_(source)
    elif torch.cuda.is_current_stream_capturing():
        fitting = [i for i, pinned in enumerate(_spare) if len(pinned) >= len(source)]
        pinned = _spare.pop(fitting[0]) if fitting else torch.empty(len(source), dtype=torch.int64, pin_memory=True)
        _captured.append(pinned)
        pinned[: len(source)].copy_(source)
        to.copy_(pinned[: len(source)], non_blocking=True)
    else:
        # torch gives pinned memory to nobody else before the copy is done.
        to.copy_(source.pin_memory(), non_blocking=True)
        if all(len(pinned) < len(source) for pinned in _spare):
            _spare[:] = [torch.empty(len(source), dtype=torch.int64, pin_memory=True)]


@torch.no_grad()
def newton_schulz(matrices: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    """Newton-Schulz iterations of matrices of any shapes, each kind of work for all of them in one launch.

    Args:
        matrices: [..., m, n] each, of float32, bfloat16 or float16, with any strides, on one GPU. They are left alone.
        chosen: The coefficients of each step.
        method: "standard", or "gram", which works on products of the smaller side and starts afresh every other step.
        eps: The least that a matrix is divided by.

    Returns:
        A result for each, of its shape and dtype, and its layout where that is dense. Zero gives zero; a matrix with
        an element that is not finite gives NaN, and concerns no other.

    Raises:
        TypeError: A matrix has another dtype.
        ValueError: It has fewer than two dimensions, is on another device than the first, or `method` is unknown.
    """
    _check(matrices, method)
    sources = [_batched(x.resolve_neg()) for x in matrices]
    results = [torch.empty_like(x) for x in sources]
    batches = [_describe(x, y) for x, y in zip(sources, results, strict=True) if x.numel() > 0]
    if batches:
        device = matrices[0].device
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            _run(batches, chosen, method, eps, device)
    return [y.view(x.shape) for x, y in zip(matrices, results, strict=True)]


def _batched(x: Tensor) -> Tensor:
    return x[None] if x.ndim == 2 else x.flatten(0, -3)


def _check(matrices: list[Tensor], method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")
    for i, x in enumerate(matrices):
        if x.dtype not in DTYPES:
            raise TypeError(f"matrices[{i}] has dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if x.ndim < 2:
            raise ValueError(f"matrices[{i}] has shape {tuple(x.shape)}, expected matrices (..., m, n)")
        if x.device != matrices[0].device:
            raise ValueError(f"matrices[{i}] is on {x.device}, expected {matrices[0].device} as the first")


def _bucket(batch: Batch, method: str) -> tuple[int, bool, str]:
    """What decides on a launch: the side of the kernel on the chip, or 0; whether it holds the matrix; the access."""
    side = next((side for side in ON_CHIP if batch.rows <= side), 0)
    if side == 0 or batch.columns > LONGEST or (method == "gram" and side > LARGEST_GRAM):
        return 0, False, batch.by
    return side, batch.columns <= held_columns(side, method == "gram"), batch.by


def _run(batches: list[Batch], chosen: CoefficientSet, method: str, eps: float, device: torch.device) -> None:
    segments = _segments(chosen.steps, method)
    buckets = [(_bucket(batch, method), batch) for batch in batches]
    # Those that are launched together in a row, first those that take longest.
    buckets.sort(key=lambda pair: (pair[0], -pair[1].columns))
    workspace = Workspace(device)
    for (side, held, _), batch in buckets:
        workspace.reserve(batch, 0 if held else 2, 0 if side else _SQUARES[method])
    launches = Launches([batch for (side, _, _), batch in buckets if side == 0], device)
    steps = [(*step, k == len(segment) - 1) for segment in segments for k, step in enumerate(segment)]
    workspace.allocate([batch for _, batch in buckets], steps, launches.chunks)
    if launches.count > 0:
        launches.run(workspace, chosen, segments, eps)
    for (side, held, by), begin, end in _runs(buckets):
        if side > 0:
            memory = [workspace.steps] if held else [workspace.buffers, workspace.steps]
            kernel = on_chip_kernel(side, held, method == "gram", by)
            scalars = len(chosen.steps), int(chosen.aol), eps, chosen.divisor
            kernel.launch(end - begin, workspace.words[begin:end], *memory, *scalars)


def _runs(batches: Sequence[tuple[K, Batch]]) -> Iterator[tuple[K, int, int]]:
    """Neighbours of the same key: the key, the first of their matrices, the one behind the last."""
    begin = 0
    for key, members in itertools.groupby(batches, lambda pair: pair[0]):
        end = begin + sum(len(batch.words) for _, batch in members)
        yield key, begin, end
        begin = end


def _segments(steps: Sequence[Triple], method: str) -> list[Sequence[Triple]]:
    """Steps after each of which the matrix itself is multiplied."""
    length = 1 if method == "standard" else RESTART_EVERY
    return [steps[k : k + length] for k in range(0, len(steps), length)]


class Launches:
    """The launches for matrices that take many programs each.

    Args:
        batches: The first in the table. Their first programs are written to their words.
        device: Of which the number of multiprocessors decides on the size of the tiles.
    """

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self.count = sum(len(batch.words) for batch in batches)
        self._batches = batches
        chunk = TILE * normalise.CHUNK_TILES.value
        self.chunks = _number(batches, table.FIRST_CHUNK, lambda b: _ceil(b.rows, TILE) * _ceil(b.columns, chunk))
        self._bands = _number(batches, table.FIRST_BAND, lambda b: _ceil(b.rows, BAND) * _ceil(b.columns, BAND_COLUMNS))
        # Large tiles read less, where there are enough of them to go round.
        for tiling in (LARGE, SMALL):
            tile = tiling.tile
            self._pairs = _number(batches, table.FIRST_PAIR, lambda b, t=tile: _triangle(_ceil(b.rows, t)))
            self._tiles = _number(batches, table.FIRST_TILE, lambda b, t=tile: _ceil(b.rows, t) * _ceil(b.columns, t))
            if self._pairs >= _multiprocessors(device):
                break
        self._kernels, self._tiling = product_kernels(tiling), tiling
        _number(batches, table.FIRST_RESULT, self._result_tiles)

    def run(self, workspace: Workspace, chosen: CoefficientSet, segments: list[Sequence[Triple]], eps: float) -> None:
        """The iteration of all matrices."""
        words, sums = workspace.words[: self.count], workspace.sums
        self._words, self._buffers = words, workspace.buffers
        measure_kernel().launch(self.chunks, words, sums, self.count)
        normalise_kernel().launch(self.chunks, words, self._buffers, sums, self.count, eps, chosen.divisor)
        if chosen.aol:
            self._gram(0, 0, 1.0)
            rescale_kernel().launch(self._bands, words, self._buffers, self.count)
        for i, segment in enumerate(segments):
            factor, scale = self._factor(segment, i % 2)
            if i < len(segments) - 1:
                self._kernels["apply"].launch(
                    self._tiles, words, self._buffers, self.count, i % 2, factor, 1 - i % 2, scale
                )
            else:
                self._finish(i % 2, factor, scale)

    def _result_tiles(self, batch: Batch) -> int:
        tile = tiling_of_results(self._tiling, batch.by).tile
        return _ceil(batch.rows, tile) * _ceil(batch.columns, tile)

    def _finish(self, source: int, factor: int, scale: float) -> None:
        for by, begin, end in _runs([(batch.by, batch) for batch in self._batches]):
            programs = sum(self._result_tiles(batch) * len(batch.words) for batch in self._batches if batch.by == by)
            kernel = finish_kernel(tiling_of_results(self._tiling, by), by)
            kernel.launch(programs, self._words[begin:end], self._buffers, end - begin, source, factor, scale)

    def _gram(self, source: int, to: int, alpha: float) -> None:
        self._kernels["gram"].launch(self._pairs, self._words, self._buffers, self.count, source, to, alpha)

    def _combine(
        self, left: int, right: int, to: int, gamma: float, addend: int, beta: float, shifted: int = -1,
        delta: float = 0.0,
    ) -> None:  # fmt: skip
        """to ← gamma·left·right + beta·addend, and unless it is -1, shifted ← the same + delta·I."""
        self._kernels["combine"].launch(
            self._pairs, self._words, self._buffers, self.count, left, right, to, gamma, addend, beta, shifted, delta
        )

    def _factor(self, segment: Sequence[Triple], source: int) -> tuple[int, float]:
        """Q and q₀: what X is multiplied by is the square Q plus q₀I, which one step alone keeps apart."""
        r, z, q, spare = range(4)
        a, b, c = segment[0]
        if len(segment) == 1:
            self._gram(source, r, 1.0 if c != 0 else b)
            if c != 0:
                self._combine(r, r, z, c, r, b)
            return z if c != 0 else r, a
        self._gram(source, r, 1.0)
        for k, (a, b, c) in enumerate(segment):
            if k == 0:
                self._combine(r, r, z, c, r, b, q, a)
            else:
                self._combine(r, r, z, c, r, b)
                self._combine(q, z, spare, 1.0, q, a)
                q, spare = spare, q
            if k < len(segment) - 1:
                self._combine(r, z, spare, 1.0, r, a)
                self._combine(z, spare, r, 1.0, spare, a)
        return q, 0.0


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_eu_count)


def _triangle(blocks: int) -> int:
    return blocks * (blocks + 1) // 2


def _number(batches: list[Batch], word: Any, programs: Callable[[Batch], int]) -> int:
    """Writes the first program of each matrix; returns how many there are."""
    total = 0
    for batch in batches:
        each = programs(batch)
        batch.words[:, word.value] = total + each * np.arange(len(batch.words))
        total += each * len(batch.words)
    return total
