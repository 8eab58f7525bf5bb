"""Muon, as torch.optim.Muon, with its variants and with other algorithms for other groups."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder.coefficients import Coefficients
from stepladder.optim import checks
from stepladder.optim.base import Group, Params
from stepladder.optim.mixed import MatrixOptions
from stepladder.optim.orthogonalized import (
    EXTRAS,
    Orthogonalized,
    choice,
    given,
    layout_of,
    neurons,
    not_negative,
)
from stepladder.reference.muon import ADJUSTMENTS, adjustment

VARIANTS = (None, "normuon", "adamuon")


class Muon(Orthogonalized):
    r"""Muon: momentum, orthogonalised by a Newton-Schulz iteration.

    u ← μu + (1 − μ)g;  O = NS((1 − μ)g + μu), without Nesterov NS(u);  w ← (1 − ηλ)w − ηsO.

    A parameter of two dimensions is a matrix, one of three a batch of matrices, and one of more, as a convolution's
    weight, is flattened to (first, all others). Each matrix of a batch, part or head is orthogonalised and scaled on
    its own. Fewer dimensions are refused: biases, norms, embeddings and output heads belong into groups with
    another `algorithm`.

    Keys of a group beside the arguments:

    - algorithm: "muon", or an elementwise one: "adamw", "lion", "sgd", or "momentum", which is SGD with 0.9. Such a
      group has the hyper-parameters and defaults of that optimizer of this package, not those given here.
    - split_sizes: Rows of each part of a fused weight, as (d, d, d) for queries, keys and values.
    - num_heads: Into how many equal matrices the rows are split; one number for all parts of `split_sizes`, or one
      for each. The groups of a grouped convolution likewise.
    - flatten: True flattens three dimensions too, as of a one-dimensional convolution; False makes batches of more
      than three.
    - fan_in_fan_out: True for weights that are stored as (in, out), as in GPT-2's Conv1D. The matrix is then the
      transposed one: `split_sizes` and `num_heads` are of its rows, the columns of what is stored, and s has m outputs
      and n inputs.

    Args:
        params: Parameters, named parameters, or groups of them; fp32, fp64, bf16 or fp16.
        lr: Learning rate η. At 0 the weights stay as they are, bit for bit.
        weight_decay: λ, by the unadjusted η.
        momentum: μ.
        nesterov: Take Nesterov's form.
        ns_coefficients: (a, b, c) for every step, a triple for each step, or the name of a set of
            `stepladder.coefficients`; None means "jordan".
        eps: Least norm that is divided by.
        ns_steps: How many steps; None means as many as there are triples. More repeat the last. Fewer take the first
            of a named set, unless that set means something only as a whole: this is refused, and so are fewer steps
            than triples given.
        adjust_lr_fn: s: None or "original" √max(1, m/n), "match_rms_adamw" 0.2√max(m, n), "spectral" √(m/n),
            "essay" √(max/min), or a number.
        maximize: Ascend instead.
        momentum_form: "ema" as above, or "sum": u ← μu + g, Nesterov g + μu.
        ns_method: As `stepladder.ops.newton_schulz` takes it.
        variant: "normuon": v ← β₂v + (1 − β₂)·mean of O² for each index of the longer dimension, O/√v rescaled to
            ‖O‖F. "adamuon": v ← β₂v + (1 − β₂)O², O/(√v + 1e-8) rescaled to 0.2√(mn), in place of s.
        beta2: β₂ of a variant.
        cautious_weight_decay: Decay only the elements that the update does not move away from zero.
        options: See `stepladder.optim.base.Options`, but for `stochastic_rounding`. `max_norm` clips the norm of all
            groups together. `capturable` goes with the backend "cuda" alone, and with no variant: a captured step
            reads a learning rate in a tensor on the GPU at each replay. `process_group` or `mesh`, as
            `stepladder.optim.mixed.MatrixOptions` says, divide the matrices over processes.

    Raises:
        ValueError: A hyper-parameter is out of range, or a shape does not fit.
        TypeError: A hyper-parameter has the wrong type.
        RuntimeError: The backend asked for cannot run here.

    Papers: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982; NorMuon: Li et al.,
    arXiv:2510.05491; AdaMuon: Si, Zhang & Shen, arXiv:2507.11005.
    """

    algorithm = "muon"
    can_be_captured = True
    optional_states = frozenset({"second_momentum_buffer"})
    keys = frozenset(
        {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | None = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int | None = 5,
        adjust_lr_fn: str | float | None = None,
        *,
        maximize: bool = False,
        momentum_form: str = "ema",
        ns_method: str = "auto",
        variant: str | None = None,
        beta2: float = 0.95,
        cautious_weight_decay: bool = False,
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        extras = {
            "maximize": maximize,
            "momentum_form": momentum_form,
            "ns_method": ns_method,
            "variant": variant,
            "beta2": beta2,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults | given(extras), **options)

    @classmethod
    def check(cls, group: Group) -> None:
        group = EXTRAS | group
        cls.check_matrices(group)
        not_negative(group, "weight_decay", "weight decay")
        fn = group["adjust_lr_fn"]
        number = isinstance(fn, numbers.Real) and not isinstance(fn, bool)
        if fn is not None and fn not in ADJUSTMENTS and not (number and 0.0 < fn < math.inf):
            raise ValueError(
                f"Adjust learning rate function {fn!r} is not supported: adjust_lr_fn must be None, "
                f"{', '.join(map(repr, ADJUSTMENTS))}, or a finite number above 0"
            )
        choice(group, "variant", VARIANTS)
        checks.at_least_zero(group, "beta2", "beta2 value", below=1.0)
        if group.get("capturable") and (group["variant"] is not None or group["cautious_weight_decay"]):
            raise ValueError(
                f"capturable=True does not go with variant={group['variant']!r} and "
                f"cautious_weight_decay={group['cautious_weight_decay']!r}, expected None and False"
            )
        if group["variant"] == "adamuon" and fn is not None:
            raise ValueError(
                f"adjust_lr_fn={fn!r} does not go with variant='adamuon', which scales updates itself: expected None"
            )

    @classmethod
    def states(cls, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group.get("variant") is None else ("momentum_buffer", "second_momentum_buffer")

    @classmethod
    def all_states(cls) -> set[str]:
        return {"momentum_buffer", "second_momentum_buffer"}

    @classmethod
    def shapes_of_state(cls, name: str, param: Tensor, group: Group) -> list[torch.Size] | None:
        if name != "second_momentum_buffer" or group.get("variant") != "normuon":
            return None
        return [neurons(shape) for shape in layout_of(param, group, "", cls.__name__).shapes(param)]

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        shape = Muon.state_shape(name, param, group)
        like = param if shape == param.shape else param.new_empty(shape)
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    @classmethod
    def scale(cls, group: Group, shape: torch.Size) -> float:
        # AdaMuon's own scale stands in place of this one.
        return 1.0 if group.get("variant") == "adamuon" else adjustment(group["adjust_lr_fn"], *shape[-2:])
