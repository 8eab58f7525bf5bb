"""The Triton kernels of Newton-Schulz iterations, by Triton's interpreter, and as they are compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rounding import allowed_error, relative_error
from torch import Tensor
from triton_interpreter import use_interpreter

import stepladder as sl
from stepladder.coefficients import SETS, Coefficients, CoefficientSet, resolve
from stepladder.reference.newton_schulz import RESTART_EVERY, normalised
from stepladder.reference.newton_schulz import newton_schulz as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflows and NaN
EPS = 1e-7
# Half of the distance from 1 to the next bf16.
ROUNDING = 2.0**-8
TILES = {"grouped": 16, "grouped as shipped": 64}
SHAPES = ((1, 1), (1, 9), (2, 2), (2, 15), (15, 17), (17, 15), (33, 40), (40, 33), (24, 24), (64, 20), (100, 40))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)


@pytest.fixture
def module():
    from stepladder.triton_kernels import newton_schulz

    return newton_schulz


@pytest.fixture(params=["held", "streamed", "grouped"])
def way(request, module, monkeypatch) -> str:
    """Each way through the kernels, with tiles so small that every matrix but the smallest takes several."""
    if request.param == "grouped":
        monkeypatch.setattr(module, "ON_CHIP", {})
        monkeypatch.setattr(module, "LARGE", module.Tiling(16, 16, 4, 1))
        monkeypatch.setattr(module, "TILE", 16)
        monkeypatch.setattr(module, "BAND_COLUMNS", 128)
    else:
        held = 128 if request.param == "held" else 0
        sizes = module.OnChip(held, held, 16, 4)
        monkeypatch.setattr(module, "ON_CHIP", dict.fromkeys((16, 32, 64, 128), sizes))
        monkeypatch.setattr(module, "LARGEST_GRAM", 128)
    return request.param


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def mirrored(x: Tensor, tile: int | None) -> Tensor:
    """Tiles below the diagonal take the place of those above."""
    if tile is None:
        return x
    block = torch.arange(len(x)) // tile
    return torch.where(block[:, None] >= block[None, :], x, x.mT)


def emulated(x: Tensor, chosen: CoefficientSet, method: str, eps: float = EPS, tile: int | None = None) -> Tensor:
    """The kernels' roundings in plain torch, in fp32.

    With a tile, those of grouped launches: squares are mirrored, and bXXᵀ is rounded once where that is all there is.
    """
    transposed = x.shape[0] > x.shape[1]
    y = normalised(x.float(), eps, chosen.divisor)
    y = to_bf16(y.mT if transposed else y)
    if chosen.aol:
        sums = to_bf16(y @ y.mT).abs().sum(-1, keepdim=True)
        y = to_bf16(torch.where(sums != 0, y / sums.sqrt(), y))
    count = len(chosen.steps)
    length = 1 if method == "standard" else RESTART_EVERY
    for begin in range(0, count, length):
        segment = chosen.steps[begin : begin + length]
        wide = mirrored(y @ y.mT, tile)
        r = to_bf16(wide)
        for k, (a, b, c) in enumerate(segment):
            once = tile is not None and len(segment) == 1 and c == 0
            z = mirrored(b * (wide if once else r) + c * (r @ r), tile)
            if len(segment) == 1:
                q, q0 = to_bf16(z), a
            elif k == 0:
                q, q0 = to_bf16(z + a * torch.eye(len(z))), 0.0
            else:
                q = to_bf16(mirrored(q @ to_bf16(z) + a * q, tile))
            z = to_bf16(z)
            if k < len(segment) - 1:
                p = to_bf16(mirrored(r @ z + a * r, tile))
                r = to_bf16(mirrored(z @ p + a * p, tile))
        y = q0 * y + q @ y
        y = to_bf16(y) if begin + length < count else y
    return (y.mT if transposed else y).to(x.dtype)


def assert_as_exact_as_rounding_allows(
    ours: Tensor, x: Tensor, name: Coefficients, method: str = "standard", steps: int | None = None, eps: float = EPS,
    tile: int | None = None,
) -> None:  # fmt: skip
    """Two results with the same roundings differ where a sum in another order is rounded the other way.

    That takes a sum within its own fp32 error, some 2^-22 at these sizes, of the middle between two bf16, 2^-8 apart:
    one in thousands. So the difference is a small part of what all roundings do together, which is the distance from
    the emulation to the exact result, or where nothing was rounded on the way one rounding of the result.
    """
    exact = reference(x.double(), name, steps, "standard", eps)
    same = emulated(x, resolve(name, steps), method, eps, tile)
    assert ours.dtype == x.dtype
    assert ours.shape == x.shape
    distance = (same.double() - exact).norm() + ROUNDING * exact.norm()
    assert (ours.double() - same.double()).norm() <= 0.1 * distance
    assert (ours.double() - exact).norm() <= 1.1 * distance


def check(module, inputs: list[Tensor], name: Coefficients, method: str, way: str, **options) -> list[Tensor]:
    kept = [x.clone() for x in inputs]
    chosen = resolve(name, options.get("steps"))
    results = module.newton_schulz(inputs, chosen, method, options.get("eps", EPS))
    for x, y, before in zip(inputs, results, kept, strict=True):
        assert torch.equal(x, before)
        assert_as_exact_as_rounding_allows(y, x, name, method, tile=TILES.get(way), **options)
    return results


def mixed(shapes) -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [torch.randn(shape).to(dtypes[i % 3]) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", SETS)
def test_sets(module, way: str, name: str, method: str):
    """Matrices of different shapes and dtypes in one call."""
    check(module, mixed([(17, 24), (20, 8), (3, 5)]), name, method, way)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_shapes(module, way: str, method: str):
    check(module, mixed(SHAPES[:-2] if way == "grouped" else SHAPES), "jordan", method, way)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("you", 1),
        ("cans", 2),
        ("cubic5", 3),
        ("polar_express", 10),
        (((0.0, 1.5, -0.5), (2.0, 0.0, 1.0), (0.0, 0.0, 3.0)), None),
    ],
    ids=str,
)
def test_steps(module, way: str, method: str, name: Coefficients, steps: int | None):
    check(module, [torch.randn(20, 18)], name, method, way, steps=steps)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_sizes_as_shipped(module, monkeypatch, method: str):
    inputs = mixed([(100, 40), (12, 130), (64, 64)])
    check(module, inputs, "jordan", method, "held")
    monkeypatch.setattr(module, "ON_CHIP", {})
    check(module, inputs, "jordan", method, "grouped as shipped")
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
    check(module, inputs, "jordan", method, "grouped as shipped")


def test_layouts(module, way: str):
    """Rows or columns by 16 bytes, strides of all kinds; the result's layout is the input's where that is dense."""
    base = torch.randn(48, 96)
    inputs = [base[:16, :24], base.mT[:24, :16], base[::4, ::5], base.bfloat16()[:, :16].mT, torch.randn(1, 40)]
    inputs += [torch.randn(20).expand(12, 20), torch.randn(16, 1).expand(16, 8), torch.randn(121)[1:].view(12, 10)]
    inputs += [torch.randn(8, 16).half().mT, base[:1, :9].mT, torch._neg_view(torch.randn(9, 9))]
    results = check(module, inputs, "jordan", "standard", way, steps=2)
    assert results[8].stride() == inputs[8].stride()
    assert all(y.is_contiguous() for y in results[5:8])


@pytest.mark.parametrize(
    ("value", "name", "method"),
    [
        (0.0, "jordan", "gram"),
        (0.0, "aol4", "standard"),
        (float("nan"), "jordan", "standard"),
        (float("nan"), "aol4", "gram"),
        (float("inf"), "jordan", "gram"),
        (-float("inf"), "cubic5", "standard"),
    ],
)
def test_results_do_not_depend_on_company(module, way: str, value: float, name: str, method: str):
    """Zero gives zero. NaN and infinity give NaN. No other matrix notices."""
    inputs = mixed([(17, 20), (5, 9), (33, 18), (16, 16), (2, 3)])
    chosen = resolve(name, None if SETS[name].whole else 3)
    alone = module.newton_schulz([inputs[i] for i in (0, 1, 4)], chosen, method, EPS)
    if value == 0:
        inputs[2].zero_()
        inputs[3].zero_()
    else:
        inputs[2][32, 17] = value
        inputs[3][0, 1] = value
    results = module.newton_schulz(inputs, chosen, method, EPS)
    for i, y in zip((0, 1, 4), alone, strict=True):
        assert torch.equal(results[i], y)
    for y in results[2:4]:
        assert (y == 0).all() if value == 0 else y.isnan().all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1e6, 1e19, 1e38])
def test_scales(module, way: str, scale: float):
    """No sum of squares over- or underflows; small matrices stay small, but for eps = 0."""
    base = torch.randn(18, 21)
    base /= base.abs().max()
    check(module, [base * scale, (base * scale).mT], "jordan", "standard", way, steps=2, eps=0.0)
    if scale < 1e-7:
        check(module, [base * scale], "jordan", "standard", way, steps=2, eps=EPS)


def test_one_huge_element_among_small_ones(module, way: str):
    x = torch.randn(20, 40) * 1e-38
    x[3, 30] = 3e38
    x[15, 2] = 1e38
    check(module, [x], "jordan", "standard", way, steps=2, eps=0.0)


def test_batches(module, way: str):
    """Of any number of dimensions, strides and dtypes, in one call."""
    inputs = [torch.randn(3, 9, 16), torch.randn(16, 24, 2).half().permute(2, 1, 0), torch.randn(2, 2, 5, 3).bfloat16()]
    inputs += [torch.randn(2, 3, 8, 16).transpose(0, 1), torch.randn(1, 8, 8).expand(2, 8, 8), torch.randn(4, 40)]
    results = module.newton_schulz(inputs, resolve("you", 2), "gram", EPS)
    for x, y in zip(inputs, results, strict=True):
        assert y.shape == x.shape
        single = x.reshape(-1, *x.shape[-2:])
        for a, b in zip(single, y.reshape(single.shape), strict=True):
            (alone,) = module.newton_schulz([a], resolve("you", 2), "gram", EPS)
            assert torch.equal(alone, b)
            assert_as_exact_as_rounding_allows(b, a, "you", "gram", steps=2)


def test_empty(module):
    results = module.newton_schulz(
        [torch.randn(0, 4), torch.randn(3, 0), torch.ones(1, 1)], resolve("you", 1), "gram", 0
    )
    assert [y.shape for y in results] == [(0, 4), (3, 0), (1, 1)]
    assert module.newton_schulz([], resolve("you", 1), "gram", EPS) == []


def test_a_workspace_is_one_allocation(module, monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: sizes.append(size) or empty(*size, **options))
    module.newton_schulz([torch.randn(4, 5), torch.randn(130, 129)], resolve("jordan", 1), "standard", EPS)
    assert len(sizes) == 1


def test_refusals(module):
    chosen = resolve("jordan", None)
    good = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"matrices\[1\] has dtype torch.float64, expected one of torch.float32, torch"):
        module.newton_schulz([good, good.double()], chosen, "standard", EPS)
    with pytest.raises(ValueError, match=r"matrices\[0\] has shape \(4,\), expected matrices"):
        module.newton_schulz([good[0]], chosen, "standard", EPS)
    with pytest.raises(ValueError, match=r"matrices\[1\] is on meta, expected cpu as the first"):
        module.newton_schulz([good, good.to("meta")], chosen, "standard", EPS)
    with pytest.raises(ValueError, match=r"method='auto' is unknown, expected one of 'standard', 'gram'"):
        module.newton_schulz([good], chosen, "auto", EPS)


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from stepladder.triton_kernels import newton_schulz
from stepladder.triton_kernels.aot import compile_kernel

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in newton_schulz.kernels():
    if not re.fullmatch("newton_schulz_(" + sys.argv[2] + ")", kernel.name):
        continue
    compiled = compile_kernel(kernel, int(sys.argv[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    print(json.dumps([compiled.name, compiled.ptx, usage, compiled.shared]))
"""
# Those of each kind that need the most registers.
DEMANDING = "normalise|(gram|combine|apply)_.*|finish_128_rows|finish_64_elements|stream_.*_elements|hold_32_gram_rows"
# Shared memory that a block may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (90, DEMANDING),
        pytest.param(90, ".*", marks=pytest.mark.large),
        pytest.param(80, ".*", marks=pytest.mark.large),
    ],
)
def test_what_is_compiled_ahead_of_time(tmp_path, arch: int, names: str):
    """bf16 operands on tensor cores, accumulated in fp32, loaded ahead by 16 bytes; and no register spilled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), names]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 17
    for name, ptx, usage, shared in rows:
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage, name
        assert shared <= SHARED[arch], name
        products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]*", ptx))
        if re.search("measure|normalise|rescale", name):
            assert not products, name
        else:
            assert products, name
            assert all(".f32.bf16.bf16" in product for product in products), f"{name}: {products}"
        if re.match("newton_schulz_(gram|combine|apply|finish)_", name):
            assert "cp.async.cg.shared.global [ " in ptx, name
            assert ("wgmma" in ptx) == (arch == 90), name


def test_muon_and_the_function_take_these_kernels(monkeypatch):
    from stepladder.triton_kernels import newton_schulz as module

    forms = []
    run = module.newton_schulz
    monkeypatch.setattr(
        module, "newton_schulz", lambda given, chosen, form, eps: (forms.append(form), run(given, chosen, form, eps))[1]
    )
    given = [torch.randn(s) for s in [(12, 9), (8, 30), (2, 5, 6)]]
    for x, y in zip(given, sl.ops.newton_schulz(given, backend="triton"), strict=True):
        exact = sl.reference.newton_schulz(x.double())
        assert relative_error(y, exact) < allowed_error(x, method="auto", diagonal_apart=False)
    assert forms == ["standard", "gram"]

    p, q = torch.nn.Parameter(torch.randn(12, 9)), torch.nn.Parameter(torch.zeros(5))
    optimizer = sl.Muon(
        [{"params": [p]}, {"params": [q], "algorithm": "adamw"}], lr=0.1, weight_decay=0.0, backend="triton"
    )
    before = p.detach().clone()
    p.grad, q.grad = torch.randn(12, 9), torch.ones(5)
    optimizer.step()
    # The weight is rounded once, and its move is found by another subtraction.
    exact = sl.reference.newton_schulz(p.grad.double()) * (12 / 9) ** 0.5
    stored = 2 * 2.0**-24 * float(before.norm() / (0.1 * exact.norm()))
    allowed = allowed_error(p.grad, method="auto", diagonal_apart=False)
    assert relative_error((before - p.detach()) / 0.1, exact) < allowed + stored
    assert (q.detach() < 0).all()
