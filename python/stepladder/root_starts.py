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
    """a, b, c with the least max|x(a + bx^p + cx^(2p)) - 1| on [low, 1], and that maximum, by Remez's exchange.

    For p = 1 the least value is near 9/condition, so that extrema on a grid would not do: a negative one turns an
    eigenvalue's sign.
    """
    points = torch.tensor([low, low + (1 - low) / 4, low + (1 - low) * 3 / 4, 1.0], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    while True:
        system = torch.stack([points, points ** (p + 1), points ** (2 * p + 1), signs], 1)
        a, b, c, level = torch.linalg.solve(system, torch.ones_like(signs)).tolist()
        # The slope a + (p + 1)bx^p + (2p + 1)cx^(2p) has two zeros between the points, where the sign alternates.
        middle, product = -(p + 1) * b / (2 * (2 * p + 1) * c), a / ((2 * p + 1) * c)
        apart = math.sqrt(middle**2 - product)
        inner = [(middle - apart) ** (1 / p), (middle + apart) ** (1 / p)]
        exchanged = torch.tensor([low, *inner, 1.0], dtype=torch.float64)
        # There the polynomial is flat: what the points are off by, it is off by the square of.
        if float((exchanged - points).abs().max()) <= 1e-10:
            return (a, b, c), abs(level)
        points = exchanged
