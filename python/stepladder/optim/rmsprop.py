"""RMSprop, as torch.optim.RMSprop."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


class RMSprop(Optimizer):
    r"""RMSprop, also centered and with momentum.

    g ← g + λw;  v ← αv + (1 − α)g²;  d = √v + ε, centered √(v − a²) + ε with a ← a + (1 − α)(g − a);
    w ← w − ηg/d, with momentum b ← μb + g/d, w ← w − ηb. The essay puts ε inside the root.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16, fp16 or complex.
        lr: Learning rate η.
        alpha: α.
        eps: ε.
        weight_decay: λ, added to the gradient.
        momentum: μ; 0 keeps no buffer.
        centered: Divide by the gradient's standard deviation instead.
        capturable: Steps inside CUDA graphs.
        foreach: Accepted for compatibility, without effect.
        maximize: Ascend instead.
        differentiable: Accepted for compatibility; True is refused.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Papers: Tieleman & Hinton, Coursera lecture 6.5, 2012; Graves, arXiv:1308.0850 (centered).
    """

    rules = ("rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_centered_momentum")
    choosing = ("momentum", "centered")
    timed = True
    late_keys = frozenset({"momentum"})

    def __init__(  # type: ignore[misc]  # names that options has too
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(group["momentum"] > 0)

    @staticmethod
    def check(group: Group) -> None:
        checks.learning_rate(group)
        checks.epsilon(group)
        checks.at_least_zero(group, "momentum", "momentum value")
        checks.weight_decay(group)
        checks.at_least_zero(group, "alpha", "alpha value")
