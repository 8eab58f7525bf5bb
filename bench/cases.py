"""What is measured: one row for each optimizer of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import stepladder as sl
from stepladder.bench import foreach
from stepladder.optim.base import Optimizer
from stepladder.optim.state import RULES

# Those of matrices, by what `--optimizer` takes.
MATRIX_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "muon": sl.Muon,
    "normuon": partial(sl.Muon, variant="normuon"),
    "muonh": sl.MuonH,
    "shampoo": sl.Shampoo,
    "soap": sl.SOAP,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One optimizer in one setting.

    Attributes:
        name: What `--optimizer` takes.
        ours: Our class.
        options: Hyper-parameters, by the names that ours and torch's share. The learning rate is that of the
            check: large enough to move bf16 parameters.
        torch: torch.optim's class of this rule, where it has one.
        foreach: Stands in for it where it has none.
    """

    name: str
    ours: type[Optimizer]
    options: dict[str, Any]
    torch: type[torch.optim.Optimizer] | None = None
    foreach: type[foreach.ForeachOptimizer] | None = None

    @property
    def states(self) -> list[str]:
        """The names of a parameter's state tensors."""
        return list(self._rule["states"])

    @property
    def norms(self) -> bool:
        """Whether the update takes norms of whole tensors."""
        return bool(self._rule["norms"])

    @property
    def _rule(self) -> dict[str, Any]:
        return RULES[self.ours.rule(self.ours([torch.nn.Parameter(torch.empty(0))], **self.options).defaults)]


_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}

CASES = {
    case.name: case
    for case in (
        Case("sgd", sl.SGD, {"lr": 1e-3}, torch.optim.SGD),
        Case("momentum", sl.SGD, {"lr": 1e-3, "momentum": 0.9}, torch.optim.SGD),
        Case("nesterov", sl.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        Case("adagrad", sl.Adagrad, {"lr": 1e-3}, torch.optim.Adagrad),
        Case("rmsprop", sl.RMSprop, {"lr": 1e-3}, torch.optim.RMSprop),
        Case("rmsprop-centered", sl.RMSprop, {"lr": 1e-3, "centered": True}, torch.optim.RMSprop),
        Case("rmsprop-momentum", sl.RMSprop, {"lr": 1e-3, "momentum": 0.9}, torch.optim.RMSprop),
        Case("adam", sl.Adam, _ADAM, torch.optim.Adam),
        Case("amsgrad", sl.Adam, _ADAM | {"amsgrad": True}, torch.optim.Adam),
        Case("adamw", sl.AdamW, _ADAM | {"weight_decay": 1e-2}, torch.optim.AdamW),
        Case("signsgd", sl.SignSGD, {"lr": 1e-3}, foreach=foreach.SignSGD),
        Case("signum", sl.SignSGD, {"lr": 1e-3, "momentum": 0.9}, foreach=foreach.Signum),
        Case("lion", sl.Lion, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2}, foreach=foreach.Lion),
        # A large rate, of which the trust coefficient takes a thousandth.
        Case("lars", sl.LARS, {"lr": 30.0, "momentum": 0.9, "weight_decay": 1e-4}, foreach=foreach.LARS),
        Case(
            "lamb",
            sl.LAMB,
            {"lr": 3e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2},
            foreach=foreach.LAMB,
        ),
    )
}
