"""Adam and AMSGrad, as torch.optim.Adam."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params


def check_adam(group: Group) -> None:
    """Refuse hyper-parameters that no member of Adam's family can take."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)


class Adam(Optimizer):
    r"""Adam.

    g ← g + λw;  m ← m + (1 − β₁)(g − m);  v ← β₂v + (1 − β₂)g²;
    w ← w − (η/bc₁) m/(√v/√bc₂ + ε) with bcᵢ = 1 − βᵢᵗ; AMSGrad takes the largest v so far.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16, fp16 or complex.
        lr: Learning rate η.
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ, added to the gradient unless `decoupled_weight_decay`.
        amsgrad: Keep the largest second moment.
        maximize: Ascend instead.
        decoupled_weight_decay: Decay as AdamW does.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Papers: Kingma & Ba, arXiv:1412.6980; Reddi, Kale & Kumar, ICLR 2018 (AMSGrad).
    """

    rules = ("adam", "adam_amsgrad", "adamw", "adamw_amsgrad")
    choosing = ("amsgrad", "decoupled_weight_decay")
    timed = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(group: Group) -> str:
        return ("adamw" if group["decoupled_weight_decay"] else "adam") + "_amsgrad" * bool(group["amsgrad"])

    check = staticmethod(check_adam)
