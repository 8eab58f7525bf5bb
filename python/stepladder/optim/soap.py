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
from stepladder.optim.base import Group, Optimizer, Params
from stepladder.optim.mixed import MatrixOptions
from stepladder.optim.orthogonalized import choice
from stepladder.optim.preconditioned import (
    FactorLayout,
    Job,
    Preconditioned,
    along,
    arithmetic,
    count,
    each,
    gradients,
    number,
    projection_work,
    states_of,
    total,
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
        options: As every optimizer takes them, but for `stochastic_rounding` and `capturable`. `process_group` or
            `mesh`, as `stepladder.optim.mixed.MatrixOptions` says, divide the parameters over processes.

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
        **options: Unpack[MatrixOptions],
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
    def operations(cls, group: Group) -> tuple[float, float, float]:
        # Into the bases and out of them; LQ is 2n³, a QR decomposition with its Q 8/3·n³ (Golub & Van Loan, 5.2).
        # KL-SOAP whitens each dimension for the other's sake.
        return 3.0 if group["variant"] == "kl" else 2.0, 2.0, 2.0 + 8.0 / 3.0

    @classmethod
    def step_jobs(cls, jobs: list[Job], backend: str | None) -> None:
        works = {id(job): Work(job, backend) for job in jobs}
        grouped = [work for work in works.values() if work.goes_together]
        jobs = [job for job in jobs if not works[id(job)].goes_together]
        each(lambda job: works[id(job)].run(), jobs)
        for members in by(grouped, lambda work: (work.job.param.device, arithmetic(work.job.param))):
            step_together(members, backend)
        rotated = [x for work in works.values() for x in work.rotated.values()]
        if not rotated:
            return
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
        # While they are worked on.
        self.factors: list[Tensor | None] = []
        self.bases = job.layout.views(state["bases"])
        self.eigenvalues: list[Tensor | None] = [None] * len(self.bases)
        # Of the dimensions whose bases are refreshed: LQ and the order of its columns, then the new bases, and whether
        # each is one.
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
        if self.kl:
            self.update_whitened_factors()
        else:
            update_factors([self], self.backend)
        if self.refresh:
            with ranges.kernel("rotate", self.rotate_work):
                self.rotate()

    def move_work(self) -> ranges.Work:
        held = sum(x.nbytes for x in (self.job.param, self.job.state["exp_avg"], self.job.state["exp_avg_sq"]))
        return ranges.Work(bytes=self.job.grad.nbytes + 2 * held)

    def project_work(self) -> ranges.Work:
        return projection_work(self.job.grad, self.job.layout.sides)

    def rotate_work(self) -> ranges.Work:
        """LQ for all dimensions, whether it is then found to be needed or not."""
        flops = sum(2.0 * factor.shape[0] ** 3 for factor in self.factors if factor is not None)
        return ranges.Work(0.0, flops, "fp64" if self.job.grad.dtype == torch.float64 else "fp32")

    def move(self) -> None:
        """Adam in the eigenbases."""
        g = self.job.grad
        with ranges.kernel("project", self.project_work):
            projected = project(g, self.bases, transposed=True)
        if self.kl:
            self.update_eigenvalues(projected)
        m, v = average([self], [projected])
        if self.lr == 0.0:
            return
        # Its memory can be the update's.
        del projected
        [update] = updates([self], m, v)
        with ranges.kernel("project", self.project_work):
            update = project(update, self.bases, transposed=False)
        apply([self], [update])

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

    def update_whitened_factors(self) -> None:
        """L ← βL + (1 - β)/(columns of W)·WWᵀ for each dimension, with W the whitened gradient."""
        self.factors = self.job.layout.load(self.job.state["factors"])
        g, beta = self.job.grad, self.shampoo_beta
        for dim, factor in enumerate(self.factors):
            if factor is not None:
                weight = (1.0 - beta) / (g.numel() // g.shape[dim])
                update_grams([factor], [as_rows(self.whitened(dim), dim)], beta, weight, self.backend)
        for values, new in zip(self.eigenvalues, self.new_values, strict=True):
            if values is not None:
                values.copy_(new)
        self.job.layout.store(self.job.state["factors"], self.factors)

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
        [m], [v] = states_of([job], "exp_avg"), states_of([job], "exp_avg_sq")
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
        stored_all([state["exp_avg"], state["exp_avg_sq"]], [m, v])
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
            job.layout.load(state["factors"]),
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
        with ranges.kernel("update", partial(total, [work.move_work for work in bunch])):
            move_together(bunch, backend)
    for bunch in bunches(works, lambda work: work.job.layout.numel(False)):
        update_factors(bunch, backend)
        refresh_together([work for work in bunch if work.refresh], backend)
        for work in bunch:
            work.factors = []


def move_together(works: list[Work], backend: str | None) -> None:
    """Adam in the eigenbases."""
    kinds = by(works, lambda work: work.job.alike)
    works = [work for members in kinds for work in members]
    grads = [grad for members in kinds for grad in gradients([work.job for work in members])]
    # From their ends, so that each is freed when it has been used.
    projected = projected_all(works, grads, False, backend)[::-1]
    del grads
    moving: list[Work] = []
    steps: list[Tensor] = []
    for members in kinds:
        m, v = average(members, [projected.pop() for _ in members])
        if members[0].lr != 0.0:
            moving += members
            steps += updates(members, m, v)
    turned = projected_all(moving, steps, True, backend)[::-1]
    for members in kinds:
        if members[0].lr != 0.0:
            apply(members, [turned.pop() for _ in members])


def projected_all(works: list[Work], tensors: list[Tensor], back: bool, backend: str | None) -> list[Tensor]:
    """Into the bases of each, by QᵀX, or out of them."""
    with ranges.kernel("project", partial(total, [work.project_work for work in works])):
        bases = [[q.mT if back and q is not None else q for q in work.bases] for work in works]
        return along_all(tensors, bases, backend)


def average(works: list[Work], projected: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """m and v of the projected gradients, of those that are alike."""
    jobs, betas = [work.job for work in works], works[0].betas
    m, v = states_of(jobs, "exp_avg"), states_of(jobs, "exp_avg_sq")
    torch._foreach_lerp_(m, projected, 1.0 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, projected, projected, value=1.0 - betas[1])
    stored_all([job.state["exp_avg"] for job in jobs], m)
    stored_all([job.state["exp_avg_sq"] for job in jobs], v)
    return m, v


def updates(works: list[Work], m: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """m/(√v + ε), of those that are alike."""
    roots = torch._foreach_sqrt(v)
    torch._foreach_add_(roots, number(works[0].job.group, "eps"))
    return list(torch._foreach_div(m, roots))


def apply(works: list[Work], steps: list[Tensor]) -> None:
    """w ← (1 - ηλ)(w - η̂·step), of those that are alike."""
    params = [work.job.param.detach() for work in works]
    weights = widened(params, arithmetic(params[0]))
    torch._foreach_add_(
        weights, [x.reshape(w.shape) for x, w in zip(steps, weights, strict=True)], alpha=-works[0].size
    )
    if works[0].decay != 1.0:
        torch._foreach_mul_(weights, works[0].decay)
    stored_all(params, weights)


def update_factors(works: list[Work], backend: str | None) -> None:
    """L ← βL + (1 - β)GGᵀ for each dimension, of gradients as they are stored: half types need fewer products."""
    for work in works:
        work.factors = work.job.layout.load(work.job.state["factors"])
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
    with ranges.kernel("rotate", partial(total, [work.rotate_work for work in works])):
        due = rotated(sides, backend)
    stacks = [stack for _, _, stack, _ in due]
    if not due:
        return
    with ranges.kernel("orthonormalize", partial(work_of, stacks)):
        found = orthonormal_bases(stacks, "auto", backend)
    with ranges.kernel("refresh"):
        # Of each parameter, and each dimension that has one: the new basis, and where its columns were.
        fresh: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        for (batch, old, _, order), (new, info) in zip(due, found, strict=True):
            # No branch on the device's numbers: nothing is to wait for them.
            good = info.finite
            new = torch.where(good[:, None, None], new, old)
            order = torch.where(good[:, None], order, torch.arange(order.shape[1], device=order.device))
            torch._foreach_add_([side.work.job.state["failed_bases"] for side in batch], list((~good).float().unbind()))
            for side, basis, own in zip(batch, new, order, strict=True):
                fresh.setdefault(id(side.work), {})[side.dim] = basis, own
        turn_together([work for work in works if id(work) in fresh], fresh, backend)


# Sides of one length and dimension; their bases, LQ in order, and that order.
Batch = tuple[list["Side"], Tensor, Tensor, Tensor]


def rotated(sides: list[Side], backend: str | None) -> list[Batch]:
    """LQ of those that are to be refreshed, its columns in the order of the eigenvalues."""
    batches = by(sides, lambda side: (side.dim, len(side.basis)))
    bases = [torch.stack([side.basis for side in batch]) for batch in batches]
    stacks = [torch.empty_like(stack) for stack in bases]
    multiply(
        [
            Product(side.factor[None], side.basis[None], out[None])
            for batch, stack in zip(batches, stacks, strict=True)
            for side, out in zip(batch, stack, strict=True)
        ],
        backend,
    )
    due: list[Batch] = []
    for batch, old, stack in zip(batches, bases, stacks, strict=True):
        diagonals = torch.linalg.vecdot(old, stack, dim=1)
        kept = [i for i, side in enumerate(batch) if not side.is_near(diagonals[i])]
        if len(kept) < len(batch):
            batch, old, stack, diagonals = [batch[i] for i in kept], old[kept], stack[kept], diagonals[kept]
        if batch:
            order = torch.argsort(diagonals, dim=1, descending=True, stable=True)
            due.append((batch, old, stack.gather(2, order[:, None, :].expand_as(stack)), order))
    return due


def turn_together(works: list[Work], fresh: dict[int, dict[int, tuple[Tensor, Tensor]]], backend: str | None) -> None:
    """v in the order of the new bases, m into them, and the bases where they are kept."""
    for members in by(works, lambda work: (work.job.layout.shape, tuple(fresh[id(work)]))):
        v = torch.stack(states_of([work.job for work in members], "exp_avg_sq"))
        for dim in fresh[id(members[0])]:
            order = torch.stack([fresh[id(work)][dim][1] for work in members])
            places = [1] * v.ndim
            places[0], places[dim + 1] = order.shape
            v = v.gather(dim + 1, order.view(places).expand_as(v))
        stored_all([work.job.state["exp_avg_sq"] for work in members], v.unbind())
    old: list[list[Tensor | None]] = [[None] * len(work.bases) for work in works]
    new: list[list[Tensor | None]] = [[None] * len(work.bases) for work in works]
    sides = []
    for work, before, after in zip(works, old, new, strict=True):
        for dim, (basis, _) in fresh[id(work)].items():
            side = Side(work, dim)
            before[dim], after[dim] = side.basis.mT, basis
            sides.append((side.basis, basis))
    m = along_all(along_all(states_of([work.job for work in works], "exp_avg"), old, backend), new, backend)
    stored_all([work.job.state["exp_avg"] for work in works], m)
    stored_all(*zip(*sides, strict=True))


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
