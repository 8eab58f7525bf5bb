"""Inverse roots by the CUDA kernels."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder import _C
from stepladder.backends import current_stream
from stepladder.reference import matrix_root
from stepladder.reference.matrix_root import RootInfo
from stepladder.root_starts import starts

# This thread's kernels on each GPU, with the tables that they keep.
_kept = threading.local()


def roots(stacks: Sequence[Tensor], p: int, eps: float, relative_eps: float) -> list[tuple[Tensor, RootInfo]]:
    """The roots of stacks [B, n, n] of fp32 on one GPU, in one sequence of launches that waits for nothing.

    Only what is on and below the diagonals is read. The residuals are left NaN.
    """
    device = stacks[0].device
    index = device.index or 0
    if not hasattr(_kept, "roots"):
        _kept.roots = {}
    if index not in _kept.roots:
        _kept.roots[index] = _C.GpuRoots(index)
    results, given = [], []
    for a in stacks:
        a = a.resolve_neg()
        x = torch.empty(a.shape, dtype=a.dtype, device=device)
        iterations = torch.zeros(len(a), dtype=torch.int32, device=device)
        status = torch.zeros(len(a), dtype=torch.int8, device=device)
        residual = torch.full((len(a),), math.nan, dtype=a.dtype, device=device)
        results.append((a, x, RootInfo(iterations, residual, status)))
        out = (x.data_ptr(), iterations.data_ptr(), status.data_ptr())
        given.append((a.data_ptr(), len(a), a.shape[-1], *a.stride(), *out))
    workspaces: list[Tensor] = []

    def allocate(count: int) -> int:
        workspaces.append(torch.empty(count, dtype=torch.uint8, device=device))
        return workspaces[-1].data_ptr()

    _kept.roots[index].run(given, options_of(p, eps, relative_eps), allocate, current_stream(index))
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
