"""What Shampoo and SOAP share: factors for each dimension of a parameter, flat in its state, and when they are due."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepladder import backends, ranges
from stepladder.distributed.assignment import Refreshes, assign
from stepladder.newton_schulz import matrix_unit
from stepladder.optim import checks
from stepladder.optim.base import Group
from stepladder.optim.memory import waves_of
from stepladder.optim.mixed import Mixed, Task, unscaled
from stepladder.optim.orthogonalized import is_count
from stepladder.optim.together import widened
from stepladder.parallel import over_threads
from stepladder.products import mm
from stepladder.reference.kronecker import times


@dataclass(frozen=True, slots=True)
class FactorLayout:
    """How the factors of a parameter lie in a flat state.

    Attributes:
        shape: Of the parameter as a tensor with a factor for each dimension.
        sides: For each block, and each dimension of it, the side of its factor; None for the identity.
        packed: Whether of symmetric factors the lower triangle alone is kept, row after row.
    """

    shape: tuple[int, ...]
    sides: tuple[int | None, ...]
    packed: bool

    def sizes(self, packed: bool) -> list[int]:
        """Elements of each factor in its state."""
        return [0 if n is None else n * (n + 1) // 2 if packed else n * n for n in self.sides]

    def numel(self, packed: bool) -> int:
        return sum(self.sizes(packed))

    def views(self, flat: Tensor, packed: bool = False) -> list[Tensor | None]:
        """The factors in a state, each [n, n] or, packed, in a row."""
        pieces = torch.split(flat, self.sizes(packed))
        return [
            None if n is None else piece if packed else piece.view(n, n)
            for n, piece in zip(self.sides, pieces, strict=True)
        ]

    def load(self, flat: Tensor, chosen: Sequence[bool] | None = None) -> list[Tensor | None]:
        """Symmetric factors, all or those chosen alone: views where they are kept whole, else copies."""
        views = self.views(flat, self.packed)
        if chosen is not None:
            views = [x if wanted else None for x, wanted in zip(views, chosen, strict=True)]
        return [None if x is None else unpacked(x) for x in views] if self.packed else views

    def store(self, flat: Tensor, factors: Sequence[Tensor | None]) -> None:
        """Write symmetric factors, but for those that are views of the state."""
        for target, factor in zip(self.views(flat, self.packed), factors, strict=True):
            if target is None or factor is None or target.data_ptr() == factor.data_ptr():
                continue
            if self.packed:
                pack_into(target, factor)
            else:
                target.copy_(factor)

    def worked_on(self) -> Iterator[tuple[int, int]]:
        """The side of each factor, and the elements of its block."""
        for first in range(0, len(self.sides), len(self.shape)):
            block = self.sides[first : first + len(self.shape)]
            numel = math.prod(size if n is None else n for n, size in zip(block, self.shape, strict=True))
            yield from ((n, numel) for n in block if n is not None)

    @property
    def cost(self) -> float:
        """Of working on all factors, in arbitrary units."""
        return float(sum(n**3 for n in self.sides if n is not None))


@functools.lru_cache(maxsize=64)
def lower(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the elements of the lower triangle lie in a matrix of n·n elements, and where in its transpose."""
    rows, columns = torch.tril_indices(n, n, device=device)
    return rows * n + columns, columns * n + rows


def unpacked(x: Tensor) -> Tensor:
    """A symmetric matrix [n, n] from its lower triangle in a row."""
    n = int((2 * x.numel()) ** 0.5)
    own, mirrored = lower(n, x.device)
    matrix = x.new_empty(n * n)
    matrix[own] = x
    matrix[mirrored] = x
    return matrix.view(n, n)


def pack_into(target: Tensor, matrix: Tensor) -> None:
    """The lower triangle of a matrix, in a row."""
    torch.index_select(matrix.reshape(-1), 0, lower(matrix.shape[-1], matrix.device)[0], out=target)


@functools.lru_cache(maxsize=64)
def phases(costs: tuple[float, ...], frequency: int) -> tuple[int, ...]:
    """A step in [0, frequency) for each piece of work, so that every step has about the same of it.

    Pieces of one cost that follow each other, as of one parameter, are given to steps that do.
    """
    # No more steps than pieces, which are then spread.
    steps = min(frequency, len(costs))
    return tuple(step * frequency // steps for step in assign(costs, [0.0] * steps))


@dataclass(slots=True)
class Job:
    """A parameter to be stepped.

    Attributes:
        param: Of any dtype and strides.
        grad: In the layout's shape: as it is to be used, in the dtype of the arithmetic, or on a GPU as it is stored.
        scale: What it is to be multiplied by.
        state: The parameter's.
        group: The parameter's.
        layout: Of its factors.
        phase: Of what is refreshed of it.
        backend: Which steps it.
    """

    param: Tensor
    grad: Tensor
    scale: float
    state: dict[str, Any]
    group: Group
    layout: FactorLayout
    phase: list[int]
    backend: str

    def settle(self) -> None:
        """Make of the gradient what it is to be used as."""
        self.grad, self.scale = gradients([self])[0], 1.0

    @property
    def alike(self) -> tuple[Any, ...]:
        """What those have in common that one operation on a list serves: hyper-parameters, step count, dtypes."""
        return id(self.group), int(self.state["step"]), self.param.dtype, self.grad.dtype, self.scale

    @property
    def on_gpu(self) -> bool:
        """Whether kernels for a GPU step it."""
        return self.backend in backends.ON_GPU

    @property
    def cost(self) -> float:
        return self.layout.cost + sum(n or 0 for n in self.layout.sides) * self.param.numel()


class Preconditioned(Mixed):
    """An optimizer that preconditions a parameter along each of its dimensions."""

    timed = True
    counts_on_host = True
    # Keys of a group, with their defaults.
    keys: ClassVar[frozenset[str]]
    late_keys = frozenset({"maximize"})

    @classmethod
    def hyper_keys(cls) -> set[str]:
        return {*cls.keys, *cls.late_keys}

    @classmethod
    @abstractmethod
    def layout(cls, param: Tensor, group: Group) -> FactorLayout:
        """How the factors of a parameter lie in its states."""

    @classmethod
    @abstractmethod
    def flat_states(cls) -> dict[str, bool]:
        """The states that hold factors, and whether they are symmetric."""

    @classmethod
    @abstractmethod
    def step_jobs(cls, jobs: list[Job], backend: str | None) -> None:
        """Step parameters that share no memory, all together."""

    @classmethod
    def check_common(cls, group: Group) -> None:
        """Refuse values of the keys that both have."""
        checks.learning_rate(group)
        checks.weight_decay(group)
        count(group, "precondition_frequency")
        for name in ("stagger", "packed", "bias_correction", "precondition_1d", "merge_dims"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} must be True or False, got {group[name]!r}")
        for option in ("stochastic_rounding", "capturable"):
            if group.get(option):
                raise ValueError(f"{option}=True is not supported by {cls.__name__}, expected False")

    @classmethod
    def check_shape(cls, param: Tensor, group: Group, where: str) -> None:
        pass

    @classmethod
    def check_backends(cls, chosen: set[tuple[str, torch.device]]) -> None:
        if any(backend == "cpu" for backend, _ in chosen):
            matrix_unit()

    @classmethod
    def state_shape(cls, name: str, param: Tensor, group: Group) -> torch.Size:
        if name not in cls.flat_states():
            return param.shape
        layout = cls.layout(param, group)
        return torch.Size([layout.numel(layout.packed and cls.flat_states()[name])])

    @classmethod
    def state_dtype(cls, name: str, param: Tensor, group: Group) -> torch.dtype:
        if name in cls.flat_states():
            return arithmetic(param)
        return super().state_dtype(name, param, group)

    @classmethod
    def cost(cls, param: Tensor, group: Group) -> float:
        """Operations of a step, in the mean over those from one refresh to the next."""
        every, refresh = cls.work(param, group)
        return every + refresh / int(group["precondition_frequency"])

    @classmethod
    def work(cls, param: Tensor, group: Group) -> tuple[float, float]:
        """Operations of every step, one for each element among them, and those that a refresh takes beside.

        A factor of side n takes n for each element of its block, as half of a Gram matrix is computed, and 2n for
        each of the products with it.
        """
        products, refresh_products, refresh_cubes = cls.operations(group)
        every, refresh = float(param.numel()), 0.0
        for n, numel in cls.layout(param, group).worked_on():
            every += (1.0 + 2.0 * products) * n * numel
            refresh += 2.0 * refresh_products * n * numel + refresh_cubes * float(n) ** 3
        return every, refresh

    @classmethod
    def refreshes(cls, groups: Sequence[Group]) -> dict[Tensor, Refreshes]:
        spread = cls.spread(groups)
        found: dict[Tensor, Refreshes] = {}
        for group in groups:
            frequency = int(group["precondition_frequency"])
            for param in group["params"]:
                refresh, pieces = cls.work(param, group)[1], cls.pieces(cls.layout(param, group))
                due = found[param] = {}
                for piece, phase in zip(pieces, spread.get(param, [0] * len(pieces)), strict=True):
                    if piece:
                        due[frequency, phase] = due.get((frequency, phase), 0.0) + refresh * piece / sum(pieces)
        return found

    @classmethod
    @abstractmethod
    def operations(cls, group: Group) -> tuple[float, float, float]:
        """Products with each factor of a step, of a refresh, and what else that takes, over n³."""

    @classmethod
    @abstractmethod
    def pieces(cls, layout: FactorLayout) -> list[float]:
        """What is refreshed at a time, by its cost."""

    @classmethod
    def spread(cls, groups: Sequence[Group]) -> dict[Tensor, list[int]]:
        """The phases of what is refreshed of each parameter of all staggered groups, with a gradient or without."""
        found: dict[Tensor, list[int]] = {}
        # What is refreshed as often is spread together.
        alike: dict[int, dict[Tensor, list[float]]] = {}
        for group in groups:
            if group["stagger"]:
                pieces = alike.setdefault(int(group["precondition_frequency"]), {})
                pieces |= {p: cls.pieces(cls.layout(p, group)) for p in group["params"]}
        for frequency, pieces in alike.items():
            due = iter(phases(tuple(cost for costs in pieces.values() for cost in costs), frequency))
            found |= {p: [next(due) for _ in costs] for p, costs in pieces.items()}
        return found

    @classmethod
    def step_matrices(
        cls,
        tasks: list[Task],
        groups: list[Group],
        states: dict[Tensor, Any],
        backend: str | None,
        inverse_scale: float | None,
        factor: float,
    ) -> None:
        spread = cls.spread(groups)
        found: list[Job] = []
        for param, group, chosen, listed in tasks:
            grad = param.grad if inverse_scale is None else unscaled(param, inverse_scale)
            assert grad is not None
            if param.numel() == 0:
                continue
            if not int(states[param]["step"]) and number(group, "lr") == 0.0 and not bool(grad.any()):
                continue  # there to make states, before those of a checkpoint are loaded
            layout = cls.layout(param, group)
            scale = -factor if group.get("maximize") else factor
            phase = spread[listed] if group["stagger"] else [0] * len(cls.pieces(layout))
            job = Job(param, grad.reshape(layout.shape), scale, states[param], group, layout, phase, chosen)
            if not job.on_gpu:
                job.settle()
            found.append(job)
        for wave in waves_of([job.param for job in found]):
            cls.step_jobs([found[i] for i in wave], backend)
        if found:
            torch._C._increment_version([job.param for job in found])


def gradients(jobs: Sequence[Job]) -> list[Tensor]:
    """As they are to be used, in the dtype of the arithmetic, of jobs that are alike."""
    grads = widened([job.grad for job in jobs], arithmetic(jobs[0].param))
    return grads if jobs[0].scale == 1.0 else list(torch._foreach_mul(grads, jobs[0].scale))


def states_of(jobs: Sequence[Job], name: str) -> list[Tensor]:
    """A state of each, in its layout's shape and the dtype of the arithmetic: views where possible, else copies."""
    return widened([job.state[name].reshape(job.layout.shape) for job in jobs], arithmetic(jobs[0].param))


def arithmetic(param: Tensor) -> torch.dtype:
    """What is computed in; half types are storage alone."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """x·M along dimension `dim`: Σᵢ x[…i…]·M[i, j]."""
    if x.ndim == 2:
        return mm(matrix.mT, x) if dim == 0 else mm(x, matrix)
    return times(x, matrix, dim)


def projection_work(x: Tensor, sides: Sequence[int | None]) -> ranges.Work:
    """Of products along the dimensions that have a matrix of these sides, 2n for each element of x."""
    flops = 2.0 * x.numel() * sum(n for n in sides if n is not None)
    return ranges.Work(2 * x.nbytes, flops, "fp64" if x.dtype == torch.float64 else "fp32")


def total(parts: Sequence[Callable[[], ranges.Work]]) -> ranges.Work:
    """Of several pieces of work, all of one precision."""
    own = [part() for part in parts]
    return ranges.Work(sum(x.bytes for x in own), sum(x.flops for x in own), own[0].precision)


def each(function: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    """Step jobs, those of the CPU's backend over its threads."""
    on_cpu = [job for job in jobs if job.backend == "cpu"]
    over_threads(function, on_cpu, [job.cost for job in on_cpu])
    for job in jobs:
        if job.backend != "cpu":
            function(job)


def number(group: Group, name: str) -> float:
    """A checked hyper-parameter."""
    return checks.number(group, name)


def count(group: Group, name: str) -> None:
    """Refuse a hyper-parameter that is no integer of at least 1."""
    if not is_count(group[name]):
        raise ValueError(f"{name}={group[name]!r} is out of range, expected an integer of at least 1")
