"""Times the named ranges of a step on the CPU, and divides the step's time among them.

The time of a step is that of the thread which calls it. A range has what is left of it without the ranges within it;
where other threads work for a range, or a parallel region of the compiled kernels does, its time goes to what they did,
in proportion to how long each thing kept them busy. So the parts add up to the step.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from time import perf_counter_ns
from typing import Any, TypeVar

from stepladder import _C, ranges
from stepladder.bench.traffic import bytes_of_pass
from stepladder.ranges import Work

Function = TypeVar("Function", bound=Callable[..., Any])
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(eq=False)
class Span:
    """A range as it was passed through; times in nanoseconds of perf_counter_ns."""

    clock: Clock
    name: str
    kernel: bool
    work: Callable[[], Work] | None = None
    parent: Span | None = None
    # Whether other threads worked for it, in spans of their own.
    shared: bool = False
    thread: int = 0
    begin: int = 0
    end: int = 0

    def __enter__(self) -> Span:
        stack = self.clock.stack()
        self.parent = stack[-1] if stack else self.parent
        stack.append(self)
        self.thread = threading.get_native_id()
        self.begin = perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self.end = perf_counter_ns()
        self.clock.stack().pop()
        self.clock.spans.append(self)


class Clock:
    """Listens to ranges, and records the regions of the compiled kernels."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._stacks = threading.local()

    def stack(self) -> list[Span]:
        """Of the calling thread."""
        if not hasattr(self._stacks, "spans"):
            self._stacks.spans = []
        spans: list[Span] = self._stacks.spans
        return spans

    def range(self, name: str, kernel: bool, work: Callable[[], Work] | None = None) -> Span:
        return Span(self, name, kernel, work)

    @contextmanager
    def workers(self) -> Iterator[Callable[[Function], Function]]:
        open_range = self.stack()[-1]
        name, kernel = open_range.name, open_range.kernel

        def carried(function: Function) -> Function:
            @wraps(function)
            def inner(*args: Any) -> Any:
                with Span(self, name, kernel, parent=section):
                    return function(*args)

            return inner  # type: ignore[return-value]

        with Span(self, name, kernel, shared=True) as section:
            yield carried

    def step(self, name: str, step: Callable[[], Any]) -> Record:
        """Take a step in a range of this name."""
        self.spans = []
        _C.take_regions()
        _C.record_regions(True)
        try:
            with ranges.listening(self), ranges.phase(name):
                step()
        finally:
            _C.record_regions(False)
        # The range around all others ends last.
        return Record(self.spans[-1], self.spans, _C.take_regions())


@dataclass
class Record:
    """What was recorded of a step: the range around it, that one and all others, and the kernels' regions."""

    whole: Span
    spans: list[Span]
    regions: list[Any]


@dataclass
class Part:
    """A kernel, or a part of the host's work, in one or several steps.

    Attributes:
        ns: Of the calling thread's time.
        calls: How often it was begun.
        work: What it takes at least.
        busy: By thread, nanoseconds in which it worked, where that is known.
        done: By thread, what it did of the work.
    """

    ns: float = 0.0
    calls: float = 0.0
    work: Work = field(default_factory=Work)
    busy: dict[str, float] = field(default_factory=dict)
    done: dict[str, Work] = field(default_factory=dict)

    def add_busy(self, thread: str, ns: float, done: Work) -> None:
        self.busy[thread] = self.busy.get(thread, 0.0) + ns
        self.done[thread] = plus(self.done.get(thread, Work()), done)


def plus(a: Work, b: Work) -> Work:
    return Work(a.bytes + b.bytes, a.flops + b.flops, b.precision or a.precision)


@dataclass
class Parts:
    """A step, divided: kernels and the host's parts by name; nanoseconds."""

    elapsed: float
    kernels: dict[str, Part]
    host: dict[str, Part]


def divide(record: Record) -> Parts:
    """Divide a step's time among its ranges and regions."""
    main = record.whole.thread
    kernels: dict[str, Part] = defaultdict(Part)
    host: dict[str, Part] = defaultdict(Part)
    own = {id(span): float(span.end - span.begin) for span in record.spans}
    for span in record.spans:
        if span.parent is not None and span.parent.thread == span.thread and id(span.parent) in own:
            own[id(span.parent)] -= span.end - span.begin
    spans = [span for span in record.spans if span.thread == main]
    for begin, end, threads in record.regions:
        around = [span for span in spans if span.begin <= begin and end <= span.end]
        own[id(max(around, key=lambda span: (span.begin, -span.end), default=record.whole))] -= end - begin
        _add_region(kernels, end - begin, threads)
    names = _names({span.thread for span in record.spans} - {main})
    for span in record.spans:
        part = (kernels if span.kernel else host)[span.name]
        work = span.work() if span.work is not None else Work()
        root = span.thread != main and span.parent is not None and span.parent.shared
        part.calls += not (span.shared or root)
        part.work = plus(part.work, work)
        if span.thread != main:
            part.add_busy(names[span.thread], own[id(span)], work)
        elif not span.shared:
            part.ns += own[id(span)]
    for section in (span for span in spans if span.shared):
        members = [span for span in record.spans if span.thread != main and _section(span) is section]
        busy = sum(own[id(span)] for span in members)
        if busy <= 0:
            (kernels if section.kernel else host)[section.name].ns += own[id(section)]
            continue
        for span in members:
            part = (kernels if span.kernel else host)[span.name]
            part.ns += own[id(section)] * own[id(span)] / busy
    return Parts(record.whole.end - record.whole.begin, dict(kernels), dict(host))


def _section(span: Span | None) -> Span | None:
    while span is not None and not span.shared:
        span = span.parent
    return span


def _names(threads: set[int]) -> dict[int, str]:
    return {thread: f"worker {index}" for index, thread in enumerate(sorted(threads))}


def name_of(share: Any) -> str:
    """Of a kernel of the compiled plan, as those for GPUs are called: update_adamw_f32_f32, scale_f32."""
    kind, rule, param, grad, state = share[:5]
    return (
        f"{kind}_{rule}_{SHORT[param]}_{SHORT[state]}" if kind not in ("measure", "scale") else f"{kind}_{SHORT[grad]}"
    )


def _add_region(kernels: dict[str, Part], wall: int, threads: Any) -> None:
    total = sum(share[5] for _, _, shares in threads for share in shares)
    seen = set()
    names = {name_of(share) for _, _, shares in threads for share in shares}
    for index, (_, _, shares) in enumerate(threads):
        for name in names:
            kernels[name].add_busy(f"thread {index}", 0.0, Work())
        for share in shares:
            kind, rule, param, grad, state, ns, elements, _ = share
            part = kernels[name_of(share)]
            work = Work(bytes=elements * bytes_of_pass(kind, rule, SIZES[param], SIZES[grad], SIZES[state]))
            part.work = plus(part.work, work)
            part.ns += wall * ns / total if total else 0.0
            part.calls += name_of(share) not in seen
            part.add_busy(f"thread {index}", ns, work)
            seen.add(name_of(share))


def mean(steps: list[Parts]) -> Parts:
    """A step in the mean."""
    by = 1.0 / len(steps)
    kernels, host = (_sum([getattr(step, which) for step in steps], by) for which in ("kernels", "host"))
    return Parts(sum(step.elapsed for step in steps) * by, kernels, host)


def _sum(tables: list[dict[str, Part]], by: float) -> dict[str, Part]:
    total: dict[str, Part] = defaultdict(Part)
    for table in tables:
        for name, part in table.items():
            own = total[name]
            own.ns += part.ns * by
            own.calls += part.calls * by
            own.work = plus(own.work, scaled(part.work, by))
            for thread, ns in part.busy.items():
                own.add_busy(thread, ns * by, scaled(part.done[thread], by))
    return dict(total)


def scaled(work: Work, by: float) -> Work:
    return Work(work.bytes * by, work.flops * by, work.precision)


def middle_half(turns: list[list[Parts]]) -> list[Parts]:
    """The steps of those turns whose length lies in the middle half: what else the machine does makes some long."""
    ordered = sorted(turns, key=lambda turn: sum(step.elapsed for step in turn))
    cut = len(ordered) // 4
    return [step for turn in ordered[cut : len(ordered) - cut] for step in turn]
