"""AdamW, as torch.optim.AdamW."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from stepladder.optim.adam import Adam
from stepladder.optim.base import Options, Params


class AdamW(Adam):
    r"""AdamW: Adam with decoupled weight decay.

    w ← (1 − ηλ)w, then Adam's step without λ in the gradient.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16, fp16 or complex.
        lr: Learning rate η.
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        amsgrad: Keep the largest second moment.
        maximize: Ascend instead.
        options: See `stepladder.optim.base.Options`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        RuntimeError: The backend asked for cannot run here.

    Paper: Loshchilov & Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            **options,
        )
