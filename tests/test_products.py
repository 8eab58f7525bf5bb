"""Products of fp32 matrices on a CPU, against fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from stepladder import _C, products

needs_kernel = pytest.mark.skipif(not products.has_kernel(), reason="this processor has no AVX-512, or no x86-64 build")
# Around the edges of tiles of 14×32, of panels of 256, of blocks of 448.
SHAPES = ((1, 1, 1), (13, 31, 7), (14, 32, 256), (15, 33, 257), (29, 65, 300), (449, 40, 5), (3, 100, 513), (64, 1, 64))


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
    """
    k = a.shape[1]
    roundings = k + k // 256 + 6
    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    size = abs(alpha) * (a.double().abs() @ b.double().abs())
    return gamma * (size + (abs(beta) * c.double().abs() if beta else 0.0))


def product(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float, symmetric: bool = False) -> Tensor:
    out = c.clone(memory_format=torch.preserve_format)
    products.multiply(a, b, out, alpha, beta, symmetric=symmetric)
    return out


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orders", list(itertools.product(("rows", "columns", "gaps"), repeat=2)), ids="-".join)
def test_products_of_any_strides(orders: tuple[str, str], shape: tuple[int, int, int]):
    m, n, k = shape
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    left, right = strided(a, orders[0]), strided(b, orders[1])
    for alpha, beta in ((1.0, 0.0), (-0.7, 0.3), (2.0, 1.0)):
        exact = alpha * (a.double() @ b.double()) + beta * c.double()
        for result in ("rows", "columns"):
            found = product(left, right, strided(c, result), alpha, beta)
            assert bool(((found - exact).abs() <= bound(a, b, c, alpha, beta)).all())


@needs_kernel
def test_a_result_between_gaps_leaves_what_is_around_it():
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
def test_symmetric_products(n: int, threads: int):
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
def test_with_beta_of_zero_the_result_is_not_looked_at(symmetric: bool):
    g = torch.randn(40, 9)
    for order in ("rows", "columns"):
        for bad in (math.nan, math.inf):
            found = product(g, g.T, strided(torch.full((40, 40), bad), order), 1.0, 0.0, symmetric)
            assert torch.equal(found, product(g, g.T, strided(torch.zeros(40, 40), order), 1.0, 0.0, symmetric))
            assert found.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_depth_of_zero_and_empty_results(symmetric: bool):
    c = torch.randn(20, 20)
    c = c + c.T
    empty = torch.zeros(20, 0)
    assert torch.equal(product(empty, empty.T, c, 3.0, 0.5, symmetric), 0.5 * c)
    assert torch.equal(product(empty, empty.T, c.clone().fill_(math.nan), 3.0, 0.0, symmetric), torch.zeros(20, 20))
    nothing = torch.zeros(0, 4)
    assert product(nothing, nothing.T, torch.zeros(0, 0), 1.0, 0.0, symmetric).shape == (0, 0)


@needs_kernel
def test_nan_and_inf_stay_in_their_rows_and_columns():
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
def test_the_number_of_threads_changes_no_bit(n: int, symmetric: bool):
    g, c = torch.randn(n, 60), torch.zeros(n, n)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(g, g.T, c, 0.3, 0.7, symmetric))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernel
def test_what_the_kernel_refuses():
    x = torch.zeros(6, 6)
    with pytest.raises(RuntimeError, match="neither rows nor columns of the result are contiguous"):
        products.multiply(x[:3, :3], x[:3, :3], x[::2, ::2], 1.0, 0.0, symmetric=False)
    with pytest.raises(RuntimeError, match="a symmetric product has 2 rows and 3 columns, expected as many"):
        products.multiply(x[:2], x[:, :3], x[:2, :3], 1.0, 0.0, symmetric=True)
    with pytest.raises(RuntimeError, match="-1x2x3 elements, expected none below 0"):
        _C.multiply_matrices(-1, 3, 2, (0, 1, 1), (0, 1, 1), (0, 1, 1), 1.0, 0.0, False, 1)


def test_which_products_are_served():
    big = torch.empty(2048, 2048)
    here = products.has_kernel()
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
