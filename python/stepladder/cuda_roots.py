"""Inverse roots, orthonormal bases, averages of Gram matrices and products by the CUDA kernels."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stepladder import _C
from stepladder.backends import current_stream
from stepladder.newton_schulz import view_of
from stepladder.reference import matrix_root
from stepladder.reference.matrix_root import RootInfo
from stepladder.reference.orthonormalize import LIMIT, SHIFT, BasisInfo
from stepladder.root_starts import starts

# This thread's kernels on each GPU, with the tables that they keep.
_kept = threading.local()

Kernels = TypeVar("Kernels")


def _kernels(kind: Callable[[int], Kernels], device: torch.device) -> Kernels:
    if not hasattr(_kept, "kernels"):
        _kept.kernels = {}
    key = (kind, device.index or 0)
    if key not in _kept.kernels:
        _kept.kernels[key] = kind(key[1])
    found: Kernels = _kept.kernels[key]
    return found


class _Workspace:
    """What a call asks for, kept until it returns; what it has enqueued comes first on its stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: list[Tensor] = []

    def __call__(self, count: int) -> int:
        self.kept.append(torch.empty(count, dtype=torch.uint8, device=self.device))
        return self.kept[-1].data_ptr()


def roots(stacks: Sequence[Tensor], p: int, eps: float, relative_eps: float) -> list[tuple[Tensor, RootInfo]]:
    """The roots of stacks [B, n, n] of fp32 on one GPU, in one sequence of launches that waits for nothing.

    Only what is on and below the diagonals is read. The residuals are left NaN.
    """
    device = stacks[0].device
    results, given = [], []
    for a in stacks:
        a = a.resolve_neg()
        x = torch.empty(a.shape, dtype=a.dtype, device=device)
        iterations = torch.zeros(len(a), dtype=torch.int32, device=device)
        status = torch.zeros(len(a), dtype=torch.int8, device=device)
        residual = torch.full((len(a),), math.nan, dtype=a.dtype, device=device)
        results.append((a, x, RootInfo(iterations, residual, status)))
        out = (x.data_ptr(), iterations.data_ptr(), status.data_ptr())
        batch, row, column = a.stride()
        given.append((a.data_ptr(), len(a), a.shape[-1], batch, row, column, *out))
    options = options_of(p, eps, relative_eps)
    _kernels(_C.GpuRoots, device).run(given, options, _Workspace(device), current_stream(device.index or 0))
    return [(x, info) for _, x, info in results]


def options_of(p: int, eps: float, relative_eps: float) -> _C.RootOptions:
    """The reference's constants, for the compiled kernels."""
    return _C.RootOptions(
        p=p,
        eps=eps,
        relative_eps=relative_eps,
        near=matrix_root.NEAR_IDENTITY,
        growth=matrix_root.GROWTH,
        fast_size=matrix_root.FAST_SIZE,
        squarings=matrix_root.SQUARINGS,
        multiplications=matrix_root.MULTIPLICATIONS,
        fast=(_polynomials(p, matrix_root.FAST_CONDITION), matrix_root.FAST_STEPS),
        wide=(_polynomials(p, matrix_root.WIDE_CONDITION), matrix_root.WIDE_STEPS),
    )


@functools.cache
def _polynomials(p: int, condition: float) -> list[tuple[float, float, float, float]]:
    return [(start.condition, start.a, start.b, start.c) for start in starts(p, condition)]


def bases(stacks: Sequence[Tensor], method: str) -> list[tuple[Tensor, BasisInfo]]:
    """The bases of tensors [..., m, n] of fp32 on one GPU, in one sequence of launches that waits for nothing."""
    device = stacks[0].device
    results, given = [], []
    for x in stacks:
        m, n = x.shape[-2:]
        members = x.resolve_neg().reshape(math.prod(x.shape[:-2]), m, n)
        q = torch.empty(x.shape, dtype=x.dtype, device=device)
        fallback = torch.zeros(x.shape[:-2], dtype=torch.bool, device=device)
        finite = torch.ones(x.shape[:-2], dtype=torch.bool, device=device)
        results.append((members, q, BasisInfo(fallback, finite)))
        out = (q.data_ptr(), fallback.data_ptr(), finite.data_ptr())
        batch, row, column = members.stride()
        given.append((members.data_ptr(), len(members), m, n, batch, row, column, *out))
    kernels, stream = _kernels(_C.GpuBases, device), current_stream(device.index or 0)
    kernels.run(given, method == "householder", SHIFT, LIMIT, _Workspace(device), stream)
    return [(q, info) for _, q, info in results]


def update_grams(squares: Sequence[Tensor], others: Sequence[Tensor], beta: float, weight: float) -> None:
    """L ← βL + weight·GGᵀ for L of fp32 on one GPU and G of a dtype that kernels take, in one launch.

    Of each L one half is read.
    """
    device = squares[0].device
    others = [g.resolve_neg() for g in others]
    given = [(view_of(square), view_of(g)) for square, g in zip(squares, others, strict=True)]
    _kernels(_C.GpuGrams, device).run(given, beta, weight, current_stream(device.index or 0))


def _place(x: Tensor) -> tuple[int, int, int, int]:
    batch, row, column = x.stride()
    return x.data_ptr(), batch, row, column


def multiply(products: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """out ← left·right for (left, right, out) of [B, m, k], [B, k, n] and [B, m, n] on one GPU, in one launch.

    All are of fp32, or all of fp64.
    """
    out = products[0][2]
    given, kept = [], []
    for left, right, result in products:
        operands = left.resolve_neg(), right.resolve_neg()
        kept.append(operands)  # until the launch is enqueued
        a, b, c = (_place(x) for x in (*operands, result))
        given.append((a, b, c, len(result), left.shape[1], right.shape[2], left.shape[2]))
    stream = current_stream(out.device.index or 0)
    _kernels(_C.GpuProducts, out.device).run(given, out.dtype == torch.float64, stream)
