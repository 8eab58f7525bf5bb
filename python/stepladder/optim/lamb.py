"""LAMB."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim.adam import check_adam
from stepladder.optim.base import Group, Optimizer, Options, Params


class LAMB(Optimizer):
    r"""LAMB: Adam's direction, scaled for each tensor to its weights' norm.

    r = (m/bc₁)/(√v/√bc₂ + ε) + λw with Adam's m and v;  w ← w − η(‖w‖/‖r‖)r, the ratio 1 where a norm is 0.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16.
        lr: Learning rate η.
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962.
    """

    rules = ("lamb",)
    timed = True
    complex_parameters = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "lamb"

    check = staticmethod(check_adam)
