"""Products of many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from stepladder.triton_kernels import multiply_tiles, newton_schulz
from stepladder.triton_kernels.newton_schulz import BY
from stepladder.triton_kernels.upload import together

WORDS = multiply_tiles.WORDS.value
TYPES = {"float32": tl.float32, "float64": tl.float64}
TILINGS = {"float32": newton_schulz.Tiling(64, 32, 8, 3), "float64": newton_schulz.Tiling(64, 16, 8, 2)}


@dataclass(frozen=True)
class Kernel(newton_schulz.Kernel):
    """A Triton function and the constants that its launches pass."""

    def signature(self) -> dict[str, str]:
        """Types of the parameters, as a launch on a GPU passes them."""
        pointers = {"words": "*i64", "tiles": "*i64"}
        return {name: "constexpr" if name in self.constants else pointers.get(name, "i32")
                for name in self.function.arg_names}  # fmt: skip


def kernel(dtype: str, left: str, right: str) -> Kernel:
    """The kernel for a dtype; `left` and `right` are keys of BY."""
    tiling = TILINGS[dtype]
    constants = {"T": TYPES[dtype], "LEFT_BY": BY[left], "RIGHT_BY": BY[right]}
    constants |= {"TILE": tiling.tile, "DEPTH": tiling.depth}
    return Kernel(f"multiply_{dtype}_{left}_{right}", multiply_tiles.multiply, constants, tiling.warps, tiling.stages)


def kernels() -> list[Kernel]:
    """Every kernel that is ever launched."""
    aligned = [name for name in BY if name != "elements"]
    found = [kernel("float32", left, right) for left in aligned for right in aligned]
    return [*found, *(kernel(dtype, "elements", "elements") for dtype in TYPES)]


@torch.no_grad()
def multiply(products: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """out ← left·right; those whose operands are accessed alike, of five ways, in one launch.

    Args:
        products: (left, right, out): [B, m, k], [B, k, n] and [B, m, n] each, of fp32 or all of fp64, with any
            strides, on one GPU.
    """
    shared: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    device = products[0][2].device
    dtype = str(products[0][2].dtype).removeprefix("torch.")
    for left, right, out in products:
        if out.numel() == 0:
            continue
        a, b = left.resolve_neg(), right.resolve_neg()
        ways = tuple(newton_schulz._access(x, *x.shape[1:], *x.stride()[1:]) for x in (a, b))
        if dtype == "float64" or "elements" in ways:
            ways = ("elements", "elements")
        shared.setdefault((ways[0], ways[1]), []).append((a, b, out))
    for ways, members in shared.items():
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            _launch(kernel(dtype, *ways), members, TILINGS[dtype].tile, device)


def _launch(chosen: Kernel, products: list[tuple[Tensor, Tensor, Tensor]], tile: int, device: torch.device) -> None:
    words = np.concatenate([_words(*product) for product in products])
    # The longest sums begin.
    words = words[np.argsort(-words[:, multiply_tiles.DEPTH_OF.value], kind="stable")]
    (table, tile_list), _ = together([words.reshape(-1), _tiles(words, tile)], 0, device)
    chosen.launch(len(tile_list), table, tile_list)


def _tiles(words: np.ndarray, tile: int) -> np.ndarray:
    """The tiles of all products: a word has the product's index above 32 bits, its tile's below."""
    rows, columns = (-(-words[:, word.value] // tile) for word in (multiply_tiles.ROWS, multiply_tiles.COLUMNS))
    counts = rows * columns
    index = np.repeat(np.arange(len(words)), counts)
    tiles: np.ndarray = index << 32 | np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return tiles


def _words(left: Tensor, right: Tensor, out: Tensor) -> np.ndarray:
    """Of a batch of products."""
    words = np.zeros((len(out), WORDS), np.int64)
    for first, x in ((multiply_tiles.LEFT, left), (multiply_tiles.RIGHT, right), (multiply_tiles.OUT, out)):
        words[:, first.value] = x.data_ptr() + np.arange(len(out)) * (x.stride(0) * x.element_size())
        words[:, first.value + 1 : first.value + 3] = x.stride()[1:]
    words[:, multiply_tiles.ROWS.value] = out.shape[1]
    words[:, multiply_tiles.COLUMNS.value : multiply_tiles.DEPTH_OF.value + 1] = out.shape[2], left.shape[2]
    return words
