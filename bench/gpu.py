"""Times one case on a GPU: by events, with the L2 flushed, and the host's time apart.

A turn of a contender is two steps, since a step has two costs. One starts with the device idle and lasts until the
device is done: that is what a step takes by itself, and where the cost of many small tensors or groups is found. The
other is queued behind a delay, so that the device alone is timed: that is what it takes where the host runs ahead, and
what is compared with the bandwidth of a copy. Turns are taken as in measure.py, in a new random order in each round.
"""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import torch

from stepladder import _C, backends
from stepladder.bench.cases import DTYPES, Case
from stepladder.bench.check import Verdict, check, check_in_full, said, sample
from stepladder.bench.measure import CACHED, OURS, Contenders, Settings, no_collection, wanted
from stepladder.bench.measurement import Quantiles
from stepladder.bench.results import RESERVE, fit, gib, own_memory
from stepladder.bench.rivals import Rival, rivals_of
from stepladder.bench.shapes import APART, Shapes, elements, shapes_of
from stepladder.bench.workload import Source

COPY = "copy"
# Of the two buffers of a copy, in bytes: more than any cache, and enough for its full speed.
COPY_LEAST, COPY_MOST = 2**27, 2**31
# Sets of which a step is captured into a graph and replayed, too.
REPLAYED = ("1000x768", "465-groups")
# Where torch does not tell the size of the L2.
L2_UNKNOWN = 2**27
# torch.cuda._sleep counts cycles: at least this many in a millisecond.
CYCLES = 2_000_000
LONGEST_DELAY = 100.0
Step = Callable[[], Any]


class Gpu:
    """What the measurement asks of a GPU. Tests put another in its place.

    Args:
        index: Of the device, as torch counts.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.properties: Any = torch.cuda.get_device_properties(index)
        torch.cuda.set_device(index)
        cache = getattr(self.properties, "L2_cache_size", 0) or L2_UNKNOWN
        self._flushed = torch.empty(4 * cache, dtype=torch.int8, device=self.device)

    def alone(self, step: Step) -> tuple[float, float]:
        """Milliseconds from the call on an idle device until the device is done, and until the call returned."""
        self._flushed.fill_(1)
        torch.cuda.synchronize()
        start, end = self._events()
        start.record()
        begin = perf_counter_ns()
        step()
        returned = perf_counter_ns()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)), (returned - begin) / 1e6

    def queued(self, step: Step, host_ms: float) -> float:
        """Milliseconds of the device alone, all launches having been queued before it begins.

        Args:
            step: What is timed.
            host_ms: What its call takes. A call that launches more than the queue holds waits all the same.
        """
        self._flushed.fill_(1)
        start, end = self._events()
        torch.cuda._sleep(int(CYCLES * min(2.0 * host_ms + 0.1, LONGEST_DELAY)))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def capture(self, step: Step) -> Step:
        """Capture a step into a graph; returns what replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def free(self) -> int:
        """Bytes that can be allocated."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0]) - RESERVE - 2 * COPY_MOST

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True)
class Contender:
    """What is known of one contender.

    Attributes:
        ms: Milliseconds of a step that starts with the device idle, until the device is done.
        host_ms: Of them, those until step() returned.
        device_ms: Milliseconds of the device where the host has run ahead.
        ratio: `ms` over that of our first backend in the same round; None for itself.
        device_ratio: The same of `device_ms`.
        gb_per_s: What the step must move, over `device_ms`; None for another rule.
        share: Over the copy's bandwidth.
        launches: Kernels that a step launches; None where they are not counted: of rivals.
        host_fresh_ms: `host_ms` with gradients that were reallocated; ours only.
        replay_ms: `ms` of a replay of the step from a graph.
        replay_host_ms: `host_ms` of it.
        samples: `ms` of each round.
        moved: Bytes that the step must move; None for another rule.
    """

    ms: Quantiles
    host_ms: Quantiles
    device_ms: Quantiles
    ratio: Quantiles | None = None
    device_ratio: Quantiles | None = None
    gb_per_s: float | None = None
    share: float | None = None
    launches: int | None = None
    host_fresh_ms: Quantiles | None = None
    replay_ms: Quantiles | None = None
    replay_host_ms: Quantiles | None = None
    samples: list[float] = field(default_factory=list)
    moved: int | None = None


@dataclass(frozen=True)
class GpuResult:
    """A case that was measured on a GPU, or was not and why.

    Attributes:
        optimizer: The case's name.
        shapes: The shape set's name.
        dtype: fp32 and so on.
        groups: How many the optimizer has.
        tensors: How many the set has.
        elements: How many they have together.
        skipped: Why it was not run; everything below is then empty.
        red: How each backend of ours that fails the check does so; it has no number then.
        absent: Contenders that have no number, and why.
        rounds: Samples behind each number.
        bandwidth: Of the device-to-device copy in the same rounds with the host ahead, in GB/s, bytes read and written.
        copy_ms: Milliseconds of a copy from an idle device until it is done, in each round.
        copy_moved: Bytes that it reads and writes.
        contenders: By name, ours first.
    """

    optimizer: str
    shapes: str
    dtype: str
    groups: int
    tensors: int
    elements: int
    skipped: str | None = None
    red: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    bandwidth: float | None = None
    copy_ms: list[float] = field(default_factory=list)
    copy_moved: int = 0
    contenders: dict[str, Contender] = field(default_factory=dict)


def contender(backend: str) -> str:
    """The name of a backend of ours among the contenders."""
    return f"{OURS}-{backend}"


def available(names: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The backends that can run here, in the order of the automatic choice, and why the others cannot."""
    found: list[str] = []
    missing = {}
    for backend in backends.TABLE:
        if backend.name not in names:
            continue
        if reason := backend.missing():
            missing[backend.name] = reason
        else:
            found.append(backend.name)
    return found, missing


def run(
    gpu: Gpu,
    case: Case,
    shapes_name: str,
    dtype_name: str,
    rival_names: Collection[str],
    settings: Settings,
    ours: Sequence[str],
) -> GpuResult:
    """Check a case, and measure it where the check is green and the memory suffices.

    Args:
        gpu: Where.
        case: The optimizer.
        shapes_name: What `--shapes` takes.
        dtype_name: fp32 and so on.
        rival_names: Who is to be measured beside ours.
        settings: How long.
        ours: Backends that can run, the first of which is compared with.
    """
    shapes, apart = shapes_of(shapes_name), shapes_name in APART
    groups = len(shapes) if apart else 1
    result = GpuResult(case.name, shapes_name, dtype_name, groups, len(shapes), elements(shapes))
    # Whatever it was, what has been measured before must not be lost.
    try:
        return _run(gpu, case, shapes, result, rival_names, settings, ours)
    except Exception as error:
        return replace(result, red={OURS: said(error)})


def _run(
    gpu: Gpu,
    case: Case,
    shapes: Shapes,
    result: GpuResult,
    rival_names: Collection[str],
    settings: Settings,
    ours: Sequence[str],
) -> GpuResult:
    dtype, apart = DTYPES[result.dtype], result.shapes in APART
    column = result.elements * dtype.itemsize
    # The check in full holds two optimizers' tensors beside the values that they start from, and temporary ones.
    need = max(own_memory(case, column, True, len(ours)), (8 + 2 * len(case.states)) * column)
    free = gpu.free()
    if need > free:
        return replace(result, skipped=f"needs {gib(need)} of the GPU's memory, {gib(free)} are free")

    rivals, absent = rivals_of(case, rival_names, gpu=True, tensors=len(shapes))
    red, wrong, writers = _checked(gpu, case, shapes, dtype, rivals, ours, apart)
    absent |= wrong
    result = replace(result, red={contender(backend): reason for backend, reason in red.items()}, absent=absent)
    green = [backend for backend in ours if backend not in red]
    if not green:
        return result
    rivals = [rival for rival in rivals if rival.name not in absent]
    rivals, without_room = fit(rivals, column, gpu.free() - own_memory(case, column, True, len(green)))
    absent |= without_room
    contenders = Contenders(
        case,
        shapes,
        dtype,
        rivals,
        writers,
        settings.fresh_grads,
        apart=apart,
        device=gpu.device,
        backends={contender(backend): backend for backend in green},
    )
    return _Measurement(gpu, case, contenders, rivals, green, settings).result(result, result.shapes in REPLAYED)


def _checked(
    gpu: Gpu, case: Case, shapes: Shapes, dtype: torch.dtype, rivals: list[Rival], ours: Sequence[str], apart: bool
) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """What is wrong by backend and by rival, and who writes gradients."""
    red: dict[str, str] = {}
    verdict: Verdict | None = None
    for backend in ours:
        # The rivals are held to the first of ours that is green.
        theirs = [] if verdict else rivals
        # One that cannot run must not keep the others from being measured.
        try:
            found = check(case, shapes, dtype, theirs, apart=apart, device=gpu.device, backend=backend)
        except Exception as error:
            red[backend] = said(error)
            continue
        if found.red:
            red[backend] = found.red
        else:
            verdict = verdict or found
    if verdict is None:
        return red, {}, set()
    wrong = verdict.wrong
    late = [rival for rival in rivals if rival.checked_in_full]
    if late or sample(shapes) != shapes:
        green = [backend for backend in ours if backend not in red]
        in_full = check_in_full(case, shapes, dtype, late, device=gpu.device, backends=green, apart=apart)
        red |= in_full[0]
        wrong |= in_full[1]
    return red, wrong, verdict.writers


class Copy:
    """A copy from device memory to device memory, of as much as a step touches, within bounds.

    Args:
        touched: Bytes that a step touches.
        device: Whose memory.
    """

    def __init__(self, touched: int, device: torch.device) -> None:
        size = min(max(touched // 2, COPY_LEAST), COPY_MOST)
        self._source = Source(device).tensor((size // 4,), torch.float32)
        self._target = torch.empty_like(self._source)
        self.moved = 2 * self._source.nbytes

    def step(self) -> None:
        self._target.copy_(self._source)


class _Measurement:
    def __init__(
        self,
        gpu: Gpu,
        case: Case,
        contenders: Contenders,
        rivals: Sequence[Rival],
        ours: Sequence[str],
        settings: Settings,
    ) -> None:
        self._gpu = gpu
        self._case = case
        self._contenders = contenders
        self._rivals = {rival.name: rival for rival in rivals}
        self._ours = {contender(backend): backend for backend in ours}
        self._settings = settings
        self._moved, touched = contenders.sizes()
        self._copy = Copy(touched, gpu.device)
        self._goal = settings.rounds[0 if touched <= CACHED else 1]

    def result(self, result: GpuResult, replays: bool) -> GpuResult:
        absent = dict(result.absent)
        names = [name for name in self._contenders.optimizers if self._warm(name, absent)]
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in (*names, COPY)}
        order, shuffle = list(samples), random.Random(0).shuffle
        with no_collection():
            begin, rounds = perf_counter(), 0
            while wanted(rounds, self._goal, perf_counter() - begin, self._settings.seconds):
                shuffle(order)
                for name in order:
                    samples[name].append(self._turn(name))
                rounds += 1
            extra = {name: self._extra(name, replays, absent) for name in names}
        times = {name: np.array(turns).T for name, turns in samples.items()}
        bandwidth = self._copy.moved / float(np.median(times[COPY][2])) / 1e6
        first = times[next(iter(self._ours))]
        measured = {}
        for name in names:
            total, host, device = times[name]
            speed = self._moved / float(np.median(device)) / 1e6 if self._same_rule(name) else None
            measured[name] = Contender(
                Quantiles.of(total),
                Quantiles.of(host),
                Quantiles.of(device),
                Quantiles.of(total / first[0]) if times[name] is not first else None,
                Quantiles.of(device / first[2]) if times[name] is not first else None,
                speed,
                speed and speed / bandwidth,
                samples=total.tolist(),
                moved=self._moved if self._same_rule(name) else None,
                **extra[name],
            )
        copied = {"bandwidth": bandwidth, "copy_ms": times[COPY][0].tolist(), "copy_moved": self._copy.moved}
        return replace(result, absent=absent, rounds=rounds, contenders=measured, **copied)

    def _same_rule(self, name: str) -> bool:
        return name in self._ours or self._rivals[name].same_rule

    def _warm(self, name: str, absent: dict[str, str]) -> bool:
        """Take a turn that is not counted: compiles, and creates states."""
        if name in self._ours or not self._rivals[name].foreign:
            self._turn(name)
            return True
        try:
            self._turn(name)
        except Exception as error:
            absent[name] = said(error)
        return name not in absent

    def _turn(self, name: str) -> tuple[float, float, float]:
        """Milliseconds of a step by itself, of its host part, and of the device."""
        if name == COPY:
            total, host = self._gpu.alone(self._copy.step)
            return total, host, self._gpu.queued(self._copy.step, host)
        step = self._contenders.optimizers[name].step
        self._contenders.prepare(name)
        total, host = self._gpu.alone(step)
        self._contenders.prepare(name)
        return total, host, self._gpu.queued(step, host)

    def _extra(self, name: str, replays: bool, absent: dict[str, str]) -> dict[str, Any]:
        """What is measured once the rounds are over."""
        found: dict[str, Any] = {}
        if name in self._ours:
            self._contenders.prepare(name)
            found["launches"] = count_launches(self._ours[name], self._contenders.optimizers[name].step)
            found["host_fresh_ms"] = Quantiles.of(np.array([self._host_fresh(name) for _ in range(self._goal)]))
        if replays and (make := self._capturable(name)):
            try:
                found["replay_ms"], found["replay_host_ms"] = map(Quantiles.of, self._replayed(name, make))
            except Exception as error:
                absent[f"{name} by graph replay"] = said(error)
        return found

    def _host_fresh(self, name: str) -> float:
        self._contenders.prepare(name, fresh=True)
        return self._gpu.alone(self._contenders.optimizers[name].step)[1]

    def _capturable(self, name: str) -> Callable[..., torch.optim.Optimizer] | None:
        """Makes those whose step is captured: ours, and torch's fused form where it can be."""
        if name in self._ours:
            return partial(self._case.ours, backend=self._ours[name])
        cls = self._case.torch
        can = name == "fused" and cls is not None and "capturable" in inspect.signature(cls).parameters
        return self._rivals[name].make if can else None

    def _replayed(self, name: str, make: Callable[..., torch.optim.Optimizer]) -> Any:
        self._contenders.prepare(name, fresh=False)
        optimizer = self._contenders.make(make, capturable=True)  # the graph points to its memory
        replay = self._gpu.capture(optimizer.step)
        replay()
        samples = np.array([self._gpu.alone(replay) for _ in range(self._goal)]).T
        del replay, optimizer
        return samples


def count_launches(backend: str, step: Step) -> int | None:
    """How many kernels of ours a step launches; None where they cannot be counted."""
    if backend == "triton":
        return _triton_launches(step)
    before = _C.launches()
    step()
    return _C.launches() - before or None


def _triton_launches(step: Step) -> int | None:
    launched: list[None] = []

    def note(_metadata: Any) -> None:
        launched.append(None)

    try:
        from triton import knobs

        hooks = knobs.runtime.launch_enter_hook
        hooks.add(note)
    except (ImportError, AttributeError):
        return None
    try:
        step()
    finally:
        hooks.remove(note)
    return len(launched) or None
