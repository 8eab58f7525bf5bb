"""Moving averages of Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_gram_(L: Tensor, G: Tensor, beta: float, weight: float | None = None) -> Tensor:
    """L ← βL + weight·GGᵀ in place, in L's dtype.

    Args:
        L: Symmetric matrices [..., m, m].
        G: Matrices [..., m, n] of any floating-point dtype.
        beta: β; at 0 it is not looked at what L holds.
        weight: Of the product; None means 1 - β.

    Returns:
        L.
    """
    g = G.to(L.dtype)
    gram = g @ g.mT
    gram = torch.tril(gram) + torch.tril(gram, -1).mT
    return (L.mul_(beta) if beta != 0.0 else L.zero_()).add_(gram, alpha=1.0 - beta if weight is None else weight)
