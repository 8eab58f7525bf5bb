"""The Triton kernel of products, by Triton's interpreter, and as it is compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from test_gram_triton import COMPILE
from torch import Tensor
from triton_interpreter import use_interpreter

from stepladder.multiply import Product, multiply

SHAPES = [(1, 1, 1, 1), (1, 5, 3, 7), (3, 16, 8, 24), (2, 40, 24, 16), (1, 9, 0, 2), (0, 4, 4, 4), (1, 17, 33, 18)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)


@pytest.fixture
def module():
    from stepladder.triton_kernels import multiply as module

    return module


@pytest.fixture
def small(module, monkeypatch):
    monkeypatch.setattr(module, "TILINGS", dict.fromkeys(module.TILINGS, module.newton_schulz.Tiling(16, 16, 4, 1)))


@pytest.fixture
def launched(module, monkeypatch) -> list[str]:
    names: list[str] = []
    launch = module.Kernel.launch

    def counted(self, programs, *arguments):
        names.append(self.name)
        launch(self, programs, *arguments)

    monkeypatch.setattr(module.Kernel, "launch", counted)
    return names


def check(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Each element is off by no more than k products and sums round."""
    products = [Product(a, b, a.new_full((len(a), a.shape[1], b.shape[2]), torch.nan)) for a, b in pairs]
    multiply(products, "triton")
    for left, right, out in products:
        exact, magnitude = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        # In fp64 what is compared with is rounded as often.
        allowed = 2 * (left.shape[2] + 1) * torch.finfo(out.dtype).eps / 2
        assert ((out.double() - exact).abs() <= allowed * magnitude).all()
    return [product.out for product in products]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_shape_in_one_call(small, launched, dtype):
    check([(torch.randn(b, m, k, dtype=dtype), torch.randn(b, k, n, dtype=dtype)) for b, m, k, n in SHAPES])
    by = {f"multiply_{str(dtype)[6:]}_{way}_{way}" for way in ("rows", "elements")}
    assert set(launched) == (by if dtype == torch.float32 else {"multiply_float64_elements_elements"})
    assert len(launched) == len(set(launched))


def test_tiles_as_shipped():
    check([(torch.randn(1, 100, 40), torch.randn(1, 40, 72)), (torch.randn(2, 64, 8), torch.randn(2, 8, 3))])


def test_layouts(small, launched):
    """Operands by rows or columns of 16 bytes, or of any strides; one for a whole batch; results of any strides."""
    base = torch.randn(48, 64)
    left = [base[:16, :24], base.mT[:16, :24], base[::3, ::2][:, :24], torch.randn(24).expand(16, 24)]
    right = [base[24:, :32], base[:32, :24].mT, torch.randn(25, 33)[1:, 1:]]
    found = check([(a[None], b[None]) for a in left for b in right])
    assert len(found) == 12
    assert sorted(launched) == sorted({*launched})
    assert len(launched) == 5
    check([(base[:16, :16].expand(3, 16, 16), torch.randn(3, 16, 8)), (torch._neg_view(base[None]), base.mT[None])])
    larger = torch.full((2, 20, 60), 7.0)
    out = larger[:, :18, ::2].mT
    a, b = torch.randn(2, 30, 5), torch.randn(2, 5, 18)
    multiply([Product(a, b, out)], "triton")
    assert (out - a @ b).abs().max() <= 2 * 6 * 2.0**-24 * (a.abs() @ b.abs()).max()
    assert (larger[:, 18:] == 7.0).all()
    assert (larger[:, :, 1::2] == 7.0).all()


def test_tiles_of_more_rows_than_16_bits_count(module, small):
    """The last tile of 100 000 of them, whose elements alone there are: the others' addresses are made up."""
    tile, rows = 16, 1_600_000
    a, b, out = torch.randn(1, tile, 5), torch.randn(1, 5, 3), torch.zeros(1, tile, 3)
    words = module._words(a, b, out)
    before = rows - tile
    for first, x in ((module.multiply_tiles.LEFT, a), (module.multiply_tiles.OUT, out)):
        words[:, first.value] -= before * x.stride(1) * x.element_size()
    words[:, module.multiply_tiles.ROWS.value] = rows
    tiles = module._tiles(words, tile)
    assert len({*tiles.tolist()}) == rows // tile
    module.kernel("float32", "elements", "elements").launch(1, torch.from_numpy(words), torch.from_numpy(tiles[-1:]))
    assert (out - a @ b).abs().max() <= 2 * 6 * 2.0**-24 * (a.abs() @ b.abs()).max()


def test_what_is_not_finite_stays_in_its_rows(small):
    a, b = torch.randn(1, 18, 5), torch.randn(1, 5, 3)
    a[0, 3, 2] = torch.nan
    product = Product(a, b, torch.zeros(1, 18, 3))
    multiply([product], "triton")
    assert product.out[0, 3].isnan().all()
    assert int(product.out.isnan().sum()) == 3


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (90, "multiply_float32_(columns_rows|elements_elements)"),
        pytest.param(90, ".*", marks=pytest.mark.large),
        pytest.param(80, ".*", marks=pytest.mark.large),
    ],
)
def test_what_is_compiled_ahead_of_time(tmp_path, arch: int, names: str):
    """Products on tensor cores, of operands loaded by 16 bytes where they lie so; and no register spilled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = COMPILE.replace("gram", "multiply")
    command = [sys.executable, "-c", code, str(arch), names]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (6 if names == ".*" else 2)
    for name, ptx, usage, shared in rows:
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage, name
        assert shared <= {80: 163 * 1024, 90: 227 * 1024}[arch], name
        products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]*", ptx))
        assert products, name
        kind = "f64.f64" if "float64" in name else "tf32.tf32"
        assert all(kind in product for product in products), f"{name}: {products}"
        if not name.endswith("elements"):
            assert "cp.async.cg.shared.global [ " in ptx, name
