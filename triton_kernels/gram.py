"""Moving averages of Gram matrices, of many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from stepladder.triton_kernels import gram_products, newton_schulz
from stepladder.triton_kernels.newton_schulz import BY, INTERPRETED
from stepladder.triton_kernels.upload import together

WORDS = gram_products.WORDS.value
# Of L's dtype and G's. Products of fp32 are three of tf32, those of half types exact.
TYPES = {"float64": tl.float64, "float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
TILINGS = {"float32": newton_schulz.Tiling(64, 32, 8, 3), "float64": newton_schulz.Tiling(64, 16, 8, 2)}


@dataclass(frozen=True)
class Kernel(newton_schulz.Kernel):
    """A Triton function and the constants that its launches pass."""

    def signature(self) -> dict[str, str]:
        """Types of the parameters, as a launch on a GPU passes them."""
        pointers = {"words": "*i64", "tiles": "*i64", "scalars": "*fp64"}
        return {name: "constexpr" if name in self.constants else pointers.get(name, "i32")
                for name in self.function.arg_names}  # fmt: skip


def kernel(square: str, g: str, by: str) -> Kernel:
    """The kernel for L and G of these dtypes; `by` is a key of BY."""
    tiling = TILINGS[square]
    constants = {"T": TYPES[square], "G": TYPES[g], "BY": BY[by], "TILE": tiling.tile, "DEPTH": tiling.depth}
    constants["INTERPRETED"] = INTERPRETED
    return Kernel(f"gram_{square}_{g}_{by}", gram_products.update, constants, tiling.warps, tiling.stages)


def kernels() -> list[Kernel]:
    """Every kernel that is ever launched."""
    found = [kernel("float32", g, by) for g in ("float32", "bfloat16", "float16") for by in BY]
    return [*found, *(kernel("float64", "float64", by) for by in BY)]


@torch.no_grad()
def update_grams(squares: Sequence[Tensor], others: Sequence[Tensor], beta: float, weight: float) -> None:
    """L ← βL + weight·GGᵀ in place; all matrices of the same dtypes in one launch.

    Args:
        squares: L: [..., m, m] each, symmetric, of float32 or float64, with any strides, on one GPU.
        others: G: [..., m, n] each, of any floating-point dtype and strides.
        beta: β.
        weight: Of the product.

    Raises:
        ValueError: Elements of L share memory.
    """
    for index, square in enumerate(squares):
        if any(stride == 0 and size > 1 for stride, size in zip(square.stride(), square.shape, strict=True)):
            raise ValueError(f"L[{index}] has strides {square.stride()}, expected elements apart from each other")
    addresses = [square.data_ptr() for square in squares if square.numel() > 0]
    if len({*addresses}) < len(addresses):
        # Those that are given twice are updated twice.
        for square, g in zip(squares, others, strict=True):
            update_grams([square], [g], beta, weight)
        return
    shared: dict[tuple[str, str, str, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for square, given in zip(squares, others, strict=True):
        if square.numel() == 0:
            continue
        g = given.resolve_neg()
        if torch.float64 in (g.dtype, square.dtype):
            g = g.to(square.dtype)
        g = g[None] if g.ndim == 2 else g.flatten(0, -3)
        by = newton_schulz._access(g, *g.shape[1:], *g.stride()[1:])
        dtypes = [str(x.dtype).removeprefix("torch.") for x in (square, g)]
        shared.setdefault((*dtypes, by, square.device), []).append((square, g))
    for (square_type, g_type, by, device), pairs in shared.items():
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            _launch(kernel(square_type, g_type, by), pairs, TILINGS[square_type].tile, beta, weight, device)
    torch.autograd.graph.increment_version([square for square in squares if not square.is_inference()])


def _launch(
    chosen: Kernel, pairs: list[tuple[Tensor, Tensor]], tile: int, beta: float, weight: float, device: torch.device
) -> None:
    words = np.concatenate([_words(square, g) for square, g in pairs])
    # The longest sums begin.
    words = words[np.argsort(-words[:, gram_products.COLUMNS.value], kind="stable")]
    sides = -(-words[:, gram_products.ROWS.value] // tile)
    lists = {side: _lower(side) for side in {*sides.tolist()}}
    tiles = np.concatenate([index << 32 | lists[side] for index, side in enumerate(sides.tolist())])
    copies, _ = together([words.reshape(-1), tiles, np.array([beta, weight])], 0, device)
    table, tile_list, scalars = copies
    chosen.launch(len(tiles), table, tile_list, scalars.view(torch.float64))


def _lower(side: int) -> np.ndarray:
    rows, columns = np.tril_indices(side)
    lower: np.ndarray = rows << 16 | columns
    return lower


def _words(square: Tensor, g: Tensor) -> np.ndarray:
    """Of tensors [..., m, m] and [B, m, n]."""
    count = len(g)
    words = np.zeros((count, WORDS), np.int64)
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(square.shape[:-2], square.stride(), strict=False):
        offsets = (offsets[:, None] + stride * np.arange(size)).reshape(-1)
    words[:, gram_products.SQUARE.value] = square.data_ptr() + offsets * square.element_size()
    words[:, gram_products.SQUARE_ROW.value : gram_products.SQUARE_COLUMN.value + 1] = square.stride()[-2:]
    words[:, gram_products.INPUT.value] = g.data_ptr() + np.arange(count) * (g.stride(0) * g.element_size())
    words[:, gram_products.INPUT_ROW.value : gram_products.INPUT_COLUMN.value + 1] = g.stride()[1:]
    words[:, gram_products.ROWS.value], words[:, gram_products.COLUMNS.value] = g.shape[1:]
    return words
