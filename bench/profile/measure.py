"""Takes steps of a subject, with and without a clock in it, in turns with the ceilings that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
import torch

from stepladder import ranges
from stepladder.bench.gpu import COPY, Copy, Gpu
from stepladder.bench.measure import CACHED, FEWEST_ROUNDS, Yardstick, milliseconds, no_collection
from stepladder.bench.profile import trace as traces
from stepladder.bench.profile.clock import Clock, Part, Parts, Record, divide, mean, middle_half
from stepladder.bench.profile.subjects import Subject
from stepladder.bench.roofline import Product
from stepladder.ranges import Work

# Bytes of the least that `a += b` goes over: of less, its time would be that of the call.
LEAST_ADDED = 2**22
# Rounds after which that is known well enough: a product takes longer than many a step.
PRODUCTS = 7
TRACED_STEPS = 3
# On a GPU, for what the host does.
HOST_TURNS = 8
# More of them would say no more.
MOST_ROUNDS = 200
ADDITION = "a += b"


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in the same run, by torch.

    Attributes:
        memory: In GB/s.
        by: What moved it.
        products: TFLOP/s of a square product with a side of roofline.SIDE, by precision.
    """

    memory: float
    by: str
    products: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRow:
    """One thread's part in a kernel: how long it worked in a step, and at which rate."""

    thread: str
    ms: float
    gb_per_s: float | None
    tflop_per_s: float | None


@dataclass(frozen=True)
class Row:
    """A kernel or a part of the host's work, in a step.

    Attributes:
        name: Of the kernel or range.
        calls: Launches of kernels, or times that a range was begun.
        ms: In a step.
        share: Of the step.
        gb_per_s: What has to be moved over the time; None where it is not known.
        tflop_per_s: Likewise of products, a symmetric one counted in full.
        ceiling: The rate over that of the ceiling; of products where there are some.
        precision: Of the products.
        threads: What is known of each thread's part in it.
        within: On a GPU, the range that launched it, whose own row has the rates.
    """

    name: str
    calls: float
    ms: float
    share: float
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    ceiling: float | None = None
    precision: str | None = None
    threads: tuple[ThreadRow, ...] = ()
    within: str | None = None


@dataclass
class Result:
    """What was measured.

    Attributes:
        samples: Turns behind each number.
        steps: In each turn.
        step_ms: A step with the clock in it.
        kernel_ms: Of it, in kernels.
        host_ms: Of it, elsewhere; on a GPU while the device had nothing to do.
        unprofiled_ms: A step without the clock, in the median, in the same rounds; None on a GPU, where none has one.
        call_ms: On a GPU, until step() returned.
        kernels: The kernels, longest first.
        host: The parts of the host's work.
        ceilings: Those of the run.
        each: Of every turn, those of `step_ms` and so on that were measured in it.
        interrupted: Whether it was ended early.
        trace: Of some further steps.
    """

    samples: int
    steps: int
    step_ms: float
    kernel_ms: float
    host_ms: float
    unprofiled_ms: float | None
    call_ms: float | None
    kernels: list[Row]
    host: list[Row]
    ceilings: Ceilings
    each: list[dict[str, float]]
    interrupted: bool = False
    trace: traces.Trace | None = None


def rounds(seconds: float, steps: int | None, cycle: int) -> Iterator[int]:
    """Rounds: as many as it takes for so many steps, or else as fit into the time, and a few at least."""
    if steps is not None:
        yield from range(max(1, -(-steps // cycle)))
        return
    begin, done = perf_counter(), 0
    fewest = FEWEST_ROUNDS if cycle == 1 else 1
    while done < fewest or (perf_counter() - begin < seconds and done < MOST_ROUNDS):
        yield done
        done += 1


def _precisions(parts: Parts) -> set[str]:
    return {part.work.precision for part in parts.kernels.values() if part.work.precision is not None}


def on_cpu(subject: Subject, seconds: float, steps: int | None, traced: bool) -> Result:
    """Profile steps on the CPU.

    Args:
        subject: What to step.
        seconds: For the turns together.
        steps: To be taken in place of that, rounded up to whole cycles.
        traced: Whether some more are to be taken for a trace.
    """
    clock = Clock()
    device = torch.device("cpu")
    take = partial(clock.step, subject.title, subject.step)
    # The first cycle makes what steps keep, and says which products there are.
    warm = [divide(take()) for _ in range(subject.cycle)]
    products = {precision: Product(precision, device) for precision in sorted(_precisions(mean(warm)))}
    yardstick = Yardstick(max(subject.touched, LEAST_ADDED))
    cached = subject.touched <= CACHED
    turns: list[list[Parts]] = []
    plain: list[float] = []
    additions: list[float] = []
    rates: dict[str, list[float]] = {precision: [] for precision in products}
    interrupted = False
    with no_collection():
        try:
            for done in rounds(seconds, steps, subject.cycle):
                if cached:
                    yardstick.step()
                additions.append(yardstick.step())
                if done < PRODUCTS:
                    for precision, product in products.items():
                        rates[precision].append(product.timed())
                if subject.cycle == 1:
                    if cached:
                        subject.step()
                    plain.append(milliseconds(subject.step))
                records = [take() for _ in range(subject.cycle)]
                turns.append([divide(record) for record in records])
        except KeyboardInterrupt:
            interrupted = True
    if not turns:
        raise KeyboardInterrupt
    memory = yardstick.moved / float(np.median(additions)) / 1e6
    rate = {precision: products[precision].rate(float(np.median(times))) for precision, times in rates.items()}
    ceilings = Ceilings(memory, ADDITION, rate)
    parts = mean(middle_half(turns))
    kernels = [_row(name, part, parts.elapsed, ceilings) for name, part in parts.kernels.items()]
    host = [_row(name, part, parts.elapsed, ceilings) for name, part in parts.host.items()]
    result = Result(
        samples=len(turns),
        steps=subject.cycle,
        step_ms=parts.elapsed / 1e6,
        kernel_ms=sum(row.ms for row in kernels),
        host_ms=sum(row.ms for row in host),
        unprofiled_ms=float(np.median(plain)) if plain else None,
        call_ms=None,
        kernels=_longest_first(kernels),
        host=_longest_first(host),
        ceilings=ceilings,
        each=[_sums(turn) for turn in turns],
        interrupted=interrupted,
    )
    if traced and not interrupted:
        result.trace = _traced(subject, clock)
    return result


def _sums(turn: list[Parts]) -> dict[str, float]:
    """Milliseconds of a step, of its kernels, of the rest."""
    by = 1.0 / len(turn) / 1e6
    tables = [[part.ns for step in turn for part in getattr(step, which).values()] for which in ("kernels", "host")]
    elapsed = sum(step.elapsed for step in turn) * by
    return {"step_ms": elapsed, "kernel_ms": sum(tables[0]) * by, "host_ms": sum(tables[1]) * by}


def _longest_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.ms)


def _rates(work: Work, ns: float) -> tuple[float | None, float | None]:
    """GB/s and TFLOP/s."""
    if ns <= 0.0:
        return None, None
    return (work.bytes / ns if work.bytes else None), (work.flops / ns / 1e3 if work.flops else None)


def _ceiling(work: Work, ns: float, ceilings: Ceilings) -> float | None:
    """The share of what the machine reaches: of products where there are some, else of memory."""
    gigabytes, teraflops = _rates(work, ns)
    if teraflops is not None and work.precision in ceilings.products:
        return teraflops / ceilings.products[work.precision]
    return gigabytes / ceilings.memory if gigabytes is not None else None


def _row(name: str, part: Part, elapsed: float, ceilings: Ceilings) -> Row:
    threads = [ThreadRow(thread, ns / 1e6, *_rates(part.done[thread], ns)) for thread, ns in sorted(part.busy.items())]
    gigabytes, teraflops = _rates(part.work, part.ns)
    ceiling = _ceiling(part.work, part.ns, ceilings)
    precision = part.work.precision if part.work.flops else None
    return Row(
        name,
        part.calls,
        part.ns / 1e6,
        part.ns / elapsed,
        gigabytes,
        teraflops,
        ceiling,
        precision,
        tuple(threads),
    )


def _traced(subject: Subject, clock: Clock) -> traces.Trace:
    """A trace of some steps, of a whole cycle where there is one."""
    records: list[Record] = []

    def take() -> None:
        for _ in range(max(TRACED_STEPS, subject.cycle)):
            records.append(clock.step(subject.title, subject.step))

    trace = traces.record(take, on_gpu=False)
    traces.add_threads(trace, records)
    return trace


def on_gpu(gpu: Gpu, subject: Subject, seconds: float, steps: int | None) -> Result:
    """Profile steps on a GPU: steps by events, kernels by torch.profiler in steps of their own.

    Args:
        gpu: Where.
        subject: What to step.
        seconds: For the turns together.
        steps: To be taken in place of that, rounded up to whole cycles.
    """
    clock = Clock()
    # What each range has to do, and the host's part of it.
    parts = mean(
        middle_half(
            [
                [divide(clock.step(subject.title, subject.step)) for _ in range(subject.cycle)]
                for _ in range(HOST_TURNS if subject.cycle == 1 else 1)
            ]
        )
    )
    copy = Copy(subject.touched, gpu.device)
    products = {precision: Product(precision, gpu.device) for precision in sorted(_precisions(parts))}
    turns: list[tuple[float, float]] = []
    copies: list[float] = []
    rates: dict[str, list[float]] = {precision: [] for precision in products}
    interrupted = False
    with no_collection():
        try:
            for done in rounds(seconds, steps, subject.cycle):
                copies.append(gpu.queued(copy.step, 0.0))
                if done < PRODUCTS:
                    for precision, product in products.items():
                        rates[precision].append(gpu.queued(product.step, 0.0))
                timed = np.array([gpu.alone(subject.step) for _ in range(subject.cycle)])
                turns.append((float(timed[:, 0].mean()), float(timed[:, 1].mean())))
        except KeyboardInterrupt:
            interrupted = True
    if not turns:
        raise KeyboardInterrupt
    taken = max(TRACED_STEPS, subject.cycle)

    def take() -> None:
        for _ in range(taken):
            with ranges.phase(subject.title):
                subject.step()

    trace = traces.record(take, on_gpu=True)
    memory = copy.moved / float(np.median(copies)) / 1e6
    rate = {precision: products[precision].rate(float(np.median(times))) for precision, times in rates.items()}
    ceilings = Ceilings(memory, f"a {COPY} within the device", rate)
    step_ms, call_ms = (float(np.median(column)) for column in zip(*turns, strict=True))
    kernels = _device_rows(traces.device_kernels(trace), taken, parts, subject.moved, step_ms, ceilings)
    kernel_ms = sum(row.ms for row in kernels if row.within is not None)
    host = {**parts.host, **parts.kernels}
    return Result(
        samples=len(turns),
        steps=subject.cycle,
        step_ms=step_ms,
        kernel_ms=kernel_ms,
        host_ms=max(step_ms - kernel_ms, 0.0),
        unprofiled_ms=None,
        call_ms=call_ms,
        kernels=kernels,
        host=_longest_first([Row(name, p.calls, p.ns / 1e6, p.ns / 1e6 / step_ms) for name, p in host.items()]),
        ceilings=ceilings,
        each=[{"step_ms": ms, "call_ms": call} for ms, call in turns],
        interrupted=interrupted,
        trace=trace,
    )


def _device_rows(
    found: list[traces.DeviceKernel], steps: int, parts: Parts, moved: int, step_ms: float, ceilings: Ceilings
) -> list[Row]:
    """A row for each range with its rates, and below it one for each of its kernels."""
    rows = []
    for where in dict.fromkeys(kernel.range for kernel in found):
        own = [kernel for kernel in found if kernel.range == where]
        ms = sum(kernel.ms for kernel in own) / steps
        work = parts.kernels[where].work if where in parts.kernels else Work()
        if where == "elementwise":
            work = Work(bytes=moved)
        launches = sum(kernel.launches for kernel in own) / steps
        rates, ceiling = _rates(work, ms * 1e6), _ceiling(work, ms * 1e6, ceilings)
        precision = work.precision if work.flops else None
        rows.append(Row(where or "outside of all ranges", launches, ms, ms / step_ms, *rates, ceiling, precision))
        for kernel in own:
            mean_ms = kernel.ms / steps
            rows.append(Row(kernel.name, kernel.launches / steps, mean_ms, mean_ms / step_ms, within=where))
    return rows
