"""How a tensor is cut into blocks with a factor for each dimension, and when factors are worked on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Neighbouring dimensions together while their product is at most `limit`, and none of length 1 among others."""
    merged: list[int] = []
    for size in shape:
        if merged and merged[-1] * size <= limit:
            merged[-1] *= size
        elif size != 1:
            merged.append(size)
    return tuple(merged) or (1,)


def even_parts(size: int, limit: int) -> tuple[int, ...]:
    """A length as the fewest parts of at most `limit` each, which differ by 1 at the most, larger ones first."""
    count = max(1, math.ceil(size / limit))
    least, more = divmod(size, count)
    return (least + 1,) * more + (least,) * (count - more)


def blocks(x: Tensor, limit: int) -> list[Tensor]:
    """Views of x, dimension after dimension cut into even parts, in the order of their elements."""
    found = [x]
    for dim, size in enumerate(x.shape):
        parts = even_parts(size, limit)
        found = list(itertools.chain.from_iterable(torch.split(part, list(parts), dim) for part in found))
    return found


def times(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """x·M along dimension `dim`: Σᵢ x[…i…]·M[i, j]."""
    product: Tensor = torch.tensordot(x, matrix, ([dim], [0]))
    return product.movedim(-1, dim)


def as_rows(x: Tensor, dim: int) -> Tensor:
    """x as a matrix whose rows are indexed by `dim`."""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def gram(x: Tensor, dim: int) -> Tensor:
    """XXᵀ of x as such a matrix, of which one half is the other's mirror image."""
    rows = as_rows(x, dim)
    product = rows @ rows.mT
    return torch.tril(product) + torch.tril(product, -1).mT


def refresh_due(time: int, start: int, frequency: int, phase: int) -> bool:
    """Whether what is refreshed every `frequency` steps, and must be there at step `start`, is due at step `time`.

    Args:
        time: From 1.
        start: Of first use.
        frequency: Steps between two refreshes.
        phase: Steps after `start`, or a multiple of `frequency` later, in [0, frequency): so the refreshes of a
            model can be spread over the steps. Those of a phase above 0 come the first time before `start`, if
            there are steps enough, else at it.
    """
    first = start - frequency + phase if phase else start
    return (time >= first and (time - start) % frequency == phase) or (time == start and first < 1)
