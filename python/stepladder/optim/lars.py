"""LARS."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


class LARS(Optimizer):
    r"""LARS: a learning rate for each tensor from the ratio of its norms.

    ρ = ξ‖w‖/(‖g‖ + λ‖w‖ + ε), 1 where ‖w‖ or ‖g‖ is 0;  v ← μv + ρ(g + λw);  w ← w − ηv.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16.
        lr: Learning rate η.
        momentum: μ.
        weight_decay: λ.
        trust_coefficient: ξ.
        eps: ε.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: You, Gitman & Ginsburg, arXiv:1708.03888.
    """

    rules = ("lars",)
    complex_parameters = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "lars"

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.at_least_zero(group, "momentum", "momentum value")
        checks.weight_decay(group)
        checks.at_least_zero(group, "trust_coefficient", "trust_coefficient value")
        checks.epsilon(group)
