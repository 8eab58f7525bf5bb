"""Orthonormal bases in CUDA C++, run by the emulator."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from test_matrix_root_cuda import place, same_bits
from torch import Tensor

import stepladder as sl
from stepladder import cuda_roots
from stepladder.reference.orthonormalize import LIMIT, BasisInfo

# Bases are computed in fp64, and their elements rounded to fp32 once, by this much at the most: by √n times as much in
# all, as ‖Q‖F = √n. Something is left for fp64's own errors.
ROUNDED = 1.01 * 2.0**-24


@pytest.fixture
def gpu(request):
    if DEVICE != "cuda":
        request.getfixturevalue("emulated")
    yield cuda_roots._C
    cuda_roots._kept.kernels = {}


def bases(stacks: list[Tensor], method: str = "auto") -> list[tuple[Tensor, BasisInfo]]:
    """Results on the CPU."""
    return [
        (q.cpu(), BasisInfo(*(value.cpu() for value in info)))
        for q, info in cuda_roots.bases([place(x) for x in stacks], method)
    ]


def with_condition(m: int, n: int, kappa: float) -> Tensor:
    """Columns in no order of size, rounded to fp32."""
    left = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return ((left * torch.logspace(-math.log10(kappa), 0, n, dtype=torch.float64)) @ right.mT).float()


def refreshed(n: int, kappa: float) -> Tensor:
    """L@Q of a factor L with this condition, and a basis Q near its eigenvectors: what SOAP asks for."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    factor = (basis * torch.logspace(-math.log10(kappa), 0, n, dtype=torch.float64)) @ basis.mT
    return (factor @ torch.linalg.qr(basis + 1e-2 * torch.randn(n, n)).Q).float()


def distance(q: Tensor) -> float:
    wide = q.double()
    return float((wide.mT @ wide - torch.eye(q.shape[-1], dtype=torch.float64)).norm())


def assert_basis(q: Tensor, x: Tensor) -> None:
    """Q is orthonormal, and R = QᵀX is upper triangular with X = QR."""
    error = ROUNDED * math.sqrt(x.shape[-1])  # of Q; what is made of two of them has twice as much
    assert distance(q) <= 2 * error
    wide, norm = x.double(), float(x.double().norm())
    r = q.double().mT @ wide
    assert float(r.tril(-1).norm()) <= error * norm
    assert float((q.double() @ r.triu() - wide).norm()) <= 3 * error * norm


@pytest.mark.parametrize("kappa", [1e2, 1e5, 1e8])
def test_a_refresh(gpu, kappa):
    given = [refreshed(n, kappa) for n in (1, 2, 17, 64, 66)]
    for x, (q, info) in zip(given, bases(given), strict=True):
        assert_basis(q, x)
        assert not info.fallback
        assert info.finite
        expected, _ = sl.reference.orthonormalize(x, "cholesky")
        # A column is as uncertain as X's condition makes it in fp64; both are rounded in the end.
        assert float((q - expected).norm()) <= kappa * 1e-13 + 2 * ROUNDED * math.sqrt(len(x))


@pytest.mark.parametrize(("m", "n"), [(5, 1), (40, 7), (100, 65), (130, 20), (67, 66)])
def test_tall_matrices(gpu, m, n):
    x = with_condition(m, n, 1e4)
    ((q, info),) = bases([x])
    assert q.shape == x.shape
    assert_basis(q, x)
    assert not info.fallback


@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 9), (50, 20), (40, 33)])
def test_reflections(gpu, m, n):
    x = with_condition(m, n, 1e6)
    ((q, info),) = bases([x], "householder")
    assert_basis(q, x)
    assert not info.fallback  # as it was asked for
    # LAPACK's reflections have the same signs.
    expected = torch.linalg.qr(x.double()).Q
    assert float((q - expected).norm()) <= 1e6 * 1e-13 + ROUNDED * math.sqrt(n)


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_deficient_rank(gpu, rank):
    n = 40
    left, right = torch.randn(n, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    ((q, info),) = bases([(left @ right).float()])
    assert distance(q) <= LIMIT
    # Rounding X to fp32 gives it full rank; the first columns span what it had.
    assert float((q[:, :rank].double() @ (q[:, :rank].double().mT @ left) - left).norm()) <= 1e-2 * float(left.norm())
    assert info.finite


def test_mixed_company(gpu):
    x = torch.stack([with_condition(30, 24, 1e3) for _ in range(8)])
    x[1], x[2], x[3] = 0.0, 1.0, x[3] * 1e30
    x[4] *= 1e-30
    x[5, 3, 4], x[6, 20, 0] = math.nan, -math.inf
    ((q, info),) = bases([x])
    assert info.finite.tolist() == [True] * 5 + [False] * 2 + [True]
    assert info.fallback.tolist() == [False, True, True] + [False] * 5
    assert q[5:7].isnan().all()
    for k in (0, 1, 2, 3, 4, 7):
        assert_basis(q[k], x[k].double() / x[k].double().norm().clamp(min=1e-300))
    # Nobody's bits depend on the others.
    order = [7, 2, 0, 4]
    ((again, _),) = bases([x[order]])
    assert same_bits(again, q[order])


def test_layouts(gpu):
    plain = torch.stack([with_condition(20, 9, 1e2) for _ in range(2)]).reshape(2, 1, 20, 9)
    wide = torch.full((2, 1, 40, 30), math.nan)
    wide[..., ::2, 2:29:3] = plain
    layouts = [plain.mT.contiguous().mT, wide[..., ::2, 2:29:3], plain[:1].expand(2, -1, -1, -1)]
    (expected, *found) = bases([plain, *layouts])
    for k, (q, info) in enumerate(found):
        assert same_bits(q, expected[0][[0, 0]] if k == 2 else expected[0])
        assert q.shape == (*info.finite.shape, 20, 9)
        assert q.is_contiguous()


def test_empty_ones_are_passed_over(gpu):
    empty = [torch.zeros(0, 4, 3), torch.zeros(3, 5, 0), torch.zeros(2, 0, 1, 1)]
    before = gpu.launches()
    for (q, info), x in zip(bases(empty), empty, strict=True):
        assert q.shape == x.shape
        assert info.finite.all()
        assert not info.fallback.any()
    assert gpu.launches() == before


def test_runs_and_batches_give_the_same_bits_with_as_many_launches(gpu):
    given = [torch.stack([with_condition(n, n, 1e4) for _ in range(2)]) for n in (12, 70)]
    given[0][1] = 0.0
    counts, found = [], []
    for buffers in (1 << 30, 1 << 30, 1):  # room for all, then for one at a time
        cuda_roots._kept.kernels = {(gpu.GpuBases, 0): gpu.GpuBases(0, buffers)}
        before = gpu.launches()
        found.append(bases(given))
        counts.append(gpu.launches() - before)
    # What is launched does not depend on what is found.
    assert counts[0] == counts[1] < counts[2]
    for other in found[1:]:
        for (q, info), (again, same) in zip(found[0], other, strict=True):
            assert same_bits(q, again)
            assert torch.equal(info.fallback, same.fallback)


def test_ops(gpu):
    x = torch.stack([with_condition(12, 5, 1e2), torch.zeros(12, 5)]).to(DEVICE)
    q, info = sl.ops.orthonormalize(x, backend="cuda")
    assert info.fallback.tolist() == [False, True]
    assert_basis(q[0].cpu(), x[0].cpu())
    wide, _ = sl.ops.orthonormalize(x[:1].double(), backend="cuda")
    assert wide.dtype == torch.float64
    assert float((wide - q[:1]).norm()) <= ROUNDED * math.sqrt(5)
    narrow, _ = sl.ops.orthonormalize(x[:1].bfloat16(), backend="cuda")
    assert narrow.dtype == torch.float32
    assert_basis(narrow[0].cpu(), x[0].bfloat16().float().cpu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 3}, "there are 1 matrices with 3 rows and 4 columns, expected"),
        ({"m": 1 << 30}, "expected at most 1073741824 elements"),
        ({"in": 2}, "'in' is at 0x2, expected an address that is aligned to its elements"),
        ({"shift": -1.0}, "shift=-1, expected a finite number of at least 0"),
        ({"limit": 0.0}, "limit=0, expected a finite number above 0"),
        ({"workspace": 8}, "expected an address aligned to 16 bytes"),
    ],
)
def test_refusals(gpu, change, message):
    x, q = torch.eye(4), torch.full((4, 4), 7.0)
    flags = torch.zeros(2, dtype=torch.bool)
    stack = (change.get("in", x.data_ptr()), 1, change.get("m", 4), 4, 16, 4, 1)
    results = (q.data_ptr(), flags.data_ptr(), flags.data_ptr() + 1)
    before = gpu.launches()
    with pytest.raises(gpu.Error, match=message):
        gpu.GpuBases(0).run(
            [(*stack, *results)],
            False,
            change.get("shift", 1e-14),
            change.get("limit", 1e-5),
            lambda size: change.get("workspace", 16),
            0,
        )
    assert gpu.launches() == before
    assert (q == 7.0).all()
