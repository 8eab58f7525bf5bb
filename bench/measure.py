"""Times one case: all contenders step the same parameters, in turns, in one process.

They share parameters and gradients, and torch's forms their states too: the same pages and alignment, and less
memory. Ours are its own, as it need not look at states that nobody else holds. Values are checked in check.py.
In each round every contender has one turn, in a new random order, so that what else the machine does falls on
all of them alike, and ratios are taken within a round. A set that fits into caches is timed warm: each turn
begins with a step that is not timed.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter, perf_counter_ns
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepladder.bench.cases import Case
from stepladder.bench.measurement import OURS, YARDSTICK
from stepladder.bench.rivals import Rival
from stepladder.bench.shapes import Shapes
from stepladder.bench.workload import Source, grouped, make_parameters

# So small that thousands of steps along the same gradients leave the values where they are.
LEARNING_RATE = 1e-4
# Up to this much memory a set counts as cached, in bytes.
CACHED = 2**26
YARDSTICK_MOST = 2**29
PATIENCE = 3.0
FEWEST_ROUNDS = 3
MOST_ROUNDS = 500

Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: Rounds are added to a case until it has taken this long.
        rounds: The goal for sets that fit into caches and for larger ones, for which a case may take up to
            PATIENCE times as long; never fewer than FEWEST_ROUNDS.
        fresh_grads: Reallocate the gradients before each step, untimed, as zero_grad's set_to_none makes it happen.
    """

    seconds: float = 2.0
    rounds: tuple[int, int] = (15, 5)
    fresh_grads: bool = False


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        steps: Milliseconds of a step in each round, by contender; YARDSTICK is one of them.
        host: Milliseconds of our step outside the plan's norm and run.
        moved: Bytes that our step must move.
        yardstick_moved: Bytes that the yardstick moves.
        state_bytes: What the states of each optimizer take.
    """

    steps: dict[str, Milliseconds]
    host: Milliseconds
    moved: int
    yardstick_moved: int
    state_bytes: dict[str, int]


class Contenders:
    """The optimizers of a case on one set of parameters.

    Args:
        case: The optimizer.
        shapes: Of the parameters.
        dtype: Of parameters, gradients and states.
        rivals: To be put beside ours.
        writers: Names of those whose step changes the gradients: they get fresh ones at each step.
        fresh_grads: Everyone gets fresh ones.
        apart: A group for each parameter.
        device: Where the parameters are.
        backends: Ours by the names of contenders, the first is compared with; None leaves the choice to it.
    """

    def __init__(
        self,
        case: Case,
        shapes: Shapes,
        dtype: torch.dtype,
        rivals: Sequence[Rival],
        writers: Collection[str] = (),
        fresh_grads: bool = False,
        *,
        apart: bool = False,
        device: torch.device | str = "cpu",
        backends: Mapping[str, str | None] = MappingProxyType({OURS: None}),
    ) -> None:
        self.params = make_parameters(shapes, dtype, device)
        self._gradients = [p.grad for p in self.params]
        self._states = case.states
        self._apart = apart
        self._options = case.options | {"lr": LEARNING_RATE}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        ours = []
        for name, backend in backends.items():
            optimizer = self.make(partial(case.ours, backend=backend) if backend else case.ours)
            optimizer.step()
            ours.append(optimizer)
            self.optimizers[name] = optimizer
        self.ours: Any = ours[0]
        shared = None
        for rival in rivals:
            optimizer = self.make(rival.make)
            if rival.shares_states:
                shared = optimizer.state = optimizer.state if shared is None else shared
            self.optimizers[rival.name] = optimizer
        self._fresh = set(self.optimizers) if fresh_grads else set(writers)

    def make(self, constructor: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """An optimizer of the parameters, with the case's hyper-parameters and these."""
        return constructor(grouped(self.params, LEARNING_RATE, self._apart), **self._options | options)

    def prepare(self, name: str, fresh: bool | None = None) -> None:
        """Give every parameter the gradient that this contender's next step finds.

        Args:
            name: The contender.
            fresh: Whether it is a new one; None as the constructor was told.
        """
        fresh = name in self._fresh if fresh is None else fresh
        for param, gradient in zip(self.params, self._gradients, strict=True):
            assert gradient is not None
            if fresh:
                param.grad = gradient.clone()
            elif param.grad is not gradient:
                param.grad = gradient

    def step(self, name: str) -> float:
        """One step; returns what it took, in milliseconds."""
        self.prepare(name)
        return milliseconds(self.optimizers[name].step)

    def sizes(self) -> tuple[int, int]:
        """Bytes that our step must move, and bytes that it touches.

        Moved are parameter, gradient and states as they are read, parameter and states as they are written.
        """
        moved = touched = 0
        for param in self.params:
            held = param.nbytes + sum(self.ours.state[param][name].nbytes for name in self._states)
            moved += 2 * held + param.nbytes
            touched += held + param.nbytes
        return moved, touched


class Yardstick:
    """`a += b` on float32, over as much memory as a step touches, up to half a GiB.

    It reads two numbers for each that it writes in place, as a step without state does, so that no write costs
    the extra read that a copy's does.
    """

    def __init__(self, touched: int) -> None:
        n = max(1, min(touched, YARDSTICK_MOST) // 8)
        source = Source()
        self._a, self._b = (source.tensor((n,), torch.float32) for _ in range(2))
        self.moved = 12 * n

    def step(self) -> float:
        return milliseconds(lambda: self._a.add_(self._b, alpha=LEARNING_RATE))


def measure(
    case: Case,
    shapes: Shapes,
    dtype: torch.dtype,
    rivals: Sequence[Rival],
    writers: Collection[str],
    settings: Settings,
    apart: bool = False,
) -> Timing:
    """Time ours, the rivals and the yardstick; arguments as of `Contenders`."""
    contenders = Contenders(case, shapes, dtype, rivals, writers, settings.fresh_grads, apart=apart)
    moved, touched = contenders.sizes()
    yardstick = Yardstick(touched)
    cached = touched <= CACHED
    goal = settings.rounds[0 if cached else 1]

    def turn(name: str) -> float:
        step = yardstick.step if name == YARDSTICK else lambda: contenders.step(name)
        if cached:
            step()
        return step()

    names = [*contenders.optimizers, YARDSTICK]
    steps: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    for name in names:
        turn(name)
    with no_collection():
        begin = perf_counter()
        rounds = 0
        while wanted(rounds, goal, perf_counter() - begin, settings.seconds):
            shuffle(order)
            for name in order:
                steps[name].append(turn(name))
            rounds += 1
        host = _host(contenders, goal)
    arrays = {name: np.array(times) for name, times in steps.items()}
    sizes = {name: state_bytes(optimizer) for name, optimizer in contenders.optimizers.items()}
    return Timing(arrays, host, moved, yardstick.moved, sizes)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in an optimizer's state, step counts among them."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def wanted(rounds: int, goal: int, elapsed: float, seconds: float) -> bool:
    """Whether there is to be another round."""
    if rounds < FEWEST_ROUNDS:
        return True
    return elapsed < (PATIENCE * seconds if rounds < goal else seconds) and rounds < MOST_ROUNDS


class _Clock:
    """Stands before our plan and adds up the time inside its norm and run."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan
        self.inside = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def norm(self, *args: Any) -> Any:
        return self._count(self._plan.norm, args)

    def run(self, *args: Any) -> Any:
        return self._count(self._plan.run, args)

    def _count(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        begin = perf_counter_ns()
        result = function(*args)
        self.inside += (perf_counter_ns() - begin) / 1e6
        return result


def _host(contenders: Contenders, steps: int) -> Milliseconds:
    """Our step less the time in its kernels, in a pass of its own so that the clock slows no timed step.

    What run() itself does for each parameter (scalars, step counts, versions) counts as theirs.
    """
    engine: Any = contenders.ours._engine
    plan = engine.plan
    outside = []
    try:
        for _ in range(steps):
            engine.plan = clock = _Clock(plan)
            outside.append(contenders.step(OURS) - clock.inside)
    finally:
        engine.plan = plan
    return np.array(outside)


def milliseconds(function: Callable[[], Any]) -> float:
    begin = perf_counter_ns()
    function()
    return (perf_counter_ns() - begin) / 1e6


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
