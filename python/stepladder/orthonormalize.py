"""Orthonormal bases of many matrices over the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from stepladder import backends, cuda_roots, products, ranges, reference
from stepladder.matrix_root import widened
from stepladder.newton_schulz import check_floating
from stepladder.parallel import over_threads
from stepladder.reference.orthonormalize import METHODS, BasisInfo

# Reflections that are applied together, by judgement: fewer leave products too thin, more leave too much to LAPACK.
BLOCK = 128
# The least number of columns for which that was measured to be faster than LAPACK, where tiles multiply
# (docs/performance.md).
LEAST_BLOCKED = 1024


@torch.no_grad()
def orthonormalize(X: Tensor, method: str = "auto", *, backend: str | None = None) -> tuple[Tensor, BasisInfo]:
    """Q with orthonormal columns, and XR⁻¹ = Q for some upper triangular R; as a QR decomposition has it.

    Args:
        X: Matrices [..., m, n] with m ≥ n, of fp32, fp64, bf16 or fp16.
        method: "cholesky", shifted Cholesky-QR in three passes, all in fp64, whose failures are done over
            by Householder reflections, in Triton's kernels by Gram and Schmidt's method with reorthogonalisation;
            "householder" for all, which on a GPU is torch.linalg's; or "auto": "householder" on a CPU, where LAPACK's
            is faster, "cholesky" on a GPU.
        backend: "cpu", "cuda", "triton", "reference", or None to choose by the device.

    Returns:
        The bases, fp32, or fp64 where X is; those of matrices that are not finite are NaN. And for each matrix
        whether Cholesky's method failed and it was done over, and whether it is finite.

    Raises:
        TypeError: X is no floating-point tensor.
        ValueError: X has fewer rows than columns, or the method is unknown.
        RuntimeError: The backend asked for cannot run here.

    Paper: Fukaya et al. 2020, Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1).
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")
    backends.check_available(backend)
    check_floating(X, "X")
    if X.ndim < 2 or X.shape[-2] < X.shape[-1]:
        raise ValueError(f"X has shape {tuple(X.shape)}, expected matrices (..., m, n) with m >= n")
    x = widened(X)
    with ranges.kernel("orthonormalize", partial(work_of, [x])):
        return bases([x], method, backend)[0]


def work_of(given: Iterable[Tensor]) -> ranges.Work:
    """4mn² - 4n³/3 for each [m, n], as Householder's method takes for Q and R; in the precision of the tensors."""
    flops = size = 0.0
    double = False
    for x in given:
        m, n = x.shape[-2:]
        flops += x.shape[:-2].numel() * (4.0 * m * n * n - 4.0 / 3.0 * n**3)
        size += 2 * x.nbytes
        double = double or x.dtype == torch.float64
    return ranges.Work(size, flops, "fp64" if double else "fp32")


def bases(stacks: list[Tensor], method: str, backend: str | None) -> list[tuple[Tensor, BasisInfo]]:
    """The bases of checked tensors of fp32 or fp64."""
    results: list[tuple[Tensor, BasisInfo] | None] = [None] * len(stacks)
    shared: dict[tuple[str, torch.device], list[int]] = {}
    for index, x in enumerate(stacks):
        name = backends.choose(backend, x.device.type)
        # What there are no kernels for: fp64 in CUDA, reflections alone in Triton.
        if (name == "cuda" and x.dtype == torch.float64) or (name == "triton" and method == "householder"):
            name = "reference"
        shared.setdefault((name, x.device), []).append(index)
    for (name, _), indices in shared.items():
        for index, result in zip(indices, _RUN[name]([stacks[i] for i in indices], method), strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def _by_reference(stacks: list[Tensor], method: str) -> list[tuple[Tensor, BasisInfo]]:
    return [reference.orthonormalize(x, method) for x in stacks]


def _by_triton(stacks: list[Tensor], method: str) -> list[tuple[Tensor, BasisInfo]]:
    from stepladder.triton_kernels.orthonormalize import cholesky_bases

    found: list[tuple[Tensor, BasisInfo]] = cholesky_bases(stacks)
    return found


def _on_cpu(stacks: list[Tensor], method: str) -> list[tuple[Tensor, BasisInfo]]:
    """Every matrix by itself, over the threads."""
    chosen = "householder" if method == "auto" else method
    members = [
        (index, one) for index, x in enumerate(stacks) for one in x.reshape(x.shape[:-2].numel(), 1, *x.shape[-2:])
    ]
    found: list[list[tuple[Tensor, BasisInfo]]] = [[] for _ in stacks]
    costs = [one.shape[-2] * one.shape[-1] ** 2 for _, one in members]
    results = over_threads(lambda one: reference.orthonormalize(one, chosen), [one for _, one in members], costs)
    for (index, _), result in zip(members, results, strict=True):
        found[index].append(result)
    return [
        (
            torch.cat([q for q, _ in own]).reshape(x.shape),
            BasisInfo(*(torch.cat(column).reshape(x.shape[:-2]) for column in zip(*(i for _, i in own), strict=True))),
        )
        if own
        else reference.orthonormalize(x, chosen)
        for x, own in zip(stacks, found, strict=True)
    ]


_RUN: dict[str, Callable[[list[Tensor], str], list[tuple[Tensor, BasisInfo]]]] = {
    "reference": _by_reference,
    "cpu": _on_cpu,
    "cuda": cuda_roots.bases,
    "triton": _by_triton,
}


def fresh_bases(given: Sequence[Tensor], backend: str | None) -> list[tuple[Tensor, Tensor]]:
    """The bases of square matrices [n, n] of any n in their own dtype, for an optimizer, and whether each is one.

    On a CPU Householder's method in that dtype is good enough: ‖QᵀQ - I‖₂ stays below 3e-6 for n up to 2304 in fp32.
    """
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(given)
    on_cpu = [i for i, x in enumerate(given) if backends.choose(backend, x.device.type) == "cpu"]
    others = sorted(set(range(len(given))) - set(on_cpu))
    costs = [float(given[i].shape[-1]) ** 3 for i in on_cpu]
    for i, basis in zip(on_cpu, over_threads(_by_reflections, [given[i] for i in on_cpu], costs), strict=True):
        found[i] = basis
    for i, (q, info) in zip(others, bases([given[i][None] for i in others], "auto", backend), strict=True):
        found[i] = q[0], info.finite[0]
    return [basis for basis in found if basis is not None]


def _by_reflections(x: Tensor) -> tuple[Tensor, Tensor]:
    good = x.isfinite().all()
    given = torch.where(good, x, 0.0)
    n = x.shape[-1]
    if n >= LEAST_BLOCKED and products.serves(given, n) and products.unit() == "amx":
        return by_blocks(given), good
    return torch.linalg.qr(given).Q, good


def by_blocks(x: Tensor) -> Tensor:
    """Q of a QR decomposition by Householder reflections, which our kernel applies, a block of them at a time.

    LAPACK finds the reflections of a block, I - VTVᵀ with V of unit lower trapezoidal form. Where it makes a reflection
    the identity, as of columns of zeros, T has zeros for it.

    Args:
        x: [n, n], fp32, on a CPU for which there is a kernel.

    Paper: Schreiber & Van Loan 1989, SIAM J. Sci. Stat. Comput. 10(1).
    """
    n = x.shape[-1]
    x = x.clone(memory_format=torch.contiguous_format)
    found: list[tuple[int, Tensor, Tensor]] = []
    for begin in range(0, n, BLOCK):
        reflections, scales = torch.geqrf(x[begin:, begin : begin + BLOCK])
        v = reflections.tril(-1)
        v.diagonal().fill_(1.0)
        # T⁻¹ = diag(1/τ) + the strict upper triangle of VᵀV, which has no τ = 0 this way.
        above = products.mm(v.mT, v).triu(1) * scales[:, None]
        t = torch.linalg.solve_triangular(above, torch.diag(scales), upper=True, unitriangular=True)
        found.append((begin, v, t))
        rest = x[begin:, begin + BLOCK :]
        if rest.shape[1] > 0:
            _reflect(rest, v, t.mT)
    q = torch.eye(n, dtype=x.dtype)
    for begin, v, t in reversed(found):
        _reflect(q[begin:, begin:], v, t)
    return q


def _reflect(x: Tensor, v: Tensor, t: Tensor) -> None:
    """x ← (I - VTVᵀ)x in place."""
    products.multiply(v, t @ products.mm(v.mT, x), x, -1.0, 1.0, symmetric=False)
