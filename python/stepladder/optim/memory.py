"""Which parameters share memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def meeting(params: Sequence[Tensor]) -> list[list[int]]:
    """Indices of parameters in sets whose bounding address ranges meet, each set in order; empty ones are alone."""
    found = [[index] for index, p in enumerate(params) if not p.numel()]
    ranges = []
    for index, p in enumerate(params):
        if p.numel():
            reach = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            ranges.append((p.data_ptr(), p.data_ptr() + (reach + 1) * p.element_size(), index))
    end = -math.inf
    for begin, past, index in sorted(ranges):
        if begin >= end:
            found.append([])
        found[-1].append(index)
        end = max(end, past)
    return sorted(sorted(members) for members in found)


def waves_of(params: Sequence[Tensor]) -> list[list[int]]:
    """Indices of parameters in waves: those whose bounding address ranges meet are in different ones, in order."""
    waves: list[list[int]] = []
    for members in meeting(params):
        for wave, index in enumerate(members if params[members[0]].numel() else ()):
            if wave == len(waves):
                waves.append([])
            waves[wave].append(index)
    return [sorted(wave) for wave in waves]
