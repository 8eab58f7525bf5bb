"""Newton-Schulz iterations towards the orthogonal polar factor, in the dtype of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from stepladder.coefficients import Coefficients, CoefficientSet, resolve

METHODS = ("auto", "standard", "gram")
# Steps of the Gram form after which it starts afresh from the matrix. Rounding makes small eigenvalues of a Gram matrix
# wrong, even negative, and each step multiplies them by up to a²: in bf16, three steps of "polar_express" in a row end
# twice as far from the exact result as that is from zero, two steps within 1 %.
RESTART_EVERY = 2
# Below the norm of any matrix of fp32 but that of zeros.
LEAST = 2.0**-150


@overload
def newton_schulz(
    X: Tensor,
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
) -> Tensor: ...
@overload
def newton_schulz(
    X: Sequence[Tensor],
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
) -> list[Tensor]: ...
@torch.no_grad()
def newton_schulz(
    X: Tensor | Sequence[Tensor],
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
) -> Tensor | list[Tensor]:
    """The iteration of `stepladder.ops.newton_schulz`; see there for the arguments.

    Everything is computed in X's dtype, but for the norm, which is taken in fp32 or wider. `method="auto"` is
    the standard form here.

    Returns:
        Tensors as given, of the same shapes and dtypes.

    Papers: Bernstein & Newhouse 2024, arXiv:2409.20325; Jordan 2024; Gram form: Dao-AILab 2025, gram-newton-schulz.
    """
    if not isinstance(X, Tensor):
        return [newton_schulz(x, coefficients, steps, method, eps) for x in X]
    return iterate(X, resolve(coefficients, steps), method, eps, X.dtype)


def iterate(X: Tensor, chosen: CoefficientSet, method: str, eps: float, dtype: torch.dtype) -> Tensor:
    """The iteration with its products in `dtype`, on matrices [..., m, n]."""
    return polynomials(normalised(X, eps, chosen.divisor).to(dtype), chosen, method).to(X.dtype)


def polynomials(x: Tensor, chosen: CoefficientSet, method: str) -> Tensor:
    """All steps of the iteration, on normalised matrices [..., m, n], which may be written to."""
    shape = x.shape
    transposed = shape[-2] > shape[-1]
    x = x.mT if transposed else x
    if x.ndim > 3:
        x = x.flatten(0, -3)  # [m, n] or [B, m, n], m <= n
    if chosen.aol:
        x = aol(x)
    x = gram_form(x, chosen) if method == "gram" else standard_form(x, chosen)
    return (x.mT if transposed else x).reshape(shape)


def normalised(X: Tensor, eps: float, divisor: float) -> Tensor:
    """X / (max(‖X‖F, eps)·divisor) for each matrix, in fp32, or fp64 where X is; a matrix of zeros stays one.

    An element that is NaN or infinite leaves a NaN, which the first product spreads over its matrix.
    """
    if X.dtype == torch.float64:
        return normalised_wide(X, eps, divisor)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    floor = norm.clamp(min=max(eps, LEAST)) * divisor
    if X.device.type == "cpu" and X.numel():
        least, most = torch.aminmax(floor)
        if least > 2.0**-100 and most < 2.0**100:
            # The same bits with one product less, as powers of two round nothing here.
            fast: Tensor = X.float() * (1.0 / floor).float()
            return fast
    # Two factors, one of them a power of two, as their product need not be a normal number.
    power = torch.ldexp(torch.ones_like(floor), -torch.frexp(floor).exponent.clamp(-126, 126))
    scaled: Tensor = X.float() * power.float() * (1.0 / (power * floor)).float()
    return scaled


def normalised_wide(X: Tensor, eps: float, divisor: float) -> Tensor:
    """The same for fp64, whose squares may overflow."""
    largest = X.abs().amax((-2, -1), keepdim=True) if X.numel() else X.sum((-2, -1), keepdim=True)
    half = torch.where(largest > 1, largest * 0.5, largest)
    unit = torch.where((largest > 0) & largest.isfinite(), half / torch.frexp(largest).mantissa, 1.0)
    x = X / unit
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    return torch.where(norm > 0, x / (torch.maximum(norm, eps / unit) * divisor), x * norm)


def times(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, in `out` where it is given, and always in their dtype: autocast leaves such products alone."""
    if out is None:
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
    return torch.matmul(left, right, out=out)


def aol(x: Tensor) -> Tensor:
    """Rows divided by √(Σⱼ|Aᵢⱼ|), A = xxᵀ; a row of zeros stays one."""
    sums = times(x, x.mT).abs().sum(-1, keepdim=True)
    return torch.where(sums != 0, x / sums.sqrt(), x)


def plus_product(
    beta: float, added: Tensor, alpha: float, left: Tensor, right: Tensor, out: Tensor | None = None
) -> Tensor:
    """beta·added + alpha·left @ right, likewise."""
    if out is None:
        out = torch.empty_like(added)
    add = torch.addmm if added.ndim == 2 else torch.baddbmm
    return add(added, left, right, beta=beta, alpha=alpha, out=out)


def standard_form(x: Tensor, chosen: CoefficientSet) -> Tensor:
    """X ← aX + (bA + cA²)X; x is written to."""
    other = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gram, poly = (x.new_empty(*x.shape[:-1], x.shape[-2]) for _ in range(2))  # [..., m, m]
    for a, b, c in chosen.steps:
        times(x, x.mT, out=gram)
        plus_product(b, gram, c, gram, gram, out=poly)
        plus_product(a, x, 1.0, poly, x, out=other)
        x, other = other, x
    return x


def gram_form(x: Tensor, chosen: CoefficientSet) -> Tensor:
    """The same polynomials on m×m matrices alone: x is touched every other step."""
    q = r = times(x, x.mT)  # [..., m, m]
    for k, (a, b, c) in enumerate(chosen.steps):
        fresh = k % RESTART_EVERY == 0  # q stands for the identity
        if fresh and k > 0:
            x = times(q, x)
            r = times(x, x.mT)
        z = plus_product(b, r, c, r, r)
        q = z + a * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) if fresh else plus_product(a, q, 1.0, q, z)
        if (k + 1) % RESTART_EVERY and k + 1 < len(chosen.steps):
            p = plus_product(a, r, 1.0, r, z)
            r = plus_product(a, p, 1.0, z, p)
    return times(q, x)
