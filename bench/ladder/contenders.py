"""Who races: one row for each optimizer, with its grid of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stepladder as sl
from stepladder.bench.ladder import essay
from stepladder.bench.ladder.essay import Step
from stepladder.bench.ladder.tasks import Students
from stepladder.optim.base import Optimizer


@dataclass(frozen=True)
class Preset:
    """A setting of the experiment.

    Attributes:
        name: What `--preset` takes.
        dtype: Of weights and data.
        backend: Of our optimizers; None is the fused kernels.
        seeds: How many.
        steps: T; None leaves it to the task.
        every: Steps between two records of the loss; None leaves it to the task.
        essays: Only the essay's task, and where none is named only its optimizers; rules are the
            essay's, and grids are tried whole. Other presets leave to the task how many rates are tried.
    """

    name: str
    dtype: torch.dtype
    backend: str | None
    seeds: int
    steps: int | None = None
    every: int | None = None
    essays: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("essay", torch.float64, "reference", 3, 4000, 1, True),
        Preset("fast", torch.float32, None, 1),
    )
}


@dataclass(frozen=True)
class Contender:
    """An optimizer in the race.

    Attributes:
        name: What `--optimizer` takes.
        cls: Our class.
        rates: The grid, ascending.
        options: Arguments beside the learning rate.
        essay: The rule of the preset "essay" where the package has another.
        essays: Whether the essay races it.
        apart: It takes a norm of a parameter, or makes blocks of it, so that no two seeds may share one.
        middle: Where in the grid the rates have their middle that are tried where a task takes but three.
    """

    name: str
    cls: type[Optimizer]
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    essay: Callable[[Sequence[Tensor]], Step] | None = None
    essays: bool = False
    apart: bool = False
    middle: int = 2

    def grid(self, count: int | None) -> tuple[float, ...]:
        """All learning rates, or so many around the middle one."""
        if count is None:
            return self.rates
        first = self.middle - count // 2
        return self.rates[first : first + count]

    def begin(self, students: Students, preset: Preset, rate: float) -> Step:
        """What steps these networks: it is called with the part of the peak rates that a step takes."""
        if preset.essays and self.essay is not None:
            rule = self.essay(students.groups(None, False))
            return lambda part: rule(rate * part)
        groups = students.groups(getattr(self.cls, "algorithm", None), self.apart)
        optimizer = self.cls(groups, lr=rate, backend=preset.backend, **self.options)
        peaks = [group["lr"] for group in optimizer.param_groups]
        return partial(_step, optimizer, peaks)


def _step(optimizer: Optimizer, peaks: Sequence[float], part: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * part
    optimizer.step()


_SMALL = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_LION = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# Of steps in units of the weights' norm.
_RELATIVE = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_PLAIN_MOMENTUM = {"momentum": 0.9, "momentum_form": "sum", "nesterov": False}
_MUON = _PLAIN_MOMENTUM | {"adjust_lr_fn": "essay"}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("sgd", sl.SGD, (0.03, 0.1, 0.3, 1.0, 3.0), essays=True),
        Contender("momentum", sl.SGD, (0.01, 0.03, 0.1, 0.3, 1.0), {"momentum": 0.9}, essays=True, middle=3),
        Contender("adagrad", sl.Adagrad, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), essay=essay.adagrad, middle=3),
        Contender("rmsprop", sl.RMSprop, _SMALL, essay=essay.rmsprop, middle=3),
        Contender("adam", sl.Adam, _ADAM, essays=True, middle=3),
        Contender("amsgrad", sl.Adam, _ADAM, {"amsgrad": True}, middle=3),
        Contender("adamw", sl.AdamW, _ADAM, {"weight_decay": 0.0}, essays=True, middle=3),
        Contender("signsgd", sl.SignSGD, _SMALL, essays=True, middle=3),
        Contender("signum", sl.SignSGD, _LION, {"momentum": 0.9}, middle=3),
        Contender("lion", sl.Lion, _LION, essays=True),
        # A thousandth of the rate, by the trust coefficient, and ten times that by momentum.
        Contender("lars", sl.LARS, (0.3, 1.0, 3.0, 10.0, 30.0), apart=True),
        Contender("lamb", sl.LAMB, _ADAM, apart=True),
        Contender("muon", sl.Muon, _ADAM, _MUON | {"weight_decay": 0.0}, essays=True),
        Contender("muonw", sl.Muon, _ADAM, _MUON | {"weight_decay": 0.01}),
        Contender("normuon", sl.Muon, _ADAM, _MUON | {"weight_decay": 0.0, "variant": "normuon"}),
        Contender("adamuon", sl.Muon, _ADAM, _PLAIN_MOMENTUM | {"weight_decay": 0.0, "variant": "adamuon"}),
        # Small matrices would be merged to vectors otherwise.
        Contender("shampoo", sl.Shampoo, _ADAM, {"merge_dims": False}, essay.shampoo, True, True, 3),
        Contender("soap", sl.SOAP, _ADAM, {"weight_decay": 0.0}, apart=True),
        Contender("muonh", sl.MuonH, _RELATIVE, _PLAIN_MOMENTUM, essays=True),
    )
}
