"""Moving averages of Gram matrices against fp64, on both backends, by either way of the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import stepladder as sl
from stepladder import gram, products

BACKENDS = ("cpu", "reference")
# Below and above what is computed by tiles, a batch, a batch of batches, no columns, one row.
SHAPES = ((1, 5), (7, 3), (40, 40), (577, 4), (2, 9, 5), (2, 580, 3), (2, 3, 6, 4), (5, 0), (0, 4), (0, 3, 4))


def symmetric(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape[:-1], shape[-2], dtype=dtype)
    return x + x.mT


def check(found: Tensor, before: Tensor, g: Tensor, beta: float, weight: float) -> None:
    """Exactly symmetric, and as near as n products and a few more roundings leave it."""
    assert torch.equal(found, found.mT)
    wide = g.to(found.dtype).double()
    roundings = (g.shape[-1] + 8) * torch.finfo(found.dtype).eps / 2
    size = weight * (wide.abs() @ wide.mT.abs()) + beta * before.double().abs()
    # Of fp64 the expected value has as many roundings itself.
    exact = beta * before.double() + weight * (wide @ wide.mT)
    assert bool(((found - exact).abs() <= (1 if found.dtype == torch.float32 else 2) * roundings * size).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates(shape: tuple[int, ...], dtype: torch.dtype, backend: str):
    for beta, weight in ((0.95, None), (1.0, 1.0), (0.5, 0.0)):
        square, g = symmetric(shape, dtype), torch.randn(shape, dtype=dtype)
        before = square.clone()
        assert sl.ops.update_gram_(square, g, beta, weight=weight, backend=backend) is None
        check(square, before, g, beta, 1.0 - beta if weight is None else weight)


@pytest.mark.skipif(
    not products.units(), reason="no kernel of ours runs here: they need AVX-512, and a compiler that knows it"
)
def test_the_kernel_and_the_tiles_agree(monkeypatch: pytest.MonkeyPatch):
    g = torch.randn(700, 20)
    before = symmetric((700, 20), torch.float32)
    found = []
    for least in (products.LEAST, 1 << 62):
        monkeypatch.setattr(products, "LEAST", least)
        square = before.clone()
        assert products.serves(square, 20) == (least < 1 << 62)
        sl.ops.update_gram_(square, g, 0.9)
        check(square, before, g, 0.9, 1.0 - 0.9)
        found.append(square)
    monkeypatch.setattr(gram, "TILE", 1000)
    square = before.clone()
    sl.ops.update_gram_(square, g, 0.9)
    check(square, before, g, 0.9, 1.0 - 0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype, backend: str):
    square, g = symmetric((9, 5), torch.float32), torch.randn(9, 5).to(dtype)
    before = square.clone()
    sl.ops.update_gram_(square, g, 0.9, backend=backend)
    check(square, before, g, 0.9, 1.0 - 0.9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_sides_and_lists(backend: str):
    g = torch.randn(9, 5)
    left, right, other = symmetric((9, 5), torch.float32), symmetric((5, 9), torch.float32), torch.zeros(2, 3, 3)
    before = [left.clone(), right.clone(), other.clone()]
    grads = [g, g.mT, torch.randn(2, 3, 4)]
    sl.ops.update_gram_([left, right, other], grads, 0.7, backend=backend)
    for square, old, own in zip((left, right, other), before, grads, strict=True):
        check(square, old, own, 0.7, 1.0 - 0.7)
    sl.ops.update_gram_([], [], 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [6, 600])
def test_strided_matrices_are_updated_in_place(m: int, backend: str):
    # Neither do the two dimensions of the batch make one, nor are the rows contiguous.
    memory = torch.zeros(3, 2, m, 2 * m)
    squares = memory.transpose(0, 1)[..., ::2]
    g = torch.randn(4, m, 2, 3).permute(2, 3, 1, 0)
    assert not squares.is_contiguous()
    sl.ops.update_gram_(squares, g, 0.9, backend=backend)
    check(squares.contiguous(), torch.zeros(2, 3, m, m), g, 0.9, 1.0 - 0.9)
    assert not memory[..., 1::2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 4), (600, 30), (2, 600, 3)], ids=str)
def test_with_beta_of_zero_what_was_there_is_not_looked_at(shape: tuple[int, ...], backend: str):
    g = torch.randn(shape)
    square = torch.full((*shape[:-1], shape[-2]), math.nan)
    sl.ops.update_gram_(square, g, 0.0, backend=backend)
    check(square, torch.zeros_like(square), g, 0.0, 1.0)


def test_a_bad_gradient_spoils_its_own_matrix_alone():
    g = torch.randn(3, 5, 4)
    g[1, 2, 3] = math.nan
    square = torch.zeros(3, 5, 5)
    sl.ops.update_gram_(square, g, 0.5)
    assert square[[0, 2]].isfinite().all()
    assert square[1, 2].isnan().all()


L, G = torch.zeros(3, 3), torch.ones(3, 2)
REFUSED: tuple[tuple[Any, Any, dict[str, Any], type[Exception], str], ...] = (
    (L, G, {"beta": -0.1}, ValueError, r"beta=-0.1 is out of range, expected a number in \[0, 1\]"),
    (L, G, {"beta": 1.5}, ValueError, r"beta=1.5 is out of range"),
    (L, G, {"beta": math.nan}, ValueError, r"beta=nan is out of range"),
    (L, G, {"beta": True}, ValueError, r"beta=True is out of range"),
    (L, G, {"beta": "0.9"}, ValueError, r"beta='0.9' is out of range"),
    (L, G, {"weight": math.inf}, ValueError, r"weight=inf is out of range, expected a finite number"),
    (L, G, {"weight": True}, ValueError, r"weight=True is out of range"),
    (L, G, {"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    (L, [[1.0]], {}, TypeError, r"G"),
    ([L], [G, G], {}, ValueError, r"there are 1 matrices L and 2 matrices G, expected as many"),
    (L, G.T, {}, ValueError, r"L has shape \(3, 3\), expected \(2, 2\) for G's \(2, 3\)"),
    ([L, L], [G, torch.ones(2, 3, 2)], {}, ValueError, r"L\[1\] has shape \(3, 3\), expected \(2, 3, 3\) for G\[1\]'s"),
    (L[0], G, {}, ValueError, r"L has shape \(3,\), expected matrices"),
    (L, G[0], {}, ValueError, r"G has shape \(2,\), expected matrices"),
    (L.bfloat16(), G, {}, TypeError, r"L has dtype torch.bfloat16, expected float32 or float64"),
    (L.int(), G, {}, TypeError, r"L has dtype torch.int32"),
    (L, G.int(), {}, TypeError, r"G has dtype torch.int32"),
    (L, G.to("meta"), {}, ValueError, r"L is on cpu and G on meta, expected the same"),
)


@pytest.mark.parametrize(("square", "g", "arguments", "error", "message"), REFUSED, ids=[row[4] for row in REFUSED])
def test_refusals(square: Any, g: Any, arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sl.ops.update_gram_(square, g, **({"beta": 0.9} | arguments))
    assert not L.any()
