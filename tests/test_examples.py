"""The examples, run as a user runs them, on a model small enough for a test."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_pool import ENVIRONMENT

from stepladder.bench import report
from stepladder.bench.charlm import Text, sample

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "train_charlm.py"
SWEEP = ROOT / "examples" / "sweep_charlm.py"
PRECISION = ROOT / "examples" / "precision_charlm.py"
TINY = {"steps": 30, "batch": 4, "context": 16, "width": 32, "layers": 2, "heads": 2, "threads": 1}


def run(tmp_path, *arguments):
    """The finished process, and what it wrote as JSON."""
    report = tmp_path / "report.json"
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, EXAMPLE, *sizes, "--json", report, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    return process, json.loads(report.read_text()) if report.exists() else None


def test_training(tmp_path):
    process, report = run(tmp_path, "--optimizer", "Lion", "--lr", "3e-3", "--dtype", "bfloat16")
    assert process.returncode == 0, process.stderr
    assert report["comparison"] is None
    (lion,) = report["runs"]
    assert lion["optimizer"] == "Lion"
    assert len(lion["losses"]) == 30
    # From all characters alike, ln(about 100) = 4.6, to less than 3.9 without the validation text being seen.
    assert 4.4 < lion["losses"][0] < 4.9
    assert lion["validation_loss"] < 3.9
    assert lion["step_ms"] > 0
    assert 0 < lion["step_share"] < 1


def test_curves_of_one_optimizer_coincide(tmp_path):
    process, report = run(tmp_path, "--compare", "torch.AdamW:fused", "AdamW")
    assert process.returncode == 0, process.stderr
    comparison = report["comparison"]
    assert comparison["coincide"]
    assert comparison["steps_compared"] == 20
    assert comparison["difference"] <= comparison["bound"] < 1e-3
    theirs, ours = report["runs"]
    assert [theirs["optimizer"], ours["optimizer"]] == ["torch.AdamW:fused", "AdamW"]
    assert theirs["losses"][0] == ours["losses"][0]
    assert ours["validation_loss"] < 3.9
    assert "times as long" in process.stdout


def test_curves_of_two_optimizers_do_not(tmp_path):
    """Adam and AdamW differ here in a decay of 0.01 only, which is enough to be found."""
    process, report = run(tmp_path, "--compare", "AdamW", "torch.Adam")
    assert process.returncode == 1
    assert "do not coincide" in process.stderr
    assert not report["comparison"]["coincide"]


def test_muon(tmp_path):
    """Hidden matrices by Muon, the rest by AdamW, in one object or in torch's two."""
    process, report = run(tmp_path, "--compare", "torch.Muon", "Muon", "--lr", "0.01", "--fallback-lr", "0.01")
    assert process.returncode == 0, process.stdout + process.stderr
    theirs, ours = report["runs"]
    assert [theirs["optimizer"], ours["optimizer"]] == ["torch.Muon", "Muon"]
    assert theirs["losses"][0] == ours["losses"][0]
    assert ours["validation_loss"] < 3.7
    assert report["settings"]["fallback_lr"] == 0.01


def test_two_processes_give_the_curve_of_one(tmp_path):
    """Sums over the batch and for the norm are taken in another order, and explain how far the two curves are apart.

    The bound is that of --compare. A process that trains on its half of each batch alone goes beyond it.
    """
    settings = TINY | {"steps": 12}
    path = tmp_path / "report.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    sizes = [f"--{name}={value}" for name, value in settings.items()]
    command = [*launcher, "--nproc-per-node=2", EXAMPLE, *sizes, "--optimizer=Muon", "--json", path]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=120)
    assert process.returncode == 0, process.stderr
    sharded = json.loads(path.read_text())["runs"][0]["losses"]

    torch.set_num_threads(1)
    text, example = Text(), runpy.run_path(str(EXAMPLE))
    options = settings | {"seed": 0, "dtype": "float32", "lr": None, "fallback_lr": 3e-3, "max_norm": 1.0}
    alone, nudged, half = (example["Run"]("Muon", text.vocabulary, options) for _ in range(3))
    nudged.nudge(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(options["seed"])
    for _ in range(settings["steps"]):
        x, y = sample(text.training, settings["batch"], settings["context"], generator)
        alone.advance(x, y)
        nudged.advance(x, y)
        half.advance(*(part[: settings["batch"] // 2] for part in (x, y)))
    assert all(map(math.isfinite, sharded))
    comparison = example["compare"](alone, SimpleNamespace(losses=sharded, step=alone.step), nudged)
    assert comparison["coincide"], comparison
    assert not example["compare"](alone, half, nudged)["coincide"]


def test_a_batch_that_cannot_be_divided(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    process, report = run(tmp_path)
    assert process.returncode == 2
    assert "--batch 4 is no multiple of the 3 processes" in process.stderr
    assert report is None


@pytest.mark.parametrize("name", ["torch.Lion", "torch.Muon:fused", "Lion:quick", "Engine"])
def test_unknown_optimizer(tmp_path, name):
    process, report = run(tmp_path, "--optimizer", name)
    assert process.returncode == 2
    assert f"'{name}' is none of" in process.stderr
    assert report is None


def sweep(tmp_path, *arguments):
    """The finished process, and the rows that it wrote."""
    path = tmp_path / "rows.csv"
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    process = subprocess.run([sys.executable, SWEEP, *sizes, "--csv", path, *arguments], capture_output=True, text=True)
    return process, list(csv.DictReader(path.open())) if path.exists() else None


def test_precision(tmp_path):
    """A run for each precision, the coarser the further from fp32's products; fp32 comes first, asked for or not."""
    path = tmp_path / "rows.csv"
    sizes = [f"--{name}={value}" for name, value in TINY.items() if name != "threads"]
    chosen = [f"--precision={name}" for name in ("bf16", "tf32", "tf32x3")]
    command = [sys.executable, PRECISION, *sizes, "--steps=6", "--seed=3", *chosen, "--csv", path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader(path.open()))
    assert [(row["precision"], row["seed"], row["steps"]) for row in rows] == [
        (name, "3", "6") for name in ("fp32", "bf16", "tf32", "tf32x3")
    ]
    fp32, bf16, tf32, tf32x3 = (float(row["error"]) for row in rows)
    assert max(fp32, tf32x3) < tf32 < bf16
    # One factor, Q, is orthogonal, with sides of at most n = 4·32: ‖AQ‖F = ‖A‖F and ‖|A||Q|‖F ≤ √n·‖A‖F. So the sums
    # are off by √n·n·2^−24 at most (Q's own departure from orthogonality is of second order), and numbers of p bits,
    # 2^−p of themselves, take the product off by 2^−p for A and √n·2^−p for Q. As sums of two such numbers they
    # are off by 2^−2p each, the product that is left out is as small as that, and there are two sums of products more.
    root = math.sqrt(4 * TINY["width"])
    sums = root**3 * 2.0**-24
    assert fp32 < sums
    assert tf32 < sums + (1.0 + root) * 2.0**-11 + root * 2.0**-22
    assert bf16 < sums + (1.0 + root) * 2.0**-8 + root * 2.0**-16
    assert tf32x3 < sums + 2.0 * root * 2.0**-24 + (1.0 + 2.0 * root) * 2.0**-22
    assert float(rows[0]["apart"]) == 0.0 < float(rows[3]["apart"])
    # Better than to hold all characters for equally likely.
    assert all(0.0 < float(row["final_loss"]) < math.log(Text().vocabulary) for row in rows)
    machine = report.machine()
    assert all(row["device"] == machine["device"] and row["torch"] == machine["torch"] for row in rows)
    assert {row["threads"] for row in rows} == {"1"}


def test_sweep(tmp_path):
    """Every run is a row; the target is the first optimizer's mean final loss at its best rate."""
    factors = ("--factor", "1", "--factor", "1e5")
    process, rows = sweep(tmp_path, "AdamW", "Muon", *factors, "--seeds", "2", "--every", "10")
    assert process.returncode == 0, process.stderr
    assert {(row["device"], row["threads"]) for row in rows} == {(report.machine()["device"], "1")}
    keys = [(row["optimizer"], float(row["lr"]), int(row["seed"])) for row in rows]
    rates = (("AdamW", 0.003), ("AdamW", 300.0), ("Muon", 0.02), ("Muon", 2000.0))
    assert keys == [(name, lr, seed) for name, lr in rates for seed in range(2)]
    (target,) = {float(row["target"]) for row in rows}
    assert target == pytest.approx(sum(float(row["final_loss"]) for row in rows[:2]) / 2, rel=1e-12)
    for row in rows:
        if float(row["final_loss"]) <= target:
            assert int(row["steps_to_target"]) in (10, 20, 30)
        if float(row["lr"]) >= 300.0:
            assert float(row["final_loss"]) > 4.0
            assert row["steps_to_target"] == ""
    # The one seed of two whose loss is below their mean has reached it.
    assert any(row["steps_to_target"] for row in rows[:2])
    assert "0.003 (least or greatest tried)" in process.stdout


def test_sweep_of_an_unknown_optimizer(tmp_path):
    process, rows = sweep(tmp_path, "AdamW", "Moun")
    assert process.returncode == 2
    assert "'Moun' is none of" in process.stderr
    assert rows is None
