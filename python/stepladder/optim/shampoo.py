"""Shampoo: gradients preconditioned by inverse roots of moving averages of their Gram matrices."""

from __future__ import annotations

import functools
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder import ranges
from stepladder.gram import update_grams
from stepladder.matrix_root import roots
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
from stepladder.reference.arithmetic import power
from stepladder.reference.kronecker import as_rows, blocks, even_parts, merged_shape, refresh_due
from stepladder.reference.matrix_root import EXPONENTS, METHODS, RootStatus
from stepladder.reference.shampoo import GRAFTING_FLOOR, GRAFTINGS, shampoo

WITH_SECOND_MOMENT = ("adagrad", "rmsprop", "adam")


class Shampoo(Preconditioned):
    r"""Shampoo, with blocks, grafting and decoupled weight decay.

    For each block of a parameter, and each dimension of it: L ← β₂L + (1 − β₂)GGᵀ. With m the moving average of the
    gradients, Ĝ = m/(1 − β₁ᵗ), U = Ĝ × (L/(1 − β₂ᵗ) + δI)^(−1/p) along every dimension, where p is twice the number
    of dimensions and δ = eps + relative_eps·λmax; w ← (1 − ηλ)w − η·U·‖P‖F/‖U‖F, where P is the step that the grafted
    method would take with Ĝ.

    Roots are computed every `precondition_frequency` steps, those of all blocks of all parameters together
    (`stepladder.ops.inverse_root`). A root that cannot be computed leaves the previous one in place, and is counted
    in the state's `failed_roots`. Other groups step by their `algorithm`, as in `stepladder.Muon`;
    `algorithm="shampoo"` is the default.

    The state has `exp_avg` (m), `exp_avg_sq` (the grafted method's second moment), and flat in fp32, or fp64 for
    fp64 parameters, `factors` and `roots`: for each block, and each of its dimensions, an n×n matrix.

    Args:
        params: Parameters, named parameters, or groups of them; real.
        lr: η. At 0 the weights stay as they are, bit for bit.
        betas: β₁, of the average that is preconditioned, and β₂, of the factors, which are sums where it is 1.
        eps: Absolute damping of the factors.
        weight_decay: λ, decoupled.
        relative_eps: Damping relative to each factor's largest eigenvalue.
        max_preconditioner_dim: The longest side of a block; longer dimensions are cut into even parts.
        merge_dims: Take neighbouring dimensions together while their product is at most `max_preconditioner_dim`.
        precondition_frequency: f, steps between two computations of a root.
        start_preconditioning_step: The first step that is preconditioned; before it the grafted method steps alone.
            None means f.
        exponent_override: p in place of twice the number of dimensions: 1, 2 or 4.
        precondition_1d: Whether parameters of one dimension have a factor, and p = 2; else the grafted method steps
            them.
        grafting: "adam", "rmsprop", "adagrad", "sgd", or "none", which leaves U's norm as it is, and takes Ĝ as a
            step before roots are used.
        grafting_beta2: Decay of the grafted method's second moment.
        grafting_eps: Added to its root.
        bias_correction: Divide averages by 1 − βᵗ.
        stagger: Spread the computation of the roots over the f steps, so that no step is a spike.
        packed: Keep of factors and roots one triangle alone: about half of their memory.
        root_method: As `stepladder.ops.inverse_root` takes it. With p other than 1, 2 and 4 always "eigh".
        maximize: Ascend instead.
        options: As every optimizer takes them, but for `stochastic_rounding` and `capturable`. `process_group` or
            `mesh`, as `stepladder.optim.mixed.MatrixOptions` says, divide the parameters over processes.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: A hyper-parameter has the wrong type.
        RuntimeError: The backend asked for cannot run here.

    Papers: Gupta et al. 2018, arXiv:1802.09568; Anil et al. 2020, arXiv:2002.09018; Shi et al. 2023, arXiv:2309.06497.
    """

    algorithm = "shampoo"
    keys = frozenset(
        {
            "lr",
            "betas",
            "eps",
            "weight_decay",
            "relative_eps",
            "max_preconditioner_dim",
            "merge_dims",
            "precondition_frequency",
            "start_preconditioning_step",
            "exponent_override",
            "precondition_1d",
            "grafting",
            "grafting_beta2",
            "grafting_eps",
            "bias_correction",
            "stagger",
            "packed",
            "root_method",
        }
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        relative_eps: float = 1e-6,
        max_preconditioner_dim: int = 1024,
        merge_dims: bool = True,
        precondition_frequency: int = 10,
        start_preconditioning_step: int | None = None,
        exponent_override: int | None = None,
        precondition_1d: bool = True,
        grafting: str = "adam",
        grafting_beta2: float = 0.999,
        grafting_eps: float = 1e-8,
        bias_correction: bool = True,
        stagger: bool = False,
        packed: bool = False,
        root_method: str = "auto",
        maximize: bool = False,
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "relative_eps": relative_eps,
            "max_preconditioner_dim": max_preconditioner_dim,
            "merge_dims": merge_dims,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "exponent_override": exponent_override,
            "precondition_1d": precondition_1d,
            "grafting": grafting,
            "grafting_beta2": grafting_beta2,
            "grafting_eps": grafting_eps,
            "bias_correction": bias_correction,
            "stagger": stagger,
            "packed": packed,
            "root_method": root_method,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def check(cls, group: Group) -> None:
        cls.check_common(group)
        betas = group["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        # β₂ = 1 sums.
        summed = pair and checks.number({"betas": betas[1]}, "betas") == 1.0
        checks.betas({"betas": (betas[0], 0.0)} if summed else group)
        checks.epsilon(group)
        checks.at_least_zero(group, "relative_eps", "relative epsilon")
        checks.at_least_zero(group, "grafting_eps", "grafting epsilon")
        checks.at_least_zero(group, "grafting_beta2", "grafting beta2", below=1.0)
        choice(group, "grafting", GRAFTINGS)
        choice(group, "root_method", METHODS)
        choice(group, "exponent_override", (None, *EXPONENTS))
        count(group, "max_preconditioner_dim")
        if group["start_preconditioning_step"] is not None:
            count(group, "start_preconditioning_step")

    @classmethod
    def states(cls, group: Group) -> tuple[str, ...]:
        betas = group["betas"]
        return (
            *(("exp_avg",) if float(betas[0]) != 0.0 else ()),
            *(("exp_avg_sq",) if group["grafting"] in WITH_SECOND_MOMENT else ()),
            "factors",
            "roots",
            "failed_roots",
        )

    @classmethod
    def all_states(cls) -> set[str]:
        return {"exp_avg", "exp_avg_sq", "factors", "roots", "failed_roots"}

    @classmethod
    def flat_states(cls) -> dict[str, bool]:
        return {"factors": True, "roots": True}

    @classmethod
    def state_shape(cls, name: str, param: Tensor, group: Group) -> torch.Size:
        return torch.Size() if name == "failed_roots" else super().state_shape(name, param, group)

    @classmethod
    def state_dtype(cls, name: str, param: Tensor, group: Group) -> torch.dtype:
        return torch.float32 if name == "failed_roots" else super().state_dtype(name, param, group)

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        shape = Shampoo.state_shape(name, param, group)
        if shape == param.shape and name not in ("factors", "roots"):
            return Optimizer.initial_state(name, param, group, dtype)
        state = torch.zeros(shape, dtype=dtype, device=param.device)
        if name == "roots":
            layout = Shampoo.layout(param, group)
            layout.store(state, [torch.eye(n or 0, dtype=dtype, device=param.device) for n in layout.sides])
        return state

    @classmethod
    def layout(cls, param: Tensor, group: Group) -> FactorLayout:
        limit = int(group["max_preconditioner_dim"])
        return _layout(tuple(param.shape), limit, group["merge_dims"], group["precondition_1d"], group["packed"])

    @classmethod
    def pieces(cls, layout: FactorLayout) -> list[float]:
        return [float(n or 0) ** 3 for n in layout.sides]

    @classmethod
    def operations(cls, group: Group) -> tuple[float, float, float]:
        # Eigenvectors of a symmetric matrix take 9n³ (Golub & Van Loan, 8.3), a root from them one product more.
        return 1.0, 0.0, 11.0

    @classmethod
    def step_jobs(cls, jobs: list[Job], backend: str | None) -> None:
        works = [Work(job) for job in jobs]
        for work in works:
            if work.job.backend == "reference":
                with ranges.kernel("reference"):
                    work.step_by_reference()
        works = [work for work in works if work.job.backend != "reference"]
        for members in by([w for w in works if w.job.on_gpu], lambda w: (w.job.param.device, arithmetic(w.job.param))):
            step_together(members, backend)
        works = [work for work in works if not work.job.on_gpu]
        by_job = {id(work.job): work for work in works}
        each(lambda job: by_job[id(job)].prepare(backend), [work.job for work in works])
        refresh_roots(works, backend)
        each(lambda job: by_job[id(job)].apply(), [work.job for work in works])


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], limit: int, merge: bool, one_dimensional: bool, packed: bool) -> FactorLayout:
    merged = merged_shape(shape, limit if merge else 0)
    if len(merged) == 1 and not one_dimensional:
        return FactorLayout(merged, (), packed)
    parts = [even_parts(size, limit) for size in merged]
    return FactorLayout(merged, tuple(chain.from_iterable(product(*parts))), packed)


class Work:
    """The step of one parameter."""

    def __init__(self, job: Job) -> None:
        self.job = job
        group, state = job.group, job.state
        state["step"] += 1
        self.time = int(state["step"])
        self.betas = tuple(number({"beta": beta}, "beta") for beta in group["betas"])
        self.start = group["start_preconditioning_step"] or group["precondition_frequency"]
        frequency = group["precondition_frequency"]
        self.refresh = [refresh_due(self.time, self.start, frequency, phase) for phase in job.phase]
        self.exponent = float(group["exponent_override"] or 2 * len(job.layout.shape))
        self.limit = int(group["max_preconditioner_dim"])
        self.correction = 1.0
        if group["bias_correction"] and self.betas[1] < 1.0:
            self.correction = 1.0 - power(self.betas[1], self.time)
        # While they are worked on: the factors, Ĝ, and the step that is to be taken.
        self.factors: list[Tensor] = []
        self.smoothed = job.grad
        self.step = job.grad

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.layout.shape

    def load(self, name: str) -> list[Tensor]:
        """The factors or the roots, copies where they are packed."""
        return [x for x in self.job.layout.load(self.job.state[name]) if x is not None]

    def prepare(self, backend: str | None) -> None:
        """Whatever comes before the roots."""
        update_factors([self], backend)
        average([self])

    def average_work(self) -> ranges.Work:
        held = sum(self.job.state[name].nbytes for name in ("exp_avg", "exp_avg_sq") if name in self.states)
        return ranges.Work(bytes=self.job.grad.nbytes + 2 * held)

    def update_work(self) -> ranges.Work:
        param = self.job.param
        return ranges.Work(bytes=2 * param.nbytes + param.numel() * arithmetic(param).itemsize)

    @property
    def states(self) -> tuple[str, ...]:
        return Shampoo.states(self.job.group)

    def apply(self) -> None:
        """Precondition, graft, decay and move the weights."""
        if not self.moves:
            return
        if self.is_preconditioned:
            with ranges.kernel("precondition", self.precondition_work):
                self.step = self.preconditioned()
        move([self])

    @property
    def moves(self) -> bool:
        return number(self.job.group, "lr") != 0.0

    @property
    def is_preconditioned(self) -> bool:
        return self.time >= self.start and bool(self.job.layout.sides)

    def precondition_work(self) -> ranges.Work:
        """Of the products alone, block by block."""
        order = len(self.shape)
        own = [
            projection_work(part, self.job.layout.sides[index * order : (index + 1) * order])
            for index, part in enumerate(blocks(self.job.grad, self.limit))
        ]
        return ranges.Work(0.0, sum(work.flops for work in own), own[0].precision)

    def preconditioned(self) -> Tensor:
        layout, state = self.job.layout, self.job.state
        found = layout.load(state["roots"])
        update = torch.empty_like(self.smoothed)
        graft = self.job.group["grafting"] != "none"
        targets, sources, plain = (blocks(x, self.limit) for x in (update, self.smoothed, self.step))
        order = len(self.shape)
        for index, (target, u) in enumerate(zip(targets, sources, strict=True)):
            for dim in range(order):
                root = found[index * order + dim]
                assert root is not None
                u = along(u, root, dim)
            if graft:
                graft_(u, plain[index], None)
            target.copy_(u)
        return update

    def step_by_reference(self) -> None:
        job, group, state = self.job, self.job.group, self.job.state
        shape = job.param.shape

        def widened(name: str) -> Tensor | None:
            return state[name].to(job.grad.dtype) if name in self.states else None

        w, m, v, factors, found, failures = shampoo(
            job.param.detach().to(job.grad.dtype),
            job.grad.reshape(shape),
            widened("exp_avg"),
            widened("exp_avg_sq"),
            self.load("factors"),
            self.load("roots"),
            shape=self.shape,
            lr=number(group, "lr"),
            betas=(self.betas[0], self.betas[1]),
            eps=number(group, "eps"),
            relative_eps=number(group, "relative_eps"),
            weight_decay=number(group, "weight_decay"),
            max_preconditioner_dim=self.limit,
            exponent=self.exponent,
            grafting=group["grafting"],
            grafting_beta2=number(group, "grafting_beta2"),
            grafting_eps=number(group, "grafting_eps"),
            bias_correction=group["bias_correction"],
            preconditioned=self.time >= self.start,
            refresh=self.refresh,
            time=self.time,
        )
        job.param.detach().copy_(w)
        for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
            if value is not None:
                state[name].copy_(value)
        for name, values in (("factors", factors), ("roots", found)):
            job.layout.store(state[name], values)
        state["failed_roots"] += failures


def step_together(works: list[Work], backend: str | None) -> None:
    """A step of all parameters of one GPU and dtype of the arithmetic, each kind of their products in one launch."""
    for bunch in bunches(works, lambda work: work.job.layout.numel(False)):
        update_factors(bunch, backend)
        refresh_roots(bunch, backend)
        for work in bunch:
            work.factors = []
    for bunch in bunches(works, held):
        kinds = by(bunch, lambda work: work.job.alike)
        for members in kinds:
            average(members)
        kinds = [members for members in kinds if members[0].moves]
        precondition_together([work for members in kinds for work in members if work.is_preconditioned], backend)
        for members in kinds:
            move(members)
        for work in bunch:
            work.smoothed = work.step = work.job.grad


def held(work: Work) -> int:
    """Elements of a parameter, and of its roots where these are packed."""
    layout = work.job.layout
    return work.job.grad.numel() + (layout.numel(False) if layout.packed else 0)


def update_factors(works: list[Work], backend: str | None) -> None:
    """L ← β₂L + (1 - β₂)GGᵀ for each block and dimension, of gradients as they are stored."""
    for work in works:
        work.factors = work.load("factors")
    for members in by([work for work in works if work.factors], lambda work: (work.betas[1], work.job.scale)):
        beta, scale = members[0].betas[1], members[0].job.scale
        rows = [
            as_rows(part, dim)
            for work in members
            for part in blocks(work.job.grad, work.limit)
            for dim in range(part.ndim)
        ]
        factors = [factor for work in members for factor in work.factors]
        update_grams(factors, rows, beta, (1.0 - beta if beta < 1.0 else 1.0) * scale**2, backend)
    for work in works:
        work.job.layout.store(work.job.state["factors"], work.factors)


def average(works: list[Work]) -> None:
    """Momentum, and the grafted method's step, of those that are alike."""
    with ranges.kernel("momentum", partial(total, [work.average_work for work in works])):
        jobs, first, group = [work.job for work in works], works[0], works[0].job.group
        grads = smoothed = gradients(jobs)
        if "exp_avg" in first.states:
            m = states_of(jobs, "exp_avg")
            torch._foreach_lerp_(m, grads, 1.0 - first.betas[0])
            stored_all([job.state["exp_avg"] for job in jobs], m)
            correction = 1.0 - power(first.betas[0], first.time) if group["bias_correction"] else 1.0
            smoothed = list(torch._foreach_div(m, correction))
        steps = smoothed
        if "exp_avg_sq" in first.states:
            v = states_of(jobs, "exp_avg_sq")
            beta = number(group, "grafting_beta2")
            adagrad = group["grafting"] == "adagrad"
            if not adagrad:
                torch._foreach_mul_(v, beta)
            torch._foreach_addcmul_(v, grads, grads, value=1.0 if adagrad else 1.0 - beta)
            stored_all([job.state["exp_avg_sq"] for job in jobs], v)
            if group["grafting"] == "adam" and group["bias_correction"]:
                v = list(torch._foreach_div(v, 1.0 - power(beta, first.time)))
            roots_of_v = torch._foreach_sqrt(v)
            torch._foreach_add_(roots_of_v, number(group, "grafting_eps"))
            steps = list(torch._foreach_div(smoothed, roots_of_v))
        for work, own, step in zip(works, smoothed, steps, strict=True):
            work.smoothed, work.step = own, step


def move(works: list[Work]) -> None:
    """w ← (1 - ηλ)w - η·step, of those that are alike."""
    with ranges.kernel("update", partial(total, [work.update_work for work in works])):
        group = works[0].job.group
        lr = number(group, "lr")
        params = [work.job.param.detach() for work in works]
        weights = widened(params, arithmetic(params[0]))
        if (decay := 1.0 - lr * number(group, "weight_decay")) != 1.0:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, [work.step.reshape(work.job.param.shape) for work in works], alpha=-lr)
        stored_all(params, weights)


def refresh_roots(works: list[Work], backend: str | None) -> None:
    """The roots that are due; factors of one side that share their settings are a batch."""
    due = [(work, k) for work in works for k, refresh in enumerate(work.refresh) if refresh]
    if not due:
        return

    def settings(member: tuple[Work, int]) -> Any:
        group = member[0].job.group
        return member[0].exponent, number(group, "eps"), number(group, "relative_eps"), group["root_method"]

    with ranges.kernel("refresh"):
        loaded = {id(work): work.job.layout.load(work.job.state["roots"], work.refresh) for work, _ in due}
        for members in by(due, settings):
            exponent, eps, relative_eps, method = settings(members[0])
            batches = by(members, lambda member: (len(member[0].factors[member[1]]), member[0].correction))
            stacks = [
                torch.stack([work.factors[k] for work, k in batch]).div_(batch[0][0].correction) for batch in batches
            ]
            found = roots(stacks, exponent, eps, relative_eps, method if exponent in EXPONENTS else "eigh", backend)
            for batch, (root, info) in zip(batches, found, strict=True):
                targets = [x for work, k in batch if (x := loaded[id(work)][k]) is not None]
                good = (info.status == RootStatus.CONVERGED) | (info.status == RootStatus.STALLED)
                # No branch on the device's numbers: nothing is to wait for them.
                stored_all(targets, torch.where(good[:, None, None], root, torch.stack(targets)).unbind())
                # The failures of each parameter, whose roots are neighbours.
                owners = by(batch, lambda member: id(member[0]))
                failures = torch._foreach_norm(list(torch.split((~good).float(), [*map(len, owners)])), 1.0)
                torch._foreach_add_([own[0][0].job.state["failed_roots"] for own in owners], failures)
        for work in works:
            if id(work) in loaded:
                work.job.layout.store(work.job.state["roots"], loaded[id(work)])


def graft_(u: Tensor, step: Tensor, within: tuple[int, ...] | None) -> None:
    """u ← u·‖step‖F/‖u‖F in place, over these dimensions, or all of them."""
    norms = [torch.linalg.vector_norm(x, dim=within, keepdim=True) for x in (step, u)]
    u.mul_(norms[0] / (norms[1] + GRAFTING_FLOOR))


def precondition_together(works: list[Work], backend: str | None) -> None:
    """L^(-1/p) Ĝ R^(-1/p) of each block, in the norm of the grafted method's step, which it replaces."""
    if not works:
        return
    with ranges.kernel("precondition", partial(total, [work.precondition_work for work in works])):
        _precondition(works, backend)


def _precondition(works: list[Work], backend: str | None) -> None:
    batches = by(works, lambda work: (work.shape, work.limit, work.job.group["grafting"] != "none"))
    updates = [batch[0].smoothed.new_empty(len(batch), *batch[0].shape) for batch in batches]
    sources, matrices, targets = [], [], []
    for batch, stack in zip(batches, updates, strict=True):
        for work, update in zip(batch, stack, strict=True):
            found, order = work.job.layout.load(work.job.state["roots"]), len(work.shape)
            own = blocks(work.smoothed, work.limit)
            sources += own
            matrices += [found[i * order : (i + 1) * order] for i in range(len(own))]
            targets += blocks(update, work.limit)
    along_all(sources, matrices, backend, targets)
    for batch, stack in zip(batches, updates, strict=True):
        if batch[0].job.group["grafting"] != "none":
            steps = torch.stack([work.step for work in batch])
            for u, p in zip(grids(stack, batch[0].limit), grids(steps, batch[0].limit), strict=True):
                graft_(u, p, tuple(range(2, u.ndim, 2)))
        for work, update in zip(batch, stack, strict=True):
            work.step = update


def grids(x: Tensor, limit: int) -> list[Tensor]:
    """The blocks of each of a batch [S, a, b, …] in regular grids: views [S, blocks, length, blocks, length, …].

    A dimension is cut into parts that differ by 1 at the most: a grid has those of one length.
    """
    found = [x]
    for dim in range(1, x.ndim):
        parts = even_parts(x.shape[dim], limit)
        lengths = sorted({*parts}, reverse=True)
        # Dimensions in front of this one have become two each.
        place = 2 * dim - 1
        found = [
            piece.view(*piece.shape[:place], -1, length, *piece.shape[place + 1 :])
            for grid in found
            for piece, length in zip(
                torch.split(grid, [length * parts.count(length) for length in lengths], place), lengths, strict=True
            )
        ]
    return found
