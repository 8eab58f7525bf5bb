"""Steps of many parameters on a GPU, each kind of work for all of them at once.

Products and Gram matrices are one launch of ours each, whatever the parameters; what is elementwise goes by torch's
operations on lists of tensors, and what sorts or selects by batches of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stepladder.multiply import Product, multiply

# Elements of the parameters, or of their factors, that are worked on at a time: 1 GiB of fp32. It bounds memory, some
# times which a step allocates, and leaves a launch 256 matrices of 1024, more than any GPU has multiprocessors.
MOST = 1 << 28
# Elements to a multiple of which a buffer is cut, so that parts of fp32 begin at multiples of 256 bytes: kernels need
# 16, and a line of the cache has 128.
ALIGNED = 64

Item = TypeVar("Item")


def by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Those that have a key in common, in their order."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def bunches(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Neighbours of at most MOST elements together, or a single one of more."""
    bunch: list[Item] = []
    held = 0
    for item in items:
        own = size(item)
        if bunch and held + own > MOST:
            yield bunch
            bunch, held = [], 0
        bunch.append(item)
        held += own
    if bunch:
        yield bunch


def buffers(like: Sequence[Tensor]) -> list[Tensor]:
    """A contiguous tensor for each of these, of one dtype and device, in a single allocation."""
    sizes = [-(-x.numel() // ALIGNED) * ALIGNED for x in like]
    pieces = torch.split(like[0].new_empty(sum(sizes)), sizes)
    return [piece[: x.numel()].view(x.shape) for piece, x in zip(pieces, like, strict=True)]


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """In the dtype of the arithmetic: as they are, or copies."""
    result = [x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device) for x in tensors]
    stored_all(result, tensors)
    return result


def stored_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values to where they are kept, but for those that are there already."""
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if t.data_ptr() != v.data_ptr()]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [v.reshape(t.shape) for t, v in pairs])


def along_all(
    tensors: Sequence[Tensor],
    matrices: Sequence[Sequence[Tensor | None]],
    backend: str | None,
    targets: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Each tensor times its matrices, one along each dimension, None for the identity: Σᵢ x[…i…]·M[i, j].

    A launch for each dimension, whatever the tensors. Those without any matrix are returned as they are. Results are
    written to `targets`, of any strides, where these are given.
    """
    found = list(tensors)
    last = [max((d for d, matrix in enumerate(own) if matrix is not None), default=-1) for own in matrices]
    for dim in range(max((x.ndim for x in found), default=0)):
        chosen = [i for i, own in enumerate(matrices) if dim < len(own) and own[dim] is not None]
        if not chosen:
            continue
        products = []
        outs = {}
        if targets is not None:
            outs = {i: targets[i] for i in chosen if dim == last[i] and is_product_result(targets[i])}
        elsewhere = [i for i in chosen if i not in outs]
        if elsewhere:
            outs |= dict(zip(elsewhere, buffers([found[i] for i in elsewhere]), strict=True))
        for i in chosen:
            out = outs[i]
            matrix = matrices[i][dim]
            assert matrix is not None
            products.append(product(found[i], matrix, dim, out))
            found[i] = out
        multiply(products, backend)
    if targets is not None:
        stored_all(targets, found)
    return found


def is_product_result(x: Tensor) -> bool:
    """Whether a kernel can write a product to it."""
    return x.ndim == 2 or x.is_contiguous()


def product(x: Tensor, matrix: Tensor, dim: int, out: Tensor) -> Product:
    """x·M along a dimension, as a product of matrices or a batch of them."""
    if dim == x.ndim - 1:
        return Product(rows_of(x), matrix[None], rows_of(out))
    right, result = (
        y[None] if y.ndim == 2 else y.view(math.prod(y.shape[:dim]), y.shape[dim], -1) for y in (whole(x), out)
    )
    return Product(matrix.mT[None].expand(len(right), *matrix.shape), right, result)


def rows_of(x: Tensor) -> Tensor:
    """[1, the other dimensions, the last one]"""
    return x[None] if x.ndim == 2 else whole(x).view(1, -1, x.shape[-1])


def whole(x: Tensor) -> Tensor:
    """As it is, where it is a matrix, or its dimensions can be taken together."""
    return x if x.ndim == 2 else x.contiguous()
