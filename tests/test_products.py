"""Products of fp32 matrices on a CPU, by every unit that runs here and by emulated tiles, against fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from stepladder import _C, newton_schulz, products

needs_kernel = pytest.mark.skipif(
    not products.units(), reason="no kernel of ours runs here: they need AVX-512, and a compiler that knows it"
)
EMULATED = "emulated amx"
# Around the edges of tiles of 14×32 and 16×16, of panels of 256 and 768, of blocks of 448 and 256.
SHAPES = (
    *((1, 1, 1), (13, 31, 7), (14, 32, 256), (15, 33, 257), (29, 65, 300), (449, 40, 5), (3, 100, 513), (64, 1, 64)),
    *((17, 16, 31), (40, 257, 33), (5, 33, 769)),
)


@pytest.fixture(params=[*products.units(), EMULATED])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == EMULATED:
        module = request.getfixturevalue("emulated_module")
        if "amx" not in module.product_units():
            pytest.skip("the emulator was built by a compiler that does not know AMX")
        monkeypatch.setattr(products, "_C", module)
    monkeypatch.setattr(products, "unit", lambda: name.removeprefix("emulated "))
    return name


def strided(x: Tensor, order: str) -> Tensor:
    """The same matrix by rows, by columns, or with gaps between rows and elements."""
    if order == "rows":
        return x.contiguous()
    if order == "columns":
        return x.T.contiguous().T
    wide = torch.full((2 * x.shape[0] + 1, 3 * x.shape[1] + 2), math.nan)
    view = wide[1::2, 2::3][: x.shape[0], : x.shape[1]]
    return view.copy_(x)


def bound(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float) -> Tensor:
    """Of each element's error: k fused multiply-adds and a few more roundings, each at most 2^-24 of Σ|a||b|.

    γ of k + 4 roundings (Higham, Accuracy and Stability, §3.1): in blocks of the depth, with alpha and beta after each.
    What falls below the normal numbers loses up to 2^-149 with each of them. Tiles sum six products of parts, so that
    what can be proven of them is six times as much; as five of these are smaller by 2^7 and more, they keep this one.
    """
    k = a.shape[1]
    roundings = k + k // 256 + 6
    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    size = abs(alpha) * (a.double().abs() @ b.double().abs())
    return gamma * (size + (abs(beta) * c.double().abs() if beta else 0.0)) + roundings * 2.0**-149


def product(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float, symmetric: bool = False) -> Tensor:
    out = c.clone(memory_format=torch.preserve_format)
    products.multiply(a, b, out, alpha, beta, symmetric=symmetric)
    return out


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orders", list(itertools.product(("rows", "columns", "gaps"), repeat=2)), ids="-".join)
def test_products_of_any_strides(orders: tuple[str, str], shape: tuple[int, int, int], unit: str):
    m, n, k = shape
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    left, right = strided(a, orders[0]), strided(b, orders[1])
    for alpha, beta in ((1.0, 0.0), (-0.7, 0.3), (2.0, 1.0)):
        exact = alpha * (a.double() @ b.double()) + beta * c.double()
        for result in ("rows", "columns"):
            found = product(left, right, strided(c, result), alpha, beta)
            assert bool(((found - exact).abs() <= bound(a, b, c, alpha, beta)).all())


@needs_kernel
def test_a_result_between_gaps_leaves_what_is_around_it(unit: str):
    a, b = torch.randn(30, 20), torch.randn(20, 37)
    for transposed in (False, True):
        frame = torch.full((37, 50) if transposed else (30, 50), 7.0)
        out = frame[:, 5:35].T if transposed else frame[:, 5:42]
        products.multiply(a, b, out, 1.0, 0.0, symmetric=False)
        exact = a.double() @ b.double()
        assert bool(((out - exact).abs() <= bound(a, b, out, 1.0, 0.0)).all())
        mask = torch.ones_like(frame, dtype=torch.bool)
        mask[:, 5 : 35 if transposed else 42] = False
        assert bool((frame[mask] == 7.0).all())


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 13, 14, 15, 32, 33, 100, 449, 500])
def test_symmetric_products(n: int, threads: int, unit: str):
    torch.set_num_threads(threads)
    g = torch.randn(n, 70)
    c = torch.randn(n, n)
    c = c + c.T
    for order in ("rows", "columns"):
        found = product(g, g.T, strided(c, order), 0.05, 0.95, symmetric=True)
        assert torch.equal(found, found.T)
        exact = 0.05 * (g.double() @ g.double().T) + 0.95 * c.double()
        assert bool(((found - exact).abs() <= bound(g, g.T, c, 0.05, 0.95)).all())


@needs_kernel
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_beta_of_zero_the_result_is_not_looked_at(symmetric: bool, unit: str):
    g = torch.randn(40, 9)
    for order in ("rows", "columns"):
        for bad in (math.nan, math.inf):
            found = product(g, g.T, strided(torch.full((40, 40), bad), order), 1.0, 0.0, symmetric)
            assert torch.equal(found, product(g, g.T, strided(torch.zeros(40, 40), order), 1.0, 0.0, symmetric))
            assert found.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_depth_of_zero_and_empty_results(symmetric: bool, unit: str):
    c = torch.randn(20, 20)
    c = c + c.T
    empty = torch.zeros(20, 0)
    assert torch.equal(product(empty, empty.T, c, 3.0, 0.5, symmetric), 0.5 * c)
    assert torch.equal(product(empty, empty.T, c.clone().fill_(math.nan), 3.0, 0.0, symmetric), torch.zeros(20, 20))
    nothing = torch.zeros(0, 4)
    assert product(nothing, nothing.T, torch.zeros(0, 0), 1.0, 0.0, symmetric).shape == (0, 0)


@needs_kernel
def test_nan_and_inf_stay_in_their_rows_and_columns(unit: str):
    a, b = torch.randn(30, 20), torch.randn(20, 40)
    a[3, 4], b[5, 6] = math.nan, math.inf
    found = product(a, b, torch.zeros(30, 40), 1.0, 0.0)
    sound = torch.ones(30, 40, dtype=torch.bool)
    sound[3], sound[:, 6] = False, False
    assert found[sound].isfinite().all()
    assert found[3].isnan().all()
    assert not found[:, 6].isfinite().any()


@needs_kernel
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [200, 1025])
def test_the_number_of_threads_changes_no_bit(n: int, symmetric: bool, unit: str):
    if unit == EMULATED and n > 1000:
        pytest.skip("takes emulated tiles too long; a smaller matrix is split as well")
    g, c = torch.randn(n, 60), torch.zeros(n, n)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(g, g.T, c, 0.3, 0.7, symmetric))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernel
def test_what_the_kernel_refuses(unit: str):
    x = torch.zeros(6, 6)
    with pytest.raises(RuntimeError, match="neither rows nor columns of the result are contiguous"):
        products.multiply(x[:3, :3], x[:3, :3], x[::2, ::2], 1.0, 0.0, symmetric=False)
    with pytest.raises(RuntimeError, match="a symmetric product has 2 rows and 3 columns, expected as many"):
        products.multiply(x[:2], x[:, :3], x[:2, :3], 1.0, 0.0, symmetric=True)
    with pytest.raises(RuntimeError, match="-1x2x3 elements, expected none below 0"):
        products._C.multiply_matrices(-1, 3, 2, (0, 1, 1), (0, 1, 1), (0, 1, 1), 1.0, 0.0, False, products.unit(), 1)


@needs_kernel
@pytest.mark.parametrize("kind", ["normal", "graded", "large", "small", "cancelling", "far", "far rows", "far sums"])
def test_products_are_as_exact_as_in_fp32(kind: str, unit: str):
    m, n, k = 40, 70, 400
    a, b = torch.randn(m, k), torch.randn(k, n)
    if kind == "graded":  # 36 powers of ten along k, against each other, and twelve from row to row
        a *= torch.logspace(18, -18, k) * torch.logspace(-6, 6, m)[:, None]
        b *= torch.logspace(-18, 18, k)[:, None]
    elif kind == "large":
        a *= 1e30
        b *= 1e-30
    elif kind == "small":  # of subnormal numbers
        a *= 1e-42
        b *= 1e30
    elif kind == "far":  # one element far above all others
        a *= 1e-22
        a[0, 0] = 1e25
    elif kind == "far rows":
        a[0] *= 1e30
        a[1:] *= 1e-30
    elif kind == "far sums":  # in which what is large in one operand meets what is small in the other
        a, b = a * torch.logspace(30, -30, k), b * torch.logspace(-30, 30, k)[:, None]
    elif kind == "cancelling":
        a[:, k // 2 :] = -a[:, : k // 2] * (1 + 1e-6 * torch.randn(m, k // 2))
        b[k // 2 :] = b[: k // 2]
    out = torch.zeros(m, n)
    found = product(a, b, out, 1.0, 0.0)
    exact = a.double() @ b.double()
    assert bool(((found - exact).abs() <= bound(a, b, out, 1.0, 0.0)).all())


@needs_kernel
def test_a_sum_beyond_fp32_is_infinite(unit: str):
    a = torch.full((20, 30), 1e20)
    assert torch.equal(product(a, a.T, torch.zeros(20, 20), 1.0, 0.0), torch.full((20, 20), math.inf))
    assert torch.equal(product(a, -a.T, torch.zeros(20, 20), 1.0, 0.0), torch.full((20, 20), -math.inf))


@needs_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_go_where_fp32_takes_them(value: float, unit: str):
    a, b = torch.randn(40, 70), torch.randn(70, 50)
    a[3, 4] = value
    b[5, 6] = value
    b[4, 7] = 0.0
    found, exact = product(a, b, torch.zeros(40, 50), 1.0, 0.0), torch.mm(a, b)
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found[found.isinf()], exact[exact.isinf()])


@pytest.mark.parametrize("asked", ["amx", "avx512_bf16", "torch"])
def test_the_environment_names_the_unit(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(newton_schulz.UNIT_VARIABLE, asked)
    if asked == "amx" and "amx" not in _C.matrix_units():
        with pytest.raises(RuntimeError, match="'amx' cannot run here"):
            products.unit()
        return
    if asked == "avx512_bf16" and asked not in _C.matrix_units():
        pytest.skip("this processor has no products of bf16")
    assert products.unit() == ("amx" if asked == "amx" else "avx512")


def test_which_products_are_served():
    big = torch.empty(2048, 2048)
    here = bool(products.units())
    assert products.serves(big, 2) == here
    assert products.serves(big.T, 2) == here
    assert not products.serves(big, 1)
    assert not products.serves(big[::2, ::2], 64)
    assert not products.serves(big.double(), 64)
    assert not products.serves(big[None], 64)
    assert not products.serves(torch.empty(2048, 2048, device="meta"), 64)


@pytest.mark.parametrize("k", [3, 130])
def test_mm_is_torchs(k: int):
    # With 130 the kernel's, where there is one.
    a, b = torch.randn(258, k), torch.randn(k, 259)
    found = products.mm(a, b)
    assert bool(((found - a.double() @ b.double()).abs() <= bound(a, b, found, 1.0, 0.0)).all())
    wide = products.mm(a.double(), b.double())
    assert torch.equal(wide, torch.mm(a.double(), b.double()))
