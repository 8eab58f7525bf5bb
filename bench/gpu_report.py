"""Results of a GPU as a table on screen, as CSV rows and as JSON; the counterpart of report.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from itertools import groupby
from typing import Any, TextIO

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepladder.bench import gpu
from stepladder.bench.gpu import COPY, Gpu, GpuResult
from stepladder.bench.measurement import MEASURE, OURS, OWN, RIVAL, SCALE, Contender, Measurement, Quantiles
from stepladder.bench.report import cell, write_rows
from stepladder.bench.results import GREEN
from stepladder.bench.rivals import ADAMW, COMPILED, NOT_INSTALLED

LEGEND = (
    "ms: median of a step that starts with the device idle, until the device is done; host: of it, until step() "
    "returned; fresh: host with reallocated gradients; device: with the host ahead; replay: ms and host of a graph. "
    "Below the medians the quantiles 0.2 and 0.8. GB/s, and share of the bandwidth of a copy in the same rounds, are "
    "the device's. ×: how many times longer than our first backend, ratios taken within rounds, by ms and by device. "
    f"launches are counted for ours alone. {ADAMW} is another rule, with more state."
)


def machine(clock: Gpu) -> dict[str, Any]:
    """Where and with what was measured: the same for every row."""
    # Here, as stepladder.cli imports this package.
    from stepladder.cli.info import collect

    facts = collect()
    versions = facts["versions"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": clock.properties.name,
        "capability": f"{clock.properties.major}.{clock.properties.minor}",
        "multiprocessors": clock.properties.multi_processor_count,
        "memory_gib": round(clock.properties.total_memory / 2**30, 1),
        "host": facts["cpu"]["name"],
        "stepladder": versions["stepladder"],
        "cuda_compiler": versions["cuda_compiler"] or "",
        "torch": versions["torch"],
        "torch_cuda": versions["torch_cuda"] or "",
        "triton": versions["triton"] or "",
        "python": versions["python"],
        "compiler": versions["compiler"],
    }


def header(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{facts['device']} ({facts['capability']}, {facts['multiprocessors']} multiprocessors) in {facts['host']} · "
        f"stepladder {facts['stepladder']} by nvcc {facts['cuda_compiler'] or '–'} and {facts['compiler']} · "
        f"torch {facts['torch']} with CUDA {facts['torch_cuda'] or '–'} · triton {facts['triton'] or '–'} · "
        f"Python {facts['python']}"
    )


def tables(results: Sequence[GpuResult]) -> Group:
    """A table for each shape set, what is missing and why, and how to read it."""
    parts: list[RenderableType] = []
    for _, rows in groupby(results, key=lambda result: result.shapes):
        parts += [_table(list(rows)), Text()]
    for result in results:
        label = f"{result.optimizer} {result.dtype} {result.shapes}"
        parts += [Text(f"{name}, {label}: the check is RED: {r}", style="bold red") for name, r in result.red.items()]
        if result.skipped:
            parts.append(Text(f"{label}: skipped, {result.skipped}"))
        parts += [Text(f"{name}, {label}: {r}") for name, r in result.absent.items() if r != NOT_INSTALLED]
    missing = {name: None for r in results for name, reason in r.absent.items() if reason == NOT_INSTALLED}
    if missing:
        parts.append(Text(f"{NOT_INSTALLED}: {', '.join(missing)}"))
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts)


def _table(results: list[GpuResult]) -> Table:
    first = results[0]
    table = Table(
        title=f"{first.shapes}: {first.tensors} tensors, groups: {first.groups}, {first.elements / 1e6:.2f} M elements",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("optimizer", "dtype", "contender"):
        table.add_column(column, no_wrap=True)
    columns = ("ms", "host", "fresh", "device", "replay", "GB/s", "share", "launches", "× ms", "× device")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        for name, c in result.contenders.items():
            replay = "" if c.replay_ms is None else f"{c.replay_ms.median:.3g}\n{_median(c.replay_host_ms)}"
            table.add_row(
                result.optimizer,
                result.dtype,
                name,
                cell(c.ms),
                cell(c.host_ms),
                "" if c.host_fresh_ms is None else cell(c.host_fresh_ms),
                cell(c.device_ms),
                replay,
                "" if c.gb_per_s is None else f"{c.gb_per_s:.4g}",
                "" if c.share is None else f"{c.share:.1%}",
                "" if c.launches is None else str(c.launches),
                "" if c.ratio is None else cell(c.ratio),
                "" if c.device_ratio is None else cell(c.device_ratio),
            )
        for name in result.red:
            table.add_row(result.optimizer, result.dtype, name, Text("RED", style="bold red"))
        if result.skipped:
            table.add_row(result.optimizer, result.dtype, "", "skipped")
    return table


def _median(quantiles: Quantiles | None) -> str:
    return "" if quantiles is None else f"{quantiles.median:.3g}"


def as_json(results: Iterable[GpuResult]) -> dict[str, Any]:
    """What the form that all cases share does not hold, ready for json.dump."""
    rows = []
    for result in results:
        contenders = {name: _as_dict(contender) for name, contender in result.contenders.items()}
        rows.append(asdict(result) | {"contenders": contenders})
    return {"results": rows} if rows else {}


def measurement(result: GpuResult) -> Measurement:
    """A result in the form that all cases share. Its milliseconds are those of a step, and of a copy, by itself."""
    found = Measurement(
        "optimizer",
        result.optimizer,
        result.shapes,
        result.dtype,
        result.tensors,
        result.elements,
        result.skipped,
        absent=dict(result.absent),
    )
    for name, contender in result.contenders.items():
        role = OWN if name.startswith(OURS) else SCALE if name == ADAMW else RIVAL
        measured = Contender(role, [contender.samples], checked(name), contender.moved)
        found.contenders[name] = measured
    found.refuse(result.red)
    if result.copy_ms:
        found.contenders[COPY] = Contender(MEASURE, [result.copy_ms], moved=result.copy_moved)
    return found


def checked(name: str) -> str:
    """What the check of a contender that has a number has found."""
    verdicts = {ADAMW: "another rule", COMPILED: "near torch's loop"}
    return GREEN if name.startswith(OURS) else verdicts.get(name, "near ours")


def _as_dict(contender: gpu.Contender) -> dict[str, Any]:
    values = {f.name: getattr(contender, f.name) for f in fields(contender)}
    return {name: v._asdict() if isinstance(v, Quantiles) else v for name, v in values.items()}


_SPREAD = ("ms", "device_ms", "ratio", "device_ratio")
_MEDIANS = ("host_ms", "host_fresh_ms", "replay_ms", "replay_host_ms")
COLUMNS = (
    *("optimizer", "shapes", "groups", "tensors", "elements", "dtype", "contender", "check", "reason", "rounds"),
    *(f"{name}_{quantile}" for name in _SPREAD for quantile in Quantiles._fields),
    *_MEDIANS,
    *("launches", "gb_per_s", "bandwidth_gb_per_s", "share"),
)


def write_csv(file: TextIO, facts: dict[str, Any], results: Iterable[GpuResult]) -> None:
    """One row for each contender of each case, ours first, each with the machine and its versions."""
    write_rows(file, facts, COLUMNS, (row for result in results for row in _csv_rows(result)))


def _csv_rows(result: GpuResult) -> Iterator[dict[str, Any]]:
    case = {name: getattr(result, name) for name in ("optimizer", "shapes", "groups", "tensors", "elements", "dtype")}
    if result.skipped:
        yield case | {"contender": OURS, "check": "skipped", "reason": result.skipped}
    for name, reason in result.red.items():
        yield case | {"contender": name, "check": "red", "reason": reason}
    for name, contender in result.contenders.items():
        row = case | {"contender": name, "check": checked(name), "rounds": result.rounds}
        for column in _SPREAD:
            if quantiles := getattr(contender, column):
                row |= {f"{column}_{key}": value for key, value in quantiles._asdict().items()}
        row |= {column: q.median for column in _MEDIANS if (q := getattr(contender, column))}
        row |= {column: value for column in ("launches", "gb_per_s", "share") if (value := getattr(contender, column))}
        if contender.share is not None:
            row["bandwidth_gb_per_s"] = result.bandwidth
        yield row
    for name, reason in result.absent.items():
        yield case | {"contender": name, "check": "no number", "reason": reason}
