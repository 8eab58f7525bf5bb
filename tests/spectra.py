"""Symmetric matrices with known spectra, and their inverse roots by float64 eigendecompositions."""

from __future__ import annotations

import torch
from torch import Tensor

SPECTRA = ("logarithmic", "half small", "one large", "linear")


def eigenvalues(spectrum: str, n: int, condition: float) -> Tensor:
    """From 1 down to 1/condition, fp64; of n = 1 that is 1 alone."""
    if spectrum == "logarithmic":
        return torch.logspace(0.0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    if spectrum == "linear":
        return torch.linspace(1.0, 1.0 / condition, n, dtype=torch.float64)
    values = torch.full((n,), 1.0 / condition, dtype=torch.float64)
    values[: (n + 1) // 2 if spectrum == "half small" else 1] = 1.0
    return values


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors, fp64."""
    n = len(values)
    generator = torch.Generator().manual_seed(1000 * seed + n)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    a = (q * values) @ q.T
    return (a + a.T) / 2


def exact_root(a: Tensor, p: int, eps: float = 0.0, relative_eps: float = 0.0) -> Tensor:
    """(A + (eps + relative_eps·λmax)I)^(-1/p) of matrices [..., n, n] as they are, in fp64."""
    values, vectors = torch.linalg.eigh(a.double())
    values = values + eps + relative_eps * values[..., -1:]
    return (vectors * values[..., None, :] ** (-1.0 / p)) @ vectors.mT
