"""SOAP, one parameter after another, in the dtype of what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepladder.reference.arithmetic import lerp, power
from stepladder.reference.kronecker import as_rows, gram, times

# Of eigenvalues that KL-SOAP divides by, relative to the largest.
KL_DAMPING = 1e-6


def project(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Into the bases of its dimensions; None stands for the identity."""
    for dim, basis in enumerate(bases):
        if basis is not None:
            x = times(x, basis, dim)
    return x


def project_back(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Out of them."""
    return project(x, [None if basis is None else basis.mT for basis in bases])


def soap(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factors: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    eigenvalues: Sequence[Tensor | None],
    *,
    lr: float,
    betas: tuple[float, float],
    shampoo_beta: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    refresh: bool,
    refresh_tolerance: float,
    kl: bool,
    time: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], list[Tensor | None], list[Tensor | None], int]:
    """One step of SOAP: Adam in the eigenbases of Shampoo's factors.

    At t = 0: L = GGᵀ for each dimension, Q its eigenvectors, eigenvalues descending, and nothing else; where an L is
    not finite, nothing at all, and the next gradient is to be the first. Then
    G' = QLᵀGQR;  m ← β₁m + (1 - β₁)G';  v ← β₂v + (1 - β₂)G'²;
    w ← (1 - ηλ)(w - η·√(1 - β₂ᵗ)/(1 - β₁ᵗ)·QL(m/(√v + ε))QRᵀ);  L ← βL + (1 - β)GGᵀ; and where `refresh`,
    columns of Q in the descending order of diag(QᵀLQ), v with them, Q ← qr(LQ), and m into the new bases.

    m is kept in the eigenbases, where the paper keeps it in the space of the weights and projects it at each step:
    between refreshes that is the same by linearity.

    Args:
        w: Weights, of any shape, one dimension for each factor.
        g: Gradient.
        m: Average of the projected gradients.
        v: That of their squares.
        factors: L for each dimension, [n, n]; None for the identity.
        bases: Q for each dimension.
        eigenvalues: KL-SOAP's Λ for each dimension, [n]; unused without `kl`.
        lr: η.
        betas: β₁, β₂.
        shampoo_beta: β.
        eps: ε.
        weight_decay: λ.
        bias_correction: Whether the step is multiplied by √(1 - β₂ᵗ)/(1 - β₁ᵗ).
        refresh: Whether bases are refreshed.
        refresh_tolerance: A basis is left as it is where ‖B - diag B‖F ≤ tolerance·‖B‖F, B = QᵀLQ.
        kl: KL-SOAP: L ← βL + (1 - β)/n·G·QRΛR⁻¹QRᵀ·Gᵀ, n the number of columns.
        time: t, from 0.

    Returns:
        All that was given and has changed, and how many bases could not be refreshed, which are then the previous ones.

    Papers: Vyas et al. 2024, arXiv:2409.11321; criterion: 2506.03595; KL-SOAP: Lin et al. 2025, arXiv:2509.03378.
    """
    given = list(factors)
    factors, bases, eigenvalues = list(factors), list(bases), list(eigenvalues)
    if time == 0:
        for dim, factor in enumerate(factors):
            if factor is not None:
                factors[dim] = gram(g, dim) / (g.numel() // g.shape[dim] if kl else 1)
        failures = sum(not bool(factor.isfinite().all()) for factor in factors if factor is not None)
        if failures:
            return w, m, v, given, bases, eigenvalues, failures
        for dim, factor in enumerate(factors):
            if factor is not None:
                values, vectors = torch.linalg.eigh(factor)
                bases[dim] = vectors.flip(-1)
                if kl:
                    eigenvalues[dim] = values.flip(-1)
        return w, m, v, factors, bases, eigenvalues, 0
    beta1, beta2 = betas
    projected = project(g, bases)
    m = lerp(m, projected, 1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * projected.square()
    size = lr
    if bias_correction:
        size *= math.sqrt(1.0 - power(beta2, time)) / (1.0 - power(beta1, time))
    if lr != 0.0:
        w = (1.0 - lr * weight_decay) * (w - size * project_back(m / (v.sqrt() + eps), bases))

    new_values = list(eigenvalues)
    for dim, factor in enumerate(factors):
        if factor is None:
            continue
        if not kl:
            factors[dim] = lerp(factor, gram(g, dim), 1.0 - shampoo_beta)
            continue
        # G·QΛ^(-1/2) along the other dimensions, so that its Gram matrix is what is averaged.
        scaled, diagonal = g, projected
        for other, (basis, values) in enumerate(zip(bases, eigenvalues, strict=True)):
            if other != dim and basis is not None and values is not None:
                weights = damped_inverse(values)
                scaled = times(scaled, basis * weights.sqrt(), other)
                diagonal = times(diagonal, torch.diag(weights.sqrt()), other)
        count = g.numel() // g.shape[dim]
        factors[dim] = lerp(factor, gram(scaled, dim) / count, 1.0 - shampoo_beta)
        squares = as_rows(diagonal.square(), dim).sum(1) / count
        values = eigenvalues[dim]
        assert values is not None
        new_values[dim] = lerp(values, squares, 1.0 - shampoo_beta)
    eigenvalues = new_values

    failures = 0
    if refresh:
        before = list(bases)
        for dim, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
            if factor is None or basis is None:
                continue
            rotated = factor @ basis
            diagonal = (basis * rotated).sum(0)
            if refresh_tolerance > 0.0 and off_diagonal(factor, diagonal) <= refresh_tolerance:
                continue
            order = torch.argsort(diagonal, descending=True, stable=True)
            fresh = torch.linalg.qr(rotated[:, order]).Q if rotated.isfinite().all() else rotated
            if not bool(fresh.isfinite().all()):
                failures += 1
                continue
            v = v.index_select(dim, order)
            bases[dim] = fresh
            if kl:
                eigenvalues[dim] = (fresh * (factor @ fresh)).sum(0)
        m = project(project_back(m, before), bases)
    return w, m, v, factors, bases, eigenvalues, failures


def damped_inverse(values: Tensor) -> Tensor:
    """1/(λ + 1e-6·λmax), where no λ is below 0; 1 for zeros, and where the damping would be no normal number."""
    values = values.clamp(min=0.0)
    top = values.max()
    return torch.where(top > torch.finfo(values.dtype).tiny / KL_DAMPING, 1.0 / (values + KL_DAMPING * top), 1.0)


def off_diagonal(factor: Tensor, diagonal: Tensor) -> float:
    """‖B - diag B‖F/‖B‖F for B = QᵀLQ, by its diagonal; NaN for zeros, and where L is not finite."""
    whole = factor.double().square().sum()
    return float(((whole - diagonal.double().square().sum()).clamp(min=0.0) / whole).sqrt())
