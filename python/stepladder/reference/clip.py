"""Gradient norms and clipping, as torch.nn.utils.clip_grad_norm_ defines them, by the fixed tree."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stepladder.reference.arithmetic import fold_partials, tree_sum


def partial_norm(x: Tensor, norm_type: float) -> float:
    """One tensor's part of a norm: the sum of squares (2) or magnitudes (1), or the largest magnitude (inf).

    Args:
        x: Real, fp32 or fp64, of any shape; sums are taken in its dtype and in its logical order.
        norm_type: 1, 2 or math.inf.
    """
    if norm_type == 2.0:
        return float(tree_sum(x * x))
    if norm_type == 1.0:
        return float(tree_sum(x.abs()))
    return float(x.abs().max()) if x.numel() else 0.0


def total_norm(partials: list[float], norm_type: float) -> float:
    """The norm of all tensors from their parts, folded in double.

    Args:
        partials: What `partial_norm` gave for each tensor.
        norm_type: 1, 2 or math.inf, as it was there.
    """
    total = fold_partials(partials, largest=math.isinf(norm_type))
    return math.sqrt(total) if norm_type == 2.0 and total >= 0.0 else total


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`, as `stepladder.ops.clip_grad_norm_` does.

    Args:
        parameters: Of any dtype and shape, any of them without a gradient.
        max_norm: The largest norm allowed.
        norm_type: 1, 2 or math.inf.

    Returns:
        The norm before, a scalar of fp32, or of fp64 where a parameter is.
    """
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
    """A tensor in its parameter's arithmetic type: fp64 for fp64, else fp32; complex as real pairs.

    Args:
        x: The parameter, its gradient or a state, of any dtype.
        param: The parameter, fp64 or complex128, or of another dtype.

    Returns:
        As x, with a last dimension of 2 where x is complex.
    """
    x = x.detach().resolve_conj().resolve_neg()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32)
