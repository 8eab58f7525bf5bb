"""Lion."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


class Lion(Optimizer):
    r"""Lion: the sign of an interpolated momentum.

    w ← (1 − ηλ)w − η sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g. sign(0) is 0, and NaN stays NaN.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16.
        lr: Learning rate η, about a third to a tenth of AdamW's.
        betas: (β₁, β₂).
        weight_decay: λ, decoupled; about three to ten times AdamW's.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.
    """

    rules = ("lion",)
    complex_parameters = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "lion"

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.betas(group)
        checks.weight_decay(group)
