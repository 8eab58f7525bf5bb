"""Rules as the essay writes them, where the package's optimizers, which follow torch.optim and the papers, differ.

Parameters are matrices [..., m, n], with the seeds of a race in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Steps all parameters from their gradients at a learning rate.
Step = Callable[[float], None]

ADAGRAD_EPS, RMSPROP_EPS = 1e-10, 1e-8
RMSPROP_BETA = 0.99
MOMENTUM = 0.9
SHAMPOO_BETA = 0.95
# What Shampoo's factors start from, in units of the identity, and the least eigenvalue that its roots see.
SHAMPOO_FLOOR = 1e-6


def adagrad(params: Sequence[Tensor]) -> Step:
    """G ← G + g²; w ← w − ηg/√(G + ε): torch.optim has ε outside of the root."""
    sums = [torch.zeros_like(p) for p in params]

    def step(lr: float) -> None:
        for p, total in zip(params, sums, strict=True):
            g = _grad(p)
            total += g * g
            p -= lr * g / (total + ADAGRAD_EPS).sqrt()

    return step


def rmsprop(params: Sequence[Tensor]) -> Step:
    """V ← βv + (1 − β)g²; w ← w − ηg/√(v + ε): torch.optim has ε outside of the root."""
    averages = [torch.zeros_like(p) for p in params]

    def step(lr: float) -> None:
        for p, v in zip(params, averages, strict=True):
            g = _grad(p)
            v.mul_(RMSPROP_BETA).addcmul_(g, g, value=1.0 - RMSPROP_BETA)
            p -= lr * g / (v + RMSPROP_EPS).sqrt()

    return step


def shampoo(params: Sequence[Tensor]) -> Step:
    """U ← 0.9u + g; L ← βL + (1 − β)GGᵀ, R ← βR + (1 − β)GᵀG; w ← w − η·L^(−1/4) u R^(−1/4), roots at every step.

    `stepladder.Shampoo` starts its factors at 0, corrects that bias, and adds its damping; here they start at 1e-6·I
    and eigenvalues are clipped.
    """
    buffers = [torch.zeros_like(p) for p in params]
    factors = [
        [SHAMPOO_FLOOR * torch.eye(n, dtype=p.dtype).expand(*p.shape[:-2], n, n).contiguous() for n in p.shape[-2:]]
        for p in params
    ]  # for each parameter L [..., m, m] and R [..., n, n]

    def step(lr: float) -> None:
        for p, u, (left, right) in zip(params, buffers, factors, strict=True):
            g = _grad(p)
            u.mul_(MOMENTUM).add_(g)
            left.mul_(SHAMPOO_BETA).add_(g @ g.mT, alpha=1.0 - SHAMPOO_BETA)
            right.mul_(SHAMPOO_BETA).add_(g.mT @ g, alpha=1.0 - SHAMPOO_BETA)
            p -= lr * (clipped_root(left) @ u @ clipped_root(right))

    return step


def clipped_root(factors: Tensor) -> Tensor:
    """V·max(λ, 1e-6)^(−1/4)·Vᵀ of matrices [..., n, n]; of one that is not finite NaN, as LAPACK refuses it."""
    finite = factors.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, factors, 0.0))
    # Each matrix's apart: torch takes other powers of a tensor's last few numbers than of those before.
    rows = values.clamp(min=SHAMPOO_FLOOR).view(-1, values.shape[-1])
    powers = torch.stack([row.pow(-0.25) for row in rows]).view_as(values)
    roots = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return torch.where(finite, roots, torch.nan)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
