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
        bias = 0.375 * 2.0 * (1.0 - beta2) / (1.0 + beta2) if scenario.noise else 1e-6
        assert mean == pytest.approx(scenario.expected, abs=error + bias), scenario
    ripple = (1.0 - beta1) / (1.0 + beta1)
    # White noise through m has √ripple of its spread; five standard errors of a variance from N·P(1 − β₁)/2 samples.
    assert result.spread[3].item() == pytest.approx(math.sqrt(ripple), rel=5.0 / math.sqrt(500 * 1000 * 0.1))
    assert result.path[-100:, 4].abs() == pytest.approx(torch.full((100,), ripple).double(), rel=1e-6)
    caption = module.caption(result)
    for text in ("A 1.00 (", "B 0.29 (", "C 0.10 (", "D 0.00 (", "E 0.00 (", "F 1.00 (", "±0.23", "0.053"):
        assert text in caption


def test_decay_is_decoupled():
    module, result = figure("decoupled_decay"), measured("decoupled_decay")
    eta_lambda = module.RATE * module.DECAY
    steps = torch.arange(module.STEPS + 1).double()
    for path in result.adamw.T:
        assert torch.allclose(path, (1.0 - eta_lambda) ** steps, rtol=1e-9, atol=0.0)
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
        "AdamW": g / (g + 1e-8),
        "Lion": torch.ones_like(g),
        "SignSGD": torch.ones_like(g),
    }
    assert list(result) == list(expected)
    for name, steps in result.items():
        # A difference of weights, of which up to 2000 steps have been made, each with its rounding.
        assert torch.allclose(steps, expected[name], rtol=1e-10, atol=0.0), name
    assert "SGD 100,000, momentum 100,000, AdamW 1.00001, Lion 1, SignSGD 1." in module.caption(result)


def polynomial(values):
    """What five steps of "jordan" make of singular values, once the Frobenius norm is 1."""
    x = values / values.norm()
    for a, b, c in SETS["jordan"].steps:
        x = a * x + b * x**3 + c * x**5
    return x.sort(descending=True).values


def test_spectra_of_steps():
    module, result = figure("step_spectra"), measured("step_spectra")
    side = module.SIDE
    for skew, steps in result.items():
        values = torch.arange(1, side + 1).double() ** -skew
        assert torch.allclose(steps["gradient"], values, rtol=1e-10, atol=0.0)
        assert torch.allclose(steps["Muon"], polynomial(values), rtol=1e-9, atol=0.0)
        # No entry is zero, so that the signs' squares add up to their number.
        assert steps["SignSGD"].square().sum().item() == pytest.approx(side**2, rel=1e-12)
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
    assert module.balance(steps["SignSGD"]) == pytest.approx(1.0 / module.SIDE, rel=1e-6)
    g = module.gradient(1.0)
    turned = module.spectra(torch.linalg.qr(torch.randn(g.shape, generator=generator).double()).Q @ g)
    for name, values in module.spectra(g).items():
        same = torch.allclose(turned[name], values, rtol=1e-6, atol=1e-6)
        assert same == (name != "SignSGD"), name


def test_shampoo_and_muon():
    module, result = figure("shampoo_and_muon"), measured("shampoo_and_muon")
    gradient = result.first["gradient"]
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    for name in ("Muon", "Shampoo"):
        assert torch.linalg.matrix_norm(result.first[name] - u @ vh) < 1e-9, name
    loudness, t, columns = module.LOUDNESS, module.STEPS, module.COLUMNS
    assert torch.allclose(module.norms(result.last["gradient"]), loudness, rtol=1e-10)
    assert torch.allclose(module.norms(result.last["Muon"]), torch.ones_like(loudness), rtol=1e-6)
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
    # "polar_express" ends within 1e-9 of an orthogonal factor.
    assert torch.allclose(result.muonh, torch.stack(h), rtol=1e-7, atol=0.0)
    assert torch.allclose(result.muonw, torch.stack(w), rtol=1e-7, atol=0.0)
    assert result.muonh.norm(dim=1) == pytest.approx(radius.expand(module.STEPS + 1), rel=1e-12)
    # All directions without a gradient shrink alike, never by more than 1/(1 + η), and by that in the end.
    factors = result.muonh[1:, k:] / result.muonh[:-1, k:]
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-9)
    assert float(factors.min()) >= 1.0 / (1.0 + eta) * (1.0 - 1e-9)
    assert float(factors[-1].max()) == pytest.approx(1.0 / (1.0 + eta), rel=1e-4)
    taking_h, taking_w = module.participation(result.muonh), module.participation(result.muonw)
    # From the second step on: the first one is as long for both, but MuonW has decayed before it.
    assert bool((taking_h[2:] < taking_w[2:]).all())
    assert k <= taking_h[-1].item() < k + 0.01
