"""Inverse roots of many matrices over the backends: checks, the choice of a method, and who computes."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from stepladder import backends, cuda_roots, ranges
from stepladder.newton_schulz import check_floating
from stepladder.parallel import over_threads
from stepladder.reference.matrix_root import (
    EXPONENTS,
    METHODS,
    RootInfo,
    damped,
    eigh_roots,
    newton_roots,
    noise_of,
    residuals,
    without_failures,
)

# How far from symmetric a matrix may be, in units of epsilon times its largest element: of the arithmetic's, for sums
# of thousands of products, each way in another order; and of its own dtype's, for what they were rounded to.
ASYMMETRY = 256.0
ROUNDED = 2.0


@overload
def inverse_root(
    A: Tensor,
    p: int,
    eps: float = 0.0,
    method: str = "auto",
    *,
    relative_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, RootInfo]: ...
@overload
def inverse_root(
    A: Sequence[Tensor],
    p: int,
    eps: float = 0.0,
    method: str = "auto",
    *,
    relative_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[list[Tensor], list[RootInfo]]: ...
@torch.no_grad()
def inverse_root(
    A: Tensor | Sequence[Tensor],
    p: int,
    eps: float = 0.0,
    method: str = "auto",
    *,
    relative_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, RootInfo] | tuple[list[Tensor], list[RootInfo]]:
    """(A + δI)^(-1/p) for symmetric positive semidefinite matrices, δ = eps + relative_eps·λmax(A).

    Every matrix stands for itself: one that is not finite, or not positive definite once it is damped, has a status
    that says so and a root of NaN, and its neighbours are what they would be without it.

    Args:
        A: Matrices [..., n, n] of fp32, fp64, bf16 or fp16; or a list of such tensors, of any n, which are computed
            together.
        p: 1, 2 or 4.
        eps: Absolute damping.
        relative_eps: Damping relative to each matrix's largest eigenvalue. "newton" takes a lower bound of it, which
            256 steps of the power method leave too small by 0.3 % at the most for n up to 1024.
        method: "eigh", an eigendecomposition, where negative eigenvalues within the rounding of A count as zeros;
            "newton", minimax polynomials and coupled Newton steps, products of matrices alone: in fp32, and in fp64
            for matrices whose condition it finds to be above 2e4; or "auto": "eigh" on a CPU and for fp64, else
            "newton".
        backend: "cpu", "cuda", "triton", "reference", or None to choose by the device. On a GPU "eigh" is the
            reference's, by torch.linalg.

    Returns:
        The roots, fp32, or fp64 where A is; and what is known of each: its steps, residual, and status. Lists of
        both for a list.

    Raises:
        TypeError: A is no floating-point tensor, or of a dtype that the backend asked for does not take.
        ValueError: A is not square or not symmetric, or another argument is out of range.
        RuntimeError: The backend asked for cannot run here.

    Papers: Higham, Functions of Matrices, 2008; Anil et al. 2020, arXiv:2002.09018.
    """
    check(p, eps, relative_eps, method)
    backends.check_available(backend)
    if not isinstance(A, Tensor) and not isinstance(A, Iterable):
        raise TypeError(f"A must be a tensor or a list of tensors, got {A!r}")
    given = [A] if isinstance(A, Tensor) else list(A)
    with ranges.kernel("check"):
        for index, a in enumerate(given):
            check_symmetric(a, "A" if isinstance(A, Tensor) else f"A[{index}]", method, backend)
    stacks = [widened(a).reshape(a.shape[:-2].numel(), *a.shape[-2:]) for a in given]
    pairs = roots(stacks, p, float(eps), float(relative_eps), method, backend)
    results, infos = [], []
    for a, stack, (x, info) in zip(given, stacks, pairs, strict=True):
        how = method_for(method, backend, a)
        with ranges.kernel("residual"):
            info = info._replace(
                residual=residuals(x, damped(stack, float(eps), float(relative_eps), how), p, info.status)
            )
        results.append(x.reshape(a.shape))
        infos.append(RootInfo(*(value.reshape(a.shape[:-2]) for value in info)))
    return (results[0], infos[0]) if isinstance(A, Tensor) else (results, infos)


def check(p: int, eps: float, relative_eps: float, method: str) -> None:
    """Refuse arguments that are out of range.

    Raises:
        TypeError: A damping is no number.
        ValueError: Any other.
    """
    if isinstance(p, bool) or not isinstance(p, numbers.Integral) or p not in EXPONENTS:
        raise ValueError(f"p={p!r} is not supported, expected one of {', '.join(map(repr, EXPONENTS))}")
    for name, value in (("eps", eps), ("relative_eps", relative_eps)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 <= value <= sys.float_info.max:
            raise ValueError(f"{name}={value} is out of range, expected a finite number of at least 0")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")


def check_symmetric(a: Tensor, where: str, method: str, backend: str | None) -> None:
    """Refuse what is no symmetric matrix that the backend can take; members that are not finite pass."""
    check_floating(a, where)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"{where} has shape {tuple(a.shape)}, expected square matrices (..., n, n)")
    if backend in backends.ON_GPU:
        if method == "eigh":
            raise ValueError(f"method='eigh' is not what backend={backend!r} computes, expected 'newton' or 'auto'")
        if a.dtype == torch.float64:
            raise TypeError(f"{where} has dtype {a.dtype}, which backend={backend!r} does not take")
    if a.numel() == 0:
        return
    # In fp64, as the bounds of the smallest matrices would be no normal numbers; those lie `spacing` apart.
    wide = a.double()
    spacing = torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps
    largest = wide.abs().amax((-2, -1), keepdim=True)
    epsilons = ASYMMETRY * torch.finfo(widened(a).dtype).eps + ROUNDED * torch.finfo(a.dtype).eps
    finite = largest.isfinite()
    limit = epsilons * torch.where(finite, largest, 0.0) + spacing
    apart = torch.where(finite, (wide - wide.mT).abs(), 0.0)
    if bool((apart > limit).any()):
        n = a.shape[-1]
        worst = int((apart - limit).argmax())
        b, i, j = worst // (n * n), worst // n % n, worst % n
        one = a.reshape(-1, n, n)[b]
        raise ValueError(
            f"{where} is not symmetric: matrix {b} has {float(one[i, j])} at ({i}, {j}) and {float(one[j, i])} at "
            f"({j}, {i})"
        )


def widened(a: Tensor) -> Tensor:
    """As kernels take it: half types are storage alone."""
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def method_for(method: str, backend: str | None, a: Tensor) -> str:
    """The method that serves matrices like these."""
    if method != "auto":
        return method
    on_gpu = backends.choose(backend, a.device.type) in backends.ON_GPU
    return "newton" if on_gpu and a.dtype != torch.float64 else "eigh"


def roots(
    stacks: Sequence[Tensor], p: float, eps: float, relative_eps: float, method: str, backend: str | None
) -> list[tuple[Tensor, RootInfo]]:
    """The roots of checked stacks [B, n, n] of fp32 or fp64, their residuals left NaN.

    With "eigh", p may be any positive number.
    """
    results: list[tuple[Tensor, RootInfo] | None] = [None] * len(stacks)
    shared: dict[tuple[str, torch.device], list[int]] = {}
    for index, a in enumerate(stacks):
        name = backends.choose(backend, a.device.type)
        how = method_for(method, backend, a)
        if name in backends.ON_GPU and (how == "eigh" or a.dtype == torch.float64):
            name = "reference"
        shared.setdefault((f"{name} {how}", a.device), []).append(index)
    for (key, _), indices in shared.items():
        run = _RUN[key]
        with ranges.kernel("inverse_root"):
            found = run([stacks[i] for i in indices], p, eps, relative_eps)
        for index, result in zip(indices, found, strict=True):
            undamped = key.endswith("newton") and eps == relative_eps == 0.0
            results[index] = without_failures(stacks[index], *result, p, undamped)
    return [result for result in results if result is not None]


Stacks = Sequence[Tensor]
Results = list[tuple[Tensor, RootInfo]]


def _reference_eigh(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    return [eigh_roots(a, p, eps, relative_eps, noise_of(a.dtype)) for a in stacks]


def _reference_newton(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    return [newton_roots(a, int(p), eps, relative_eps) for a in stacks]


def _cpu_eigh(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    """By LAPACK in fp64, which reaches a condition of 1e6 for every p, where fp32 leaves an error of 0.1."""

    def one(a: Tensor) -> tuple[Tensor, RootInfo]:
        x, info = eigh_roots(a.double(), p, eps, relative_eps, noise_of(a.dtype))
        return x.to(a.dtype), info._replace(residual=info.residual.to(a.dtype))

    return _each(one, stacks)


def _cpu_newton(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    return _each(lambda a: newton_roots(a, int(p), eps, relative_eps), stacks)


def _each(one: Callable[[Tensor], tuple[Tensor, RootInfo]], stacks: Stacks) -> Results:
    """A function of stacks on single matrices, over the threads."""
    members = [(index, a[b : b + 1]) for index, a in enumerate(stacks) for b in range(len(a))]
    costs = [a.shape[-1] ** 3 for _, a in members]
    found: list[list[tuple[Tensor, RootInfo]]] = [[] for _ in stacks]
    for (index, _), result in zip(members, over_threads(one, [a for _, a in members], costs), strict=True):
        found[index].append(result)
    return [
        (torch.cat([x for x, _ in own]), RootInfo(*map(torch.cat, zip(*(info for _, info in own), strict=True))))
        if own
        else one(a)
        for own, a in zip(found, stacks, strict=True)
    ]


def _by_cuda(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    return cuda_roots.roots(stacks, int(p), eps, relative_eps)


def _by_triton(stacks: Stacks, p: float, eps: float, relative_eps: float) -> Results:
    from stepladder.triton_kernels.matrix_root import inverse_roots

    results: Results = inverse_roots(stacks, int(p), eps, relative_eps)
    return results


_RUN: dict[str, Callable[[Stacks, float, float, float], Results]] = {
    "reference eigh": _reference_eigh,
    "reference newton": _reference_newton,
    "cpu eigh": _cpu_eigh,
    "cpu newton": _cpu_newton,
    "cuda newton": _by_cuda,
    "triton newton": _by_triton,
}
