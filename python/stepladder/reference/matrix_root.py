"""Inverse roots of symmetric positive definite matrices, in the dtype of what they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, overload

import torch
from torch import Tensor

from stepladder.root_starts import Start, starts

METHODS = ("auto", "eigh", "newton")
EXPONENTS = (1, 2, 4)
# What rounding A leaves open of its eigenvalues, in units of its dtype's epsilon times the largest of them. Below it a
# matrix that is not damped is taken for a singular one; negative ones no further off than four times that, for zero.
NOISE = 2.0
# Newton's steps stop here: what they end with is applied once more, and squares the error. Roots in fp64 go further.
NEAR_IDENTITY = 3e-3
NEAR_IDENTITY_WIDE = 1e-6
GROWTH = 1.2
# The worst condition that an attempt in fp32 allows for. Its error was found to be about 4e-9·κ√n/p from n = 64 on,
# and up to three times that for smaller matrices, where half of the eigenvalues are small; so it is made where √n/p is
# at most FAST_SIZE, and has only so many Newton steps as bring an eigenvalue within that condition to 1. Others are
# computed in fp64.
FAST_CONDITION = 2e4
FAST_SIZE = 16.0
FAST_STEPS = 5
WIDE_CONDITION = 1e8
WIDE_STEPS = 30
# Of the largest eigenvalue: matrices are squared this often, and the last one is multiplied by this often.
SQUARINGS = 3
MULTIPLICATIONS = 32
# Where a norm from below will do. Of what rounding makes of a singular matrix one product shows the size.
FEW_MULTIPLICATIONS = 3


class RootStatus(IntEnum):
    """How the root of one matrix ended.

    Attributes:
        CONVERGED: As near as the arithmetic allows.
        STALLED: The iteration ended early; the result is the nearest that there was.
        FAILED: The damped matrix is not positive definite, or its root too large for the dtype; the result is NaN.
        NON_FINITE: The matrix has an infinite or NaN element; the result is NaN.
    """

    CONVERGED = 0
    STALLED = 1
    FAILED = 2
    NON_FINITE = 3


class RootInfo(NamedTuple):
    """What is known of each root; all are of the shape of the batch.

    Attributes:
        iterations: int32, steps of the iteration, 0 for an eigendecomposition.
        residual: max|X^p(A + δI) - I|, evaluated in fp64; NaN where X failed. Of a root in fp32 about κ·1e-7, were it
            correctly rounded.
        status: int8, values of `RootStatus`.
    """

    iterations: Tensor
    residual: Tensor
    status: Tensor


@overload
def inverse_root(
    A: Tensor, p: int, eps: float = 0.0, method: str = "auto", *, relative_eps: float = 0.0
) -> tuple[Tensor, RootInfo]: ...
@overload
def inverse_root(
    A: Sequence[Tensor], p: int, eps: float = 0.0, method: str = "auto", *, relative_eps: float = 0.0
) -> tuple[list[Tensor], list[RootInfo]]: ...
@torch.no_grad()
def inverse_root(
    A: Tensor | Sequence[Tensor], p: int, eps: float = 0.0, method: str = "auto", *, relative_eps: float = 0.0
) -> tuple[Tensor, RootInfo] | tuple[list[Tensor], list[RootInfo]]:
    """The roots of `stepladder.ops.inverse_root`, computed in A's dtype; "auto" means "eigh".

    Args:
        A: Symmetric matrices [..., n, n] of fp32 or fp64, or a list of such tensors.
        p: 1, 2 or 4.
        eps: Absolute damping.
        method: "eigh", "newton" or "auto".
        relative_eps: Damping relative to each matrix's largest eigenvalue.

    Returns:
        The roots, like A, and what is known of each.

    Papers: Higham, Functions of Matrices, 2008; Anil et al. 2020, arXiv:2002.09018.
    """
    if not isinstance(A, Tensor):
        pairs = [inverse_root(a, p, eps, method, relative_eps=relative_eps) for a in A]
        return [x for x, _ in pairs], [info for _, info in pairs]
    stack = A.reshape(A.shape[:-2].numel(), *A.shape[-2:])
    if method == "newton":
        x, info = newton_roots(stack, p, eps, relative_eps)
    else:
        x, info = eigh_roots(stack, p, eps, relative_eps, noise_of(A.dtype))
    x, info = without_failures(stack, x, info, p, method == "newton" and eps == relative_eps == 0.0)
    info = info._replace(residual=residuals(x, damped(stack, eps, relative_eps, method), p, info.status))
    return x.reshape(A.shape), RootInfo(*(value.reshape(A.shape[:-2]) for value in info))


def without_failures(A: Tensor, x: Tensor, info: RootInfo, p: float, singular: bool) -> tuple[Tensor, RootInfo]:
    """Roots of which those have failed that only look like one.

    Args:
        A: What they are roots of, undamped. [B, n, n]
        x: [B, n, n]
        info: Of each.
        p: Which root.
        singular: Whether A may be singular, so that rounding alone has made a root: its least eigenvalue, as the root
            has it, is then within the rounding of A.
    """
    failed = ~x.isfinite().all(-1).all(-1)
    if singular and x.numel():
        # Both are at most what they stand for, so that no matrix fails that should not.
        of_root, of_matrix = (norms_from_below(torch.where(failed[:, None, None], 1.0, m)).log() for m in (x, A))
        failed |= p * of_root + of_matrix + math.log(noise_of(A.dtype)) >= 0.0
    failed &= info.status < RootStatus.FAILED
    status = torch.where(failed, int(RootStatus.FAILED), info.status)
    return torch.where(failed[:, None, None], math.nan, x), info._replace(status=status)


def noise_of(dtype: torch.dtype) -> float:
    """What rounding leaves open of the eigenvalues of a matrix of this dtype whose largest is 1."""
    return NOISE * torch.finfo(dtype).eps


def eigh_roots(A: Tensor, p: float, eps: float, relative_eps: float, noise: float) -> tuple[Tensor, RootInfo]:
    """V·(λ + δ)^(-1/p)·Vᵀ with δ = eps + relative_eps·λmax, for A [B, n, n]; the residual is left NaN.

    Args:
        A: Symmetric matrices.
        p: Which root, of any kind here.
        eps: Absolute damping.
        relative_eps: Damping relative to the largest eigenvalue.
        noise: Of `noise_of` the dtype that A was rounded to.
    """
    status = torch.zeros(len(A), dtype=torch.int8, device=A.device)
    iterations = torch.zeros(len(A), dtype=torch.int32, device=A.device)
    residual = torch.full((len(A),), math.nan, dtype=A.dtype, device=A.device)
    if A.numel() == 0:
        return A.clone(), RootInfo(iterations, residual.zero_(), status)
    largest = A.abs().amax((-2, -1))
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 0.0).clamp(min=eps)
    unit = power_of_two(torch.where(largest > 0, largest, 1.0))
    # What is not finite would stop the others.
    scaled = torch.where(finite[:, None, None], A / unit[:, None, None], 0.0)
    values, vectors = torch.linalg.eigh(scaled)  # [B, n], [B, n, n]
    top = values[:, -1:].clamp(min=0.0)
    values = torch.where((values < 0) & (values >= -4.0 * noise * top), 0.0, values)
    delta = eps / unit[:, None] + relative_eps * top
    lowest = values[:, :1] + delta
    good = finite & torch.where(delta > 0, lowest > 0, lowest > noise * top)[:, 0]
    # (λ + δ)^(-1/p) in units whose own root is a separate factor, as neither need be a normal number when multiplied.
    factors = (values + delta).clamp(min=torch.finfo(A.dtype).tiny) ** (-1.0 / p) * unit[:, None] ** (-1.0 / p)
    x = (vectors * factors[:, None, :]) @ vectors.mT
    x = (x + x.mT) / 2
    status[~good] = RootStatus.FAILED
    status[~finite] = RootStatus.NON_FINITE
    x[~good] = math.nan
    return x, RootInfo(iterations, residual, status)


def newton_roots(A: Tensor, p: int, eps: float, relative_eps: float) -> tuple[Tensor, RootInfo]:
    """The same by products of matrices alone, for p in 1, 2, 4; see `newton_root`."""
    roots = [newton_root(a, p, eps, relative_eps) for a in A]
    x = torch.stack([root for root, _, _ in roots]) if roots else A.clone()
    status = torch.tensor([status for _, _, status in roots], dtype=torch.int8, device=A.device)
    iterations = torch.tensor([count for _, count, _ in roots], dtype=torch.int32, device=A.device)
    residual = torch.full((len(A),), math.nan, dtype=A.dtype, device=A.device)
    return x, RootInfo(iterations, residual, status)


def newton_root(A: Tensor, p: int, eps: float, relative_eps: float) -> tuple[Tensor, int, RootStatus]:
    """(A + δI)^(-1/p) of one matrix [n, n]: in its dtype, and where fp32 does not reach it, in fp64.

    Returns:
        The root, how many steps it took, and the status.
    """
    n = A.shape[-1]
    if n == 0:
        return A.clone(), 0, RootStatus.CONVERGED
    nothing = torch.full_like(A, math.nan)
    largest = float(A.abs().max())
    if not math.isfinite(largest):
        return nothing, 0, RootStatus.NON_FINITE
    unit = float(power_of_two(torch.tensor(max(largest, eps), dtype=torch.float64)))
    if unit == 0.0:
        return nothing, 0, RootStatus.FAILED
    D = A.double() / unit  # exact
    delta = eps / unit
    if relative_eps > 0.0:
        delta += relative_eps * largest_eigenvalue(D.to(A.dtype))
    D = D + delta * torch.eye(n, dtype=D.dtype, device=D.device)
    steps = 0
    root, status = D, RootStatus.FAILED
    if A.dtype != torch.float64 and math.sqrt(n) / p <= FAST_SIZE:
        root, steps, status = coupled_newton(D.to(A.dtype), p, delta, FAST_CONDITION, FAST_STEPS)
    if status != RootStatus.CONVERGED:
        near = NEAR_IDENTITY_WIDE if A.dtype == torch.float64 else NEAR_IDENTITY
        root, more, status = coupled_newton(D, p, delta, WIDE_CONDITION, WIDE_STEPS, near)
        steps += more
    if status == RootStatus.FAILED:
        return nothing, steps, status
    root = root.double()
    # In two factors, neither of which is too large where their product is a number.
    exponent = math.frexp(unit)[1] - 1
    for part in (exponent // 2, exponent - exponent // 2):
        root = root * 2.0 ** (-part / p)
    return root.to(A.dtype), steps, status


def coupled_newton(
    D: Tensor, p: int, delta: float, condition: float, most_steps: int, near: float = NEAR_IDENTITY
) -> tuple[Tensor, int, RootStatus]:
    """D^(-1/p) in D's dtype, where its least eigenvalue is at least `delta`.

    s = √‖D²‖F ≥ λmax;  X = I, M = D/s. While M is far from I, T = aI + bM + cM² by `starts`; then T = ((p + 1)I - M)/p.
    Each step is X ← XT, M ← TᵖM, which leaves X^(-p)·M as it is, and M goes to I: X = (D/s)^(-1/p). All factors are
    polynomials of D, so every product is symmetric.

    Args:
        D: [n, n], of elements about 1.
        p: 1, 2 or 4.
        delta: May be 0.
        condition: The worst to allow for.
        most_steps: Newton's, after the starts.
        near: How far M may be from I, in the Frobenius norm, for the last of them.

    Returns:
        The root, how many steps it took, and the status.
    """
    eye = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
    square = product(D, D)
    scale = math.sqrt(float(square.norm())) * (1.0 + 2.0**-10)
    if scale == 0.0:  # damping that takes away what there is
        return D, 0, RootStatus.FAILED
    M, square, X = D / scale, square / scale**2, eye
    steps = 0
    for start in starts_within(p, condition, scale / delta if delta > 0.0 else math.inf):
        if steps:
            square = product(M, M)
        T = start.a * eye + start.b * M + start.c * square
        X = product(X, T)
        M = product(power(T, p), M)
        steps += 1
    nearest, best = X, math.inf
    for _ in range(most_steps):
        distance = float((M - eye).norm())
        if not distance <= GROWTH * best:
            break
        if distance < best:
            nearest, best = X, distance
        T = ((p + 1) * eye - M) / p
        X = product(X, T)
        steps += 1
        if distance <= near:
            nearest = X
            break
        M = product(power(T, p), M)
    root = nearest * scale ** (-1.0 / p)
    if best <= near:
        return root, steps, RootStatus.CONVERGED
    return root, steps, RootStatus.STALLED if best < 1.0 else RootStatus.FAILED


def starts_within(p: int, condition: float, known: float) -> tuple[Start, ...]:
    """The polynomials to begin with for a matrix whose condition is at most `known`, which may be infinite."""
    schedule = starts(p, condition)
    first = max((i for i, start in enumerate(schedule) if start.condition >= known), default=0)
    return schedule[first:]


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two symmetric matrices that commute, made symmetric."""
    x = left @ right
    return torch.tril(x) + torch.tril(x, -1).mT


def power(T: Tensor, p: int) -> Tensor:
    """T^p for p in 1, 2, 4."""
    while p > 1:
        T = product(T, T)
        p //= 2
    return T


def largest_eigenvalue(A: Tensor) -> float:
    """λmax of a positive semidefinite matrix from below: a Rayleigh quotient after 256 steps of the power method."""
    squared = A
    for _ in range(SQUARINGS):
        norm = float(squared.norm())
        if norm == 0.0:
            return 0.0
        squared = product(squared / norm, squared / norm)
    v = probe(A.shape[-1], A.dtype).to(A.device)
    for _ in range(MULTIPLICATIONS):
        v = squared @ v
        v = v / v.norm()
    return float(v @ (A @ v) / (v @ v))


def norms_from_below(A: Tensor) -> Tensor:
    """At most ‖A‖₂ of matrices [B, n, n], mostly near it, by a few products with a vector, all at once. [B], fp64"""
    size = A.abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > 0.0, size, 1.0)
    scaled = A / size
    v = probe(A.shape[-1], A.dtype).to(A.device)[:, None].expand(len(A), -1, 1)
    norm = torch.ones_like(size)
    for _ in range(FEW_MULTIPLICATIONS + 1):
        v = scaled @ (v / torch.where(norm > 0.0, norm, 1.0))
        norm = v.square().sum((-2, -1), keepdim=True).sqrt()
    return norm[:, 0, 0].double() * size[:, 0, 0].double()


def probe(n: int, dtype: torch.dtype) -> Tensor:
    """A vector without a pattern, the same everywhere, of odd multiples of 2⁻¹⁶ between -1 and 1."""
    i = torch.arange(n, dtype=torch.int64)
    mixed = (i + 1) * 2654435769 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 2246822519 & 0xFFFFFFFF
    mixed = mixed ^ mixed >> 13
    return (2 * (mixed & 0xFFFF) - 0xFFFF).to(dtype) * 2.0**-16


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most x; 0 for 0."""
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1), 0.0)


def damped(A: Tensor, eps: float, relative_eps: float, method: str) -> Tensor:
    """A + (eps + relative_eps·λmax)I in fp64, with λmax as the method has it."""
    wide = A.double()
    delta = torch.full(A.shape[:-2], eps, dtype=torch.float64, device=A.device)
    if relative_eps > 0.0 and A.numel():
        finite = torch.where(wide.isfinite().all(-1).all(-1)[..., None, None], wide, 0.0)
        if method == "newton":
            top = [
                unit * largest_eigenvalue(a / unit)
                for a in finite.reshape(-1, *A.shape[-2:])
                for unit in (float(a.abs().max()) or 1.0,)
            ]
            delta += relative_eps * torch.tensor(top, dtype=torch.float64, device=A.device).reshape(delta.shape)
        else:
            delta += relative_eps * torch.linalg.eigvalsh(finite)[..., -1].clamp(min=0.0)
    return wide + delta[..., None, None] * torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)


def residuals(X: Tensor, D: Tensor, p: int, status: Tensor) -> Tensor:
    """max|X^p·D - I| in fp64, and NaN where X failed. X and D: [B, n, n]"""
    wide = X.double()
    good = (status == RootStatus.CONVERGED) | (status == RootStatus.STALLED)
    wide = torch.where(good[..., None, None], wide, 0.0)
    for _ in range(p):
        D = wide @ D
    if X.numel() == 0:
        return torch.zeros(len(X), dtype=X.dtype, device=X.device)
    distance = (D - torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)).abs().amax((-2, -1))
    return torch.where(good, distance, math.nan).to(X.dtype)
