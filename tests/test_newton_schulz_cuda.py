"""The Newton-Schulz kernels in CUDA C++, run by the emulator: on chip, streamed, and in grouped launches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from rounding import allowed_error
from torch import Tensor

import stepladder as sl
from stepladder import _C
from stepladder.bench.matrices import by_clusters
from stepladder.cli import cubins
from stepladder.coefficients import SETS, CoefficientSet, resolve
from stepladder.reference.newton_schulz import RESTART_EVERY, aol, standard_form

MAX_SHARED = 227 << 10


def on_chip_bytes(side: int, slots: int, width: int | None = None) -> int:
    """Of a block with as many panels of X, `width` or else `side` columns wide."""
    planes = 2 if side == 32 else 1
    return 2 * planes * side * (side + 8 + slots * ((width or side) + 8)) + 32 * 8 + 2 * 4 * side


# Room in shared memory with which the matrices of `SIZES` are iterated on chip, and otherwise.
PATHS = {"resident": MAX_SHARED, "grouped": 0}


class Gpu:
    """The emulator, or where `STEPLADDER_TEST_DEVICE=cuda` asks for it the first GPU, with any room on chip."""

    def __init__(self, module) -> None:
        self.module = module
        self.shared = MAX_SHARED
        self.clusters = False

    def limit_shared(self, size: int) -> None:
        self.shared = size

    def iteration(self):
        return self.module.NewtonSchulzGpu(0, self.shared, self.clusters)

    def options(self, chosen: CoefficientSet, eps: float = 1e-7, method: str = "standard"):
        return self.module.NewtonSchulzOptions(chosen.steps, eps, chosen.divisor, chosen.aol, method == "gram")

    def run(self, jobs: Sequence[Job], iteration=None) -> None:
        """All jobs in one call. What they are made of is on the CPU before and after."""
        here = [t for x, out, _, muon in jobs for t in (x, out, *(muon or ())[:1])]
        there = {id(t): place(t) for t in here}
        matrices = [
            (view(there[id(x)]), view(there[id(out)]), o, m and (view(there[id(m[0])]), *m[1:]))
            for x, out, o, m in jobs
        ]
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
        (iteration or self.iteration()).run(matrices, Workspace(), stream)
        if DEVICE == "cuda":
            for t in here:
                storage(t).copy_(storage(there[id(t)]))


# In, out, options, and None or the momentum and what else Muon takes.
Job = tuple[Tensor, Tensor, Any, tuple[Any, ...] | None]


@pytest.fixture
def gpu(request):
    return Gpu(_C if DEVICE == "cuda" else request.getfixturevalue("emulated_module"))


@pytest.fixture
def clusters(gpu):
    """The same with clusters of blocks, which iterate matrices with a smaller side of 129 to 256."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters of blocks")
    gpu.clusters = True
    return gpu


def storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def place(t: Tensor) -> Tensor:
    """The same view, of a storage on the device."""
    if DEVICE != "cuda":
        return t
    return storage(t).to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())


def view(x: Tensor) -> tuple[int, str, Sequence[int], Sequence[int]]:
    return x.data_ptr(), str(x.dtype).removeprefix("torch."), x.shape, x.stride()


class Workspace:
    """What `run` asks for, full of NaN."""

    tensor: Tensor | None = None

    def __call__(self, size: int) -> int:
        assert self.tensor is None
        self.tensor = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        return self.tensor.data_ptr()


def orthogonalise(gpu: Gpu, given: list[Tensor], chosen: CoefficientSet, out: list[Tensor] | None = None, **keywords):
    """All matrices in one call; `out` says where results go."""
    results = [torch.full_like(x, 7.0) for x in given] if out is None else out
    shared = gpu.options(chosen, **keywords)
    gpu.run([(x, result, shared, None) for x, result in zip(given, results, strict=True)])
    return results


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def emulate(X: Tensor, chosen: CoefficientSet, eps: float = 1e-7, method: str = "standard") -> Tensor:
    """The same iteration in torch, with the kernels' points of rounding: operands are bf16, sums fp32."""
    tall = X.shape[0] > X.shape[1]
    wide = (X.mT if tall else X).double()
    norm = wide.square().sum().sqrt().item()
    x = rounded((wide * (1.0 / (max(norm, eps) * chosen.divisor) if norm else 0.0)).float())
    if chosen.aol:
        sums = square(x @ x.mT).abs().sum(-1, keepdim=True)
        x = rounded(torch.where(sums != 0, x * (1.0 / sums.sqrt()), x))
    x = gram_form(x, chosen) if method == "gram" else plain_form(x, chosen)
    return (x.mT if tall else x).to(X.dtype)


def square(x: Tensor) -> Tensor:
    """A symmetric matrix as the kernels keep it: rounded but for its diagonal."""
    lower = rounded(x.tril(-1))
    return lower + lower.mT + x.diag().diag()


def plain_form(x: Tensor, chosen: CoefficientSet) -> Tensor:
    for k, (a, b, c) in enumerate(chosen.steps):
        gram = x @ x.mT
        if c != 0.0:
            gram = square(gram)
        x = a * x + square(b * gram + c * (gram @ gram)) @ x
        if k + 1 < len(chosen.steps):
            x = rounded(x)
    return x


def gram_form(x: Tensor, chosen: CoefficientSet) -> Tensor:
    q = r = square(x @ x.mT)
    for k, (a, b, c) in enumerate(chosen.steps):
        fresh = k % RESTART_EVERY == 0
        if fresh and k > 0:
            x = rounded(q @ x)
            r = square(x @ x.mT)
        z = square(b * r + c * (r @ r))
        q = z + a * torch.eye(len(z)) if fresh else square(q @ z + a * q)
        if (k + 1) % RESTART_EVERY and k + 1 < len(chosen.steps):
            p = square(r @ z + a * r)
            r = square(z @ p + a * p)
    return q @ x


def relative_error(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected)).item()


def exact(X: Tensor, chosen: CoefficientSet, eps: float = 1e-7) -> Tensor:
    tall = X.shape[0] > X.shape[1]
    x = (X.mT if tall else X).double()
    x = x / (max(x.norm().item(), eps) * chosen.divisor)
    x = standard_form(aol(x) if chosen.aol else x, chosen)
    return x.mT if tall else x


# Of a matrix with at most 32 rows, which on chip is kept in 16 bits of mantissa and more in place of 8.
SPLIT_SIDE, FINER, SPLIT_ROUNDING = 32, 2.0**-7, 2.0**-16
STORED = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def assert_right(found: Tensor, X: Tensor, chosen: CoefficientSet, grouped: bool = False, **keywords) -> None:
    """As far from exact arithmetic as the points of rounding make it.

    Sums in another order move a few operands by one rounding, which the steps enlarge as they do all others: the
    kernel's error is another sample of what the emulation's is one of. How the result is stored comes on top.
    """
    assert found.dtype == X.dtype
    expected = exact(X, chosen, keywords.get("eps", 1e-7))
    # Before it is stored in X's dtype.
    error = relative_error(emulate(X.float(), chosen, **keywords), expected)
    split = min(X.shape) <= SPLIT_SIDE and not grouped
    allowed = STORED[X.dtype] + (1.5 * error * FINER + SPLIT_ROUNDING if split else 1.5 * error)
    assert relative_error(found, expected) <= allowed


SIZES = [(1, 1), (1, 40), (2, 2), (15, 17), (17, 15), (33, 20), (33, 64), (64, 64), (100, 33), (17, 130)]


def matrices(sizes=SIZES, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(size).to(dtype) for size in sizes]


# Against the same points of rounding in torch


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("path", PATHS)
def test_every_set_with_mixed_shapes_in_one_call(gpu, path, name):
    gpu.limit_shared(PATHS[path])
    given, chosen = matrices(), resolve(name, None)
    for x, result in zip(given, orthogonalise(gpu, given, chosen), strict=True):
        assert_right(result, x, chosen, grouped=path == "grouped")


@pytest.mark.parametrize("name", SETS)
def test_gram_form(gpu, name):
    gpu.limit_shared(0)
    given, chosen = matrices(), resolve(name, None)
    for x, result in zip(given, orthogonalise(gpu, given, chosen, method="gram"), strict=True):
        assert_right(result, x, chosen, method="gram", grouped=True)


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_any_number_of_steps(gpu, method, steps):
    given, chosen = matrices([(20, 30)]), resolve("jordan", steps)
    gpu.limit_shared(0)
    (result,) = orthogonalise(gpu, given, chosen, method=method)
    assert_right(result, given[0], chosen, method=method, grouped=True)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", ["jordan", "cubic5", "aol4"])
@pytest.mark.parametrize(("side", "size"), [(32, (20, 130)), (64, (200, 40))])
def test_streamed(gpu, side, size, name, slots):
    gpu.limit_shared(on_chip_bytes(side, slots))
    given, chosen = matrices([size, (side, side), size]), resolve(name, None)
    for x, result in zip(given, orthogonalise(gpu, given, chosen), strict=True):
        assert_right(result, x, chosen)


@pytest.mark.parametrize("shared", [MAX_SHARED, on_chip_bytes(128, 1), 0], ids=["resident", "streamed", "grouped"])
def test_a_smaller_side_beyond_64(gpu, shared):
    gpu.limit_shared(shared)
    given, chosen = matrices([(130, 70)]), resolve("polar_express", 3)
    (result,) = orthogonalise(gpu, given, chosen)
    assert_right(result, given[0], chosen)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_several_tiles(gpu, method):
    """Two rows of tiles: one off the diagonal, stored in both its places."""
    gpu.limit_shared(0)
    given, chosen = matrices([(130, 260), (40, 10)]), resolve("you", 3)
    for x, result in zip(given, orthogonalise(gpu, given, chosen, method=method), strict=True):
        assert_right(result, x, chosen, method=method, grouped=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(gpu, path, dtype):
    gpu.limit_shared(PATHS[path])
    given, chosen = matrices([(33, 20), (16, 48)], dtype), resolve("jordan", None)
    for x, result in zip(given, orthogonalise(gpu, given, chosen), strict=True):
        assert_right(result, x, chosen, grouped=path == "grouped")


def test_result_of_another_dtype(gpu):
    x, chosen = torch.randn(33, 20), resolve("jordan", None)
    full = orthogonalise(gpu, [x], chosen)[0]
    for dtype in (torch.bfloat16, torch.float16):
        (result,) = orthogonalise(gpu, [x], chosen, out=[torch.empty(33, 20, dtype=dtype)])
        assert torch.equal(result, full.to(dtype))


# Exact results


def hadamard(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("path", [*PATHS, "streamed"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 4), (16, 16), (64, 64), (4, 64), (64, 16), (16, 256)])
def test_exact(gpu, path, m, n, method):
    """Rows of a Hadamard matrix have one singular value, 1/√m after scaling, and every figure is a short binary one."""
    gpu.limit_shared(PATHS.get(path, on_chip_bytes(64, 1)))
    x = hadamard(max(m, n))[:m, :n].contiguous()
    chosen = CoefficientSet(((2.0, -1.0, 0.5),), "given", divisor=2.0)
    (result,) = orthogonalise(gpu, [x], chosen, method=method)
    value = 0.25 / min(m, n)  # of XXᵀ, from divisor 2
    # Squares are multiples of the identity: their diagonals are not rounded.
    factor = 2.0 - value + 0.5 * value**2
    assert torch.equal(result, (x.double() * factor / (2.0 * math.sqrt(m * n))).float())


@pytest.mark.parametrize("path", PATHS)
def test_a_matrix_does_not_depend_on_its_company(gpu, path):
    gpu.limit_shared(PATHS[path])
    given, chosen = matrices(), resolve("jordan", None)
    together = orthogonalise(gpu, given, chosen)
    for x, result in zip(given, together, strict=True):
        assert torch.equal(orthogonalise(gpu, [x], chosen)[0], result)
    backwards = orthogonalise(gpu, given[::-1], chosen)
    assert all(torch.equal(a, b) for a, b in zip(together, backwards[::-1], strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_in_one_matrix(gpu, path, bad):
    gpu.limit_shared(PATHS[path])
    given, chosen = matrices([(20, 33), (33, 20), (10, 10)]), resolve("jordan", None)
    clean = orthogonalise(gpu, given, chosen)
    given[1][4, 5] = bad
    results = orthogonalise(gpu, given, chosen)
    assert results[1].isnan().all()
    assert torch.equal(results[0], clean[0])
    assert torch.equal(results[2], clean[2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zeros(gpu, path, name, eps):
    gpu.limit_shared(PATHS[path])
    given = [torch.zeros(20, 33), torch.zeros(33, 3)]
    for result in orthogonalise(gpu, given, resolve(name, None), eps=eps):
        assert (result == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_of_zeros_with_the_prescale(gpu, path):
    gpu.limit_shared(PATHS[path])
    x, chosen = torch.randn(20, 33), resolve("aol4", None)
    x[7] = 0.0
    (result,) = orthogonalise(gpu, [x], chosen)
    assert (result[7] == 0).all()
    assert_right(result, x, chosen, grouped=path == "grouped")


@pytest.mark.parametrize("path", PATHS)
def test_scale_does_not_matter(gpu, path):
    gpu.limit_shared(PATHS[path])
    # With the bits that subnormal numbers leave, so that scaling by powers of two is exact.
    x = torch.randint(-64, 64, (33, 20)).float()
    chosen = resolve("jordan", None)
    (expected,) = orthogonalise(gpu, [x], chosen, eps=0.0)
    for exponent in (-149, -140, -100, -20, 20, 121):
        scaled = (x.double() * 2.0**exponent).float()
        assert torch.equal(orthogonalise(gpu, [scaled], chosen, eps=0.0)[0], expected)


@pytest.mark.parametrize("path", PATHS)
def test_eps_is_the_least_norm(gpu, path):
    gpu.limit_shared(PATHS[path])
    x, chosen = torch.randn(10, 12) * 1e-3, resolve("cans", None)
    (result,) = orthogonalise(gpu, [x], chosen, eps=1.0)
    assert_right(result, x, chosen, eps=1.0, grouped=path == "grouped")
    assert relative_error(orthogonalise(gpu, [x], chosen)[0], result.double()) > 0.1


# Layouts


def layouts(x: Tensor) -> dict[str, Tensor]:
    m, n = x.shape
    return {
        "transposed": x.T.contiguous().T,
        "every_second": torch.stack([x, x], 1).flatten(0, 1)[::2],
        "columns_apart": torch.stack([x, x], 2).flatten(1)[:, ::2],
        "within": torch.nn.functional.pad(x, (3, 2, 1, 1))[1 : m + 1, 3 : n + 3],
        "of_a_batch": torch.stack([x, x, x], 1)[:, 1],
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1)))
def test_layouts(gpu, path, shape, layout):
    gpu.limit_shared(PATHS[path])
    x, chosen = torch.randn(shape), resolve("jordan", None)
    (expected,) = orthogonalise(gpu, [x], chosen)
    source = layouts(x)[layout]
    target = layouts(torch.zeros(shape))[layout]
    around = target._base if target._base is not None else target
    (result,) = orthogonalise(gpu, [source], chosen, out=[target])
    assert torch.equal(source, x)
    assert torch.equal(result, expected)
    # Nothing was written beside the result.
    result.zero_()
    assert (around == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_in_place(gpu, path):
    gpu.limit_shared(PATHS[path])
    given, chosen = matrices([(20, 33), (70, 20)]), resolve("jordan", None)
    expected = orthogonalise(gpu, given, chosen)
    copies = [x.clone() for x in given]
    orthogonalise(gpu, copies, chosen, out=copies)
    assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))


def test_empty_matrices_are_passed_over(gpu):
    given = [torch.empty(0, 5), torch.randn(5, 5), torch.empty(5, 0)]
    chosen = resolve("jordan", None)
    results = orthogonalise(gpu, given, chosen)
    assert torch.equal(results[1], orthogonalise(gpu, given[1:2], chosen)[0])
    gpu.run([])


# Singular values


def spectrum(shape: tuple[int, int], values: Tensor) -> Tensor:
    m, n = shape
    u, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    return ((u * values) @ v.T).float()


def band(chosen: CoefficientSet, low: float, high: float) -> tuple[float, float]:
    """What exact arithmetic makes of singular values between `low` and `high`."""
    sigma = torch.linspace(low, high, 100_001, dtype=torch.float64)
    for a, b, c in chosen.steps:
        sigma = sigma * (a + b * sigma**2 + c * sigma**4)
    return sigma.min().item(), sigma.max().item()


@pytest.mark.parametrize("name", [name for name in SETS if not SETS[name].aol])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("kappa", [1.0, 30.0, 1000.0])
def test_singular_values_stay_in_the_band_of_exact_arithmetic(gpu, name, method, kappa):
    chosen = resolve(name, None)
    shapes = [(1, 9), (8, 4), (24, 60), (40, 100), (60, 60), (100, 40)]
    spectra = [torch.logspace(0, -math.log10(kappa), min(shape), dtype=torch.float64) for shape in shapes]
    given = [spectrum(shape, values) for shape, values in zip(shapes, spectra, strict=True)]
    for values, result in zip(spectra, orthogonalise(gpu, given, chosen, method=method), strict=True):
        scaled = values / values.norm() / chosen.divisor
        low, high = band(chosen, scaled.min().item() / 1.03, scaled.max().item() * 1.03)
        found = torch.linalg.svdvals(result.double())
        assert low - 0.06 <= found.min()
        assert found.max() <= high + 0.06


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("path", PATHS)
def test_rank_one(gpu, path, name):
    gpu.limit_shared(PATHS[path])
    chosen = resolve(name, None)
    x = torch.randn(20, 1) * torch.randn(1, 33)
    (result,) = orthogonalise(gpu, [x], chosen)
    found = torch.linalg.svdvals(result.double())
    if chosen.aol:
        low = high = torch.linalg.svdvals(exact(x, chosen)).max().item()
    else:
        low, high = band(chosen, 1 / chosen.divisor / 1.03, 1 / chosen.divisor * 1.03)
    assert low - 0.06 <= found[0] <= high + 0.06


# What goes around the iteration


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """torch.lerp in fp32 with one rounding, of what 64 bits of mantissa hold."""
    way = (end - start).numpy().astype(np.longdouble)
    weight = np.float32(weight)
    origin, factor = (start, weight) if weight < 0.5 else (end, weight - np.float32(1.0))
    return torch.from_numpy((np.longdouble(factor) * way + origin.numpy().astype(np.longdouble)).astype(np.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon(gpu, path, nesterov, averages, dtype):
    """Momentum and parameter have the bits of the same operations in torch around the same iteration."""
    gpu.limit_shared(PATHS[path])
    check_muon(gpu, [(20, 33), (40, 17)], resolve("jordan", None), nesterov, averages, dtype)


def check_muon(
    gpu: Gpu,
    shapes: list[tuple[int, int]],
    chosen: CoefficientSet,
    nesterov: bool,
    averages: bool,
    dtype: torch.dtype,
) -> None:
    momentum, grad_scale, decay, step = (torch.tensor(value).item() for value in (0.95, 0.3, 0.999, 0.02))
    params, grads, buffers = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(3))
    buffers[0] = buffers[0].T.contiguous().T
    stored, updates = [], []
    for u, g in zip(buffers, grads, strict=True):
        g = grad_scale * g.float()
        u = (lerp(u.float(), g, 1.0 - momentum) if averages else momentum * u.float() + g).to(dtype)
        stored.append(u)
        u = u.float()
        updates.append((lerp(g, u, momentum) if averages else g + momentum * u) if nesterov else u)
    orthogonal = orthogonalise(gpu, updates, chosen)
    expected = [(decay * w.float() - step * o).to(dtype) for w, o in zip(params, orthogonal, strict=True)]
    shared = gpu.options(chosen)
    gpu.run(
        [
            (g, w, shared, (u, momentum, averages, nesterov, grad_scale, decay, step))
            for w, g, u in zip(params, grads, buffers, strict=True)
        ]
    )
    assert all(torch.equal(a, b) for a, b in zip(buffers, stored, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_options_of_their_own(gpu):
    """Matrices of one call need not share their coefficients, or their form."""
    x = torch.randn(40, 50)
    ways = [("jordan", "standard"), ("cans", "gram"), ("aol4", "standard"), ("you", "gram")]
    results = [torch.zeros_like(x) for _ in ways]
    gpu.run(
        [
            (x, result, gpu.options(resolve(name, None), method=method), None)
            for result, (name, method) in zip(results, ways, strict=True)
        ]
    )
    for result, (name, method) in zip(results, ways, strict=True):
        assert torch.equal(result, orthogonalise(gpu, [x], resolve(name, None), method=method)[0])


# Clusters of blocks. Of a square matrix all of X stays on chip; 257 columns and more are streamed.

TWO_STEPS = CoefficientSet(SETS["jordan"].steps[:2], "given")
STREAMED = on_chip_bytes(256, 1, 32), on_chip_bytes(256, 3, 32)


@pytest.mark.parametrize("name", ["jordan", "cubic5", "aol4"])
def test_clusters_with_mixed_shapes_in_one_call(clusters, name):
    given, chosen = matrices([(130, 130), (300, 136), (40, 50), (129, 150)]), resolve(name, None)
    before = clusters.module.launches()
    results = orthogonalise(clusters, given, chosen)
    assert clusters.module.launches() - before == 3  # a block each, clusters with all of X, clusters without
    for x, result in zip(given, results, strict=True):
        assert_right(result, x, chosen)


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (1024, 256)])
def test_clusters_are_exact(clusters, shape):
    """Rows of a Hadamard matrix, as above."""
    m, n = shape
    x = hadamard(max(m, n))[:m, :n].contiguous()
    chosen = CoefficientSet(((2.0, -1.0, 0.5),), "given", divisor=2.0)
    (result,) = orthogonalise(clusters, [x], chosen)
    value = 0.25 / min(m, n)
    factor = 2.0 - value + 0.5 * value**2
    assert torch.equal(result, (x.double() * factor / (2.0 * math.sqrt(m * n))).float())


def test_the_largest_matrix_of_a_cluster(clusters):
    given, chosen = matrices([(256, 256)]), resolve("polar_express", 3)
    (result,) = orthogonalise(clusters, given, chosen)
    assert_right(result, given[0], chosen)


@pytest.mark.parametrize("name", ["jordan", "aol4"])
@pytest.mark.parametrize("shared", STREAMED)
def test_streamed_by_clusters(clusters, shared, name):
    clusters.limit_shared(shared)
    given, chosen = matrices([(225, 260)]), resolve(name, None)
    (result,) = orthogonalise(clusters, given, chosen)
    assert_right(result, given[0], chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_clusters(clusters, dtype):
    given, chosen = matrices([(161, 140)], dtype), resolve("jordan", None)
    (result,) = orthogonalise(clusters, given, chosen)
    assert_right(result, given[0], chosen)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_of_a_cluster_does_not_depend_on_its_company(clusters, bad):
    """More matrices than clusters run at once; one that is not finite is so in both blocks."""
    given = matrices([(129, 130), (131, 129), (140, 260), (130, 140), (129, 129)])
    clean = orthogonalise(clusters, given, TWO_STEPS)
    assert torch.equal(orthogonalise(clusters, given[3:4], TWO_STEPS)[0], clean[3])
    given[1][4, 5] = given[2][3, 250] = bad
    results = orthogonalise(clusters, given, TWO_STEPS)
    assert results[1].isnan().all()
    assert results[2].isnan().all()
    assert all(torch.equal(results[i], clean[i]) for i in (0, 3, 4))


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("name", ["jordan", "aol4"])
def test_zeros_in_clusters(clusters, name, eps):
    given = [torch.zeros(130, 129), torch.randn(130, 300)]
    given[1][:, :290] = 0.0  # one block has nothing but zeros
    given[1][7] = 0.0
    zeros, sparse = orthogonalise(clusters, given, resolve(name, 4), eps=eps)
    assert (zeros == 0).all()
    assert (sparse[7] == 0).all()
    assert (sparse[:, :290] == 0).all()
    assert sparse.isfinite().all()


def test_scale_does_not_matter_to_clusters(clusters):
    x = torch.randint(-64, 64, (129, 140)).float()
    (expected,) = orthogonalise(clusters, [x], TWO_STEPS, eps=0.0)
    for exponent in (-149, 121):
        scaled = (x.double() * 2.0**exponent).float()
        assert torch.equal(orthogonalise(clusters, [scaled], TWO_STEPS, eps=0.0)[0], expected)


@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_layouts_in_clusters(clusters, path):
    clusters.limit_shared(MAX_SHARED if path == "resident" else STREAMED[1])
    x = torch.randn(135, 170)
    (expected,) = orthogonalise(clusters, [x], TWO_STEPS)
    for layout in ("transposed", "within"):
        target = layouts(torch.zeros(x.shape))[layout]
        (result,) = orthogonalise(clusters, [layouts(x)[layout]], TWO_STEPS, out=[target])
        assert torch.equal(result, expected)
        result.zero_()
        assert target._base is not None
        assert (target._base == 0).all()
    copy = x.clone()
    orthogonalise(clusters, [copy], TWO_STEPS, out=[copy])
    assert torch.equal(copy, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_in_clusters(clusters, dtype):
    check_muon(clusters, [(130, 133), (300, 132)], TWO_STEPS, True, True, dtype)


def test_only_the_standard_form_is_iterated_by_clusters(clusters):
    given, chosen = matrices([(130, 140)]), TWO_STEPS
    before = clusters.module.launches()
    (result,) = orthogonalise(clusters, given, chosen, method="gram")
    assert clusters.module.launches() - before == 2 + 1 + 3 + 2 + 1
    clusters.clusters = False
    assert torch.equal(result, orthogonalise(clusters, given, chosen, method="gram")[0])


@pytest.mark.parametrize(
    ("size", "asked", "launches"),
    [
        ((129, 129), True, 1),
        ((129, 129), False, 2 + 3),
        ((128, 140), True, 1),
        ((257, 257), True, 2 + 3),
        ((129, 32 * 256 + 1), True, 2 + 3),
    ],
)
def test_which_matrices_clusters_take(gpu, clusters, size, asked, launches):
    gpu.clusters = asked
    before = gpu.module.launches()
    orthogonalise(gpu, matrices([size]), CoefficientSet(TWO_STEPS.steps[:1], "given"))
    assert gpu.module.launches() - before == launches


@pytest.fixture
def old_device(emulated_module):
    """The emulated device without clusters."""
    emulated_module.set_capability(8)
    yield emulated_module
    emulated_module.set_capability(9)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulated device")
class TestClustersByTheEnvironment:
    def test_batches(self, emulated, monkeypatch):
        monkeypatch.setenv("STEPLADDER_CLUSTERS", "1")
        x = torch.randn(2, 130, 136)
        before = emulated.module.launches()
        results = sl.ops.newton_schulz(x, method="standard", backend="cuda")
        assert emulated.module.launches() - before == 1
        for one, result in zip(x, results, strict=True):
            assert relative_error(result, sl.reference.newton_schulz(one.double())) <= allowed_error(one)

    def test_as_they_are_measured(self, emulated, monkeypatch):
        monkeypatch.setenv("STEPLADDER_CLUSTERS", "0")
        x = torch.randn(130, 129)
        before = emulated.module.launches()
        result = by_clusters(partial(sl.ops.newton_schulz, x, method="standard", backend="cuda"))()
        assert emulated.module.launches() - before == 1
        assert os.environ["STEPLADDER_CLUSTERS"] == "0"
        assert relative_error(result, sl.reference.newton_schulz(x.double())) <= allowed_error(x)

    @pytest.mark.parametrize("value", [None, "0"])
    def test_not_asked_for(self, emulated, monkeypatch, value):
        monkeypatch.delenv("STEPLADDER_CLUSTERS", raising=False)
        if value is not None:
            monkeypatch.setenv("STEPLADDER_CLUSTERS", value)
        before = emulated.module.launches()
        sl.ops.newton_schulz(torch.randn(129, 129), (3.0, -3.0, 1.0), 1, "standard", backend="cuda")
        assert emulated.module.launches() - before == 2 + 3

    def test_refusals(self, emulated, old_device, monkeypatch):
        sl.ops.newton_schulz(X, backend="cuda")
        monkeypatch.setenv("STEPLADDER_CLUSTERS", "yes")
        with pytest.raises(ValueError, match="STEPLADDER_CLUSTERS='yes' is unknown, expected '0' or '1'"):
            sl.ops.newton_schulz(X, backend="cuda")
        monkeypatch.setenv("STEPLADDER_CLUSTERS", "1")
        message = "STEPLADDER_CLUSTERS='1' cannot run here: .* GPU 0, which has compute capability 8.0, expected .* 9.0"
        with pytest.raises(RuntimeError, match=message):
            sl.ops.newton_schulz(X, backend="cuda")

    def test_muon_changes_nothing_where_they_cannot_run(self, emulated, old_device, monkeypatch):
        weight, bias = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
        optimizer = sl.Muon(
            [{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}],
            backend="cuda",
        )
        weight.grad, bias.grad = torch.ones(4, 4), torch.ones(4)
        for value, error in (("maybe", ValueError), ("1", RuntimeError)):
            monkeypatch.setenv("STEPLADDER_CLUSTERS", value)
            with pytest.raises(error, match=f"STEPLADDER_CLUSTERS='{value}'"):
                optimizer.step()
            assert (weight == 1.0).all()
            assert (bias == 1.0).all()
            assert not optimizer.state
        monkeypatch.setenv("STEPLADDER_CLUSTERS", "0")
        optimizer.step()
        assert (weight != 1.0).all()


# The host


@pytest.mark.parametrize(
    ("sizes", "shared", "method", "launches"),
    [
        ([(8, 8)] * 5 + [(30, 90)], MAX_SHARED, "standard", 1),
        (SIZES, MAX_SHARED, "standard", 2),
        (SIZES, 0, "standard", 2 + 3 * 5),
        # Those with few rows on chip. Five steps in three forms: R; Z with Q, P, R; Z, Q; X; the last has one step.
        (SIZES, MAX_SHARED, "gram", 1 + 2 + 2 * (1 + 3 + 2 + 1) + (1 + 1 + 1)),
    ],
)
def test_launches_do_not_grow_with_the_matrices(gpu, sizes, shared, method, launches):
    gpu.limit_shared(shared)
    before = gpu.module.launches()
    orthogonalise(gpu, matrices(sizes), resolve("jordan", None), method=method)
    assert gpu.module.launches() - before == launches


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator's capture")
@pytest.mark.parametrize("path", PATHS)
def test_a_captured_iteration_keeps_its_table(gpu, path):
    gpu.limit_shared(PATHS[path])
    chosen, iteration = resolve("jordan", None), gpu.iteration()
    first, second = matrices([(20, 33), (9, 9)]), matrices([(12, 12), (40, 20)])
    shared, spaces = gpu.options(chosen), [Workspace(), Workspace()]
    out = [torch.zeros_like(x) for x in (*first, *second)]

    def jobs(given, results):
        return [(view(x), view(r), shared, None) for x, r in zip(given, results, strict=True)]

    gpu.module.begin_capture()
    iteration.run(jobs(first, out[:2]), spaces[0], 1)
    assert all((x == 0).all() for x in out)
    iteration.run(jobs(second, out[2:]), spaces[1], 0)
    for seed in range(2):
        for x in first:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        gpu.module.replay()
        expected = orthogonalise(gpu, first, chosen)
        assert all(torch.equal(a, b) for a, b in zip(out[:2], expected, strict=True))
    gpu.module.begin_capture()


def test_a_table_is_uploaded_anew_where_it_changed(gpu):
    chosen, iteration = resolve("jordan", None), gpu.iteration()
    shared = gpu.options(chosen)
    for sizes in ([(20, 33)], [(20, 33)], [(5, 8), (20, 33), (40, 40)], [(5, 8)]):
        given = matrices(sizes)
        out = [torch.zeros_like(x) for x in given]
        gpu.run([(x, r, shared, None) for x, r in zip(given, out, strict=True)], iteration)
        assert all(torch.equal(a, b) for a, b in zip(out, orthogonalise(gpu, given, chosen), strict=True))


X = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "there are 0 steps, expected 1 to 99"),
        ({"steps": [(1.0, 2.0, 3.0)] * 100}, "there are 100 steps, expected 1 to 99"),
        ({"steps": [(1.0, math.nan, 3.0)]}, r"the coefficients \(1, nan, 3\) are not finite"),
        ({"eps": -1.0}, "eps=-1, expected a finite number of at least 0"),
        ({"eps": math.inf}, "eps=inf, expected a finite number of at least 0"),
        ({"divisor": 0.0}, "divisor=0, expected a finite number above 0"),
        (
            dict.fromkeys(("in", "out"), (X.data_ptr(), "float32", (-1, 4), (4, 1))),
            "a matrix has -1 rows and 4 columns",
        ),
        (
            dict.fromkeys(("in", "out"), (X.data_ptr(), "float32", (4, 2**31), (4, 1))),
            "a matrix has 4 rows and 2147483648 columns",
        ),
        ({"in": (X.data_ptr(), "float32", (2, 4, 4), (0, 4, 1))}, "matrices and their results have different shapes"),
        ({"out": (X.data_ptr(), "float32", (2, 8), (8, 1))}, "matrices and their results have different shapes"),
        (
            {"buffer": (X.data_ptr(), "float32", (8, 8), (8, 1))},
            "matrices and their momentum have different shapes",
        ),
        ({"in": (X.data_ptr(), "float32", (4,), (1,))}, "a tensor has 1 sizes and 1 strides, expected as many of both"),
        ({"in": (X.data_ptr(), "float32", (4, 4), (1,))}, "a tensor has 2 sizes and 1 strides, expected as many of"),
        ({"in": (0, "float32", (4, 4), (4, 1))}, "the matrix 'in' has no address"),
        ({"out": (0, "float32", (4, 4), (4, 1))}, "the matrix 'out' has no address"),
        (
            {"in": (X.data_ptr(), "float64", (4, 4), (4, 1))},
            "has the dtype 'float64', expected float32, bfloat16 or float16",
        ),
        (
            {"out": (X.data_ptr() + 2, "float32", (4, 4), (4, 1))},
            "the matrix 'out' begins at .*, which is not aligned",
        ),
        ({"options": None}, "a matrix has no options"),
        ({"workspace": 8}, "expected an address aligned to 16 bytes"),
        ({"workspace": 0}, "expected an address aligned to 16 bytes"),
    ],
)
def test_refusals(gpu, change, message):
    gpu.limit_shared(0)
    x, result = torch.ones(4, 4), torch.full((4, 4), 7.0)
    given = {"steps": [(1.0, 2.0, 3.0)], "eps": 0.0, "divisor": 1.0, "workspace": 16, **change}
    shared = gpu.module.NewtonSchulzOptions(given["steps"], given["eps"], given["divisor"], False, False)
    muon = (given["buffer"], 0.9, True, True, 1.0, 1.0, 0.1) if "buffer" in given else None
    matrices = (given.get("in", view(x)), given.get("out", view(result)), given.get("options", shared), muon)
    before = gpu.module.launches()
    with pytest.raises(gpu.module.Error, match=message):
        gpu.iteration().run([matrices], lambda size: given["workspace"], 0)
    assert gpu.module.launches() == before
    assert (result == 7.0).all()


def test_static_facts_are_the_kernels(gpu):
    assert gpu.module.matrix_kernels() == cubins.MATRIX_KERNELS
