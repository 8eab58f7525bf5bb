"""Parameters as matrices, and the step of all matrices of an optimizer together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepladder import ops, ranges, reference
from stepladder.coefficients import CoefficientSet, Triple, resolve
from stepladder.newton_schulz import (
    KERNEL_DTYPES,
    TORCH,
    Matrices,
    form_for,
    matrix_unit,
    options_of,
    run_compiled,
    view_of,
    work_of,
)
from stepladder.reference.muon import adamuon_update, frobenius, normuon_update

DOUBLE = torch.float64


@dataclass(frozen=True, slots=True)
class MuonSettings:
    """What a group says about its matrices; see `stepladder.Muon` for most of it.

    Attributes:
        lr: NaN where the kernels read it from `rate`.
        sign: -1 to ascend.
        rate: The learning rate in a tensor on the device.
    """

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    momentum_form: str
    ns_coefficients: str | Triple | tuple[Triple, ...]
    ns_steps: int | None
    eps: float
    ns_method: str
    variant: str | None
    beta2: float
    cautious_weight_decay: bool
    sign: float
    rate: Tensor | None = field(default=None, compare=False)


@dataclass(slots=True)
class MuonJob:
    """A matrix, or several of one shape, to be stepped.

    Attributes:
        param: [..., m, n], to be written; of any floating-point dtype and strides, as all that follow.
        grad: [..., m, n].
        buffer: [..., m, n], the momentum buffer, to be written.
        settings: Of its group.
        scale: What the learning rate of the update, not of the decay, is multiplied by.
        backend: Which steps it; "reference" means the functions of stepladder.reference.
        second: [..., m, 1] or [..., 1, n] for NorMuon, [..., m, n] for AdaMuon, to be written.
        radius: [...], the norm to be kept, for MuonH.
    """

    param: Tensor
    grad: Tensor
    buffer: Tensor
    settings: MuonSettings
    scale: float
    backend: str
    second: Tensor | None = None
    radius: Tensor | None = None

    @property
    def arithmetic(self) -> torch.dtype:
        """What is computed in; half types are storage alone."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """How a parameter is made of matrices.

    Attributes:
        order: Dimensions in memory order, where all but the first are flattened; None where they stay.
        split_sizes: Rows of each part, or None.
        heads: For each part how many equal matrices its rows make, or None.
        transposed: Stored as (in, out), so that its columns are the rows of the matrix.
    """

    order: tuple[int, ...] | None
    split_sizes: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    transposed: bool = False

    def matrices(self, x: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """A tensor of the parameter's shape as its parts, each [..., m, n].

        Returns:
            The parts, and where they could not be views of x: what they are views of, and x in its shape, so that
            the one can be copied back to the other.
        """
        copied = None
        if self.order is not None:
            x = x.permute(self.order)
            flat = x.flatten(1)
            if x.numel() and flat.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                copied = flat, x
            x = flat
        if self.transposed:
            x = x.mT
        parts = list(torch.split(x, list(self.split_sizes), -2)) if self.split_sizes is not None else [x]
        if self.heads is not None:
            parts = [torch.unflatten(part, -2, (h, -1)) for part, h in zip(parts, self.heads, strict=True)]
        return parts, copied

    def shapes(self, param: Tensor) -> list[torch.Size]:
        """The shapes of the parts."""
        return [part.shape for part in self.matrices(torch.empty(param.shape, device="meta"))[0]]


def memory_order(param: Tensor) -> tuple[int, ...]:
    """Dimensions with the first in front, the others from the largest stride to the smallest."""
    strides = param.stride()
    return (0, *sorted(range(1, param.ndim), key=lambda d: -strides[d]))


@torch.no_grad()
def muon_step(jobs: list[MuonJob], backend: str | None = None, factor: float = 1.0) -> None:
    """Step all matrices: one iteration over all of them that share its settings, the rest by lists.

    Momentum, then decay, then the update by NS(u), as torch.optim.Muon. A learning rate of 0 leaves weights as they
    are, bit for bit.

    Args:
        jobs: What to step; no two of them may share memory.
        backend: For `stepladder.ops.newton_schulz`.
        factor: Multiplies the gradients.
    """
    for job in jobs:
        if job.backend == "reference":
            with ranges.kernel("reference"):
                _step_by_reference(job, factor)
    jobs = [job for job in jobs if job.backend != "reference"]
    unit = matrix_unit() if any(job.backend == "cpu" for job in jobs) else TORCH
    fused: list[MuonJob] = []
    rest: list[MuonJob] = []
    for job in jobs:
        (fused if _fuses(job, unit) else rest).append(job)
    if fused:
        _step_fused(fused, factor, unit)
    jobs = rest
    updates: dict[int, Tensor] = {}
    for bunch in _bunches(jobs, lambda job: (job.settings, job.arithmetic, job.param.device)):
        with ranges.kernel("momentum", partial(_momentum_work, bunch)):
            found = _momentum(bunch, factor)
        for job, update in zip(bunch, found, strict=True):
            updates[id(job)] = update
    # With a learning rate of 0 only a second moment has a use for the update.
    moving = [job for job in jobs if job.settings.lr != 0.0 or job.second is not None]
    for bunch in _bunches(moving, _iteration):
        matrices = [updates[id(job)] for job in bunch]
        for job, orthogonal in zip(bunch, _orthogonalise(bunch, matrices, backend), strict=True):
            updates[id(job)] = orthogonal
    for bunch in _bunches(moving, lambda job: (job.settings, job.scale, job.param.dtype, job.param.device)):
        with ranges.kernel("update", partial(_update_work, bunch)):
            _apply(bunch, [updates[id(job)] for job in bunch])


def _momentum_work(jobs: list[MuonJob]) -> ranges.Work:
    return ranges.Work(bytes=sum(job.grad.nbytes + 2 * job.buffer.nbytes for job in jobs))


def _update_work(jobs: list[MuonJob]) -> ranges.Work:
    return ranges.Work(bytes=sum(2 * job.param.nbytes + job.param.numel() * job.arithmetic.itemsize for job in jobs))


def _fused_work(jobs: list[MuonJob], sets: dict[Hashable, CoefficientSet]) -> ranges.Work:
    """Of momentum, iteration and update in one."""
    moved = sum(2 * job.param.nbytes + job.grad.nbytes + 2 * job.buffer.nbytes for job in jobs)
    chosen = [sets[job.settings.ns_coefficients, job.settings.ns_steps] for job in jobs]
    flops = sum(work_of([job.param], own, "").flops for job, own in zip(jobs, chosen, strict=True))
    return ranges.Work(moved, flops, "bf16")


def _fuses(job: MuonJob, unit: str) -> bool:
    """Whether the compiled kernels take momentum, iteration, decay and update together; `unit`: of the CPU."""
    s = job.settings
    plain = s.variant is None and job.radius is None and not s.cautious_weight_decay
    compiled = job.backend == "cuda" or (job.backend == "cpu" and unit != TORCH)
    return plain and compiled and are_stored([job.param, job.grad, job.buffer]) and s.lr != 0.0


def are_stored(tensors: Iterable[Tensor]) -> bool:
    """Whether the compiled kernels read and write these dtypes."""
    return all(x.dtype in KERNEL_DTYPES for x in tensors)


def reads_rate(lr: Any, tensors: Sequence[Tensor], backend: str) -> bool:
    """Whether the kernels that step a parameter, its gradient and momentum can read the learning rate themselves."""
    if backend != "cuda" or not isinstance(lr, Tensor) or lr.dtype not in (torch.float32, DOUBLE):
        return False
    return lr.numel() == 1 and lr.device == tensors[0].device and are_stored(tensors)


def _step_fused(jobs: list[MuonJob], factor: float, unit: str) -> None:
    """The step in one call: momentum as gradients are read, decay and update as the last product is written."""
    sets: dict[Hashable, CoefficientSet] = {}
    options: dict[Hashable, Any] = {}
    for bunch in _bunches(jobs, lambda job: (job.backend, job.param.device)):
        backend, device = bunch[0].backend, bunch[0].param.device
        multiplies = unit if backend == "cpu" else backend
        matrices: list[Matrices] = []
        grads = [job.grad.resolve_neg() for job in bunch]  # alive until the kernels have been launched
        for job, grad in zip(bunch, grads, strict=True):
            s = job.settings
            which = s.ns_coefficients, s.ns_steps
            if which not in sets:
                sets[which] = resolve(*which)
            form = form_for(s.ns_method, job.param.shape, multiplies, sets[which])
            key = which, s.eps, form
            if key not in options:
                options[key] = options_of(sets[which], s.eps, form)
            averages = s.momentum_form == "ema"
            decay, step = 1.0 - s.lr * s.weight_decay, s.lr * job.scale
            made = step if s.rate is None else (s.rate.data_ptr(), s.rate.dtype == DOUBLE, s.weight_decay, job.scale)
            how = s.momentum, averages, s.nesterov, factor * s.sign, decay, made
            matrices.append((view_of(grad), view_of(job.param), options[key], (view_of(job.buffer), *how)))
        with ranges.kernel("momentum, newton_schulz, update", partial(_fused_work, bunch, sets)):
            run_compiled(matrices, multiplies, device)
    torch._C._increment_version([tensor for job in jobs for tensor in (job.param, job.buffer)])


def _bunches(jobs: Iterable[MuonJob], key: Callable[[MuonJob], Hashable]) -> list[list[MuonJob]]:
    """The jobs that have a key in common, together."""
    found: dict[Hashable, list[MuonJob]] = {}
    for job in jobs:
        found.setdefault(key(job), []).append(job)
    return list(found.values())


def _widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in tensors]


def _written_back(targets: list[Tensor], values: list[Tensor]) -> None:
    """Store what was computed in a wider dtype than it is kept in."""
    pairs = [(target, value) for target, value in zip(targets, values, strict=True) if target is not value]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


def _momentum(jobs: list[MuonJob], factor: float) -> list[Tensor]:
    """Step the momentum buffers; returns what is to be orthogonalised."""
    settings = jobs[0].settings
    grads = _widened([job.grad for job in jobs], jobs[0].arithmetic)
    if factor * settings.sign != 1.0:
        grads = list(torch._foreach_mul(grads, factor * settings.sign))
    stored = [job.buffer for job in jobs]
    buffers = _widened(stored, jobs[0].arithmetic)
    if settings.momentum_form == "sum":
        torch._foreach_mul_(buffers, settings.momentum)
        torch._foreach_add_(buffers, grads)
    else:
        torch._foreach_lerp_(buffers, grads, 1.0 - settings.momentum)
    _written_back(stored, buffers)
    # What follows sees the momentum as it is stored.
    buffers = _widened(stored, jobs[0].arithmetic)
    if not settings.nesterov:
        return buffers
    if settings.momentum_form == "sum":
        return list(torch._foreach_add(grads, buffers, alpha=settings.momentum))
    return list(torch._foreach_lerp(grads, buffers, settings.momentum))


def _iteration(job: MuonJob) -> Hashable:
    """What the matrices of one call of the iteration have in common."""
    s = job.settings
    return s.ns_coefficients, s.ns_steps, s.eps, s.ns_method, job.arithmetic, job.param.device


def _orthogonalise(jobs: list[MuonJob], matrices: list[Tensor], backend: str | None) -> list[Tensor]:
    s = jobs[0].settings
    if jobs[0].arithmetic == torch.float64:
        # What asks for fp64 does not ask for half-precision products.
        chosen = resolve(s.ns_coefficients, s.ns_steps)
        with ranges.kernel("newton_schulz", partial(work_of, matrices, chosen, "reference")):
            return reference.newton_schulz(matrices, s.ns_coefficients, s.ns_steps, s.ns_method, s.eps)
    result = ops.newton_schulz(matrices, s.ns_coefficients, s.ns_steps, s.ns_method, s.eps, backend=backend)
    return list(result)


def _apply(jobs: list[MuonJob], updates: list[Tensor]) -> None:
    """Variance, decay and update of the weights."""
    settings = jobs[0].settings
    if settings.variant is not None:
        updates = [_varied(job, update) for job, update in zip(jobs, updates, strict=True)]
    if settings.lr == 0.0:
        return
    stored = [job.param for job in jobs]
    weights = _widened(stored, jobs[0].arithmetic)
    if jobs[0].radius is not None:
        for job, w, update in zip(jobs, weights, updates, strict=True):
            _rotate(w, update, job)
    else:
        decay = 1.0 - settings.lr * settings.weight_decay
        if decay != 1.0 and settings.cautious_weight_decay:
            torch._foreach_mul_(weights, [_cautious(w, o, decay) for w, o in zip(weights, updates, strict=True)])
        elif decay != 1.0:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, updates, alpha=-settings.lr * jobs[0].scale)
    _written_back(stored, weights)


def _varied(job: MuonJob, update: Tensor) -> Tensor:
    """NorMuon's or AdaMuon's form of an update; steps the second moment."""
    assert job.second is not None
    vary = normuon_update if job.settings.variant == "normuon" else adamuon_update
    update, second = vary(update, job.second.to(update.dtype), job.settings.beta2)
    job.second.copy_(second)
    return update


def _cautious(w: Tensor, update: Tensor, decay: float) -> Tensor:
    return torch.ones_like(w).masked_fill_(update * w >= 0, decay)


def _rotate(w: Tensor, update: Tensor, job: MuonJob) -> None:
    """MuonH: a move of ηR, and back to the norm R; norms in fp64."""
    assert job.radius is not None
    radius = job.radius.double()[..., None, None]
    norm = frobenius(update)
    moved = w - (job.settings.lr * radius / norm).to(w.dtype) * update
    moved *= (radius / frobenius(moved)).to(w.dtype)
    w.copy_(torch.where(norm == 0, w, moved))


def _step_by_reference(job: MuonJob, factor: float) -> None:
    s = job.settings
    hyper: dict[str, Any] = {
        "lr": s.lr,
        "momentum": s.momentum,
        "nesterov": s.nesterov,
        "momentum_form": s.momentum_form,
        "ns_coefficients": s.ns_coefficients,
        "ns_steps": s.ns_steps,
        "eps": s.eps,
        "ns_method": s.ns_method,
    }
    states = [job.buffer]
    functions: dict[str | None, Callable[..., tuple[Tensor, ...]]] = {
        None: reference.muon,
        "normuon": reference.normuon,
        "adamuon": reference.adamuon,
    }
    step = functions[s.variant]
    if job.radius is not None:
        step = reference.muonh
        hyper["radius"] = job.radius
    else:
        hyper |= {"weight_decay": s.weight_decay, "cautious_weight_decay": s.cautious_weight_decay}
        if s.variant != "adamuon":
            hyper["adjust_lr_fn"] = job.scale
        if job.second is not None:
            states.append(job.second)
            hyper["beta2"] = s.beta2
    w, g, *before = _widened([job.param, job.grad, *states], job.arithmetic)
    w, *after = step(w, factor * s.sign * g, *before, **hyper)
    if s.lr != 0.0:
        job.param.copy_(w)
    for state, value in zip(states, after, strict=True):
        state.copy_(value)
