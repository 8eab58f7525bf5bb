"""Traces of some steps by torch.profiler: written for Perfetto and chrome://tracing, and read for a GPU's kernels."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from stepladder.bench.profile.clock import Record, name_of
from stepladder.bench.profile.ncu import short_name
from stepladder.ranges import PREFIX

Trace = dict[str, Any]


def record(take: Callable[[], None], on_gpu: bool) -> Trace:
    """What torch.profiler exports of steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        take()
        if on_gpu and torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace: Trace = json.loads(file.read_text())
    return trace


def add_threads(trace: Trace, records: Sequence[Record]) -> None:
    """Add what torch.profiler does not see: the regions of the compiled kernels, and ranges in other threads.

    Args:
        trace: To be added to. It is of the steps of the records, no more and no less.
        records: Of steps that one thread took.
    """
    events = trace["traceEvents"]
    main = records[0].whole.thread
    spans = sorted((s for r in records for s in r.spans if s.thread == main and not s.shared), key=lambda s: s.begin)
    names = {PREFIX + span.name for span in spans}
    marks = sorted((e for e in events if e.get("name") in names and e["tid"] == main), key=_begin)
    # A range has a mark by each of two clocks, torch's first: where they lie closest, the offset is the truest.
    offset = max(_begin(mark) - span.begin / 1e3 for mark, span in zip(marks, spans, strict=True))
    pid = marks[0]["pid"]
    lanes: dict[int, str] = {}

    def add(name: str, tid: int, begin: int, end: int, **args: Any) -> None:
        event = {"ph": "X", "cat": "stepladder", "name": PREFIX + name, "pid": pid, "tid": tid}
        events.append(event | {"ts": begin / 1e3 + offset, "dur": (end - begin) / 1e3, "args": args})

    for taken in records:
        for begin, end, threads in taken.regions:
            names = ", ".join(dict.fromkeys(name_of(share) for _, _, shares in threads for share in shares))
            add(f"{names} (kernel)", main, begin, end)
            for index, (first, last, shares) in enumerate(threads):
                # Numbers that no thread of the system has.
                tid = main if index == 0 else -index
                lanes[tid] = f"kernel thread {index}"
                chunks = sum(share[7] for share in shares)
                add(f"thread {index}: {names}", tid, first, last, chunks=chunks, ms=sum(s[5] for s in shares) / 1e6)
        for span in taken.spans:
            if span.thread != main:
                lanes[span.thread] = "worker"
                add(span.name, span.thread, span.begin, span.end)
    lanes.pop(main, None)
    for tid, name in lanes.items():
        label = f"stepladder {name}"
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": label}})


def _begin(event: dict[str, Any]) -> float:
    return float(event["ts"])


@dataclass
class DeviceKernel:
    """A kernel of a GPU, in the steps of a trace.

    Attributes:
        range: The innermost of our ranges in which it was launched; "" where it was outside of all.
        name: Short.
        launches: How many.
        ms: Of all of them.
    """

    range: str
    name: str
    launches: int = 0
    ms: float = 0.0


def device_kernels(trace: Trace) -> list[DeviceKernel]:
    """The kernels that ran, with copies and memsets among them, by range and name, the longest first."""
    launches: dict[Any, dict[str, Any]] = {}
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    ran = []
    for event in trace["traceEvents"]:
        kind, correlation = event.get("cat"), event.get("args", {}).get("correlation")
        if kind in ("cuda_runtime", "cuda_driver") and correlation is not None:
            launches[correlation] = event
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            ran.append(event)
        elif event.get("ph") == "X" and str(event.get("name", "")).startswith(PREFIX) and kind != "gpu_user_annotation":
            by_thread.setdefault(event["tid"], []).append(event)
    for own in by_thread.values():
        own.sort(key=_begin)
    found: dict[tuple[str, str], DeviceKernel] = {}
    for event in ran:
        launch = launches.get(event.get("args", {}).get("correlation"))
        where = "" if launch is None else _innermost(by_thread.get(launch["tid"], []), _begin(launch))
        kernel = found.setdefault((where, name := short_name(event["name"])), DeviceKernel(where, name))
        kernel.launches += 1
        kernel.ms += float(event["dur"]) / 1e3
    return sorted(found.values(), key=lambda kernel: -kernel.ms)


def _innermost(ranges: list[dict[str, Any]], at: float) -> str:
    for event in reversed(ranges[: bisect_right([_begin(e) for e in ranges], at)]):
        if at <= _begin(event) + float(event["dur"]):
            return str(event["name"]).removeprefix(PREFIX)
    return ""
