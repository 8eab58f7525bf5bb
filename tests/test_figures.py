"""The figures of the essay: the files that they make, and their numbers against what theory says."""

from __future__ import annotations

import functools
import importlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from stepladder.coefficients import SETS

FIGURES = Path(__file__).parents[1] / "examples" / "figures"
U = 2.0**-53
EPS = 1e-8  # Adam's and AdamW's
# Roundings of a single step: some of the factors of an update, its product, quotient and root, and of what is expected.
FEW = 20
NAMES = sorted(path.stem for path in FIGURES.glob("*.py") if path.stem != "drawing")


@functools.cache
def figure(name):
    """The script as a module; what they share is found beside it."""
    sys.path.insert(0, str(FIGURES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FIGURES))


@functools.cache
def measured(name):
    return figure(name).measure()


def test_all_are_there():
    assert NAMES == [
        "adam_signal_to_noise",
        "decoupled_decay",
        "per_parameter_normalisation",
        "shampoo_and_muon",
        "spectral_squeeze",
        "step_spectra",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_picture(name):
    """Large enough to read, drawn all over, and with its caption in the description too."""
    image = pytest.importorskip("PIL.Image", reason="reads the PNG; comes with matplotlib")
    module = figure(name)
    drawing, result = figure("drawing"), measured(name)
    caption = module.caption(result)
    picture = image.open(io.BytesIO(drawing.picture(lambda part: module.draw(part, result), caption, (11.0, 4.0))))
    assert picture.format == "PNG"
    assert picture.text["Description"] == caption
    width, height = picture.size
    assert width == 1430
    assert height > 520
    pixels = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).view(height, width)
    dark = pixels < 200
    # Text or lines in every eighth of the width, and in the upper, middle and lower third; the margin is free.
    assert all(bool(part.any()) for part in dark.chunk(8, 1))
    assert all(bool(part.any()) for part in dark.chunk(3, 0))
    for edge in (dark[:3], dark[-3:], dark[:, :3], dark[:, -3:]):
        assert not edge.any()


def test_script_without_a_display(tmp_path):
    """As a user runs it; a backend that would need a display is not looked at."""
    path = tmp_path / "steps.png"
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MPLBACKEND": "tkagg"}
    command = [sys.executable, FIGURES / "per_parameter_normalisation.py", "--output", path]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == figure("per_parameter_normalisation").caption(
        measured("per_parameter_normalisation")
    )
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_other_formats(tmp_path, kind):
    path = tmp_path / f"steps.{kind}"
    result = CliRunner().invoke(figure("per_parameter_normalisation").main, ["--output", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith({"svg": b"<?xml", "pdf": b"%PDF"}[kind])


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("missing/x.png", "there is no directory"),
        ("file.txt/x.png", "there is no directory"),
        ("folder.png", "is a directory"),
        ("x.bmp", "ends neither in"),
        ("x", "ends neither in"),
        ("x" * 300 + ".png", "File name too long"),
    ],
)
def test_bad_output(tmp_path, output, says):
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(figure("per_parameter_normalisation").main, ["--output", str(tmp_path / output)])
    assert result.exit_code != 0
    assert says in result.output
    assert isinstance(result.exception, SystemExit)
    assert sorted(tmp_path.iterdir()) == before


def test_adam_is_a_signal_to_noise_ratio():
    module, result = figure("adam_signal_to_noise"), measured("adam_signal_to_noise")
    beta1, beta2 = module.BETAS
    for scenario, mean in zip(module.SCENARIOS, result.mean.tolist(), strict=True):
        # Five standard errors: the mean of m over N steps is that of N gradients, but for the ends. What v scatters by,
        # relatively √(2(1 − β₂)/(1 + β₂)) at the most, moves the mean of 1/√v by three eighths of its square.
        power = scenario.signal**2 + scenario.noise**2
        error = 5.0 * scenario.noise / math.sqrt(module.AVERAGED * module.PARAMETERS * power)
        bias = 0.375 * 2.0 * (1.0 - beta2) / (1.0 + beta2)
        if not scenario.noise:
            # ε beside √v, and roundings: of w, after as many steps as there are; of v, half of them; and as many of the
            # sum of the mean. Those of m and of the bias corrections, which are near 1 then, are a few.
            size = abs(scenario.signal)
            bias = EPS / size + (3.0 * module.STEPS + FEW) * U
        assert mean == pytest.approx(scenario.expected, abs=error + bias), scenario
    ripple = (1.0 - beta1) / (1.0 + beta1)
    # White noise through m has √ripple of its spread; five standard errors of a variance from N·P(1 − β₁)/2 samples.
    assert result.spread[3].item() == pytest.approx(math.sqrt(ripple), rel=5.0 / math.sqrt(500 * 1000 * 0.1))
    # Of gradients ±1: ε beside √v, and roundings as above, of w, which stays below 2, in units of the ripple; m is
    # a difference of numbers that are 1/ripple times as large, and has a memory of 1/(1 − β₁) steps.
    rounding = (2.0 / ripple + 1.0 / ripple / (1.0 - beta1) + module.STEPS + FEW) * U
    start = beta1 ** (module.STEPS - 100) / (1.0 - beta1 ** (module.STEPS - 100))
    close = EPS + rounding + 2.0 * start
    assert result.path[-100:, 4].abs() == pytest.approx(torch.full((100,), ripple, dtype=torch.float64), rel=close)
    caption = module.caption(result)
    for text in ("A 1.00 (", "B 0.29 (", "C 0.10 (", "D 0.00 (", "E 0.00 (", "F 1.00 (", "±0.23", "0.053"):
        assert text in caption


def test_decay_is_decoupled():
    module, result = figure("decoupled_decay"), measured("decoupled_decay")
    eta_lambda = module.RATE * module.DECAY
    steps = torch.arange(module.STEPS + 1).double()
    left = (1.0 - eta_lambda) ** steps
    # A step rounds twice, at the size of a weight. A pair is less than 2η from its mean: Adam's steps of ±η(1 − β₁)/
    # (1 + β₁)·(1 − (−β₁)^t)/(1 − β₁^t) alternate, and sum to less. The mean and the power take two roundings each.
    largest = 1.0 + 2.0 * module.RATE / float(left[-1])
    for path in result.adamw.T:
        assert torch.allclose(path, left, rtol=(2.0 * largest * module.STEPS + 4.0) * U, atol=0.0)
    for size, rate in zip((module.LOUD, module.QUIET), module.rates(result.adam), strict=True):
        # v is g² + (λw)², with w at most 1; m lags behind w by β₁/(1 − β₁) = 9 steps, in which w was larger.
        slowest = 1.0 / math.hypot(size, module.DECAY)
        fastest = math.exp(10.0 * eta_lambda / size) / size
        assert slowest < rate < fastest
    assert f"has left {(1.0 - eta_lambda) ** module.STEPS:.1%} of the loud" in module.caption(result)


def test_steps_are_normalised():
    module, result = figure("per_parameter_normalisation"), measured("per_parameter_normalisation")
    g = module.GRADIENTS
    mu = module.MOMENTUM
    expected = {
        "SGD": g,
        "momentum": g * (1.0 - mu**module.STEPS) / (1.0 - mu),
        "AdamW": g / (g + EPS),
        "Lion": torch.ones_like(g),
        "SignSGD": torch.ones_like(g),
    }
    assert list(result) == list(expected)
    # A difference of weights that are up to as many steps large as were made, and rounded at that size; whole numbers
    # are exact. In units of U besides: momentum rounds twice a step and remembers 1/(1 − μ) of them; m of AdamW once, v
    # twice a step over all of them, of which the root takes half; β₂^t has t roundings, which 1 − β₂^t enlarges.
    made, beta1, beta2 = module.STEPS, 0.9, 0.999
    corrected = made * beta2**made / (1.0 - beta2**made)
    rounding = {
        "SGD": made,
        "momentum": made + 2.0 / (1.0 - mu) + FEW,
        "AdamW": made + 1.0 / (1.0 - beta1) + made + 0.5 * corrected + FEW,
        "Lion": 0.0,
        "SignSGD": 0.0,
    }
    for name, steps in result.items():
        assert torch.allclose(steps, expected[name], rtol=rounding[name] * U, atol=0.0), name
    assert "SGD 100,000, momentum 100,000, AdamW 1.00001, Lion 1, SignSGD 1." in module.caption(result)


def lapack(n):
    """How far LAPACK's SVD, QR and eigendecompositions are from exact, in units of σ₁: p(n)·U.

    Here p is "a modestly growing function of n" (Users' Guide, chapter 4), taken as n.
    """
    return n * U


def enlargement(x, y, slopes):
    """What an odd function, y at singular values x with these slopes, makes of a small change of the matrix, at most.

    In the Frobenius norm that is its largest divided difference among x, −x and 0 (Noferini 2017, "A formula for the
    Fréchet derivative of a generalized matrix function").
    """
    zero = x.new_zeros(1)
    points, values = torch.cat([x, -x, zero]), torch.cat([y, -y, zero])
    dx, dy = points[:, None] - points, values[:, None] - values
    return max(float((dy / dx)[dx != 0].abs().max()), float(slopes.abs().max()))


def iterated(values, error, n, name="jordan"):
    """What Newton-Schulz makes of singular values, and how far it may be off, to first order, in the Frobenius norm.

    `error` is that of the matrix in the 2-norm, n its larger side. Each step aX + bX³ + cX⁵ has three products of sums
    of n: XXᵀ is off by nU·f², f the Frobenius norm of X, and with t = σ₁ all of them by nU·tf²(2|b| + 4|c|t²). What a
    step is off by goes through those that follow.
    """
    size = float(values.norm()) * SETS[name].divisor
    xs, slopes, errors = [values / size], [], [math.sqrt(len(values)) * error / size + n * U]
    for a, b, c in SETS[name].steps:
        x = xs[-1]
        t, f = float(x.max()), float(x.norm())
        errors.append(n * U * (a * t + t * f**2 * (2.0 * abs(b) + 4.0 * abs(c) * t**2)))
        slopes.append(a + 3.0 * b * x**2 + 5.0 * c * x**4)
        xs.append(a * x + b * x**3 + c * x**5)
    off, chain = errors[-1], torch.ones_like(values)
    for x, slope, made in zip(xs[-2::-1], slopes[::-1], errors[-2::-1], strict=True):
        chain = chain * slope
        off += enlargement(x, xs[-1], chain) * made
    return xs[-1].sort(descending=True).values, off


def test_spectra_of_steps():
    module, result = figure("step_spectra"), measured("step_spectra")
    side = module.SIDE
    for skew, steps in result.items():
        values = torch.arange(1, side + 1).double() ** -skew
        # Two bases, each as orthogonal as QR makes them, the product of both, and the SVD; σ₁ is 1.
        error = 2.0 * lapack(side) + side * U * float(values.sum())
        assert torch.allclose(steps["gradient"], values, rtol=0.0, atol=error + lapack(side))
        through, off = iterated(values, error, side)
        assert torch.allclose(steps["Muon"], through, rtol=0.0, atol=off + lapack(side) * float(through[0]))
        # No entry is zero, so that the signs' squares add up to their number n². The SVD is off by lapack(n)·σ₁,
        # σ₁ ≤ n, in each value, and Σσ ≤ √n·n.
        signs = steps["SignSGD"].square().sum().item()
        assert signs == pytest.approx(side**2, rel=2.0 * math.sqrt(side) * lapack(side) + side * U)
        assert module.balance(steps["Muon"]) > max(module.balance(steps[name]) for name in ("gradient", "SignSGD"))
    # Muon's step is never far from flat; that of signs follows the gradient's skew.
    signs = [module.balance(steps["SignSGD"]) for steps in result.values()]
    assert signs == sorted(signs, reverse=True)
    assert min(module.balance(steps["Muon"]) for steps in result.values()) > 0.9


def test_signs_of_rank_one_have_rank_one_and_depend_on_the_basis():
    module = figure("step_spectra")
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, module.SIDE, generator=generator, dtype=torch.float64)
    steps = module.spectra(torch.outer(u, v))
    side = module.SIDE
    # Each of the other values is off by lapack(n)·σ₁, and all of them count twice in the square of the sum.
    rounding = 2.0 * side * lapack(side) + 2.0 * side * U
    assert module.balance(steps["SignSGD"]) == pytest.approx(1.0 / side, rel=rounding)
    g = module.gradient(1.0)
    turned = module.spectra(torch.linalg.qr(torch.randn(g.shape, generator=generator).double()).Q @ g)
    plain = module.spectra(g)
    # The basis is as orthogonal as QR makes it, the product has sums of n; σ₁ is 1. The SVD errs in both spectra.
    error = lapack(side) + side * U * math.sqrt(side) * float(plain["gradient"].norm())
    _, off = iterated(plain["gradient"], error, side)
    allowed = {"gradient": error, "SignSGD": error, "Muon": 2.0 * off}
    for name, values in plain.items():
        close = allowed[name] + 2.0 * lapack(side) * float(values[0])
        assert torch.allclose(turned[name], values, rtol=0.0, atol=close) == (name != "SignSGD"), name


def test_shampoo_and_muon():
    module, result = figure("shampoo_and_muon"), measured("shampoo_and_muon")
    gradient = result.first["gradient"]
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    loudness, t, columns = module.LOUDNESS, module.STEPS, module.COLUMNS
    through, off = iterated(loudness, 0.0, columns, "polar_express")
    muon = float((through - 1.0).abs().max()) + off
    # Both factors are σ² + δ, and σ(σ² + δ)^(−1/2) is 1 − δ/2 at least, as σ ≥ 1. R has a null space, where its root is
    # δ^(−1/4): what products of sums of 8 and the eigendecomposition are off by, relative to σ₁² = 256, turns G into
    # that. L^(−1/4) is at most 1, and as much is allowed for its error.
    delta, largest = 1e-12, float(loudness[0]) ** 2
    mixed = (lapack(columns) + 2.0 * module.ROWS * U) * largest
    shampoo = 0.5 * delta + 2.0 * mixed * delta**-0.25
    # The factor by SVD moves by twice the error of a matrix over its least singular value, 1.
    exact = 2.0 * lapack(columns) * float(loudness[0])
    for name, error in (("Muon", muon), ("Shampoo", shampoo)):
        assert torch.linalg.matrix_norm(result.first[name] - u @ vh, 2) < error + exact, name
    # Rows of Z have norm 1 as QR makes them; a norm is of as many squares as columns. Both are over the last row's.
    rows = 2.0 * (lapack(columns) + columns * U)
    assert torch.allclose(module.norms(result.last["gradient"]), loudness, rtol=rows, atol=0.0)
    assert torch.allclose(
        module.norms(result.last["Muon"]), torch.ones_like(loudness), rtol=rows + 2.0 * muon, atol=0.0
    )
    # Five standard errors: v is a mean of t squares with a variance of 2, and a row's norm one of its columns' entries.
    assert torch.allclose(
        module.norms(result.last["AdamW"]),
        torch.ones_like(loudness),
        rtol=5.0 * math.sqrt(2.0) * 0.5 * math.sqrt(2.0 / t) * math.sqrt(3.0 / columns),
    )
    # R is a mean of t·(ΣD²)²/ΣD⁴ outer products: zᵀR⁻¹ᐟ²z has a quarter of their relative spread in its root, in two
    # rows. The last gradient is part of R itself, by 1/t of it.
    d2 = loudness.square()
    spread = math.sqrt(2.0 * d2.square().sum().item() / (t * d2.sum().item() ** 2))
    own = columns * d2[0].item() / (t * d2.sum().item())
    norms = module.norms(result.last["Shampoo"])
    assert torch.allclose(norms, loudness.sqrt(), rtol=0.25 * (5.0 * math.sqrt(2.0) * spread + own))
    assert f"Shampoo {norms[0].item():.2f}. AdamW and Muon" in module.caption(result)


def test_spectral_squeeze():
    module, result = figure("spectral_squeeze"), measured("spectral_squeeze")
    start, k, eta = module.start(), module.DIRECTIONS, module.RATE
    moved = (torch.arange(module.SIDE) < k).double()
    radius = start.norm()
    h, w = [start], [start]
    for _ in range(module.STEPS):
        sum_h = h[-1] + eta * radius * moved / math.sqrt(k)
        h.append(radius * sum_h / sum_h.norm())
        w.append((1.0 - module.rate_of_muonw() * module.DECAY) * w[-1] + module.rate_of_muonw() * moved)
    # The gradient's other directions are as far from zero as the bases and their product are off. Each step is off by
    # what "polar_express" makes of them and of its four ones, times its length, and by its roundings; what is seen of
    # the weights also by bases, QR of n columns, and two products with them, of sums of n.
    side, steps = module.SIDE, module.STEPS
    noise = 2.0 * lapack(side) + side * U * k
    through, off = iterated(moved, noise, side, "polar_express")
    off += float((through[:k] - 1.0).abs().max())
    each = {"muonh": eta * float(radius) / math.sqrt(k), "muonw": module.rate_of_muonw()}
    seen = 2.0 * lapack(side) + 2.0 * side**1.5 * U
    close, one = {}, {}
    for name, exact in (("muonh", torch.stack(h)), ("muonw", torch.stack(w))):
        largest = float(exact.max())
        close[name] = steps * (each[name] * off + FEW * U * largest) + seen * largest
        one[name] = each[name] * off + (FEW * U + seen) * largest
        assert torch.allclose(getattr(result, name), exact, rtol=0.0, atol=close[name]), name
    # A norm is of n² squares, of which its root halves the error; then it is seen as above.
    norm = (side**2 / 2 + FEW) * U + seen
    assert result.muonh.norm(dim=1) == pytest.approx(radius.expand(steps + 1), rel=norm)
    # All directions without a gradient shrink alike, never by more than 1/(1 + η), which 1/√(1 + 2ηs/R + η²) nears as
    # W's part along the step, s, nears the norm R.
    factors = result.muonh[1:, k:] / result.muonh[:-1, k:]
    # A factor sees the errors of one step.
    alike = 2.0 * one["muonh"] / float(result.muonh[:, k:].min())
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=2.0 * alike, atol=0.0)
    assert float(factors.min()) >= 1.0 / (1.0 + eta) * (1.0 - alike)
    along = float(h[-2][:k].sum() / math.sqrt(k) / radius)
    last = alike + eta * close["muonh"] / float(radius)
    assert float(factors[-1].max()) == pytest.approx((1.0 + 2.0 * eta * along + eta**2) ** -0.5, rel=last)
    taking_h, taking_w = module.participation(result.muonh), module.participation(result.muonw)
    # From the second step on: the first one is as long for both, but MuonW has decayed before it.
    assert bool((taking_h[2:] < taking_w[2:]).all())
    assert k <= taking_h[-1].item() < k + 0.01
