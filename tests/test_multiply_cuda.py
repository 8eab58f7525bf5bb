"""Products of many matrices in CUDA C++, run by the emulator."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from test_matrix_root_cuda import place, same_bits
from torch import Tensor

from stepladder import cuda_roots
from stepladder.multiply import Product, multiply

# Batch, m, k, n: below, at and above a tile of 128, and of 16 of the sum; by 16 bytes, and not.
SHAPES = [(1, 1, 1, 1), (1, 5, 3, 7), (3, 12, 8, 20), (1, 128, 16, 4), (2, 132, 40, 8), (1, 9, 0, 2), (1, 3, 65, 130)]


@pytest.fixture
def gpu(request):
    if DEVICE != "cuda":
        request.getfixturevalue("emulated")
    yield cuda_roots._C
    cuda_roots._kept.kernels = {}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def run(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Results on the CPU."""
    there = [(place(left), place(right)) for left, right in pairs]
    products = [Product(a, b, a.new_full((len(a), a.shape[1], b.shape[2]), math.nan)) for a, b in there]
    multiply(products, "cuda")
    return [product.out.cpu() for product in products]


def assert_right(found: Tensor, left: Tensor, right: Tensor) -> None:
    """As near as fp32 is, element by element; fp64 to the roundings of a sum of k products.

    Splitting an operand leaves 2⁻²² of it, and the product of the two small parts is 2⁻²² of theirs. Each sum of eight
    columns is added with one rounding; within it the tensor core cuts off up to twice as much at each of three times
    eight places.
    """
    depth = left.shape[-1]
    exact, magnitude = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    if left.dtype == torch.float64:
        # Both this sum and the one that it is compared with.
        assert ((found - exact).abs() <= 2 * (depth + 1) * 2.0**-53 * magnitude).all()
        return
    summed = (depth / 8 + 2 * 3 * 8) * 2.0**-24
    assert ((found.double() - exact).abs() <= (3 * 2.0**-22 + summed) * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_shape_in_one_launch(gpu, dtype):
    pairs = [(random(b, m, k, dtype=dtype), random(b, k, n, dtype=dtype)) for b, m, k, n in SHAPES]
    before = gpu.launches()
    found = run(pairs)
    assert gpu.launches() - before == 1
    for x, (left, right) in zip(found, pairs, strict=True):
        assert_right(x, left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_down", [False, True])
@pytest.mark.parametrize("right_down", [False, True])
def test_operands_are_read_as_they_lie(gpu, dtype, left_down, right_down):
    """Transposed, a part of something larger, once for a whole batch; the results may be, too."""
    m, k, n = 20, 36, 24
    left, right = random(2, m, k, dtype=dtype), random(2, k, n, dtype=dtype)
    (expected,) = run([(left, right)])
    assert_right(expected, left, right)

    def lying(x: Tensor, down: bool, offset: int) -> Tensor:
        """The same elements in a buffer of NaN, by rows or by columns."""
        rows, columns = x.shape[1:]
        inner, outer = (rows, columns) if down else (columns, rows)
        buffer = torch.full((2, outer + 3, inner + 12), math.nan, dtype=dtype)
        view = buffer[:, 1 : 1 + outer, offset : offset + inner]
        view = view.mT if down else view
        view.copy_(x)
        return view

    for offset in (4, 3):  # by 16 bytes, and not
        pairs = [(lying(left, left_down, offset), lying(right, right_down, offset))]
        (found,) = run(pairs)
        assert same_bits(found, expected)
    one = left[:1].expand(2, m, k)
    assert same_bits(run([(one, right)])[0][0], expected[0])
    # Every second column of a larger buffer, whose others stay.
    larger = place(torch.full((2, n, 2 * m), 7.0, dtype=dtype))
    out = larger[:, :, ::2].mT
    multiply([Product(place(lying(left, left_down, 4)), place(right), out)], "cuda")
    assert same_bits(out.cpu().contiguous(), expected)
    assert (larger[:, :, 1::2] == 7.0).all()


def test_what_is_not_finite_stays_in_its_own_rows(gpu):
    left, right = torch.randn(2, 20, 12), torch.randn(2, 12, 6)
    expected = run([(left, right)])[0]
    left[1, 3, 5] = math.inf
    found = run([(left, right)])[0]
    bad = torch.zeros(2, 20, dtype=torch.bool)
    bad[1, 3] = True
    assert not found[bad].isfinite().any()
    assert same_bits(found[~bad], expected[~bad])


def test_nothing_to_do(gpu):
    before = gpu.launches()
    assert run([(torch.ones(0, 3, 4), torch.ones(0, 4, 5)), (torch.ones(1, 0, 4), torch.ones(1, 4, 5))])[0].shape == (
        0,
        3,
        5,
    )
    assert gpu.launches() == before


def test_any_number_of_matrices_is_one_launch(gpu):
    """The table has a row for each, and there is still one launch."""
    pairs = [(torch.randn(1, 2, 3), torch.randn(1, 3, 4)) for _ in range(200)]
    before = gpu.launches()
    found = run(pairs)
    assert gpu.launches() - before == 1
    for x, (left, right) in zip(found, pairs, strict=True):
        assert_right(x, left, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": -1}, "a product is of 1 times -1 x 4 and 4 x 4, expected sizes from 0 to"),
        ({"k": 2**31}, "a product is of 1 times 4 x 2147483648 and"),
        ({"left": (2, 16, 4, 1)}, "'left' is at 0x2, expected an address that is aligned to its elements"),
        ({"right": (0, 16, 4, 1)}, "'right' is at"),
        ({"out": (6, 16, 4, 1)}, "'out' is at 0x6"),
    ],
)
def test_refusals(gpu, change, message):
    x = torch.full((3, 4, 4), 7.0)
    places = {name: (x[i].data_ptr(), 16, 4, 1) for i, name in enumerate(("left", "right", "out"))}
    given = places | {"m": 4, "k": 4} | change
    before = gpu.launches()
    product = (given["left"], given["right"], given["out"], 1, given["m"], 4, given["k"])
    with pytest.raises(gpu.Error, match=message):
        gpu.GpuProducts(0).run([product], False, 0)
    assert gpu.launches() == before
    assert (x == 7.0).all()
