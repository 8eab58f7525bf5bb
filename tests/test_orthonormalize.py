"""Orthonormal bases: of what a basis refresh gives them, of matrices without full rank, tall, batched, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from spectra import eigenvalues, with_eigenvalues
from torch import Tensor

import stepladder as sl
from stepladder import orthonormalize, products
from stepladder.orthonormalize import by_blocks, fresh_bases

METHODS = ("auto", "cholesky", "householder")
BACKENDS = ("cpu", "reference")
NO_KERNEL = "no kernel of ours runs here: they need AVX-512, and a compiler that knows it"
NO_TILES = "no kernel with tiles runs here: they need AMX, a compiler that knows it, and a system that allows it"
# ‖QᵀQ - I‖F of what is returned in fp32.
PROMISED = 1e-5


def refreshed(n: int, values: Tensor) -> Tensor:
    """L @ Q in fp32, for L with these eigenvalues, and a Q near its eigenvectors, in descending order."""
    factor = with_eigenvalues(values)
    basis = torch.linalg.eigh(factor).eigenvectors.flip(-1)
    near = torch.linalg.qr(basis + 1e-2 * torch.randn(n, n, dtype=torch.float64)).Q
    return (factor @ near).float()


def deviation(q: Tensor) -> float:
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).norm(dim=(-2, -1)).max())


def spectral_deviation(q: Tensor) -> float:
    """‖QᵀQ - I‖₂, which unlike Frobenius' norm does not grow with the side."""
    q = q.double()
    return float(torch.linalg.matrix_norm(q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64), 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_bases_of_a_refresh(condition: float, method: str, backend: str):
    for n in (1, 2, 33, 128):
        x = refreshed(n, eigenvalues("logarithmic", n, condition))
        q, info = sl.ops.orthonormalize(x, method, backend=backend)
        assert (q.dtype, q.shape) == (torch.float32, x.shape)
        assert deviation(q) <= PROMISED
        assert bool(info.finite)
        assert not bool(info.fallback)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 1, 64])
def test_without_full_rank(rank: int, method: str):
    values = torch.zeros(256, dtype=torch.float64)
    values[:rank] = torch.linspace(1.0, 2.0, rank, dtype=torch.float64)
    x = refreshed(256, values) if rank else torch.zeros(256, 256)
    q, info = sl.ops.orthonormalize(x, method)
    assert deviation(q) <= PROMISED
    # A matrix of zeros has no Gram matrix to factor.
    assert bool(info.fallback) == (rank == 0 and method == "cholesky")


@pytest.mark.skipif(not products.units(), reason=NO_KERNEL)
@pytest.mark.parametrize("kind", [1e2, 1e4, 1e6, 1e8, "rank 64", "rank 1", "zero", "zero columns", "graded", "random"])
@pytest.mark.parametrize("n", [5, 300])
def test_reflections_by_blocks_are_lapacks(n: int, kind: float | str):
    # Of 300 columns there are two whole blocks and a part of one.
    if isinstance(kind, float):
        x = refreshed(n, eigenvalues("logarithmic", n, kind))
    elif kind.startswith("rank"):
        values = torch.zeros(n, dtype=torch.float64)
        values[: int(kind[5:])] = 1.0
        x = refreshed(n, values)
    else:
        x = torch.zeros(n, n) if kind == "zero" else torch.randn(n, n)
    if kind == "zero columns":
        x[:, n // 3 : n // 2] = 0.0
    elif kind == "graded":
        x *= torch.logspace(0, -30, n)
    given = x.clone()
    q = by_blocks(x)
    assert torch.equal(x, given)
    assert spectral_deviation(q) <= PROMISED
    # R = QᵀX is triangular, but for roundings: those of LAPACK's reflections, of which some other ones may be twice as
    # far off, and of the three products by which each block is applied, to X and to Q.
    size = x.double().norm(dim=0)
    ours, lapacks = ((basis.double().T @ x.double()).tril(-1).norm(dim=0) for basis in (q, torch.linalg.qr(x).Q))
    products_of_blocks = 3 * 2 * math.ceil(n / orthonormalize.BLOCK)
    limit = 2 * (lapacks / size).nan_to_num(0.0).max() + products_of_blocks * torch.finfo(torch.float32).eps / 2
    assert bool((ours <= limit * size).all())


@pytest.mark.skipif("amx" not in products.units(), reason=NO_TILES)
def test_large_bases_are_made_by_blocks(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    monkeypatch.setattr(orthonormalize, "by_blocks", lambda x: sizes.append(len(x)) or by_blocks(x))
    given = [torch.randn(n, n) for n in (200, 1023, 1100)]
    given.append(given[-1].clone())
    given[-1][3, 4] = math.nan
    found = fresh_bases(given, "cpu")
    assert sizes == [1100, 1100]
    assert [bool(good) for _, good in found] == [True, True, True, False]
    assert all(spectral_deviation(q) <= PROMISED for q, _ in found)
    monkeypatch.setenv("STEPLADDER_MATRIX_UNIT", "torch")
    fresh_bases(given[2:], "cpu")
    assert sizes == [1100, 1100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (64, 7), (3, 1)], ids=str)
def test_as_a_qr_decomposition_has_it(shape: tuple[int, int], method: str, dtype: torch.dtype):
    """Q spans what X does, and R = QᵀX is upper triangular, up to Q's rounding."""
    m, n = shape
    x = torch.randn(m, n, dtype=torch.float64)
    x = (x @ with_eigenvalues(eigenvalues("logarithmic", n, 1e3))).to(dtype)
    q, _ = sl.ops.orthonormalize(x, method)
    q, wide = q.double(), x.double()
    # Rounding Q, each column by 2^-24 of its length, or eps·κ(X) of Householder's backward error in fp64.
    eps = 2.0**-23 if dtype == torch.float32 else 1e3 * 2.0**-52
    limit = 4 * n * eps * float(wide.norm())
    r = q.T @ wide
    assert float((wide - q @ r).norm()) <= limit
    assert float(r.tril(-1).norm()) <= limit
    # It is the basis, but for signs, that QR gives; those of Cholesky's R are all positive.
    ours, theirs = r.diagonal(), torch.linalg.qr(wide).R.diagonal()
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=limit)
    if method == "cholesky":
        assert bool((ours > 0).all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_bad_members(method: str, backend: str, threads: int):
    torch.set_num_threads(threads)
    x = torch.randn(2, 3, 7, 5)
    bad = {(0, 1): math.nan, (1, 0): math.inf, (1, 2): -math.inf}
    for at, value in bad.items():
        x[at][3, 2] = value
    x[0, 2] = 0.0
    q, info = sl.ops.orthonormalize(x, method, backend=backend)
    assert info.finite.shape == info.fallback.shape == (2, 3)
    assert info.finite.tolist() == [[(i, j) not in bad for j in range(3)] for i in range(2)]
    fallback = [(i, j) for i in range(2) for j in range(3) if info.fallback[i, j]]
    assert fallback == ([(0, 2)] if method == "cholesky" or (method == "auto" and backend == "reference") else [])
    for i in range(2):
        for j in range(3):
            if (i, j) in bad:
                assert q[i, j].isnan().all()
                continue
            assert deviation(q[i, j]) <= PROMISED
            sound = x.clone()
            sound[~info.finite] = torch.eye(7, 5)
            again, _ = sl.ops.orthonormalize(sound, method, backend=backend)
            assert torch.equal(again[i, j], q[i, j])


def test_scales():
    x = torch.randn(9, 5)
    q, _ = sl.ops.orthonormalize(x, "cholesky")
    for scale in (2.0**-120, 2.0**100):
        scaled, info = sl.ops.orthonormalize(scale * x, "cholesky")
        assert not bool(info.fallback)
        assert torch.equal(scaled, q)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_empty(method: str, backend: str, shape: tuple[int, ...]):
    q, info = sl.ops.orthonormalize(torch.zeros(shape), method, backend=backend)
    assert q.shape == shape
    assert info.finite.shape == shape[:-2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_storage_and_strides_are_any(dtype: torch.dtype):
    x = torch.randn(3, 9, 5).to(dtype)
    q, _ = sl.ops.orthonormalize(x)
    assert q.dtype == torch.float32
    assert torch.equal(q, sl.ops.orthonormalize(x.float())[0])
    strided = x.float().mT.contiguous().mT
    assert torch.equal(q, sl.ops.orthonormalize(strided)[0])
    assert torch.equal(strided, x.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizers_fresh_basis(backend: str):
    x = refreshed(33, eigenvalues("half small", 33, 1e6))
    (q, good), (small, _) = fresh_bases([x, torch.ones(1, 1)], backend)
    assert deviation(small) == 0.0
    assert bool(good)
    assert deviation(q) <= PROMISED
    x[3, 4] = math.nan
    [(_, good)] = fresh_bases([x], backend)
    assert not bool(good)


REFUSED: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
    (torch.ones(2, 3), {}, ValueError, r"X has shape \(2, 3\), expected matrices \(..., m, n\) with m >= n"),
    (torch.ones(3), {}, ValueError, r"X has shape \(3,\)"),
    (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, r"X has dtype torch.int64"),
    (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, r"X has dtype torch.complex64"),
    ([[1.0]], {}, TypeError, r"X"),
    (torch.eye(3), {"method": "gram"}, ValueError, r"method='gram' is unknown, expected one of 'auto', 'cholesky', 'h"),
    (torch.eye(3), {"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
)


@pytest.mark.parametrize(("x", "arguments", "error", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_refusals(x: Any, arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sl.ops.orthonormalize(x, **arguments)
