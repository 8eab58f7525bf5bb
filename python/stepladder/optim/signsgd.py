"""SignSGD, and Signum where it has momentum."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


class SignSGD(Optimizer):
    r"""SignSGD; with momentum, Signum.

    w ← (1 − ηλ)w − η sign(g), Signum: m ← βm + (1 − β)g, w ← (1 − ηλ)w − η sign(m). sign(0) is 0, and NaN
    stays NaN.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16.
        lr: Learning rate η.
        momentum: β, in [0, 1); 0 keeps no state.
        weight_decay: λ, decoupled.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: Bernstein, Wang, Azizzadenesheli & Anandkumar, arXiv:1802.04434.
    """

    rules = ("signsgd", "signum")
    choosing = ("momentum",)
    optional_states = frozenset({"exp_avg"})
    complex_parameters = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "signum" if group["momentum"] != 0 else "signsgd"

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.at_least_zero(group, "momentum", "momentum value", below=1.0)
        checks.weight_decay(group)
