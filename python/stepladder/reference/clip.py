"""Gradient norms and clipping, as torch.nn.utils.clip_grad_norm_ defines them, by the fixed tree."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stepladder.reference.arithmetic import fold_partials, tree_sum


def partial_norm(x: Tensor, norm_type: float) -> float:
    """One tensor's part of a norm: the sum of squares (2) or magnitudes (1), or the largest magnitude (inf)."""
    if norm_type == 2.0:
        return float(tree_sum(x * x))
    if norm_type == 1.0:
        return float(tree_sum(x.abs()))
    return float(x.abs().max()) if x.numel() else 0.0


def total_norm(partials: list[float], norm_type: float) -> float:
    """The norm of all tensors from their parts."""
    total = fold_partials(partials, largest=math.isinf(norm_type))
    return math.sqrt(total) if norm_type == 2.0 and total >= 0.0 else total


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`; returns the norm before."""
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    pairs = [(p.grad, widened(p.grad, p)) for p in params if p.grad is not None]
    norm = total_norm([partial_norm(g, norm_type) for _, g in pairs], norm_type)
    factor = max_norm / (norm + 1e-6)
    if not factor > 1.0:
        for grad, g in pairs:
            (torch.view_as_real(grad) if grad.is_complex() else grad).copy_(factor * g)
    wide = any(g.dtype == torch.float64 for _, g in pairs)
    return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32)


def widened(x: Tensor, param: Tensor) -> Tensor:
    """A tensor in its parameter's arithmetic type: fp64 for fp64, else fp32; complex as real pairs."""
    x = x.detach().resolve_conj().resolve_neg()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32)
