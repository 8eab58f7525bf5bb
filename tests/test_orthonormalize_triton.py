"""The Triton kernels of orthonormal bases, by Triton's interpreter, and as they are compiled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from triton_interpreter import use_interpreter

import stepladder as sl
from stepladder import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflows and NaN


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def module():
    from stepladder.triton_kernels import orthonormalize

    return orthonormalize


@pytest.fixture
def small(module, monkeypatch):
    """Blocks so small that most matrices take several."""
    import triton.language as tl

    monkeypatch.setattr(module.table, "BLOCK", tl.constexpr(8))
    for name, value in (("BLOCK", 8), ("TALL", 8), ("TILE", 16), ("SPAN", 16)):
        monkeypatch.setattr(module, name, value)


def conditioned(m: int, n: int, condition: float) -> Tensor:
    """With singular values from 1 down to 1/condition, in fp64."""
    left, _ = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return (left * torch.logspace(0.0, -math.log10(condition), n, dtype=torch.float64)) @ right


def check(x: Tensor, q: Tensor) -> None:
    """Q is orthonormal and QᵀX upper triangular, but for the rounding of Q to its dtype.

    That moves Q by ‖E‖F ≤ u·√n, QᵀQ by twice as much, and QᵀX by ‖E‖·‖X‖. In fp64 some n² roundings come on top.
    """
    assert q.dtype == x.dtype
    assert q.shape == x.shape
    m, n = x.shape
    wide = q.double()
    rounding = torch.finfo(x.dtype).eps / 2 * math.sqrt(n)
    own = m * n * 2.0**-53
    assert (wide.mT @ wide - torch.eye(n, dtype=torch.float64)).norm() <= 2.0 * rounding + own
    triangular = wide.mT @ x.double()
    assert torch.tril(triangular, -1).norm() <= (rounding + own) * x.double().norm()
    # Nothing of X lies outside.
    assert (wide @ triangular - x.double()).norm() <= (3.0 * rounding + own) * x.double().norm()


SHAPES = ((40, 33, torch.float32), (20, 20, torch.float64), (9, 3, torch.float32))


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_conditions(module, condition: float):
    """Of square and tall matrices, of one block and of several, in both dtypes: no fallback is needed."""
    given = [conditioned(m, n, condition).to(dtype) for m, n, dtype in SHAPES]
    kept = [x.clone() for x in given]
    for x, before, (q, info) in zip(given, kept, module.cholesky_bases(given), strict=True):
        assert torch.equal(x, before)
        assert not info.fallback
        assert info.finite
        check(x, q)


def members() -> Tensor:
    n = 12
    rows = [
        conditioned(n, n, 1e3),
        torch.randn(n, 4) @ torch.randn(4, n),
        torch.zeros(n, n),
        torch.eye(n),
        torch.full((n, n), math.nan),
        conditioned(n, n, 10.0) * 1e30,
        conditioned(n, n, 10.0) * 1e-30,
        torch.randn(n, n),
    ]
    rows[7][3, 4] = -math.inf
    return torch.stack([row.float() for row in rows])


def test_members(module, small):
    """What one matrix is concerns no other."""
    stack = members()
    ((q, info),) = module.cholesky_bases([stack])
    _, expected = reference.orthonormalize(stack, "cholesky")
    assert info.finite.tolist() == [i not in (4, 7) for i in range(8)]
    assert torch.equal(info.finite, expected.finite)
    assert torch.equal(info.fallback, expected.fallback)
    assert info.fallback[2]
    for i, (x, basis) in enumerate(zip(stack, q, strict=True)):
        if i in (4, 7):
            assert basis.isnan().all()
        else:
            check(x, basis)
    chosen = [0, 5, 6]
    ((alone, _),) = module.cholesky_bases([stack[chosen]])
    assert torch.equal(q[chosen], alone)


def test_what_is_done_over(module, monkeypatch, small):
    """All of them, whether they need it or not: dependent columns and zeros give way to whatever is orthogonal."""
    monkeypatch.setattr(module, "LIMIT", -1.0)
    low = torch.randn(18, 3) @ torch.randn(3, 12)
    gaps = torch.randn(18, 12)
    gaps[:, ::3] = 0.0
    gaps[:, 4] = gaps[:, 5]
    given = [low, gaps, torch.zeros(6, 6), torch.eye(5)[:, :3], torch.randn(1, 1), conditioned(17, 17, 1e12)]
    for x, (q, info) in zip(given, module.cholesky_bases(given), strict=True):
        assert info.fallback
        check(x, q)


def test_layouts(module, small):
    """Any strides and batches, and nothing at all; bases are contiguous."""
    base = torch.randn(40, 30)
    given = [base[:9, :7], base.mT[:12, :5], base[::4, ::6], torch._neg_view(torch.randn(6, 6))]
    given += [torch.randn(2, 1, 5, 4).transpose(0, 1), torch.randn(1, 5, 2).expand(2, 5, 2), torch.randn(70, 2)]
    for x, (q, info) in zip(given, module.cholesky_bases(given), strict=True):
        assert q.is_contiguous()
        assert info.fallback.shape == info.finite.shape == x.shape[:-2]
        for one, basis in zip(x.reshape(-1, *x.shape[-2:]), q.reshape(-1, *x.shape[-2:]), strict=True):
            check(one, basis)
    empty = [torch.zeros(0, 3, 2), torch.zeros(2, 3, 0)]
    for x, (q, info) in zip(empty, module.cholesky_bases(empty), strict=True):
        assert q.shape == x.shape
        assert info.finite.all()
        assert info.finite.shape == x.shape[:-2]
    assert module.cholesky_bases([]) == []


def test_groups(module, monkeypatch, small):
    """Matrices whose workspace does not fit take turns."""
    given = [torch.randn(2, 6, 4), torch.randn(9, 9)]
    together = module.cholesky_bases(given)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    runs = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda words, *rest: (runs.append(len(words)), run(words, *rest))[1])
    for (q, _), (alone, _) in zip(together, module.cholesky_bases(given), strict=True):
        assert torch.equal(q, alone)
    assert runs == [1, 1, 1]


def test_refusals(module):
    good = torch.eye(3)
    with pytest.raises(
        TypeError, match=r"stacks\[1\] has dtype torch.float16, expected torch.float32 or torch.float64"
    ):
        module.cholesky_bases([good, good.half()])
    with pytest.raises(
        ValueError, match=r"stacks\[0\] has shape \(2, 3\), expected matrices \(..., m, n\) with m >= n"
    ):
        module.cholesky_bases([good[:2]])
    with pytest.raises(ValueError, match=r"stacks\[1\] is on meta, expected cpu as the first"):
        module.cholesky_bases([good, good.to("meta")])


def test_the_function_takes_these_kernels(module, monkeypatch):
    calls = []
    run = module.cholesky_bases
    monkeypatch.setattr(module, "cholesky_bases", lambda given: (calls.append(len(given)), run(given))[1])
    x = torch.randn(5, 4).bfloat16()
    q, info = sl.ops.orthonormalize(x, backend="triton")
    assert calls == [1]
    assert not info.fallback
    check(x.float(), q)
    sl.ops.orthonormalize(x, "householder", backend="triton")
    assert calls == [1]


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from stepladder.triton_kernels import orthonormalize
from stepladder.triton_kernels.aot import compile_kernel

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in orthonormalize.kernels():
    if not re.fullmatch("basis_(" + sys.argv[2] + ")", kernel.name):
        continue
    compiled = compile_kernel(kernel, int(sys.argv[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    print(json.dumps([compiled.name, compiled.ptx, usage, compiled.shared]))
"""
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (90, "cholesky_shifted|solve|redo_float32"),
        pytest.param(90, ".*", marks=pytest.mark.large),
        pytest.param(80, ".*", marks=pytest.mark.large),
    ],
)
def test_what_is_compiled_ahead_of_time(tmp_path, arch: int, names: str):
    """Products in fp64 on tensor cores, and no register spilled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), names]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (14 if names == ".*" else 3)
    for name, ptx, usage, shared in rows:
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage, name
        assert shared <= SHARED[arch], name
        products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]*", ptx))
        assert bool(products) == bool(re.search("gram|cholesky|solve", name)), name
        assert all("f64.f64" in product for product in products), f"{name}: {products}"
