"""Functions over the kernels, without an optimizer around them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from stepladder import _C, backends, ranges, reference
from stepladder.gram import update_gram_
from stepladder.matrix_root import inverse_root
from stepladder.newton_schulz import newton_schulz
from stepladder.optim import sharding
from stepladder.optim.engine import check_gradient, clip_factor, new_plan
from stepladder.optim.sharding import local
from stepladder.orthonormalize import orthonormalize
from stepladder.reference.matrix_root import RootInfo, RootStatus
from stepladder.reference.orthonormalize import BasisInfo

__all__ = [
    "BasisInfo",
    "RootInfo",
    "RootStatus",
    "clip_grad_norm_",
    "inverse_root",
    "newton_schulz",
    "orthonormalize",
    "update_gram_",
]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm is at most `max_norm`.

    On a GPU nothing waits for the device, unless `error_if_nonfinite` asks for it.

    As `torch.nn.utils.clip_grad_norm_`: gradients are multiplied by min(1, max_norm/(norm + 1e-6)). The norm is
    summed by a fixed tree in fp32 (fp64 for fp64 parameters), the same bits with any number of threads, and
    where nothing has to be scaled, nothing is written.

    Of distributed parameters (DTensors) the norm is that of the whole tensors: every rank must call this, with the same
    parameters, whether it has gradients or not. The number of collectives does not grow with that of the parameters.

    Args:
        parameters: Parameters, any of them without a gradient.
        max_norm: The largest norm allowed.
        norm_type: Order of the norm; may be math.inf.
        error_if_nonfinite: Raise for a norm that is infinite or NaN.
        foreach: Accepted for compatibility, without effect.
        found_inf: One element; set to 1 where a gradient has an infinite or NaN element, else to 0.

    Returns:
        The norm before clipping, a scalar of fp32, or of fp64 where a parameter is.

    Raises:
        RuntimeError: `error_if_nonfinite` and the norm is not; or a gradient is sparse.
        ValueError: `max_norm` is negative or NaN.
        TypeError: A gradient is distributed otherwise than its parameter.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0.0:
        raise ValueError(f"max_norm={max_norm} is out of range, expected at least 0")
    if found_inf is not None and found_inf.numel() != 1:
        raise ValueError(f"found_inf has shape {tuple(found_inf.shape)}, expected one element")
    graded = [p for p in params if p.grad is not None]
    grads: list[Tensor] = []
    for index, p in enumerate(graded):
        assert p.grad is not None
        check_gradient(p.grad, p, "clip_grad_norm_", f"parameter {index}")
        sharding.check_placements(p, f"parameter {index}")
    for p in graded:
        assert p.grad is not None
        if sharding.is_distributed(p):
            p.grad = sharding.settled(p.grad, p)
        elif p.grad.is_conj() or p.grad.is_neg():
            p.grad = p.grad.resolve_conj().resolve_neg()
        grads.append(p.grad)
    distributed = any(map(sharding.is_distributed, params))

    threads = torch.get_num_threads()
    plan = _plan()
    plan.reset([({"params": graded}, "", ())])
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in graded)
    result_dtype = torch.float64 if wide else torch.float32
    try:
        chosen = {kind: backends.choose(None, kind) for kind in {p.device.type for p in graded}}
        with ranges.phase("bind"):
            others = plan.bind_gradients([chosen[p.device.type] for p in graded])
        device = plan.only_device()
        fixed_tree = norm_type in (1.0, 2.0, math.inf)
        if (
            device is not None
            and fixed_tree
            and not distributed
            and (found_inf is None or found_inf.device == grads[0].device)
        ):
            norm_and_factor = torch.empty(2, dtype=torch.float64, device=grads[0].device)
            flag = torch.empty(1, dtype=torch.float32, device=grads[0].device)
            if error_if_nonfinite:
                _raise_if_nonfinite(plan.norm(norm_type, 1.0, threads)[0], norm_type)
            with ranges.kernel("clip"):
                plan.clip_on_device(norm_type, max_norm, norm_and_factor.data_ptr(), flag.data_ptr())
            if found_inf is not None:
                found_inf.copy_(flag.reshape(found_inf.shape))
            torch._C._increment_version(grads)
            return norm_and_factor[0].to(result_dtype)
        if fixed_tree:
            with ranges.phase("norm"):
                norm, finite = plan.norm(norm_type, 1.0, threads)
            if others or distributed:
                partials = plan.partials()
                for index in others:
                    g = reference.widened(local(grads[index]), local(graded[index]))
                    partials[index] = reference.partial_norm(g, norm_type)
                    finite = finite and bool(g.isfinite().all())
                if distributed:
                    partials = _whole_partials(partials, graded, params, math.isinf(norm_type))
                    finite = not sharding.on_any_rank(not finite, params)
                norm = reference.total_norm(partials, norm_type)
        else:
            finite = all(bool(local(g).isfinite().all()) for g in grads)
            if distributed:
                powers = [float(local(g).double().abs().pow(norm_type).sum()) for g in grads]
                norm = sum(_whole_partials(powers, graded, params, False)) ** (1.0 / norm_type)
                finite = not sharding.on_any_rank(not finite, params)
            else:
                norm = float(torch.nn.utils.get_total_norm(grads, norm_type))
        if found_inf is not None:
            found_inf.fill_(0.0 if finite else 1.0)
        if error_if_nonfinite:
            _raise_if_nonfinite(norm, norm_type)
        factor = clip_factor(norm, max_norm)
        if factor != 1.0:
            with ranges.phase("scale"):
                plan.scale_gradients(factor, threads)
            for index in others:
                local(grads[index]).mul_(factor)
            torch._C._increment_version(grads)
    finally:
        plan.reset([])
    return torch.tensor(norm, dtype=result_dtype, device=graded[0].device if graded else torch.device("cpu"))


def _whole_partials(partials: list[float], graded: list[Tensor], params: list[Tensor], largest: bool) -> list[float]:
    """The parts of all parameters' norm over all ranks, from those that have a gradient here."""
    parts = dict(zip(map(id, graded), partials, strict=True))
    return sharding.whole_partials([parts.get(id(p), 0.0) for p in params], params, largest)


def _raise_if_nonfinite(norm: float, norm_type: float) -> None:
    if not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


_plans = threading.local()


def _plan() -> _C.StepPlan:
    """This thread's plan: its memory on a GPU is kept from call to call."""
    if not hasattr(_plans, "plan"):
        _plans.plan = new_plan()
    plan: _C.StepPlan = _plans.plan
    return plan
