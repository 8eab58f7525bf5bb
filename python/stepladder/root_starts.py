"""Minimax polynomials with which Newton's iterations for inverse roots begin."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

# From here on Newton's steps, which cost a product less, are as fast.
NEAR = 0.9


@dataclass(frozen=True, slots=True)
class Start:
    """x ← x(a + bx^p + cx^(2p)) on [condition^(-1/p), 1]: as near a number as can be, which makes 1 the largest."""

    condition: float
    a: float
    b: float
    c: float


@functools.cache
def starts(p: int, condition: float) -> tuple[Start, ...]:
    """The polynomials for inverse p-th roots of matrices of at most this condition, one after the other.

    One whose condition is known to be better begins with the last one that allows for it. All eigenvalues are pressed
    into the range of the worst condition that is allowed for, which costs digits whatever the matrix's own.
    """
    found = []
    low = condition ** (-1.0 / p)
    while low < NEAR:
        (a, b, c), error = minimax(low, p)
        top = 1.0 + error
        found.append(Start(low**-p, a / top, b / top, c / top))
        low = (1.0 - error) / top
    return tuple(found)


def minimax(low: float, p: int) -> tuple[tuple[float, float, float], float]:
    """a, b, c with the least max|x(a + bx^p + cx^(2p)) - 1| on [low, 1], and that maximum, by Remez's exchange."""
    grid = torch.logspace(math.log2(low), 0.0, 20001, base=2.0, dtype=torch.float64)
    points = torch.tensor([low, low + (1 - low) / 4, low + (1 - low) * 3 / 4, 1.0], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    while True:
        system = torch.stack([points, points ** (p + 1), points ** (2 * p + 1), signs], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones_like(signs)).tolist()
        error = a * grid + b * grid ** (p + 1) + c * grid ** (2 * p + 1) - 1.0
        slope = error.diff()
        extrema = (slope[1:] * slope[:-1] < 0).nonzero().flatten() + 1
        exchanged = torch.stack([points[0], grid[extrema[0]], grid[extrema[-1]], points[3]])
        if torch.equal(exchanged, points):
            return (a, b, c), float(error.abs().max())
        points = exchanged
