"""Results of races that were never run, and what a case of real ones needs."""

from __future__ import annotations

import math

import pytest

from stepladder.bench.ladder.race import Lap, Results, Run, Setting, Standing
from stepladder.bench.ladder.tasks import TASKS


def skip_without(task):
    """Where a task's data are not installed."""
    if package := TASKS[task].missing:
        pytest.skip(f"{package} is not installed and has the data: pip install 'stepladder[{task}]'")


def skip_without_plots():
    """Where what draws pictures and pages is not installed."""
    for package in ("matplotlib", "plotly"):
        pytest.importorskip(package, reason="draws the race; pip install 'stepladder[plot]'")


def made_run(rate, seed, final, steps_to_target=None, name="adamw"):
    diverged = 7 if math.isinf(final) else None
    return Run(Lap(name, rate, seed), final, steps_to_target, diverged, [0, 10], [1.0, 0.5])


def standing(rows, seeds=2, rates=(0.01, 0.03, 0.1), name="adamw"):
    """Of rows of rate, seed, final and perhaps steps to the target."""
    return Standing(name, list(rates), seeds, [made_run(*row, name=name) for row in rows])


def made_results():
    """An essay's race of sgd and muon, with 6 of its 12 runs."""
    first = standing([(0.03, 0, 0.01, 80), (0.03, 1, 0.02, 90), (0.1, 0, math.inf), (0.1, 1, 0.2)], name="muon")
    second = standing([(0.03, 0, 0.001, 10), (0.03, 1, 0.04)], name="sgd")
    machine = {"date": "2026-11-22", "device": "none", "cores": 2, "threads": 1, "kernels": "avx2", "compiler": "GNU"}
    machine |= {"stepladder": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}
    return Results(machine, Setting("teacher", "essay", 100, 2), [second, first])
