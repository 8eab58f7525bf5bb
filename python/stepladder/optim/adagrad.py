"""AdaGrad, as torch.optim.Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder import backends
from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params
from stepladder.optim.state import create_state, step_device


class Adagrad(Optimizer):
    r"""AdaGrad.

    g ← g + λw;  G ← G + g²;  w ← w − η/(1 + (t − 1)δ) · g/(√G + ε). The essay puts ε inside the root.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16, fp16 or complex.
        lr: Learning rate η.
        lr_decay: δ.
        weight_decay: λ, added to the gradient.
        initial_accumulator_value: What G starts from.
        eps: ε.
        foreach: Accepted for compatibility, without effect.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: Duchi, Hazan & Singer, Adaptive Subgradient Methods, JMLR 2011.
    """

    rules = ("adagrad",)
    timed = True

    def __init__(  # type: ignore[misc]  # a name that options has too
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults, **options)
        # As torch's: the sums exist from the start, so that share_memory() can share them.
        for group in self.param_groups:
            for p in group["params"]:
                device = step_device(backends.choose(self._backend, p.device.type), p)
                create_state(type(self), self.state[p], p, group, device)

    @staticmethod
    def rule(group: Group) -> str:
        return "adagrad"

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.at_least_zero(group, "lr_decay", "lr_decay value")
        checks.weight_decay(group)
        checks.at_least_zero(group, "initial_accumulator_value", "initial_accumulator_value value")
        checks.epsilon(group)

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        start = group["initial_accumulator_value"]
        value = complex(start, start) if param.is_complex() else start
        return torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def share_memory(self) -> None:
        """Move the sums to shared memory, for processes that train together."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"].share_memory_()
