"""SGD with momentum and Nesterov's form, as torch.optim.SGD."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


class SGD(Optimizer):
    r"""Stochastic gradient descent.

    g ← g + λw;  v ← μv + (1 − τ)g, at the first step v = g;  w ← w − ηv, Nesterov: w ← w − η(g + μv).

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16, fp16 or complex.
        lr: Learning rate η.
        momentum: μ; 0 keeps no state.
        dampening: τ.
        weight_decay: λ, added to the gradient.
        nesterov: Take Nesterov's form; needs momentum and no dampening.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Papers: Robbins & Monro 1951; Polyak 1964; Sutskever, Martens, Dahl & Hinton 2013.
    """

    rules = ("sgd", "momentum")
    choosing = ("momentum",)
    optional_states = frozenset({"momentum_buffer"})
    late_keys = frozenset({"nesterov"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "momentum" if group["momentum"] != 0 else "sgd"

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.at_least_zero(group, "momentum", "momentum value")
        checks.weight_decay(group)
        checks.number(group, "dampening")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening: "
                f"got momentum={group['momentum']}, dampening={group['dampening']}"
            )
