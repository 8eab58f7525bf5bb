"""SOAP: Adam in the eigenbases of Shampoo's factors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder import ranges
from stepladder.gram import update_grams
from stepladder.multiply import Product, multiply
from stepladder.optim import checks
from stepladder.optim.base import Group, Optimizer, Options, Params
from stepladder.optim.orthogonalized import choice
from stepladder.optim.preconditioned import (
    FactorLayout,
    Job,
    Preconditioned,
    along,
    arithmetic,
    count,
    each,
    in_place,
    number,
    projection_work,
    stored,
)
from stepladder.optim.together import along_all, bunches, by, stored_all, widened
from stepladder.orthonormalize import bases as orthonormal_bases
from stepladder.orthonormalize import fresh_bases, work_of
from stepladder.products import mm
from stepladder.reference.arithmetic import power
from stepladder.reference.kronecker import as_rows, merged_shape, refresh_due
from stepladder.reference.soap import damped_inverse, off_diagonal, soap

VARIANTS = (None, "kl")


class SOAP(Preconditioned):
    r"""SOAP, Shampoo with Adam in the preconditioner's eigenbasis.

    For a matrix, with L and R moving averages of GGᵀ and GᵀG, and QL and QR their eigenvectors: G' = QLᵀGQR;
    m ← β₁m + (1 − β₁)G'; v ← β₂v + (1 − β₂)G'²; w ← (1 − ηλ)(w − η·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·QL(m/(√v + ε))QRᵀ). The
    first step with a gradient other than zero makes the bases and moves nothing; one that is not finite makes none,
    and is counted in the state's `failed_bases`, as is every refresh that leaves a basis as it is for that. Every
    `precondition_frequency` steps one step of the power method and a QR decomposition refresh them: columns are ordered
    by descending diag(QᵀLQ), v with them, Q ← qr(LQ). Tensors of more dimensions have a basis for each;
    scalars and vectors are stepped by Adam, unless `precondition_1d` is set.

    Where the paper keeps m in the space of the weights and projects it at each step, it is kept in the eigenbases
    here, and taken along when they are refreshed: the same numbers but for rounding, with a third less products.

    Other groups step by their `algorithm`, as in `stepladder.Muon`; `algorithm="soap"` is the default.

    The state has `exp_avg` (m) and `exp_avg_sq` (v), both in the eigenbases, and flat in fp32, or fp64 for fp64
    parameters, `factors` and `bases`: for each dimension an n×n matrix; KL-SOAP also `eigenvalues`.

    Args:
        params: Parameters, named parameters, or groups of them; real.
        lr: η. At 0 the weights stay as they are, bit for bit.
        betas: β₁, β₂.
        shampoo_beta: Of the averages L and R; None means β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        precondition_frequency: f, steps between two refreshes.
        max_preconditioner_dim: Longer dimensions keep the identity.
        merge_dims: Take neighbouring dimensions together while their product is at most `max_preconditioner_dim`.
        precondition_1d: Whether vectors have a basis too.
        bias_correction: Multiply the step by √(1 − β₂ᵗ)/(1 − β₁ᵗ).
        refresh_tolerance: A basis is left as it is at a refresh while ‖B − diag B‖F ≤ tolerance·‖B‖F, B = QᵀLQ.
        variant: "kl" for KL-SOAP: L ← βL + (1 − β)/n·G·QRΛR⁻¹QRᵀ·Gᵀ, and R likewise, with Λ the diagonal of QᵀRQ.
        stagger: Spread the refreshes over the f steps, so that no step is a spike.
        packed: Keep of the symmetric factors one triangle alone: about half of their memory.
        maximize: Ascend instead.
        options: As every optimizer takes them, but for `stochastic_rounding` and `capturable`.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: A hyper-parameter has the wrong type.
        RuntimeError: The backend asked for cannot run here.

    Papers: Vyas et al. 2024, arXiv:2409.11321; criterion: 2506.03595; KL-SOAP: Lin et al. 2025, arXiv:2509.03378.
    """

    algorithm = "soap"
    keys = frozenset(
        {
            "lr",
            "betas",
            "shampoo_beta",
            "eps",
            "weight_decay",
            "precondition_frequency",
            "max_preconditioner_dim",
            "merge_dims",
            "precondition_1d",
            "bias_correction",
            "refresh_tolerance",
            "variant",
            "stagger",
            "packed",
        }
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        *,
        bias_correction: bool = True,
        refresh_tolerance: float = 0.0,
        variant: str | None = None,
        stagger: bool = False,
        packed: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_preconditioner_dim": max_preconditioner_dim,
            "merge_dims": merge_dims,
            "precondition_1d": precondition_1d,
            "bias_correction": bias_correction,
            "refresh_tolerance": refresh_tolerance,
            "variant": variant,
            "stagger": stagger,
            "packed": packed,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def check(cls, group: Group) -> None:
        cls.check_common(group)
        checks.betas(group)
        checks.epsilon(group)
        if group["shampoo_beta"] is not None:
            checks.at_least_zero(group, "shampoo_beta", "shampoo_beta value", below=1.0)
        checks.at_least_zero(group, "refresh_tolerance", "refresh tolerance")
        choice(group, "variant", VARIANTS)
        count(group, "max_preconditioner_dim")

    @classmethod
    def states(cls, group: Group) -> tuple[str, ...]:
        own = ("exp_avg", "exp_avg_sq", "factors", "bases", "failed_bases")
        return own if group["variant"] is None else (*own, "eigenvalues")

    @classmethod
    def all_states(cls) -> set[str]:
        return {"exp_avg", "exp_avg_sq", "factors", "bases", "failed_bases", "eigenvalues"}

    @classmethod
    def flat_states(cls) -> dict[str, bool]:
        return {"factors": True, "bases": False}

    @classmethod
    def state_shape(cls, name: str, param: Tensor, group: Group) -> torch.Size:
        if name == "failed_bases":
            return torch.Size()
        if name == "eigenvalues":
            return torch.Size([sum(n or 0 for n in cls.layout(param, group).sides)])
        return super().state_shape(name, param, group)

    @classmethod
    def state_dtype(cls, name: str, param: Tensor, group: Group) -> torch.dtype:
        if name == "failed_bases":
            return torch.float32
        return super().state_dtype("factors" if name == "eigenvalues" else name, param, group)

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        if name in ("exp_avg", "exp_avg_sq"):
            return Optimizer.initial_state(name, param, group, dtype)
        return torch.zeros(SOAP.state_shape(name, param, group), dtype=dtype, device=param.device)

    @classmethod
    def layout(cls, param: Tensor, group: Group) -> FactorLayout:
        limit = int(group["max_preconditioner_dim"])
        return _layout(tuple(param.shape), limit, group["merge_dims"], group["precondition_1d"], group["packed"])

    @classmethod
    def pieces(cls, layout: FactorLayout) -> list[float]:
        return [layout.cost]

    @classmethod
    def step_jobs(cls, jobs: list[Job], backend: str | None) -> None:
        works = {id(job): Work(job, backend) for job in jobs}
        grouped = [work for work in works.values() if work.goes_together]
        jobs = [job for job in jobs if not works[id(job)].goes_together]
        each(lambda job: works[id(job)].run(), jobs)
        for members in by(grouped, lambda work: (work.job.param.device, arithmetic(work.job.param))):
            step_together(members, backend)
        rotated = [x for work in works.values() for x in work.rotated.values()]
        with ranges.kernel("orthonormalize", partial(work_of, rotated)):
            fresh = iter(fresh_bases(rotated, backend))
        for work in works.values():
            work.fresh = {dim: next(fresh) for dim in work.rotated}
        with ranges.kernel("refresh"):
            each(lambda job: works[id(job)].refresh_bases(), [job for job in jobs if works[id(job)].fresh])


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], limit: int, merge: bool, one_dimensional: bool, packed: bool) -> FactorLayout:
    merged = merged_shape(shape, limit) if merge else shape or (1,)
    if len(merged) == 1 and not one_dimensional:
        return FactorLayout(merged, (None,), packed)
    return FactorLayout(merged, tuple(n if n <= limit else None for n in merged), packed)


class Work:
    """The step of one parameter."""

    def __init__(self, job: Job, backend: str | None) -> None:
        self.job = job
        self.backend = backend
        group, state = job.group, job.state
        self.time = int(state["step"])
        self.betas = tuple(number({"beta": beta}, "beta") for beta in group["betas"])
        self.shampoo_beta = self.betas[1] if group["shampoo_beta"] is None else number(group, "shampoo_beta")
        frequency = int(group["precondition_frequency"])
        self.refresh = self.time > 0 and refresh_due(self.time, frequency, frequency, job.phase[0])
        self.kl = group["variant"] == "kl"
        self.factors = job.layout.load(state["factors"])
        self.bases = job.layout.views(state["bases"])
        self.eigenvalues: list[Tensor | None] = [None] * len(self.bases)
        # Of the dimensions whose bases are refreshed: LQ and the order of its columns, then the new bases.
        self.rotated: dict[int, Tensor] = {}
        self.order: dict[int, Tensor] = {}
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}
        if self.kl:
            pieces = torch.split(state["eigenvalues"], [n or 0 for n in job.layout.sides])
            self.eigenvalues = [None if n is None else x for n, x in zip(job.layout.sides, pieces, strict=True)]

    @property
    def goes_together(self) -> bool:
        """Whether it is stepped with all others on its GPU."""
        return self.job.on_gpu and self.time > 0 and not self.kl

    def run(self) -> None:
        job, state = self.job, self.job.state
        job.settle()
        if self.time == 0 and not bool(job.grad.any()):
            # A gradient of zeros has no eigenvectors, and is what initialises states before a checkpoint is loaded.
            return
        if job.backend == "reference" or self.time == 0:
            with ranges.kernel("reference"):
                failures = self.by_reference()
            if self.time > 0 or failures == 0:
                state["step"] += 1
            return
        state["step"] += 1
        with ranges.kernel("update", self.move_work):
            self.move()
        self.update_factors()
        job.layout.store(state["factors"], self.factors)
        if self.refresh:
            with ranges.kernel("rotate", self.rotate_work):
                self.rotate()

    def move_work(self) -> ranges.Work:
        held = sum(x.nbytes for x in (self.job.param, self.job.state["exp_avg"], self.job.state["exp_avg_sq"]))
        return ranges.Work(bytes=self.job.grad.nbytes + 2 * held)

    def rotate_work(self) -> ranges.Work:
        """LQ for all dimensions, whether it is then found to be needed or not."""
        flops = sum(2.0 * factor.shape[0] ** 3 for factor in self.factors if factor is not None)
        return ranges.Work(0.0, flops, "fp64" if self.job.grad.dtype == torch.float64 else "fp32")

    def move(self) -> None:
        """Adam in the eigenbases."""
        job, state, g = self.job, self.job.state, self.job.grad
        work = partial(projection_work, g, self.job.layout.sides)
        with ranges.kernel("project", work):
            projected = project(g, self.bases, transposed=True)
        m = in_place(state["exp_avg"], g.shape, g.dtype)
        v = in_place(state["exp_avg_sq"], g.shape, g.dtype)
        m.lerp_(projected, 1.0 - self.betas[0])
        if self.kl:
            self.update_eigenvalues(projected)
        v.mul_(self.betas[1]).addcmul_(projected, projected, value=1.0 - self.betas[1])
        stored(state["exp_avg"], m)
        stored(state["exp_avg_sq"], v)
        if self.lr == 0.0:
            return
        # Without bases the projected gradient is the gradient itself.
        update = torch.sqrt(v) if projected is g else torch.sqrt(v, out=projected)
        torch.div(m, update.add_(number(job.group, "eps")), out=update)
        with ranges.kernel("project", work):
            update = project(update, self.bases, transposed=False)
        w = job.param.detach()
        if w.dtype == update.dtype:
            w.add_(update.reshape(w.shape), alpha=-self.size)
            if self.decay != 1.0:
                w.mul_(self.decay)
        else:
            w.copy_(w.to(update.dtype).add_(update.reshape(w.shape), alpha=-self.size).mul_(self.decay))

    @property
    def lr(self) -> float:
        return number(self.job.group, "lr")

    @property
    def size(self) -> float:
        """What the update is multiplied by."""
        if not self.job.group["bias_correction"]:
            return self.lr
        return self.lr * (math.sqrt(1.0 - power(self.betas[1], self.time)) / (1.0 - power(self.betas[0], self.time)))

    @property
    def decay(self) -> float:
        return 1.0 - self.lr * number(self.job.group, "weight_decay")

    def update_factors(self) -> None:
        """L ← βL + (1 - β)GGᵀ for each dimension."""
        g, beta = self.job.grad, self.shampoo_beta
        for dim, factor in enumerate(self.factors):
            if factor is not None:
                weight = (1.0 - beta) / (g.numel() // g.shape[dim]) if self.kl else 1.0 - beta
                rows = as_rows(self.whitened(dim) if self.kl else g, dim)
                update_grams([factor], [rows], beta, weight, self.backend)
        if self.kl:
            for values, new in zip(self.eigenvalues, self.new_values, strict=True):
                if values is not None:
                    values.copy_(new)

    def whitened(self, dim: int) -> Tensor:
        """G·QΛ^(-1/2) along all dimensions but one."""
        x = self.job.grad
        for other, (basis, values) in enumerate(zip(self.bases, self.eigenvalues, strict=True)):
            if other != dim and basis is not None and values is not None:
                x = along(x, basis * damped_inverse(values).sqrt(), other)
        return x

    def update_eigenvalues(self, projected: Tensor) -> None:
        """The diagonal of QᵀLQ as it will be, from the projected gradient."""
        self.new_values: list[Any] = [None] * projected.ndim
        squares = projected.square()
        for dim, values in enumerate(self.eigenvalues):
            if values is None:
                continue
            x = squares
            for other, weights in enumerate(self.eigenvalues):
                if other != dim and weights is not None:
                    shape = [-1 if d == other else 1 for d in range(x.ndim)]
                    x = x * damped_inverse(weights).reshape(shape)
            sums = as_rows(x, dim).sum(1) / (x.numel() // x.shape[dim])
            self.new_values[dim] = torch.lerp(values, sums, 1.0 - self.shampoo_beta)

    def rotate(self) -> None:
        """LQ for the bases that are to be refreshed, its columns in the order of the eigenvalues."""
        tolerance = number(self.job.group, "refresh_tolerance")
        for dim, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is None or basis is None:
                continue
            rotated = mm(factor, basis)
            diagonal = torch.linalg.vecdot(basis, rotated, dim=0)
            if tolerance > 0.0 and off_diagonal(factor, diagonal) <= tolerance:
                continue
            self.order[dim] = torch.argsort(diagonal, descending=True, stable=True)
            self.rotated[dim] = rotated.index_select(1, self.order[dim])

    def refresh_bases(self) -> None:
        """Q ← qr(LQ), v in the same order, and m into the new bases."""
        job, state = self.job, self.job.state
        m = in_place(state["exp_avg"], job.grad.shape, job.grad.dtype)
        v = in_place(state["exp_avg_sq"], job.grad.shape, job.grad.dtype)
        bases: list[Tensor | None] = list(self.bases)
        for dim, (new, good) in self.fresh.items():
            factor, basis, order = self.factors[dim], self.bases[dim], self.order[dim]
            assert factor is not None
            assert basis is not None
            # No branch on the device's numbers: nothing is to wait for them.
            new = torch.where(good, new, basis)
            v = v.index_select(dim, torch.where(good, order, torch.arange(len(order), device=order.device)))
            state["failed_bases"] += (~good).float()
            values = self.eigenvalues[dim]
            if values is not None:
                # By rows: small products by columns depend on where in memory a factor lies, which packing changes.
                exact = torch.linalg.vecdot(new, mm(factor, new.contiguous()), dim=0)
                values.copy_(torch.where(good, exact, values))
            bases[dim] = new
        for own, transposed in ((self.bases, False), (bases, True)):
            with ranges.kernel("project", partial(projection_work, m, job.layout.sides)):
                m = project(m, own, transposed)
        stored(state["exp_avg"], m)
        stored(state["exp_avg_sq"], v)
        for dim in self.fresh:
            old, fresh = self.bases[dim], bases[dim]
            assert old is not None
            assert fresh is not None
            old.copy_(fresh)

    def by_reference(self) -> int:
        """The step as the reference takes it; returns how many bases failed."""
        job, group, state = self.job, self.job.group, self.job.state
        dtype, shape = job.grad.dtype, job.layout.shape
        w, m, v, factors, bases, eigenvalues, failures = soap(
            job.param.detach().to(dtype).reshape(shape),
            job.grad,
            state["exp_avg"].to(dtype).reshape(shape),
            state["exp_avg_sq"].to(dtype).reshape(shape),
            self.factors,
            self.bases,
            self.eigenvalues,
            lr=number(group, "lr"),
            betas=(self.betas[0], self.betas[1]),
            shampoo_beta=self.shampoo_beta,
            eps=number(group, "eps"),
            weight_decay=number(group, "weight_decay"),
            bias_correction=group["bias_correction"],
            refresh=self.refresh,
            refresh_tolerance=number(group, "refresh_tolerance"),
            kl=self.kl,
            time=self.time,
        )
        if self.time > 0:
            job.param.detach().copy_(w.reshape(job.param.shape))
            state["exp_avg"].copy_(m.reshape(job.param.shape))
            state["exp_avg_sq"].copy_(v.reshape(job.param.shape))
        job.layout.store(state["factors"], factors)
        for targets, values in ((self.bases, bases), (self.eigenvalues, eigenvalues)):
            for target, value in zip(targets, values, strict=True):
                if target is not None and value is not None and target.data_ptr() != value.data_ptr():
                    target.copy_(value)
        state["failed_bases"] += failures
        return failures


def project(x: Tensor, bases: list[Tensor | None], transposed: bool) -> Tensor:
    """Into the bases of the dimensions, by QᵀX, or out of them."""
    for dim, basis in enumerate(bases):
        if basis is not None:
            x = along(x, basis if transposed else basis.mT, dim)
    return x


def step_together(works: list[Work], backend: str | None) -> None:
    """A step of all parameters of one GPU and dtype of the arithmetic, each kind of their products in one launch."""
    for work in works:
        work.job.state["step"] += 1
    for bunch in bunches(works, lambda work: work.job.grad.numel()):
        move_together(bunch, backend)
    update_factors_together(works, backend)
    for bunch in bunches([work for work in works if work.refresh], lambda work: work.job.layout.numel(False)):
        refresh_together(bunch, backend)


def alike(work: Work) -> Any:
    """What those have in common that one operation on a list serves: hyper-parameters, step count, dtypes."""
    return id(work.job.group), work.time, work.job.param.dtype, work.job.grad.dtype, work.job.scale


def in_arithmetic(works: list[Work], name: str) -> list[Tensor]:
    """A state of each, in its shape: views where that is possible, else copies."""
    return widened(
        [work.job.state[name].reshape(work.job.layout.shape) for work in works], arithmetic(works[0].job.param)
    )


def move_together(works: list[Work], backend: str | None) -> None:
    """Adam in the eigenbases."""
    grads: dict[int, Tensor] = {}
    for members in by(works, alike):
        own = widened([work.job.grad for work in members], arithmetic(members[0].job.param))
        if (scale := members[0].job.scale) != 1.0:
            own = list(torch._foreach_mul(own, scale))
        grads |= {id(work): x for work, x in zip(members, own, strict=True)}
    found = along_all([grads[id(work)] for work in works], [work.bases for work in works], backend)
    projected = {id(work): x for work, x in zip(works, found, strict=True)}
    del grads, found
    moving: list[Work] = []
    updates: list[Tensor] = []
    for members in by(works, alike):
        first = members[0]
        own = [projected.pop(id(work)) for work in members]
        m, v = in_arithmetic(members, "exp_avg"), in_arithmetic(members, "exp_avg_sq")
        torch._foreach_lerp_(m, own, 1.0 - first.betas[0])
        torch._foreach_mul_(v, first.betas[1])
        torch._foreach_addcmul_(v, own, own, value=1.0 - first.betas[1])
        del own
        for name, values in (("exp_avg", m), ("exp_avg_sq", v)):
            stored_all([work.job.state[name] for work in members], values)
        if first.lr == 0.0:
            continue
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, number(first.job.group, "eps"))
        moving += members
        updates += torch._foreach_div(m, roots)
    back = [[None if q is None else q.mT for q in work.bases] for work in moving]
    turned = {id(work): x for work, x in zip(moving, along_all(updates, back, backend), strict=True)}
    for members in by(moving, alike):
        params = [work.job.param.detach() for work in members]
        weights = widened(params, arithmetic(params[0]))
        steps = [turned[id(work)].reshape(work.job.param.shape) for work in members]
        torch._foreach_add_(weights, steps, alpha=-members[0].size)
        if members[0].decay != 1.0:
            torch._foreach_mul_(weights, members[0].decay)
        stored_all(params, weights)


def update_factors_together(works: list[Work], backend: str | None) -> None:
    """L ← βL + (1 - β)GGᵀ for each dimension, of gradients as they are stored: half types need fewer products."""
    for members in by(works, lambda work: (work.shampoo_beta, work.job.scale)):
        beta, scale = members[0].shampoo_beta, members[0].job.scale
        pairs = [
            (factor, as_rows(work.job.grad, dim))
            for work in members
            for dim, factor in enumerate(work.factors)
            if factor is not None
        ]
        if pairs:
            squares, rows = zip(*pairs, strict=True)
            update_grams(squares, rows, beta, (1.0 - beta) * scale**2, backend)
    for work in works:
        work.job.layout.store(work.job.state["factors"], work.factors)


def refresh_together(works: list[Work], backend: str | None) -> None:
    """LQ for the bases that are to be refreshed, new ones from it, v in their order, and m into them.

    Sides of one length are a batch: what sorts, selects and decides are then a few operations for all of them.
    """
    sides = [Side(work, dim) for work in works for dim, basis in enumerate(work.bases) if basis is not None]
    if not sides:
        return
    batches = by(sides, lambda side: (side.dim, len(side.basis)))
    bases = [torch.stack([side.basis for side in batch]) for batch in batches]
    rotated = [torch.empty_like(stack) for stack in bases]
    multiply(
        [
            Product(side.factor[None], side.basis[None], out[None])
            for batch, stack in zip(batches, rotated, strict=True)
            for side, out in zip(batch, stack, strict=True)
        ],
        backend,
    )
    due: list[tuple[list[Side], Tensor, Tensor, Tensor]] = []
    for batch, old, stack in zip(batches, bases, rotated, strict=True):
        diagonals = torch.linalg.vecdot(old, stack, dim=1)
        kept = [i for i, side in enumerate(batch) if not side.is_near(diagonals[i])]
        if len(kept) < len(batch):
            batch, old, stack, diagonals = [batch[i] for i in kept], old[kept], stack[kept], diagonals[kept]
        if batch:
            order = torch.argsort(diagonals, dim=1, descending=True, stable=True)
            due.append((batch, old, stack.gather(2, order[:, None, :].expand_as(stack)), order))
    del bases, rotated
    for (batch, old, _, order), (found, info) in zip(
        due, orthonormal_bases([stack for _, _, stack, _ in due], "auto", backend), strict=True
    ):
        # No branch on the device's numbers: nothing is to wait for them.
        good = info.finite
        fresh = torch.where(good[:, None, None], found, old)
        order = torch.where(good[:, None], order, torch.arange(order.shape[1], device=order.device))
        failures = list((~good).float().unbind())
        torch._foreach_add_([side.work.job.state["failed_bases"] for side in batch], failures)
        for side, new, own in zip(batch, fresh, order, strict=True):
            side.work.fresh[side.dim] = new, own
    fresh_works = [work for work in works if work.fresh]
    for members in by(fresh_works, lambda work: (work.job.layout.shape, tuple(work.fresh))):
        v = torch.stack(in_arithmetic(members, "exp_avg_sq"))
        for dim in members[0].fresh:
            order = torch.stack([work.fresh[dim][1] for work in members])
            places = [1] * v.ndim
            places[0], places[dim + 1] = order.shape
            v = v.gather(dim + 1, order.view(places).expand_as(v))
        stored_all([work.job.state["exp_avg_sq"] for work in members], v.unbind())
    if not fresh_works:
        return
    old_bases = [[q.mT if q is not None and d in w.fresh else None for d, q in enumerate(w.bases)] for w in fresh_works]
    new_bases = [[w.fresh[d][0] if d in w.fresh else None for d in range(len(w.bases))] for w in fresh_works]
    m = along_all(along_all(in_arithmetic(fresh_works, "exp_avg"), old_bases, backend), new_bases, backend)
    stored_all([work.job.state["exp_avg"] for work in fresh_works], m)
    sides = [Side(work, dim) for work in fresh_works for dim in work.fresh]
    stored_all([side.basis for side in sides], [side.work.fresh[side.dim][0] for side in sides])


@dataclass(frozen=True, slots=True)
class Side:
    """A dimension of a parameter that has a basis."""

    work: Work
    dim: int

    @property
    def factor(self) -> Tensor:
        factor = self.work.factors[self.dim]
        assert factor is not None
        return factor

    @property
    def basis(self) -> Tensor:
        basis = self.work.bases[self.dim]
        assert basis is not None
        return basis

    def is_near(self, diagonal: Tensor) -> bool:
        """Whether the factor is so nearly diagonal that the basis is left as it is. Asked for, it waits for the GPU."""
        tolerance = number(self.work.job.group, "refresh_tolerance")
        return tolerance > 0.0 and off_diagonal(self.factor, diagonal) <= tolerance
