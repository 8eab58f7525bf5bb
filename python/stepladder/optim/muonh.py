"""MuonH: Muon on the sphere of each matrix's initial norm."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder.coefficients import Coefficients
from stepladder.optim.base import Group, Optimizer, Params
from stepladder.optim.matrix import MuonSettings
from stepladder.optim.mixed import MatrixOptions
from stepladder.optim.orthogonalized import EXTRAS, Orthogonalized, given, layout_of
from stepladder.reference.muon import frobenius


class MuonH(Orthogonalized):
    r"""MuonH, Muon with a hyperball: each matrix keeps the Frobenius norm that it began with.

    u ← μu + (1 − μ)g;  O = NS((1 − μ)g + μu), without Nesterov NS(u);  w ← R·(w + U)/‖w + U‖F with U = −ηR·O/‖O‖F.

    There is no decay, as the norm is given. R is measured before the first step and kept in the state as `radius`;
    norms are summed in fp64. Matrices are made of parameters, and other groups step by their `algorithm`, as in
    `stepladder.Muon`; `algorithm="muonh"` is the default.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16, and no
            matrix of them zero.
        lr: η, the length of a step in units of R. At 0 the weights stay as they are, bit for bit.
        momentum: μ.
        nesterov: Take Nesterov's form.
        ns_coefficients: As `stepladder.Muon` takes them.
        eps: Likewise.
        ns_steps: Likewise.
        maximize: Ascend instead.
        momentum_form: As `stepladder.Muon` takes it.
        ns_method: Likewise.
        options: Likewise.

    Raises:
        ValueError: A hyper-parameter is out of range, or a shape does not fit.
        TypeError: A hyper-parameter has the wrong type.
        RuntimeError: The backend asked for cannot run here.

    Paper: arXiv:2606.16899.
    """

    algorithm = "muonh"
    checks_start = True
    keys = frozenset({"lr", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | None = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int | None = 5,
        *,
        maximize: bool = False,
        momentum_form: str = "ema",
        ns_method: str = "auto",
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
        }
        extras = {"maximize": maximize, "momentum_form": momentum_form, "ns_method": ns_method}
        super().__init__(params, defaults | given(extras), **options)

    @classmethod
    def hyper_keys(cls) -> set[str]:
        return super().hyper_keys() - {"variant", "beta2", "cautious_weight_decay"}

    @classmethod
    def check(cls, group: Group) -> None:
        cls.check_matrices(EXTRAS | group)

    @classmethod
    def states(cls, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer", "radius")

    @classmethod
    def all_states(cls) -> set[str]:
        return {"momentum_buffer", "radius"}

    @classmethod
    def state_dtype(cls, name: str, param: Tensor, group: Group) -> torch.dtype:
        if name == "radius":
            return torch.float64 if param.dtype == torch.float64 else torch.float32
        return super().state_dtype(name, param, group)

    @classmethod
    def shapes_of_state(cls, name: str, param: Tensor, group: Group) -> list[torch.Size] | None:
        if name != "radius":
            return None
        return [shape[:-2] for shape in layout_of(param, group, "", cls.__name__).shapes(param)]

    @classmethod
    def check_start(cls, param: Tensor, group: Group, where: str) -> None:
        norms = radii(param, group)
        if param.numel() and not bool(((norms > 0.0) & norms.isfinite()).all()):
            bad = float(norms.reshape(-1)[((norms <= 0.0) | ~norms.isfinite()).reshape(-1)][0])
            raise ValueError(
                f"{where} has a matrix of norm {bad}, which MuonH would keep: expected a finite one above 0"
            )

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        if name == "radius":
            return radii(param, group).to(dtype)
        return Optimizer.initial_state(name, param, group, dtype)

    @classmethod
    def settings(cls, group: Group, rate: Tensor | None = None) -> MuonSettings:
        own: Group = {key: value for key, value in group.items() if key in cls.hyper_keys()}
        return super().settings(own, rate)


@torch.no_grad()
def radii(param: Tensor, group: Group) -> Tensor:
    """The norms of a parameter's matrices, in fp64. [...] of its only part, or all in a row"""
    parts, _ = layout_of(param, group, "", MuonH.__name__).matrices(param)
    norms = [frobenius(part)[..., 0, 0] for part in parts]
    return norms[0] if len(norms) == 1 else torch.cat([norm.reshape(-1) for norm in norms])
