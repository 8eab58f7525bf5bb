"""Correctly rounded building blocks of the reference, in any float dtype.

Scalars are Python floats (doubles) and are rounded once, to the tensor's dtype, where they meet a tensor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LANES = 128
LEAF = 4096


def power(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring, the same operations as csrc/common/math.h."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def rounded(value: float, like: Tensor) -> float:
    """A scalar as `like`'s dtype holds it."""
    return float(torch.tensor(value, dtype=like.dtype))


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root; torch's own is not, on large CPU tensors."""
    if x.dtype != torch.float64:
        return x.double().sqrt().to(x.dtype)
    if x.device.type == "cpu":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))
    return x.sqrt()


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays NaN."""
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """A + weight (b - a), from the nearer end, as torch.lerp has it."""
    if weight < 0.5:
        return a + weight * (b - a)
    return b - (b - a) * (1.0 - weight)


def decayed(g: Tensor, w: Tensor, weight_decay: float) -> Tensor:
    """Coupled (L2) decay: g + weight_decay * w, and g itself where there is none."""
    return g + weight_decay * w if rounded(weight_decay, w) != 0.0 else g


def _fold(x: Tensor) -> Tensor:
    """Fold the last dimension in halves, in index order, to size 1."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        folded = x[..., :half].clone()
        folded[..., : n - half] += x[..., half:]
        x = folded
    return x[..., 0]


def tree_sum(x: Tensor) -> Tensor:
    """Sum of a tensor's elements in logical order by the fixed tree.

    Leaves of 4096 elements are 128 lanes summed row after row; lanes, then leaves, are folded in halves.
    """
    flat = x.reshape(-1)
    leaves = -(-flat.numel() // LEAF)
    if leaves == 0:
        return flat.new_zeros(())
    rows = torch.nn.functional.pad(flat, (0, leaves * LEAF - flat.numel())).view(leaves, LEAF // LANES, LANES)
    lanes = rows[:, 0]
    for row in range(1, LEAF // LANES):
        lanes = lanes + rows[:, row]  # [leaves, LANES]
    return _fold(_fold(lanes))


def norm(x: Tensor) -> Tensor:
    """Euclidean norm by the fixed tree."""
    return sqrt(tree_sum(x * x))


def fold_partials(partials: list[float], largest: bool = False) -> float:
    """Sums (or largest magnitudes) of several tensors, folded in halves in double."""
    x = list(partials)
    while (n := len(x)) > 1:
        half = (n + 1) // 2
        for j in range(n - half):
            x[j] = float(np.maximum(x[j], x[j + half])) if largest else x[j] + x[j + half]
        x = x[:half]
    return x[0] if x else 0.0


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on arrays of counters held in uint64."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a = np.uint64(0xD2511F53) * c0
        b = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & low, (a >> shift) ^ c3 ^ np.uint64(k1), a & low
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def rounding_bits(count: int, seed: int, step: int, index: int, first: int = 0) -> np.ndarray:
    """16 uniform bits for each logical element from `first` on; one call serves 8, low half of a word first. [count]"""
    blocks = np.arange(first // 8, -(-(first + count) // 8), dtype=np.uint64)
    counter = (
        blocks & np.uint64(0xFFFFFFFF),
        blocks >> np.uint64(32),
        np.full_like(blocks, step),
        np.full_like(blocks, index),
    )
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), axis=1)  # [blocks, 4]
    halves = np.stack((words & np.uint64(0xFFFF), words >> np.uint64(16)), axis=2)  # [blocks, 4, 2]
    return halves.reshape(-1)[first % 8 :][:count].astype(np.uint32)


def round_stochastically(x: Tensor, seed: int, step: int, index: int, first: int = 0) -> Tensor:
    """Fp32 to bf16: 16 random bits are added below the kept mantissa, the rest is cut off.

    Args:
        x: float32.
        seed: Of the optimizer's group.
        step: The step being taken, from 1.
        index: The parameter's, through all groups.
        first: Logical index of x's first element in the parameter of which x is a piece.
    """
    bits = x.detach().cpu().contiguous().view(-1).view(torch.int32).numpy().view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    random = rounding_bits(bits.size, seed, step, index, first)
    kept = (bits + np.where(magnitude < 0x7F800000, random, np.uint32(0))) >> np.uint32(16)
    kept = np.where(magnitude > 0x7F800000, (bits >> np.uint32(16)) | np.uint32(0x40), kept)
    result = torch.from_numpy(kept.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    return result.view(x.shape).to(x.device)
