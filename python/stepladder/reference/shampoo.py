"""Shampoo, one parameter and one block after another, in the dtype of what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder.reference.arithmetic import lerp, power
from stepladder.reference.kronecker import blocks, gram, times
from stepladder.reference.matrix_root import RootStatus, eigh_roots, noise_of

GRAFTINGS = ("none", "sgd", "adagrad", "rmsprop", "adam")
# Added to the norm that grafting divides by.
GRAFTING_FLOOR = 1e-16


def shampoo(
    w: Tensor,
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    factors: Sequence[Tensor],
    roots: Sequence[Tensor],
    *,
    shape: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    relative_eps: float,
    weight_decay: float,
    max_preconditioner_dim: int,
    exponent: float,
    grafting: str,
    grafting_beta2: float,
    grafting_eps: float,
    bias_correction: bool,
    preconditioned: bool,
    refresh: Sequence[bool],
    time: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor], list[Tensor], int]:
    """One step of Shampoo.

    L ← β₂L + (1 - β₂)GGᵀ for each block and dimension, summed where β₂ = 1;  Ĝ = m/(1 - β₁ᵗ), m the moving average
    of G;  U = Ĝ × (L/(1 - β₂ᵗ) + δI)^(-1/p) along each dimension;  w ← (1 - ηλ)w - η·U·‖P‖F/‖U‖F, where P is the
    grafted method's step for Ĝ, which stands for U as long as `preconditioned` is not set.

    Args:
        w: Weights, of any shape.
        g: Gradient.
        m: Average of the gradients; None where β₁ = 0.
        v: Second moment of the grafted method; None where it has none.
        factors: L for each block and dimension, [n, n], all dimensions of a block one after the other. Empty where
            the parameter is stepped by the grafted method alone.
        roots: Their roots.
        shape: Of the tensor that is cut into blocks.
        lr: η.
        betas: β₁, β₂.
        eps: Absolute part of δ.
        relative_eps: Part of δ relative to the largest eigenvalue.
        weight_decay: λ.
        max_preconditioner_dim: The longest side of a block.
        exponent: p of the roots.
        grafting: Of GRAFTINGS; "none" leaves the norm of U, and takes Ĝ before there is one.
        grafting_beta2: Of v.
        grafting_eps: Added to the root of v.
        bias_correction: Whether averages are divided by 1 - βᵗ.
        preconditioned: Whether roots are used yet.
        refresh: For each factor whether its root is to be computed.
        time: t, from 1.

    Returns:
        All that was given and has changed, and how many roots failed, which are then the previous ones.

    Papers: Gupta et al. 2018, arXiv:1802.09568; Anil et al. 2020, arXiv:2002.09018; Shi et al. 2023, arXiv:2309.06497.
    """
    beta1, beta2 = betas
    if m is not None:
        m = lerp(m, g, 1.0 - beta1)
    smoothed = g if m is None else m / (1.0 - power(beta1, time) if bias_correction else 1.0)
    step, v = grafted(smoothed, g, v, grafting, grafting_beta2, grafting_eps, bias_correction, time)

    factors, roots, failures = list(factors), list(roots), 0
    correction = 1.0 - power(beta2, time) if bias_correction and beta2 < 1.0 else 1.0
    parts = blocks(g.reshape(shape), max_preconditioner_dim) if factors else []
    order = len(shape)
    for index, part in enumerate(parts):
        for dim in range(order):
            k = index * order + dim
            factors[k] = beta2 * factors[k] + (1.0 - beta2 if beta2 < 1.0 else 1.0) * gram(part, dim)
            if refresh[k]:
                corrected = (factors[k] / correction)[None]
                root, info = eigh_roots(corrected, exponent, eps, relative_eps, noise_of(corrected.dtype))
                if int(info.status) == RootStatus.CONVERGED:
                    roots[k] = root[0]
                else:
                    failures += 1
    if preconditioned and factors:
        update = torch.empty_like(g).reshape(shape)
        targets = blocks(update, max_preconditioner_dim)
        sources = blocks(smoothed.reshape(shape), max_preconditioner_dim)
        plain = blocks(step.reshape(shape), max_preconditioner_dim)
        for index, (target, u) in enumerate(zip(targets, sources, strict=True)):
            for dim in range(order):
                u = times(u, roots[index * order + dim], dim)
            if grafting != "none":
                u = u * (plain[index].norm() / (u.norm() + GRAFTING_FLOOR))
            target.copy_(u)
        step = update.reshape(w.shape)
    if lr != 0.0:
        w = (1.0 - lr * weight_decay) * w - lr * step
    return w, m, v, factors, roots, failures


def grafted(
    smoothed: Tensor,
    g: Tensor,
    v: Tensor | None,
    grafting: str,
    beta2: float,
    eps: float,
    bias_correction: bool,
    time: int,
) -> tuple[Tensor, Tensor | None]:
    """The step of the grafted method for a smoothed gradient, and its second moment."""
    if v is None:
        return smoothed, None
    if grafting == "adagrad":
        v = v + g.square()
        return smoothed / (v.sqrt() + eps), v
    v = beta2 * v + (1.0 - beta2) * g.square()
    correction = 1.0 - power(beta2, time) if bias_correction and grafting == "adam" else 1.0
    return smoothed / ((v / correction).sqrt() + eps), v
