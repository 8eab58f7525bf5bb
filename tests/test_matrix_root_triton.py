"""The Triton kernels of inverse roots, by Triton's interpreter, and as they are compiled."""

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
from stepladder.reference.matrix_root import (
    FAST_CONDITION,
    NEAR_IDENTITY,
    RootInfo,
    RootStatus,
    newton_roots,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflows and NaN
# What is asked of every method: ‖X - X₆₄‖F/‖X₆₄‖F by condition.
ALLOWED = {1e4: 1e-3, 1e6: 2e-2}
SPECTRA = ("logarithmic", "half small", "one large", "linear")
CONVERGED, FAILED, NON_FINITE = RootStatus.CONVERGED, RootStatus.FAILED, RootStatus.NON_FINITE


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)
    from triton.runtime import interpreter

    # A third of the time goes into looking for integers that overflow, which matrices of this size are far from.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def module():
    from stepladder.triton_kernels import matrix_root

    return matrix_root


def set_tile(module, monkeypatch, tile: int) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    tilings = dict.fromkeys(module.TILINGS, module.newton_schulz.Tiling(tile, 16, 4, 1))
    monkeypatch.setattr(module, "TILINGS", tilings)


@pytest.fixture(params=["on chip", "grouped"])
def way(request, module, monkeypatch) -> str:
    """Both ways through the fast attempt, with tiles so small that matrices take several."""
    set_tile(module, monkeypatch, 16)
    if request.param == "grouped":
        monkeypatch.setattr(module, "ON_CHIP", {})
    return request.param


def spectrum(kind: str, n: int, condition: float) -> Tensor:
    if kind == "logarithmic":
        return torch.logspace(0.0, -math.log10(condition), n, dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(1.0, 1.0 / condition, n, dtype=torch.float64)
    large = n // 2 if kind == "half small" else 1
    return torch.where(torch.arange(n) < large, 1.0, 1.0 / condition).double()


def with_spectrum(values: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues, rounded to fp32."""
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).float()


def exact_root(a: Tensor, p: int, delta: float = 0.0) -> Tensor:
    values, vectors = torch.linalg.eigh(a.double())
    return (vectors * (values + delta) ** (-1.0 / p)) @ vectors.mT


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def allowed(p: int) -> float:
    """Of the attempt in fp32, which brings every spectrum into the range of the worst condition κ that it allows for.

    Rounding M, which has a norm of 1, by 2^-24 of that moves an eigenvalue of 1/κ by κ·2^-24 of itself, and X by 1/p
    of that.
    """
    return min(ALLOWED[1e4], FAST_CONDITION * 2.0**-24 / p)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_roots(module, monkeypatch, way: str, p: int):
    """Matrices of a condition of 1e4 and of 1e6, which fp32 does not reach, in one call."""
    n = 24
    set_tile(module, monkeypatch, 32)
    kinds = {1e4: SPECTRA, 1e6: SPECTRA[p // 2 : p // 2 + 1]}
    if way == "grouped":
        kinds = {1e4: SPECTRA[p // 2 : p // 2 + 2]}
    stacks = [torch.stack([with_spectrum(spectrum(kind, n, c)) for kind in kinds[c]]) for c in kinds]
    kept = [a.clone() for a in stacks]
    results = module.inverse_roots(stacks, p, 0.0, 0.0)
    for condition, a, before, (x, info) in zip(kinds, stacks, kept, results, strict=True):
        assert torch.equal(a, before)
        assert torch.equal(x, x.mT)
        assert x.shape == (len(a), n, n)
        _, expected = newton_roots(a, p, 0.0, 0.0)
        assert torch.equal(info.status, expected.status)
        assert torch.equal(info.iterations, expected.iterations)
        assert (info.status == CONVERGED).all()
        assert info.residual.isnan().all()
        for each, root, steps in zip(a, x, info.iterations.tolist(), strict=True):
            exact = exact_root(each, p)
            assert error(root, exact) <= ALLOWED[condition]
            if condition == 1e6:
                assert steps > 12
                # In fp64: Newton's last step squares what it is given, times (p + 1)/2p², and what is rounded is X.
                assert error(root, exact) <= NEAR_IDENTITY**2 + 2.0**-24
            else:
                assert error(root, exact) <= allowed(p)


def members() -> tuple[Tensor, list[int], list[int]]:
    """Matrices of all kinds; their statuses without damping, and with."""
    n = 12
    ordinary = with_spectrum(spectrum("logarithmic", n, 1e3))
    one = torch.randn(n)
    negative = with_spectrum(torch.linspace(-0.5, 1.0, n, dtype=torch.float64))
    infinite, nan = ordinary.clone(), ordinary.clone()
    infinite[3, 3] = math.inf
    # Of the triangle that nothing else reads.
    nan[2, 10] = math.nan
    rows = [
        (ordinary, CONVERGED, CONVERGED),
        (torch.zeros(n, n), FAILED, CONVERGED),
        (torch.eye(n) * 3.0, CONVERGED, CONVERGED),
        (one[:, None] * one[None, :], FAILED, CONVERGED),
        (infinite, NON_FINITE, NON_FINITE),
        (ordinary * 1e30, CONVERGED, CONVERGED),
        (nan, NON_FINITE, NON_FINITE),
        (ordinary * 1e-30, CONVERGED, CONVERGED),
        (negative, FAILED, FAILED),
    ]
    return torch.stack([row[0] for row in rows]), [row[1] for row in rows], [row[2] for row in rows]


@pytest.mark.parametrize(("p", "eps", "way"), [(4, 0.0, "on chip"), (1, 1e-3, "grouped")], indirect=["way"])
def test_members(module, monkeypatch, way: str, p: int, eps: float):
    """What one matrix is concerns no other, and no launch."""
    if way == "grouped":
        set_tile(module, monkeypatch, 8)
    stack, undamped, damped = members()
    launched: list[str] = []
    launch = module.newton_schulz.Kernel.launch
    monkeypatch.setattr(
        module.newton_schulz.Kernel,
        "launch",
        lambda self, *arguments: (launched.append(self.name), launch(self, *arguments))[1],
    )
    ((x, info),) = module.inverse_roots([stack], p, eps, 0.0)
    _, expected = newton_roots(stack, p, eps, 0.0)
    assert info.status.tolist() == (damped if eps > 0.0 else undamped)
    assert torch.equal(info.status, expected.status)
    together = [*launched]
    launched.clear()
    good = (info.status == CONVERGED).nonzero().flatten()
    ((alone, other),) = module.inverse_roots([stack[good]], p, eps, 0.0)
    assert torch.equal(x[good], alone)
    assert torch.equal(info.iterations[good], other.iterations)
    assert launched == together
    assert torch.equal(info.iterations[good], expected.iterations[good])
    for i, (a, root) in enumerate(zip(stack, x, strict=True)):
        if i not in good:
            assert root.isnan().all()
        elif bool((a == 0).all()):
            assert error(root, eps ** (-1.0 / p) * torch.eye(len(a), dtype=torch.float64)) <= 2.0**-22
        else:
            assert error(root, exact_root(a, p, eps)) <= allowed(p)


def test_relative_damping(module, way: str):
    """Some of it, singular matrices among them; zero has no largest eigenvalue to damp it by."""
    p, one = 4, torch.randn(20)
    stack = torch.stack(
        [with_spectrum(spectrum("logarithmic", 20, 1e6)) * 1e-20, one[:, None] * one[None, :], torch.zeros(20, 20)]
    )
    ((x, info),) = module.inverse_roots([stack], p, 0.0, 1e-3)
    assert info.status.tolist() == [CONVERGED, CONVERGED, FAILED]
    for a, root in zip(stack[:2], x, strict=False):
        top = float(torch.linalg.eigvalsh(a.double())[-1])
        assert error(root, exact_root(a, p, 1e-3 * top)) <= ALLOWED[1e4]


def test_stalled(module, monkeypatch, way: str):
    """Where nothing is near enough, the nearest is kept while the iteration goes on, and is as exact as fp64 has it."""
    monkeypatch.setattr(module, "NEAR_IDENTITY", 0.0)
    monkeypatch.setattr(module, "_MOST", {module.FAST: 2, module.WIDE: 8})
    a = with_spectrum(spectrum("linear", 12, 100.0))
    ((x, info),) = module.inverse_roots([a[None]], 2, 0.0, 0.0)
    assert info.status.tolist() == [RootStatus.STALLED]
    assert (info.status.dtype, info.iterations.dtype) == (torch.int8, torch.int32)
    assert error(x[0], exact_root(a, 2)) <= 2.0**-24


def test_sizes(module, way: str):
    """Tiles that are cut off, several of them a side, batches of all sizes, and nothing at all."""
    sizes = (1, 2, 15, 16, 17, 32, 40) if way == "on chip" else (1, 8, 17)
    stacks = [torch.stack([with_spectrum(spectrum("linear", n, 50.0)) * 3.0]) for n in sizes]
    stacks += [torch.zeros(0, 5, 5), torch.zeros(3, 0, 0)]
    for a, (x, info) in zip(stacks, module.inverse_roots(stacks, 2, 0.0, 0.0), strict=True):
        assert x.shape == a.shape
        assert info.status.shape == info.iterations.shape == info.residual.shape == (len(a),)
        assert (info.status == CONVERGED).all()
        for each, root in zip(a, x, strict=True):
            if each.numel():
                assert error(root, exact_root(each, 2)) <= allowed(2)
    assert module.inverse_roots([], 4, 0.0, 0.0) == []


def test_layouts(module, way: str):
    """Any strides; roots are contiguous."""
    a = torch.stack([with_spectrum(spectrum("linear", 9, 10.0)) for _ in range(3)])
    wide = torch.zeros(3, 18, 20)
    wide[:, ::2, :9] = a
    strided = [a.mT, wide[:2, ::2, :9], a.permute(1, 2, 0).contiguous().permute(2, 0, 1)[1:], a[:1].expand(2, 9, 9)]
    if way == "on chip":
        strided += [torch._neg_view(-a), a.flip(0)[1:], torch.randn(1, 1, 1).abs().expand(3, 1, 1)]
    for given, (x, info) in zip(strided, module.inverse_roots(strided, 1, 0.0, 0.0), strict=True):
        assert x.is_contiguous()
        assert (info.status == CONVERGED).all()
        for each, root in zip(given, x, strict=True):
            assert error(root, exact_root(each, 1)) <= allowed(1)


def test_groups(module, monkeypatch):
    """Matrices whose buffers do not fit take turns."""
    set_tile(module, monkeypatch, 16)
    monkeypatch.setattr(module, "ON_CHIP", {})
    stacks = [torch.stack([with_spectrum(spectrum("linear", n, 10.0)) for _ in range(count)]) for n, count in GROUPED]
    together = module.inverse_roots(stacks, 1, 1e-4, 0.0)
    batch = module._describe(stacks[0])
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2 * batch.bytes)
    groups = module._groups([module._describe(a) for a in stacks])
    assert [[(b.size, len(b.words)) for b in group] for group in groups] == [[(6, 2)], [(6, 1), (3, 2)], [(12, 1)]]
    for (x, info), (y, other) in zip(together, module.inverse_roots(stacks, 1, 1e-4, 0.0), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(info.iterations, other.iterations)
        assert torch.equal(info.status, other.status)


GROUPED = ((6, 3), (3, 2), (12, 1))


def test_refusals(module):
    good = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"p=3 is not supported, expected one of 1, 2, 4"):
        module.inverse_roots([good], 3, 0.0, 0.0)
    with pytest.raises(TypeError, match=r"stacks\[1\] has dtype torch.float64, expected torch.float32"):
        module.inverse_roots([good, good.double()], 4, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"stacks\[0\] has shape \(3, 3\), expected matrices"):
        module.inverse_roots([good[0]], 4, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"stacks\[0\] has shape \(1, 3, 2\), expected matrices"):
        module.inverse_roots([good[..., :2]], 4, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"stacks\[1\] is on meta, expected cpu as the first"):
        module.inverse_roots([good, good.to("meta")], 4, 0.0, 0.0)


def test_the_function_takes_these_kernels(module, monkeypatch):
    set_tile(module, monkeypatch, 16)
    calls = []
    run = module.inverse_roots
    monkeypatch.setattr(module, "inverse_roots", lambda *given: (calls.append(len(given[0])), run(*given))[1])
    a = [torch.stack([with_spectrum(spectrum("linear", 6, 100.0))] * 2)[None].half(), torch.eye(3) * 16.0]
    a[0] = (a[0] + a[0].mT) / 2
    roots, infos = sl.ops.inverse_root(a, 4, 1e-3, backend="triton")
    assert calls == [2]
    assert [x.shape for x in roots] == [(1, 2, 6, 6), (3, 3)]
    assert isinstance(infos[0], RootInfo)
    assert infos[0].status.shape == (1, 2)
    for given, x, info in zip(a, roots, infos, strict=True):
        assert x.dtype == torch.float32
        for each, root, residual in zip(
            given.flatten(0, -3) if given.ndim > 2 else given[None],
            x.flatten(0, -3) if x.ndim > 2 else x[None],
            info.residual.flatten(),
            strict=True,
        ):
            assert error(root, exact_root(each, 4, 1e-3)) <= allowed(4)
            power = torch.linalg.matrix_power(root.double(), 4) @ (each.double() + 1e-3 * torch.eye(len(each)).double())
            assert float(residual) == pytest.approx(float((power - torch.eye(len(each))).abs().max()), rel=1e-6)


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from stepladder.triton_kernels import matrix_root
from stepladder.triton_kernels.aot import compile_kernel

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in matrix_root.kernels():
    if not re.fullmatch("matrix_root_(" + sys.argv[2] + ")", kernel.name):
        continue
    compiled = compile_kernel(kernel, int(sys.argv[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    print(json.dumps([compiled.name, compiled.ptx, usage, compiled.shared]))
"""
# Shared memory that a block may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


# Those of each kind that need the most registers.
DEMANDING = "product_.*|begin_fp64|whole_root_32"


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (90, DEMANDING),
        pytest.param(90, ".*", marks=pytest.mark.large),
        pytest.param(80, ".*", marks=pytest.mark.large),
    ],
)
def test_what_is_compiled_ahead_of_time(tmp_path, arch: int, names: str):
    """Products on tensor cores, in three of tf32 or in fp64, loaded ahead by 16 bytes; and no register spilled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), names]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (16 if names == ".*" else 4)
    for name, ptx, usage, shared in rows:
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage, name
        assert shared <= SHARED[arch], name
        products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]*", ptx))
        if not re.search("product|whole", name):
            assert not products, name
            continue
        operands = "f64.f64" if name.endswith("fp64") else "tf32.tf32"
        assert products, name
        assert all(operands in product for product in products), f"{name}: {products}"
        assert ("cp.async.cg.shared.global [ " in ptx) == ("product" in name), name
        if name.endswith("fp64"):
            # Nothing narrower on the way.
            assert not re.search(r"cvt\.(rn|rz)\S*\.f32\.f64", ptx), name
