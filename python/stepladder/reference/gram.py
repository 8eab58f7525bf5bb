"""Moving averages of Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_gram_(L: Tensor, G: Tensor, beta: float, weight: float | None = None) -> Tensor:
    """L ← βL + weight·GGᵀ in place, in L's dtype; the weight is 1 - β where None. L: [..., m, m], G: [..., m, n]"""
    g = G.to(L.dtype)
    gram = g @ g.mT
    gram = torch.tril(gram) + torch.tril(gram, -1).mT
    return (L.mul_(beta) if beta != 0.0 else L.zero_()).add_(gram, alpha=1.0 - beta if weight is None else weight)
