"""Moving averages of Gram matrices in CUDA C++, run by the emulator."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from test_matrix_root_cuda import place, same_bits
from torch import Tensor

import stepladder as sl
from stepladder import cuda_roots

SHAPES = [(1, 1), (5, 3), (3, 70), (64, 16), (66, 40), (20, 0), (130, 9)]


@pytest.fixture
def gpu(request):
    if DEVICE != "cuda":
        request.getfixturevalue("emulated")
    yield cuda_roots._C
    cuda_roots._kept.kernels = {}


def update(squares: list[Tensor], others: list[Tensor], beta: float, weight: float) -> list[Tensor]:
    """Results on the CPU, of copies."""
    there = [place(square).clone(memory_format=torch.preserve_format) for square in squares]
    cuda_roots.update_grams(there, [place(g) for g in others], beta, weight)
    return [square.cpu() for square in there]


def symmetric(m: int) -> Tensor:
    a = torch.randn(m, m)
    return a @ a.mT


def assert_right(found: Tensor, square: Tensor, g: Tensor, beta: float, weight: float) -> None:
    """As near as fp32 is, element by element.

    Splitting an operand leaves 2⁻²² of it, and the product of the two small parts is 2⁻²² of theirs; products of half
    types are exact. Each sum of eight columns is added with one rounding; within it the tensor core cuts off up to
    twice as much at each of three times eight places. Then three operations round once each.
    """
    wide = g.double()
    product, magnitude = wide @ wide.mT, wide.abs() @ wide.abs().mT
    exact = beta * square.double() + weight * product
    each = 3 * 2.0**-22 if g.dtype == torch.float32 else 0.0
    summed = (g.shape[-1] / 8 + 2 * 3 * 8) * 2.0**-24
    rounded = 2.0**-24 * (beta * square.double().abs() + abs(weight) * product.abs() + exact.abs())
    assert ((found - exact).abs() <= abs(weight) * (each + summed) * magnitude + 2 * rounded).all()
    assert same_bits(found, found.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("beta", "weight"), [(0.9, 0.1), (0.0, -2.0), (1.0, 1.0)])
def test_every_shape_in_one_call(gpu, dtype, beta, weight):
    squares = [symmetric(m) for m, _ in SHAPES]
    others = [torch.randn(shape).to(dtype) for shape in SHAPES]
    before = gpu.launches()
    found = update(squares, others, beta, weight)
    assert gpu.launches() - before == 1
    for x, square, g in zip(found, squares, others, strict=True):
        assert_right(x, square, g, beta, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(gpu, dtype):
    g = torch.randn(40, 21).to(dtype)
    wide = torch.full((81, 64), math.nan, dtype=dtype)
    wide[1::2, ::3][:, :21] = g
    (expected,) = update([torch.zeros(40, 40)], [g], 0.5, 1.0)
    for other in (g.mT.contiguous().mT, wide[1::2, ::3][:, :21], g[None].expand(1, 40, 21)[0]):
        assert same_bits(update([torch.zeros(40, 40)], [other], 0.5, 1.0)[0], expected)
    # The other side.
    (found,) = update([torch.zeros(21, 21)], [g.mT], 0.5, 1.0)
    assert_right(found, torch.zeros(21, 21), g.mT, 0.5, 1.0)


def test_the_lower_half_makes_both(gpu):
    square, g = symmetric(70), torch.randn(70, 10)
    upper = torch.full((70, 70), math.nan).triu(1)
    (expected,) = update([square], [g], 0.7, 0.3)
    (found,) = update([square.tril() + upper], [g], 0.7, 0.3)
    assert same_bits(found, expected)
    # L may be a part of something larger, of any strides.
    larger = torch.full((3, 80, 150), 7.0)
    part = place(larger).clone()
    view = part[1, 5:75, 4:144:2]
    view.copy_(square)
    cuda_roots.update_grams([view], [place(g)], 0.7, 0.3)
    assert same_bits(view.cpu().contiguous(), expected)
    view.fill_(7.0)
    assert (part == 7.0).all()


def test_what_is_not_finite_stays_in_its_own_matrix(gpu):
    squares = [symmetric(9) for _ in range(3)]
    others = [torch.randn(9, 5) for _ in range(3)]
    alone = update(squares[::2], others[::2], 0.9, 0.1)
    others[1][4, 2] = math.nan
    found = update(squares, others, 0.9, 0.1)
    assert same_bits(found[0], alone[0])
    assert same_bits(found[2], alone[1])
    assert found[1][4].isnan().all()
    rest = [k for k in range(9) if k != 4]
    assert found[1][rest][:, rest].isfinite().all()


def test_ops(gpu):
    squares = [torch.stack([symmetric(6), symmetric(6)]), symmetric(4).double(), symmetric(5)]
    others = [torch.randn(2, 6, 3).bfloat16(), torch.randn(4, 4), torch.randn(5, 2).double()]
    expected = [square.clone() for square in squares]
    # Products of bf16 are exact: two sums of three, each term, βL and their sum are what either side rounds.
    magnitudes = []
    for square, g in zip(expected, others, strict=True):
        a = g.double().abs()
        magnitudes.append(0.9 * square.double().abs() + 0.1 * a @ a.mT)
        sl.reference.update_gram_(square, g, 0.9)
    there = [square.to(DEVICE) for square in squares]
    before = gpu.launches()
    sl.ops.update_gram_(there, [g.to(DEVICE) for g in others], 0.9, backend="cuda")
    assert gpu.launches() - before == 1  # fp64 is the reference's
    assert bool(((there[0].cpu() - expected[0]).double().abs() <= 2 * 6 * 2.0**-24 * magnitudes[0]).all())
    # What is left to the reference has its bits.
    for square, reference in zip(there[1:], expected[1:], strict=True):
        assert torch.equal(square.cpu(), reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"L": (16, "float32", (-1, -1), (4, 1)), "G": (16, "float32", (-1, 4), (4, 1))},
            "a matrix G has -1 rows and 4 columns, expected 0 to",
        ),
        ({"L": (16, "float32", (5, 5), (5, 1))}, "a matrix L is of 5x5 for a matrix G of 4 rows"),
        ({"L": (2, "float32", (4, 4), (4, 1))}, "'L' is at 0x2, expected an address that is aligned to its elements"),
        ({"L": (16, "bfloat16", (4, 4), (4, 1))}, "a matrix L has the dtype 'bfloat16', expected float32"),
        ({"G": (0, "float16", (4, 4), (4, 1))}, "'G' is at"),
        ({"G": (16, "float64", (4, 4), (4, 1))}, "a matrix has the dtype 'float64', expected"),
        ({"G": (16, "float32", (2, 4, 4), (0, 4, 1))}, "there are 1 matrices L and 2 matrices G"),
        ({"beta": math.inf}, "beta=inf and weight=1, expected finite numbers"),
    ],
)
def test_refusals(gpu, change, message):
    square, g = torch.full((4, 4), 7.0), torch.ones(4, 4)
    views = {
        "L": (square.data_ptr(), "float32", (4, 4), (4, 1)),
        "G": (g.data_ptr(), "float32", (4, 4), (4, 1)),
        "beta": 0.5,
    }
    given = views | change
    before = gpu.launches()
    with pytest.raises(gpu.Error, match=message):
        gpu.GpuGrams(0).run([(given["L"], given["G"])], given["beta"], 1.0, 0)
    assert gpu.launches() == before
    assert (square == 7.0).all()
