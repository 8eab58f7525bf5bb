"""Inverse roots in CUDA C++, run by the emulator: on chip and in grouped launches, in fp32 and in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import stepladder as sl
from stepladder import cuda_roots
from stepladder.cli import cubins
from stepladder.reference import matrix_root
from stepladder.reference.matrix_root import RootInfo, RootStatus, newton_roots

MAX_SHARED = 227 << 10
# Room in shared memory with which small matrices are iterated on chip, and otherwise.
PATHS = {"on_chip": MAX_SHARED, "grouped": 0}


class Gpu:
    """The emulator, or where `STEPLADDER_TEST_DEVICE=cuda` asks for it the first GPU, with any room on chip."""

    def __init__(self, module) -> None:
        self.module = module
        self.use()

    def use(self, path: str = "on_chip", buffers: int = 1 << 30) -> None:
        kernels = self.module.GpuRoots(0, PATHS[path], buffers)
        cuda_roots._kept.kernels = {(self.module.GpuRoots, 0): kernels}

    def roots(self, stacks: list[Tensor], p: int, eps: float = 0.0, relative_eps: float = 0.0):
        """Results on the CPU; matrices [n, n] are stacks of one."""
        there = [place(a if a.ndim == 3 else a[None]) for a in stacks]
        return [
            (x.cpu(), RootInfo(*(value.cpu() for value in info)))
            for x, info in cuda_roots.roots(there, p, eps, relative_eps)
        ]


@pytest.fixture
def gpu(request):
    if DEVICE != "cuda":
        request.getfixturevalue("emulated")
    gpu = Gpu(cuda_roots._C)
    yield gpu
    cuda_roots._kept.kernels = {}


def place(a: Tensor) -> Tensor:
    """The same view, of a storage on the device."""
    if DEVICE != "cuda":
        return a
    storage = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
    return storage.to(DEVICE).as_strided(a.shape, a.stride(), a.storage_offset())


def logarithmic(n: int, kappa: float) -> Tensor:
    return torch.logspace(-math.log10(kappa), 0, n, dtype=torch.float64)


def half_small(n: int, kappa: float) -> Tensor:
    return torch.where(torch.arange(n) < n // 2, 1 / kappa, 1.0).double()


def one_large(n: int, kappa: float) -> Tensor:
    return torch.where(torch.arange(n) < n - 1, 1 / kappa, 1.0).double()


def linear(n: int, kappa: float) -> Tensor:
    return torch.linspace(1 / kappa, 1, n, dtype=torch.float64)


# Relative errors that are allowed at a condition of 1e4, and at 1e6. Without damping, every matrix is taken for one of
# 2e4 in fp32, whatever its own.
MOST, MOST_AT_1E6 = 1e-3, 2e-2
# Half a unit in the last place of the result, and the iteration's own error in fp64, below 1e-15 times the condition.
FP64 = 2.0**-24 + 1e-9

SPECTRA = (logarithmic, half_small, one_large, linear)


def positive(n: int, kappa: float, spectrum=logarithmic) -> Tensor:
    """A matrix with these eigenvalues, rounded to fp32."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    a = (q * spectrum(n, kappa)) @ q.mT
    return ((a + a.mT) / 2).float()


def exact(a: Tensor, p: int, eps: float = 0.0, relative_eps: float = 0.0) -> Tensor:
    values, vectors = torch.linalg.eigh(a.double())
    values = values + eps + relative_eps * values[..., -1:]
    return (vectors * values[..., None, :] ** (-1.0 / p)) @ vectors.mT


def errors(x: Tensor, expected: Tensor) -> Tensor:
    return (x.double() - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


def mixed_company(n: int) -> dict[str, Tensor]:
    found = {
        "zero": torch.zeros(n, n),
        "identity": torch.eye(n),
        "rank one": torch.ones(n, n),
        "NaN": positive(n, 10),
        "inf": positive(n, 10),
        "-inf": positive(n, 10),
        "negative": positive(n, 10) - 0.5 * torch.eye(n),
        "large": 1e30 * positive(n, 1e3),
        "small": 1e-30 * positive(n, 1e3),
        "ordinary": positive(n, 1e3),
    }
    for name, value in (("NaN", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        found[name][n // 2, 1] = found[name][1, n // 2] = value
    return found


# Against float64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kappa", "most"), [(1e4, MOST), (1e6, MOST_AT_1E6)])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_every_spectrum(gpu, path, kappa, most, p):
    gpu.use(path)
    a = torch.stack([positive(24, kappa, spectrum) for spectrum in SPECTRA])
    ((x, info),) = gpu.roots([a], p)
    assert (errors(x, exact(a, p)) <= most).all()
    assert same_bits(x, x.mT)
    _, expected = newton_roots(a, p, 0.0, 0.0)
    assert torch.equal(info.status, expected.status)
    assert (info.status == RootStatus.CONVERGED).all()
    assert info.residual.isnan().all()
    # Whether fp32 converges beyond the condition that it is meant for is a matter of single roundings.
    if kappa <= matrix_root.FAST_CONDITION or DEVICE == "cpu":
        assert ((info.iterations - expected.iterations).abs() <= 1).all()


@pytest.mark.parametrize(
    ("path", "sizes"), [("on_chip", (1, 2, 3, 15, 31, 32, 33, 64)), ("grouped", (1, 2, 5, 30, 63, 66))]
)
def test_every_size_in_one_call(gpu, path, sizes):
    gpu.use(path)
    given = [positive(n, 1e3) for n in sizes]
    for a, (x, info) in zip(given, gpu.roots(given, 4), strict=True):
        assert x.shape == (1, *a.shape)
        assert errors(x, exact(a, 4)) <= MOST
        assert info.status == RootStatus.CONVERGED


@pytest.mark.parametrize("n", [100, 130])  # the largest size on chip; beyond it, several tiles
def test_larger_matrices(gpu, n):
    a = positive(n, 1e4, half_small)
    ((x, info),) = gpu.roots([a], 4)
    assert errors(x, exact(a, 4)) <= MOST
    assert same_bits(x, x.mT)
    assert info.status == RootStatus.CONVERGED
    assert abs(info.iterations - newton_roots(a[None], 4, 0.0, 0.0)[1].iterations) <= 1


@pytest.mark.parametrize(("path", "n"), [("on_chip", 20), ("on_chip", 40), ("grouped", 20), ("grouped", 70)])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_fp64_leaves_only_the_rounding_of_the_result(gpu, monkeypatch, path, n, p):
    gpu.use(path)
    monkeypatch.setattr(matrix_root, "FAST_SIZE", 0.0)  # never in fp32
    a = positive(n, 1e6 if n <= 40 else 1e2)
    ((x, info),) = gpu.roots([a], p)
    assert errors(x, exact(a, p)) <= FP64
    assert info.status == RootStatus.CONVERGED
    assert info.iterations == newton_roots(a[None], p, 0.0, 0.0)[1].iterations


def test_what_fp32_does_not_reach_on_chip_goes_on_in_grouped_launches(gpu):
    a = torch.stack([positive(66, 1e2), positive(66, 1e9, half_small), positive(66, 1e2)])
    a[1] += 1e-6 * torch.eye(66)
    ((x, info),) = gpu.roots([a], 2)
    assert (info.status == RootStatus.CONVERGED).all()
    assert info.iterations[1] > 3 + matrix_root.FAST_STEPS
    assert (errors(x, exact(a, 2)) <= torch.tensor([MOST, FP64, MOST], dtype=torch.float64)).all()


# Damping


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n", "p"), [(1, 4), (33, 1)])
def test_damping(gpu, path, n, p):
    gpu.use(path)
    # λmax stands apart, and so the power method finds it as well as fp32 can.
    a = torch.stack([7.0 * positive(n, 1e9, one_large), 1e-20 * positive(n, 1e2)])
    for eps, relative_eps in ((1e-3, 0.0), (0.0, 1e-3), (1e-3, 1e-3)):
        ((x, info),) = gpu.roots([a], p, eps, relative_eps)
        assert (errors(x, exact(a, p, eps, relative_eps)) <= MOST).all()
        assert (info.status == RootStatus.CONVERGED).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_eigenvalue_is_the_references(gpu, path):
    gpu.use(path)
    a = positive(48, 1e3, linear)  # where neighbours are near
    # So much damping that only it counts: X = (relative_eps λ)^-1 I, but for 1e-6.
    ((x, _),) = gpu.roots([a], 1, 0.0, 1e6)
    found = 1e-6 / x[0].diagonal().double().mean()
    expected = matrix_root.largest_eigenvalue(a)
    assert abs(found / expected - 1) <= 1e-5
    assert expected <= torch.linalg.eigvalsh(a.double())[-1]


# Company


@pytest.mark.parametrize(
    ("path", "p", "eps", "relative_eps"),
    [("on_chip", p, *damping) for p in (1, 2, 4) for damping in ((0.0, 0.0), (1e-3, 0.0), (0.0, 1e-4))]
    + [("grouped", 1, 0.0, 1e-4), ("grouped", 2, 0.0, 0.0), ("grouped", 4, 1e-3, 0.0)],
)
def test_mixed_company(gpu, path, p, eps, relative_eps):
    gpu.use(path)
    company = mixed_company(16)
    a = torch.stack(list(company.values()))
    ((x, info),) = gpu.roots([a], p, eps, relative_eps)
    expected, known = newton_roots(a, p, eps, relative_eps)
    assert info.status.tolist() == known.status.tolist()
    converged = info.status == RootStatus.CONVERGED
    # The course of a matrix that has no root is a matter of roundings.
    assert ((info.iterations - known.iterations).abs()[converged] <= 1).all()
    assert info.iterations[info.status == RootStatus.NON_FINITE].eq(0).all()
    assert x[~converged].isnan().all()
    assert (errors(x.double(), expected.double())[converged] <= 2 * MOST).all()
    names = list(company)
    found = dict(zip(names, x, strict=True))
    if eps > 0:
        torch.testing.assert_close(found["zero"], eps ** (-1 / p) * torch.eye(16), rtol=1e-5, atol=1e-5)
    else:
        assert info.status[names.index("zero")] == RootStatus.FAILED
    # Nobody's bits depend on the others.
    apart = ("ordinary", "small", "identity", "large")
    ((again, _),) = gpu.roots([torch.stack([company[name] for name in apart])], p, eps, relative_eps)
    assert all(same_bits(again[k], found[name]) for k, name in enumerate(apart))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", [-100, 100])
def test_powers_of_two_pass_through(gpu, path, exponent):
    gpu.use(path)
    a = positive(20, 1e4)
    for p in (1, 4):
        ((x, _),) = gpu.roots([a], p)
        ((scaled, _),) = gpu.roots([a * 2.0**exponent], p)
        assert same_bits(scaled, x * 2.0 ** (-exponent / p))


# Memory


@pytest.mark.parametrize("path", PATHS)
def test_layouts(gpu, path):
    gpu.use(path)
    plain = torch.stack([positive(19, 1e2) for _ in range(2)])
    wide = torch.full((2, 40, 60), math.nan)
    wide[:, 1:39:2, 2:59:3] = plain
    layouts = {
        "transposed": plain.mT,
        "strided": wide[:, 1:39:2, 2:59:3],
        "reordered": plain.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "repeated": plain[:1].expand(2, -1, -1),
    }
    (expected, *found) = gpu.roots([plain, *layouts.values()], 2)
    for name, (x, info) in zip(layouts, found, strict=True):
        which = [0, 0] if name == "repeated" else [0, 1]
        assert same_bits(x, expected[0][which]), name
        assert torch.equal(info.iterations, expected[1].iterations[which])
        assert x.is_contiguous()


def test_empty_ones_are_passed_over(gpu):
    a = positive(5, 10)
    empty = [torch.zeros(0, 4, 4), torch.zeros(3, 0, 0)]
    before = gpu.module.launches()
    for (x, info), given in zip(gpu.roots(empty, 2), empty, strict=True):
        assert x.shape == given.shape
        assert info.status.tolist() == info.iterations.tolist() == [0] * len(given)
    assert gpu.module.launches() == before
    assert errors(gpu.roots([*empty, a], 2)[2][0], exact(a, 2)) <= MOST


@pytest.mark.parametrize("path", PATHS)
def test_runs_and_batches_give_the_same_bits(gpu, path):
    gpu.use(path)
    given = [torch.stack([positive(n, 1e4), positive(n, 1e2)]) for n in (12, 33)]
    first = gpu.roots(given, 2, 0.0, 1e-6)
    for buffers in (1 << 30, 1):  # with room for all, for one at a time
        gpu.use(path, buffers)
        for (x, info), (again, same) in zip(first, gpu.roots(given, 2, 0.0, 1e-6), strict=True):
            assert same_bits(x, again)
            assert torch.equal(info.iterations, same.iterations)


@pytest.mark.parametrize(("path", "sizes", "groups"), [("on_chip", (5, 40), 2), ("grouped", (5, 40), 1)])
def test_launches_do_not_grow_with_the_matrices(gpu, path, sizes, groups):
    counts = []
    for copies in (1, 3):
        gpu.use(path)
        before = gpu.module.launches()
        gpu.roots([torch.stack([positive(n, 10)] * copies) for n in sizes], 1)
        counts.append(gpu.module.launches() - before)
    assert counts[0] == counts[1]
    # On chip one in fp32 and one in fp64 for each size of block.
    assert path == "grouped" or counts[0] == 2 * groups


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator's capture")
@pytest.mark.parametrize("path", PATHS)
def test_a_captured_call_keeps_its_table(gpu, path):
    gpu.use(path)
    a, other = torch.stack([positive(9, 1e2)] * 2), positive(12, 10)
    (roots,) = cuda_roots._kept.kernels.values()
    x = torch.empty_like(a)
    iterations, status = torch.zeros(2, dtype=torch.int32), torch.full((2,), 9, dtype=torch.int8)
    workspaces = []

    def allocate(size: int) -> int:
        workspaces.append(torch.empty(size, dtype=torch.uint8))
        return workspaces[-1].data_ptr()

    gpu.module.begin_capture()
    results = (x.data_ptr(), iterations.data_ptr(), status.data_ptr())
    roots.run([(a.data_ptr(), 2, 9, *a.stride(), *results)], cuda_roots.options_of(2, 0.0, 0.0), allocate, 1)
    gpu.roots([other], 2)
    a[1] = positive(9, 1e3)
    gpu.module.replay()
    gpu.module.begin_capture()
    assert (errors(x, exact(a, 2)) <= MOST).all()
    assert status.tolist() == [0, 0]
    assert len(workspaces) == 1


# What is refused, before anything is launched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 3}, "p=3, expected 1, 2 or 4"),
        ({"eps": -1.0}, "eps=-1, expected a finite number of at least 0"),
        ({"relative_eps": math.inf}, "relative_eps=inf, expected a finite number of at least 0"),
        ({"fast": ([], 5)}, "there are 0 polynomials to begin with, expected 1 to 16"),
        ({"wide": ([(1.0, 1.0, 1.0, 1.0)] * 17, 5)}, "there are 17 polynomials to begin with, expected 1 to 16"),
        ({"wide": ([(1.0, math.nan, 1.0, 1.0)], 5)}, r"the coefficients \(nan, 1, 1\)"),
        ({"fast": ([(1.0, 1.0, 1.0, 1.0)], 0)}, "there are 0 Newton steps, expected 1 or more"),
        ({"squarings": 0}, "there are 0 squarings"),
        ({"n": -1}, "there are 1 matrices of side -1, expected"),
        ({"n": 1 << 20}, "of a side from 0 to"),
        ({"in": 0}, "'in' is at"),
        ({"out": 2}, "'out' is at 0x2, expected an address that is aligned to its elements"),
        ({"workspace": 8}, "expected an address aligned to 16 bytes"),
        ({"workspace": 0}, "expected an address aligned to 16 bytes"),
    ],
)
def test_refusals(gpu, change, message):
    a, x = torch.eye(4), torch.full((4, 4), 7.0)
    iterations, status = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int8)
    polynomials = ([(1.0, 1.0, 1.0, 1.0)], 1)
    options = {"p": 2, "eps": 0.0, "relative_eps": 0.0, "near": 0.1, "growth": 1.2, "fast_size": 16.0}
    options |= {"squarings": 1, "multiplications": 1, "fast": polynomials, "wide": polynomials}
    options |= {name: value for name, value in change.items() if name in options}
    stack = (change.get("in", a.data_ptr()), 1, change.get("n", 4), 16, 4, 1, change.get("out", x.data_ptr()))
    before = gpu.module.launches()
    with pytest.raises(gpu.module.Error, match=message):
        gpu.module.GpuRoots(0).run(
            [(*stack, iterations.data_ptr(), status.data_ptr())],
            gpu.module.RootOptions(**options),
            lambda size: change.get("workspace", 16),
            0,
        )
    assert gpu.module.launches() == before
    assert (x == 7.0).all()


# As it is called


def test_ops(gpu):
    a = torch.stack([positive(12, 1e2), torch.zeros(12, 12)]).reshape(2, 1, 12, 12)
    given = [a.to(DEVICE), positive(6, 1e2).double().bfloat16().to(DEVICE)]
    given[1] = (given[1] + given[1].mT) / 2
    results, infos = sl.ops.inverse_root(given, 2, backend="cuda")
    for x, one in zip(results, given, strict=True):
        assert x.shape == one.shape
        assert x.dtype == torch.float32
    assert infos[0].status.tolist() == [[RootStatus.CONVERGED], [RootStatus.FAILED]]
    assert errors(results[0][0].cpu(), exact(a[0], 2)) <= MOST
    # max|X²A - I|, of an error in X that is multiplied by A's condition.
    assert infos[0].residual[0] <= 1e2 * MOST
    assert infos[0].residual[1].isnan()
    assert infos[1].residual <= 1e2 * MOST


def test_ops_refuse_what_the_kernels_do_not_take(gpu):
    with pytest.raises(TypeError, match=r"A has dtype torch\.float64, which backend='cuda' does not take"):
        sl.ops.inverse_root(torch.eye(3, dtype=torch.float64), 2, backend="cuda")
    with pytest.raises(ValueError, match="method='eigh' is not what backend='cuda' computes"):
        sl.ops.inverse_root(torch.eye(3), 2, method="eigh", backend="cuda")


def test_static_facts_are_the_kernels(gpu):
    assert gpu.module.root_kernels() == cubins.ROOT_KERNELS
