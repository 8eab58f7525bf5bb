"""Orthonormal bases of the columns of many matrices at once: shifted Cholesky-QR in three passes, in fp64.

Paper: Fukaya et al. 2020, Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from stepladder.reference.orthonormalize import LIMIT, SHIFT, BasisInfo
from stepladder.triton_kernels import cholesky_qr as table
from stepladder.triton_kernels import newton_schulz
from stepladder.triton_kernels.upload import together

WORDS = table.WORDS.value
BLOCK = table.BLOCK.value
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
TILE = 64
# Columns of W that are summed at a time; rows of L below a block; what Gram and Schmidt's method takes at a time.
DEPTH, TALL, SPAN = 16, 64, 128
# What the workspace of matrices that share launches may take; a matrix that takes more has launches of its own.
WORKSPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class Kernel(newton_schulz.Kernel):
    """A Triton function and the constants that its launches pass."""

    def signature(self) -> dict[str, str]:
        """Types of the parameters, as a launch on a GPU passes them."""
        pointers = {"words": "*i64", "tiles": "*i64", "workspace": "*fp64", "sums": "*fp64"}
        return {name: "constexpr" if name in self.constants else pointers[name] for name in self.function.arg_names}


def _kernel(function: Any, name: str = "", warps: int = 4, stages: int = 2, **constants: Any) -> Kernel:
    if "TILE" in function.arg_names:
        constants["TILE"] = TILE
    return Kernel(f"basis_{function.__name__}{name}", function, constants, warps, stages)


def _typed(function: Any, dtype: torch.dtype, **constants: Any) -> Kernel:
    return _kernel(function, "_" + str(dtype).removeprefix("torch."), 8, X=TYPES[dtype], **constants)


def redo_kernel(dtype: torch.dtype) -> Kernel:
    return _typed(table.redo, dtype, DEPTH=SPAN)


def gram_kernel() -> Kernel:
    return _kernel(table.gram, warps=8, DEPTH=DEPTH)


def cholesky_kernel(shifted: bool) -> Kernel:
    return _kernel(table.cholesky, "_shifted" if shifted else "", 8, SHIFT=SHIFT if shifted else 0.0, TALL=TALL)


def solve_kernel() -> Kernel:
    return _kernel(table.solve, warps=8)


def settle_kernel() -> Kernel:
    return _kernel(table.settle, warps=1)


def judge_kernel() -> Kernel:
    return _kernel(table.judge, warps=1, LIMIT=LIMIT)


def kernels() -> list[Kernel]:
    """Every kernel that is ever launched."""
    found = [gram_kernel(), cholesky_kernel(True), cholesky_kernel(False), solve_kernel()]
    found += [settle_kernel(), judge_kernel()]
    for dtype in TYPES:
        found += [_typed(function, dtype) for function in (table.measure, table.form, table.finish)]
        found.append(redo_kernel(dtype))
    return found


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)


def _room(m: int, n: int) -> tuple[int, int, int]:
    """Units of 64 doubles for W, L and the inverses of its diagonal blocks."""
    side = _ceil(n, BLOCK) * BLOCK
    return _ceil(n * _ceil(m, 8) * 8, 64), _ceil(side * side, 64), _ceil(side * BLOCK, 64)


@torch.no_grad()
def cholesky_bases(stacks: Sequence[Tensor]) -> list[tuple[Tensor, BasisInfo]]:
    """Orthonormal bases, as `reference.orthonormalize` with "cholesky"; the host waits for nothing.

    Members that Cholesky's method fails on are done over by Gram and Schmidt's with reorthogonalisation.

    Args:
        stacks: [..., m, n] each with m ≥ n, of float32 or float64, with any strides, on one GPU.

    Returns:
        For each the bases, in its dtype; those of matrices that are not finite are NaN. And what is known of them.

    Raises:
        TypeError: A stack has another dtype.
        ValueError: It has another shape, or is on another device than the first.
    """
    for i, x in enumerate(stacks):
        if x.dtype not in TYPES:
            raise TypeError(f"stacks[{i}] has dtype {x.dtype}, expected torch.float32 or torch.float64")
        if x.ndim < 2 or x.shape[-2] < x.shape[-1]:
            raise ValueError(f"stacks[{i}] has shape {tuple(x.shape)}, expected matrices (..., m, n) with m >= n")
        if x.device != stacks[0].device:
            raise ValueError(f"stacks[{i}] is on {x.device}, expected {stacks[0].device} as the first")
    results = []
    # Words, m, n and dtype of each matrix.
    todo: list[tuple[np.ndarray[Any, Any], torch.dtype]] = []
    kept = []  # copies, until their launches are queued
    for x in stacks:
        source = x.resolve_neg()
        source = source[None] if x.ndim == 2 else source.flatten(0, -3)
        q = torch.empty(source.shape, dtype=x.dtype, device=x.device)
        fallback = torch.zeros(len(source), dtype=torch.bool, device=x.device)
        finite = torch.ones(len(source), dtype=torch.bool, device=x.device)
        info = BasisInfo(fallback.reshape(x.shape[:-2]), finite.reshape(x.shape[:-2]))
        results.append((q.reshape(x.shape), info))
        kept.append(source)
        if source.numel() > 0:
            todo += [(words, x.dtype) for words in _describe(source, q, fallback, finite)]
    todo.sort(key=lambda pair: -int(pair[0][table.ROWS.value]) * int(pair[0][table.COLUMNS.value]) ** 2)
    if todo:
        device = stacks[0].device
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            for dtype in TYPES:
                for group in _groups([words for words, own in todo if own == dtype]):
                    _run(group, dtype, device)
    return results


def _describe(source: Tensor, q: Tensor, fallback: Tensor, finite: Tensor) -> np.ndarray[Any, Any]:
    m, n = source.shape[1:]
    words = np.zeros((len(source), WORDS), np.int64)
    each = np.arange(len(source))
    for tensor, at in ((source, table.INPUT), (q, table.OUTPUT), (fallback, table.FALLBACK), (finite, table.FINITE)):
        words[:, at.value] = tensor.data_ptr() + each * (tensor.stride(0) * tensor.element_size())
    words[:, table.INPUT_ROW.value : table.INPUT_COLUMN.value + 1] = source.stride()[1:]
    sizes = m, n, _ceil(m, 8), _ceil(n, BLOCK) * (BLOCK // 8)
    words[:, table.ROWS.value : table.SIDE.value + 1] = sizes
    return words


def _groups(members: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Those that share a workspace; where in it their parts are."""
    groups: list[list[np.ndarray[Any, Any]]] = []
    end = WORKSPACE_BYTES
    for words in members:
        rooms = _room(int(words[table.ROWS.value]), int(words[table.COLUMNS.value]))
        if not groups or 512 * (end + sum(rooms)) > WORKSPACE_BYTES:
            groups.append([])
            end = 0
        words[table.WIDE.value : table.INVERSES.value + 1] = end + np.cumsum((0, *rooms[:-1]))
        end += sum(rooms)
        groups[-1].append(words)
    return [np.stack(group) for group in groups]


def _run(words: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> None:
    """The bases of matrices that share a workspace."""
    down, across = (-(-words[:, side.value] // TILE) for side in (table.ROWS, table.COLUMNS))

    def number(first: Any, own: Any, tiles: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Lists the tiles of all matrices, and writes to their words which are a matrix's own."""
        lengths = np.array([len(each) for each in tiles])
        words[:, first.value], words[:, own.value] = np.cumsum(lengths) - lengths, lengths
        return np.repeat(np.arange(len(words)), lengths) << 32 | np.concatenate(tiles)

    rectangles = [(np.arange(d)[:, None] << 16 | np.arange(a)).reshape(-1) for d, a in zip(down, across, strict=True)]
    triangles = [rows << 16 | columns for rows, columns in map(np.tril_indices, across)]
    lists = [
        number(table.FIRST_TILE, table.TILES, rectangles),
        number(table.FIRST_LOWER, table.LOWERS, triangles),
        number(table.FIRST_BAND, table.BANDS, [np.arange(d) << 16 for d in down]),
    ]
    last = words[-1]
    end = int(last[table.WIDE.value]) + sum(_room(int(last[table.ROWS.value]), int(last[table.COLUMNS.value])))
    copies, memory = together([words.reshape(-1), *lists], 64 * end + max(len(lists[0]), len(lists[1])), device)
    matrices, tiles, lowers, bands = copies
    workspace, sums = memory.view(torch.float64)[: 64 * end], memory.view(torch.float64)[64 * end :]

    _typed(table.measure, dtype).launch(len(tiles), matrices, tiles, sums)
    settle_kernel().launch(len(words), matrices, sums)
    _typed(table.form, dtype).launch(len(tiles), matrices, tiles, workspace)
    for shifted in (True, False, False):
        gram_kernel().launch(len(lowers), matrices, lowers, workspace, sums)
        cholesky_kernel(shifted).launch(len(words), matrices, workspace)
        solve_kernel().launch(len(bands), matrices, bands, workspace)
    gram_kernel().launch(len(lowers), matrices, lowers, workspace, sums)
    judge_kernel().launch(len(words), matrices, sums)
    redo_kernel(dtype).launch(len(words), matrices, workspace)
    _typed(table.finish, dtype).launch(len(tiles), matrices, tiles, workspace)
