"""Newton-Schulz iterations: every coefficient set, shape, spectrum and scale, on every matrix unit that runs here."""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from rounding import allowed_error, relative_error
from torch import Tensor

import stepladder as sl
from stepladder import _C, coefficients, newton_schulz
from stepladder.coefficients import SETS, CoefficientSet, resolve
from stepladder.reference.newton_schulz import normalised as reference_normalised

UNITS = (*_C.matrix_units(), newton_schulz.TORCH)
# What the package promises of its sets in bf16 (docs/muon.md): singular values of the result within the band of exact
# arithmetic and this, where the interval that the band is computed for is wider than the input's by the second.
ROUNDING = 0.06
WIDENED = 0.03


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(newton_schulz.UNIT_VARIABLE, request.param)
    return request.param


def with_spectrum(m: int, n: int, values: Any, seed: int = 0) -> Tensor:
    """A random m×n matrix with these singular values, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return u @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ v.T


def spectrum(name: str, k: int) -> np.ndarray[Any, Any]:
    if name == "rank one":
        return np.eye(1, k)[0]
    return np.logspace(0.0, -3.0 if name == "steep" else 0.0, k)


def band(chosen: CoefficientSet, low: float, high: float) -> tuple[float, float]:
    """The least and greatest value that exact arithmetic makes of singular values in [low, high]."""
    x = np.linspace(low, high, 20001)
    for a, b, c in chosen.steps:
        x = a * x + b * x**3 + c * x**5
    return float(x.min()), float(x.max())


def exact_band(chosen: CoefficientSet, x: Tensor) -> tuple[float, float]:
    x = x.double()
    if chosen.aol:
        x = x.mT if x.shape[0] > x.shape[1] else x
        x = x / (x @ x.mT).abs().sum(-1, keepdim=True).sqrt()
    else:
        x = x / x.norm() / chosen.divisor
    values = torch.linalg.svdvals(x)
    return band(chosen, float(values.min()) * (1 - WIDENED), float(values.max()) * (1 + WIDENED))


@pytest.mark.parametrize("method", ["standard", "gram", "auto"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2, 3e-2])
@pytest.mark.parametrize("name", SETS)
def test_rows_that_are_nearly_alike(name: str, noise: float, method: str, unit: str):
    """As gradients of sums have them: the roundings of all elements of a Gram matrix go the same way."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(1, 100, generator=generator) + noise * torch.randn(36, 100, generator=generator)
    _, high = exact_band(SETS[name], x)
    assert float(torch.linalg.svdvals(sl.ops.newton_schulz(x, name, method=method)).max()) <= high + ROUNDING


SHAPES = [(1, 1), (1, 7), (2, 2), (31, 33), (64, 64), (17, 272), (272, 17), (129, 257), (300, 100)]


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("kind", ["flat", "steep", "rank one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_singular_values_stay_in_the_sets_band(name: str, shape: tuple[int, int], kind: str, method: str, unit: str):
    x = with_spectrum(*shape, spectrum(kind, min(shape))).float()
    low, high = exact_band(SETS[name], x)
    values = torch.linalg.svdvals(sl.ops.newton_schulz(x, name, method=method).double())
    assert low - ROUNDING <= float(values.min())
    assert float(values.max()) <= high + ROUNDING


@pytest.mark.parametrize("shape", [(1024, 1000), (2048, 128), (127, 2032)], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_large_matrices(shape: tuple[int, int], method: str, unit: str):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    low, high = exact_band(SETS["jordan"], x)
    values = torch.linalg.svdvals(sl.ops.newton_schulz(x, method=method))
    assert low - ROUNDING <= float(values.min())
    assert float(values.max()) <= high + ROUNDING


def allowed(x: Tensor, name: str, method: str, unit: str) -> float:
    """What rounding explains; torch rounds diagonals too."""
    return allowed_error(x, name, None, method, diagonal_apart=unit != newton_schulz.TORCH)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", newton_schulz.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (33, 100), (100, 33), (96, 512)], ids=str)
def test_close_to_the_reference_in_float64(shape: tuple[int, int], dtype: torch.dtype, method: str, unit: str):
    x = with_spectrum(*shape, np.linspace(1.0, 0.1, min(shape))).to(dtype)
    y = sl.ops.newton_schulz(x, "polar_express", method=method)
    assert y.dtype == dtype
    assert y.shape == x.shape
    exact = sl.reference.newton_schulz(x.double(), "polar_express")
    assert relative_error(y, exact) < allowed(x, "polar_express", method, unit)


def test_the_reference_reaches_the_polar_factor():
    x = with_spectrum(20, 50, np.linspace(1.0, 0.2, 20))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    for method in ("standard", "gram"):
        assert torch.allclose(sl.reference.newton_schulz(x, "polar_express", 12, method), u @ vh, atol=1e-8)
        assert torch.allclose(sl.ops.newton_schulz(x, "polar_express", 12, method), u @ vh, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-6, 1.0, 1e20, 1e37])
def test_the_scale_does_not_matter(scale: float, unit: str):
    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(2))
    z = sl.ops.newton_schulz(x * scale, eps=0.0 if scale < 1e-6 else 1e-7)
    assert relative_error(z, sl.reference.newton_schulz(x.double())) < allowed(x, "jordan", "standard", unit)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("exponent", [-100, -60, -45, -30, 30, 40, 100])
def test_a_power_of_two_changes_no_bit(exponent: int, method: str, unit: str):
    # The CPU's kernels take another way where the norm is far from 1.
    x = torch.randn(3, 48, 80, generator=torch.Generator().manual_seed(2))
    scaled = x.clone()
    scaled[1] *= 2.0**exponent
    y = sl.ops.newton_schulz(x, "you", method=method, eps=0.0)
    assert torch.equal(y, sl.ops.newton_schulz(scaled, "you", method=method, eps=0.0))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zeros_stay_zeros(name: str, eps: float, unit: str):
    assert not sl.ops.newton_schulz(torch.zeros(20, 30), name, eps=eps).any()
    assert not sl.ops.newton_schulz(torch.zeros(40, 30), name, eps=eps, method="gram").any()


def test_eps_is_the_least_norm(unit: str):
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()
    x = (x / x.norm() * 1e-3).float()
    # Divided by 1 instead of its norm 1e-3: of 2x - 1.5x³ + …, the second term is below 1e-6 of the first. The operand
    # was rounded once to bf16.
    y = sl.ops.newton_schulz(x, (2.0, -1.5, 0.5), 1, eps=1.0)
    assert relative_error(y, 2.0 * x.double()) < 2.0**-9 + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_one_bad_matrix_leaves_the_others_alone(bad: float, method: str, unit: str):
    x = torch.randn(5, 40, 70, generator=torch.Generator().manual_seed(4))
    good = sl.ops.newton_schulz(x, method=method)
    x[2, 3, 4] = bad
    result = sl.ops.newton_schulz(x, method=method)
    assert result[2].isnan().all()
    for k in (0, 1, 3, 4):
        assert torch.equal(result[k], good[k])


def test_a_list_is_each_of_its_matrices(unit: str):
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 40, 24), (128, 64), (64, 64), (1, 5), (2, 2, 33, 35), (200, 20), (0, 4), (4, 0), (0, 3, 3)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    given = [torch.randn(s, generator=generator).to(dtypes[i % 3]) for i, s in enumerate(shapes)]
    for x, y in zip(given, sl.ops.newton_schulz(given), strict=True):
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert torch.equal(sl.ops.newton_schulz(x), y)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "batch of transposed", "sliced"])
def test_strides_do_not_matter(layout: str, unit: str):
    x = torch.randn(4, 96, 96, generator=torch.Generator().manual_seed(6))
    view = {
        "transposed": x[0, :40].T,
        "strided": x[0, ::2, ::3],
        "expanded": x[0, :1].expand(30, 96),
        "batch of transposed": x[:, :50].mT,
        "sliced": x[1:3, 5:60, 7:31],
    }[layout]
    assert torch.equal(
        sl.ops.newton_schulz(view), sl.ops.newton_schulz(view.clone(memory_format=torch.contiguous_format))
    )


def test_a_tall_matrix_is_its_transpose(unit: str):
    x = torch.randn(150, 70, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sl.ops.newton_schulz(x), sl.ops.newton_schulz(x.T).T)


def test_threads_do_not_matter(unit: str):
    if unit == newton_schulz.TORCH:
        pytest.skip("torch's own products may depend on the number of threads")
    shapes = [(300, 500), (64, 64), (20, 700)]
    given, large = (
        [torch.randn(s, generator=torch.Generator().manual_seed(8)) for s in some] for some in (shapes, [(500, 800)])
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # Threads share the large one, which is alone.
            results.append([*sl.ops.newton_schulz(given), *sl.ops.newton_schulz(large)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_input_is_left_alone_and_nothing_is_recorded(unit: str):
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(9), requires_grad=True)
    before = x.detach().clone()
    y = sl.ops.newton_schulz(x)
    assert torch.equal(x.detach(), before)
    assert not y.requires_grad
    assert y.data_ptr() != x.data_ptr()


def test_steps_and_coefficients():
    assert resolve("jordan", None).steps == (SETS["jordan"].steps[0],) * 5
    assert resolve(None, 7).steps == (SETS["jordan"].steps[0],) * 7
    assert resolve("you", 6).steps == (*SETS["you"].steps, SETS["you"].steps[-1])
    a, b, c = SETS["polar_express"].steps[1]
    s = SETS["polar_express"].safety
    raw = SETS["polar_express"].steps
    assert resolve("polar_express", 3).steps == (raw[0], (a / s, b / s**3, c / s**5), raw[2])
    assert resolve("polar_express", 10).steps[7:] == (raw[-1],) * 3
    assert resolve((2, -1.5, 0.5), None).steps == ((2.0, -1.5, 0.5),) * coefficients.DEFAULT_STEPS
    assert resolve([(2, -1.5, 0.5), (3, 0, 0)], None).steps == ((2.0, -1.5, 0.5), (3.0, 0.0, 0.0))
    assert resolve([(2, -1.5, 0.5), (3, 0, 0)], 3).steps == ((2.0, -1.5, 0.5), (3.0, 0.0, 0.0), (3.0, 0.0, 0.0))
    assert resolve("jordan8_exact2", 11).steps[-3:] == ((2.0, -1.5, 0.5),) * 3


X = torch.ones(3, 4)
REFUSALS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((torch.ones(3),), {}, ValueError, r"X has shape \(3,\)"),
    ((torch.tensor(1.0),), {}, ValueError, r"X has shape \(\)"),
    (([X, torch.ones(2)],), {}, ValueError, r"X\[1\] has shape \(2,\)"),
    ((torch.ones(3, 4, dtype=torch.int32),), {}, TypeError, "X has dtype torch.int32"),
    ((torch.ones(3, 4, dtype=torch.complex64),), {}, TypeError, "X has dtype torch.complex64"),
    ((X.to_sparse(),), {}, TypeError, "X has layout torch.sparse_coo"),
    (([X, 3],), {}, TypeError, r"X\[1\] is a int"),
    ((X, "jordann"), {}, ValueError, "coefficients='jordann' is unknown, expected one of 'jordan'"),
    ((X, (1.0, 2.0)), {}, ValueError, "exactly 3 values"),
    ((X, [(1.0, 2.0, 3.0), (1.0,)]), {}, ValueError, r"exactly 3 values for each step, got \(1.0,\)"),
    ((X, ()), {}, TypeError, "coefficients must be a name"),
    ((X, 3.0), {}, TypeError, "coefficients must be a name"),
    ((X, (1.0, math.nan, 3.0)), {}, ValueError, "must be finite numbers, got nan"),
    ((X, (1.0, "2", 3.0)), {}, ValueError, "must be finite numbers, got '2'"),
    ((X,), {"steps": 0}, ValueError, "steps=0 is out of range, expected 1 to 99"),
    ((X,), {"steps": 100}, ValueError, "steps=100 is out of range"),
    ((X,), {"steps": 2.0}, TypeError, "steps must be an integer or None, got 2.0"),
    ((X,), {"steps": True}, TypeError, "steps must be an integer or None, got True"),
    ((X, "aol4"), {"steps": 3}, ValueError, "steps=3 is too few for coefficients='aol4', expected at least 4"),
    ((X, "jordan8_exact2"), {"steps": 9}, ValueError, "steps=9 is too few"),
    ((X,), {"method": "fast"}, ValueError, "method='fast' is unknown, expected one of 'auto', 'standard', 'gram'"),
    ((X,), {"eps": -1.0}, ValueError, "eps=-1.0 is out of range"),
    ((X,), {"eps": math.nan}, ValueError, "eps=nan is out of range"),
    ((X,), {"eps": "0"}, TypeError, "eps must be a number, got '0'"),
    ((X,), {"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
    ((X.double(),), {"backend": "cpu"}, TypeError, "X has dtype torch.float64, which backend='cpu' does not take"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"), REFUSALS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refusals(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sl.ops.newton_schulz(*args, **kwargs)


def test_units_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(newton_schulz.UNIT_VARIABLE, "abacus")
    with pytest.raises(ValueError, match="STEPLADDER_MATRIX_UNIT='abacus' is unknown, expected 'amx'"):
        sl.ops.newton_schulz(X)
    monkeypatch.setattr(newton_schulz, "_units", lambda module: (newton_schulz.TORCH,))
    monkeypatch.setenv(newton_schulz.UNIT_VARIABLE, "amx")
    with pytest.raises(RuntimeError, match="STEPLADDER_MATRIX_UNIT='amx' cannot run here"):
        sl.ops.newton_schulz(X)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", ["jordan", "aol4"])
def test_tiles_by_their_emulation(emulated_module: Any, monkeypatch: pytest.MonkeyPatch, name: str, method: str):
    """The kernels for tiles, whose instructions plain C++ stands in for: other sums, the same everything else."""
    if "avx512_bf16" not in _C.matrix_units():
        pytest.skip("the tiles' kernels need AVX-512 with bf16 beside the tiles")
    given = [
        torch.randn(s, generator=torch.Generator().manual_seed(10)) for s in [(40, 40), (20, 300), (70, 33), (1100, 40)]
    ]
    monkeypatch.setattr(newton_schulz, "_C", emulated_module)
    monkeypatch.setattr(newton_schulz, "_kept", threading.local())
    monkeypatch.setenv(newton_schulz.UNIT_VARIABLE, "amx")
    for x, y in zip(given, sl.ops.newton_schulz(given, name, method=method), strict=True):
        assert relative_error(y, sl.reference.newton_schulz(x.double(), name)) < allowed(x, name, method, "amx")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, contiguous or not."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every other column":
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
    return x


def normalised_into(x: Tensor, y: Tensor, eps: float, divisor: float, threads: int = 1, module: Any = _C) -> Tensor:
    module.normalise(newton_schulz.view_of(x), newton_schulz.view_of(y), eps, divisor, threads)
    return y


@pytest.mark.parametrize("dtype", newton_schulz.KERNEL_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (333, 700), (2, 3, 40, 17), (16, 64, 128), (5, 5000)])
def test_what_torch_multiplies_is_normalised(emulated_module: Any, shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double() / (1.05 * torch.linalg.norm(x.double(), dim=(-2, -1), keepdim=True))
    for result, stored in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-8)):
        y = normalised_into(x, torch.full(shape, math.nan, dtype=result), 1e-7, 1.05)
        # The factor that is no power of two is rounded to fp32, so is its product with x, and then what is stored; fp64
        # adds a rounding for each term of either sum of squares.
        bound = (1 + 2.0**-24) ** 2 * (1 + stored) * (1 + x.numel() * 2.0**-52) - 1
        assert bool(((y.double() - expected).abs() <= bound * expected.abs()).all())
        # Neither threads, strides nor the width of vectors change a bit; the emulator has the least width.
        for given in (laid_out(x, layout) for layout in ("rows", "transposed", "every other column")):
            for out in (torch.full_like(y, math.nan), torch.full_like(y, math.nan).mT.contiguous().mT):
                assert torch.equal(normalised_into(given, out, 1e-7, 1.05, threads=2), y)
        assert torch.equal(normalised_into(x, torch.empty_like(y), 1e-7, 1.05, module=emulated_module), y)


def on_the_edge(seed: int) -> Tensor:
    """A matrix whose norm has a reciprocal between two numbers of fp32: roundings of its sum of squares decide."""
    x = np.float32(2.0**-13) * np.random.default_rng(seed).random((48, 80), dtype=np.float32)
    x[0, :4] = 0.0
    middle = Fraction(3, 2) + Fraction(1, 2**24)
    left = 1 / middle**2 - sum(Fraction(float(v)) ** 2 for v in x.flat)
    for k in range(4):
        x[0, k] = np.nextafter(np.float32(math.sqrt(left)), np.float32(0.0))
        left -= Fraction(float(x[0, k])) ** 2
    return torch.from_numpy(x)


def test_the_order_of_sums_is_that_of_rows():
    by_columns = 0
    for seed in range(20):
        x = on_the_edge(seed)
        y = normalised_into(x, torch.empty_like(x), 0.0, 1.0)
        for layout in ("transposed", "every other column"):
            assert torch.equal(normalised_into(laid_out(x, layout), torch.empty_like(x), 0.0, 1.0), y)
        sums = np.add.accumulate(np.square(x.T.numpy().astype(np.float64)).ravel())
        by_columns += not torch.equal(x * float(np.float32(1.0 / math.sqrt(sums[-1]))), y)
    # Else another order would have gone unnoticed.
    assert by_columns > 0


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e38, math.inf, math.nan])
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_normalised_at_the_ends_of_the_range(value: float, eps: float):
    x = torch.full((2, 3, 5), 0.25)
    x[1] = torch.tensor(value)
    expected = reference_normalised(x, eps, 1.0)
    found = normalised_into(x, torch.empty_like(x), eps, 1.0)
    # Fifteen equal squares of fp32 add up exactly in fp64, in any order: all that follows has the same bits.
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_normalised_refusals():
    x = torch.ones(4, 4)
    for y, message in (
        (x.half(), "normalised matrices are of float16, expected float32 or bfloat16"),
        (x[:2], "the two tensors have different shapes"),
    ):
        with pytest.raises(_C.Error, match=message):
            normalised_into(x, y, 0.0, 1.0)


@pytest.mark.parametrize(
    ("tiles", "most", "shape", "name", "expected"),
    [
        (True, None, (1024, 1024), "jordan", torch.bfloat16),
        (True, "AVX512_CORE_AMX", (1024, 1024), "jordan", torch.bfloat16),
        (True, "avx512_core_bf16", (1024, 1024), "jordan", torch.float32),
        (True, None, (1024, 1024), "polar_express", torch.float32),  # has a divisor
        (True, None, (64, 64), "jordan", torch.float32),
        (False, None, (1024, 1024), "jordan", torch.float32),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_in_which_dtype_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    tiles: bool,
    most: str | None,
    shape: tuple[int, int],
    name: str,
    expected: torch.dtype,
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(newton_schulz.platform, "machine", lambda: "x86_64")
    for name_of in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name_of, raising=False)
    if most is not None:
        monkeypatch.setenv(variable, most)
    newton_schulz._torch_has_bf16.cache_clear()
    try:
        assert newton_schulz._torch_dtype(resolve(name, None), torch.empty(shape)) == expected
        newton_schulz._torch_has_bf16.cache_clear()
        monkeypatch.setattr(newton_schulz.platform, "machine", lambda: "aarch64")
        assert newton_schulz._torch_has_bf16()
    finally:
        newton_schulz._torch_has_bf16.cache_clear()


@pytest.mark.parametrize("shape", [(40, 70), (300, 20), (3, 30, 30)])
def test_defaults_of_the_caller_do_not_matter(shape: tuple[int, ...], unit: str):
    x = torch.randn(shape)
    for method in ("standard", "gram"):
        expected = sl.ops.newton_schulz(x, method=method)
        with torch.device("meta"):
            assert torch.equal(sl.ops.newton_schulz(x, method=method), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sl.ops.newton_schulz(x, method=method), expected)
        with torch.inference_mode():
            assert torch.equal(sl.ops.newton_schulz(x, method=method), expected)


@pytest.mark.parametrize("name", ["jordan", "aol4"])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_the_reference_leaves_autocast_and_its_input_alone(name: str, method: str):
    x = torch.randn(3, 20, 30)
    before, expected = x.clone(), sl.reference.newton_schulz(x, name, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sl.reference.newton_schulz(x, name, method=method), expected)
    assert torch.equal(x, before)
