"""The Triton kernels of Gram updates, by Triton's interpreter, and as they are compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from triton_interpreter import use_interpreter

import stepladder as sl
from stepladder.gram import update_gram_

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BETA, WEIGHT = 0.9, 0.3


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)


@pytest.fixture
def module():
    from stepladder.triton_kernels import gram

    return gram


@pytest.fixture
def small(module, monkeypatch):
    monkeypatch.setattr(module, "TILINGS", dict.fromkeys(module.TILINGS, module.newton_schulz.Tiling(16, 16, 4, 1)))


def symmetric(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + x.mT).to(dtype)


def check(squares: list[Tensor], others: list[Tensor], beta: float = BETA, weight: float = WEIGHT) -> None:
    """Each element is off by no more than its own roundings: those of the sum, of the two products and their sum."""
    before, given = [x.double().clone() for x in squares], [g.clone() for g in others]
    update_gram_(squares, others, beta, weight=weight, backend="triton")
    for square, old, g, same in zip(squares, before, others, given, strict=True):
        assert torch.equal(g, same)
        assert torch.equal(square, square.mT)
        wide = g.to(square.dtype).double()
        exact = beta * old + weight * (wide @ wide.mT)
        unit = torch.finfo(square.dtype).eps / 2
        sums = wide.abs() @ wide.abs().mT
        # n products and sums; then the numbers themselves, both products, and the sum.
        allowed = unit * (abs(weight) * (g.shape[-1] + 3) * sums + 3 * beta * old.abs() + 2 * exact.abs())
        assert ((square.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(small, dtype: torch.dtype):
    """G of every dtype, L of both, matrices of different shapes in one call."""
    for square in (torch.float32, torch.float64):
        shapes = [((5, 5), (5, 9)), ((2, 40, 40), (2, 40, 24)), ((1, 2, 17, 17), (1, 2, 17, 16))]
        check([symmetric(*a, dtype=square) for a, _ in shapes], [torch.randn(*b).to(dtype) for _, b in shapes])


def test_tiles_as_shipped():
    check([symmetric(100, 100), symmetric(3, 64, 64)], [torch.randn(100, 40), torch.randn(3, 64, 8).bfloat16()])


def test_layouts(small):
    """Rows or columns by 16 bytes, strides of all kinds, of L too."""
    base = torch.randn(48, 64)
    others = [base[:16, :24], base.mT[:32, :16], base[::4, ::5], base.bfloat16()[:, :16].mT, torch.randn(1, 40)]
    others += [torch.randn(20).expand(12, 20), torch.randn(121)[1:].view(12, 10), torch._neg_view(torch.randn(9, 9))]
    squares = [symmetric(len(g), len(g)) for g in others]
    within = torch.zeros(40, 20)
    within[::2, :16][:16] = squares[0]
    squares[0] = within[::2, :16][:16]
    squares[1] = squares[1].mT
    batch = torch.zeros(4, 4, 3).permute(2, 0, 1)
    batch.copy_(symmetric(3, 4, 4))
    check([*squares, batch], [*others, torch.randn(4, 7, 3).permute(2, 0, 1)])
    assert not within[1::2].any()
    assert not within[:, 16:].any()


def test_numbers(small):
    """β and the weight at their ends; without columns L fades alone; NaN stays in its rows; nothing at all."""
    for beta, weight in ((0.0, 1.0), (1.0, -0.5), (0.5, 0.0)):
        check([symmetric(18, 18)], [torch.randn(18, 5)], beta, weight)
    check([symmetric(6, 6)], [torch.randn(6, 0)])
    update_gram_(
        [torch.zeros(0, 0), torch.zeros(0, 3, 3)], [torch.zeros(0, 4), torch.zeros(0, 3, 2)], 0.5, backend="triton"
    )
    square, g = torch.zeros(18, 18), torch.ones(18, 5)
    g[3, 2] = torch.nan
    update_gram_(square, g, 0.5, backend="triton")
    bad = square.isnan()
    assert bad[3].all()
    assert bad[:, 3].all()
    assert int(bad.sum()) == 2 * 18 - 1


def test_one_given_twice_is_updated_twice(small):
    square = torch.eye(3)
    g = torch.randn(3, 4)
    version = square._version
    update_gram_([square, square], [g, g], 0.5, weight=1.0, backend="triton")
    exact = 0.25 * torch.eye(3).double() + 1.5 * g.double() @ g.double().mT
    assert (square.double() - exact).abs().max() <= 2.0**-21 * exact.abs().max()
    assert square._version > version


def test_refusal():
    with pytest.raises(ValueError, match=r"L\[0\] has strides \(0, 2, 1\), expected elements apart from each other"):
        sl.gram.update_gram_(torch.eye(2).expand(3, 2, 2), torch.ones(3, 2, 1), 0.5, backend="triton")


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from stepladder.triton_kernels import gram
from stepladder.triton_kernels.aot import compile_kernel

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in gram.kernels():
    if not re.fullmatch(sys.argv[2], kernel.name):
        continue
    compiled = compile_kernel(kernel, int(sys.argv[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    print(json.dumps([compiled.name, compiled.ptx, usage, compiled.shared]))
"""
OPERANDS = {"float32": "tf32.tf32", "bfloat16": "bf16.bf16", "float16": "f16.f16", "float64": "f64.f64"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (90, "gram_float32_float32_elements|gram_float32_bfloat16_rows|gram_float64_.*_elements"),
        pytest.param(90, ".*", marks=pytest.mark.large),
        pytest.param(80, ".*", marks=pytest.mark.large),
    ],
)
def test_what_is_compiled_ahead_of_time(tmp_path, arch: int, names: str):
    """Products on tensor cores, of operands loaded by 16 bytes where they lie so; and no register spilled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), names]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (12 if names == ".*" else 3)
    for name, ptx, usage, shared in rows:
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage, name
        assert shared <= SHARED[arch], name
        products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]*", ptx))
        assert products, name
        assert all(OPERANDS[name.split("_")[2]] in product for product in products), f"{name}: {products}"
        if not name.endswith("elements"):
            assert "cp.async.cg.shared.global [ " in ptx, name
