"""Moving averages of Gram matrices over the backends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stepladder import backends, cuda_roots, products, ranges, reference
from stepladder.newton_schulz import KERNEL_DTYPES, check_floating

# Rows of a tile on a CPU: large enough that its product runs at full speed, small enough that the tiles on the
# diagonal, half of which are computed for nothing, are few.
TILE = 384


@torch.no_grad()
def update_gram_(
    L: Tensor | Sequence[Tensor],
    G: Tensor | Sequence[Tensor],
    beta: float,
    *,
    weight: float | None = None,
    backend: str | None = None,
) -> None:
    """L ← βL + weight·GGᵀ in place, for symmetric L; of the product one half is computed, and mirrored.

    For the other side give `G.mT`.

    Args:
        L: Symmetric matrices [..., m, m] of fp32 or fp64, or a list of such tensors, updated together.
        G: Matrices [..., m, n] of any floating-point dtype and strides, one for each of L.
        beta: β, in [0, 1]. At 0 it is not looked at what L holds.
        weight: Of the product; None means 1 - β.
        backend: "cpu", "cuda", "triton", "reference", or None to choose by the device.

    Raises:
        TypeError: A tensor is of the wrong type.
        ValueError: Shapes do not fit, or a number is out of range.
        RuntimeError: The backend asked for cannot run here.
    """
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta!r} is out of range, expected a number in [0, 1]")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight)
    ):
        raise ValueError(f"weight={weight!r} is out of range, expected a finite number")
    backends.check_available(backend)
    squares = [L] if isinstance(L, Tensor) else list(L)
    others = [G] if isinstance(G, Tensor) else list(G)
    if len(squares) != len(others):
        raise ValueError(f"there are {len(squares)} matrices L and {len(others)} matrices G, expected as many")
    for index, (square, g) in enumerate(zip(squares, others, strict=True)):
        check_pair(square, g, index, isinstance(L, Tensor))
    update_grams(squares, others, float(beta), 1.0 - beta if weight is None else float(weight), backend)


def check_pair(square: Tensor, g: Tensor, index: int, single: bool) -> None:
    """Refuse matrices that cannot be updated."""
    names = ("L", "G") if single else (f"L[{index}]", f"G[{index}]")
    for x, name in zip((square, g), names, strict=True):
        check_floating(x, name)
        if x.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected matrices (..., m, n)")
    if square.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{names[0]} has dtype {square.dtype}, expected float32 or float64")
    expected = (*g.shape[:-1], g.shape[-2])
    if square.shape != expected:
        raise ValueError(
            f"{names[0]} has shape {tuple(square.shape)}, expected {expected} for {names[1]}'s {tuple(g.shape)}"
        )
    if square.device != g.device:
        raise ValueError(f"{names[0]} is on {square.device} and {names[1]} on {g.device}, expected the same")


def update_grams(
    squares: Sequence[Tensor], others: Sequence[Tensor], beta: float, weight: float, backend: str | None
) -> None:
    """Update checked matrices."""
    with ranges.kernel("update_gram_", partial(work_of, squares, others)):
        _update(squares, others, beta, weight, backend)


def work_of(squares: Sequence[Tensor], others: Sequence[Tensor]) -> ranges.Work:
    """2m²n for each G [..., m, n]; L read and written, G read."""
    flops = sum(2.0 * g.numel() * g.shape[-2] for g in others)
    double = any(square.dtype == torch.float64 for square in squares)
    moved = sum(2 * square.nbytes + g.nbytes for square, g in zip(squares, others, strict=True))
    return ranges.Work(moved, flops, "fp64" if double else "fp32")


def _update(
    squares: Sequence[Tensor], others: Sequence[Tensor], beta: float, weight: float, backend: str | None
) -> None:
    together: dict[tuple[str, torch.device], list[int]] = {}
    for index, (square, g) in enumerate(zip(squares, others, strict=True)):
        name = backends.choose(backend, square.device.type)
        compiled = square.dtype == torch.float32 and g.dtype in KERNEL_DTYPES and not square.is_neg()
        if name == "triton" or (name == "cuda" and compiled):
            together.setdefault((name, square.device), []).append(index)
        elif name == "cpu":
            update_by_tiles(square, g.to(square.dtype), beta, weight)
        else:
            reference.update_gram_(square, g, beta, weight)
    for (name, _), indices in together.items():
        chosen = [squares[i] for i in indices], [others[i] for i in indices], beta, weight
        if name == "cuda":
            cuda_roots.update_grams(*chosen)
        else:
            from stepladder.triton_kernels import gram

            gram.update_grams(*chosen)


def update_by_tiles(square: Tensor, g: Tensor, beta: float, weight: float) -> None:
    """The tiles on and below the diagonal by products, those above it by copies."""
    m, n = g.shape[-2:]
    if products.serves(square, n):
        products.multiply(g, g.mT, square, weight, beta, symmetric=True)
        return
    if square.ndim > 3:
        # One by one, as the dimensions of a batch need not make one.
        for own_square, own in zip(square, g, strict=True):
            update_by_tiles(own_square, own, beta, weight)
        return
    add = torch.addmm if square.ndim == 2 else torch.baddbmm
    if m <= TILE + TILE // 2:
        gram = g @ g.mT
        gram = (gram + gram.mT).mul_(weight / 2)
        (square.mul_(beta) if beta != 0.0 else square.zero_()).add_(gram)
        return
    for top in range(0, m, TILE):
        rows = slice(top, min(top + TILE, m))
        # All tiles of a row of them in one product, the one on the diagonal with them.
        left = slice(0, rows.stop)
        tile = square[..., rows, left]
        add(tile, g[..., rows, :], g[..., left, :].mT, beta=beta, alpha=weight, out=tile)
        own = square[..., rows, rows]
        own.copy_((own + own.mT) / 2)
        square[..., left.start : rows.start, rows].copy_(square[..., rows, left.start : rows.start].mT)
