"""A profile as tables and as JSON, and the command lines that look closer."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepladder.bench import roofline
from stepladder.bench.profile.measure import Ceilings, Result, Row
from stepladder.bench.profile.ncu import Measured
from stepladder.bench.profile.subjects import Subject, counted
from stepladder.bench.shapes import elements

TIMES = {
    "cpu": "ms: of a step, in the mean over the middle half of the turns.",
    "cuda": "ms: of a step from an idle device until it is done, in the median; of kernels in steps that were traced.",
}
LEGEND = (
    "GB/s: what has to be read and written over that time. TFLOP/s: of products, symmetric ones counted in full. "
    "ceiling: TFLOP/s over those of torch's product, or where there is none, GB/s over those of {by}."
)
# Parts of the host's work below this share of the step are shown as one.
LEAST = 0.001


@dataclass(frozen=True)
class Case:
    """What was asked for, as the command line has it."""

    name: str
    shapes: str
    dtype: str
    device: str
    backend: str | None
    threads: int | None

    @property
    def arguments(self) -> list[str]:
        """Of `stepladder profile`."""
        given = [self.name, "--shapes", self.shapes, "--dtype", self.dtype, "--device", self.device]
        if self.backend is not None:
            given += ["--backend", self.backend]
        return given + (["--threads", str(self.threads)] if self.threads is not None else [])


def commands(case: Case) -> dict[str, str]:
    """Command lines for the case: of Nsight Systems, of Nsight Compute, and of what reads the latter's file.

    Nsight Compute sees GPUs alone, so that its is of the case on one.
    """
    on_gpu = case
    if case.device != "cuda":
        on_gpu = Case(case.name, case.shapes, case.dtype, "cuda", None, case.threads)
    file = "-".join((case.name, "".join(c if c.isalnum() else "-" for c in case.shapes), case.dtype))[:80]
    python = [sys.executable, "-m", "stepladder", "profile"]
    steps = [*python, *on_gpu.arguments, "--bare", "--steps"]
    nsys = ["nsys", "profile", "--trace=cuda,nvtx,osrt", "--capture-range=cudaProfilerApi"]
    nsys += ["--capture-range-end=stop", "--force-overwrite=true", f"--output={file}"]
    ncu = ["ncu", "--set", "full", "--profile-from-start", "off", "--csv", "--page", "raw", "--log-file", f"{file}.csv"]
    found = {
        "nsys": [*nsys, *steps, "10"],
        "ncu": [*ncu, *steps, "1"],
        "read": [*python, *on_gpu.arguments, "--ncu", f"{file}.csv"],
    }
    return {name: shlex.join(line) for name, line in found.items()}


def title(case: Case, subject: Subject, threads: int) -> str:
    """What was measured, in a line."""
    where = counted(threads, "thread") if case.device == "cpu" else case.device
    count = elements(subject.shapes)
    size = f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)
    tensors = counted(len(subject.shapes), "tensor")
    return f"{subject.title}, {case.shapes}: {tensors}, {size} elements, {case.dtype}, {where}"


def tables(case: Case, subject: Subject, result: Result, threads: int, measured: Mapping[str, Measured]) -> Group:
    """Everything, to be shown."""
    heading = Text(title(case, subject, threads), style="bold")
    parts: list[RenderableType] = [Text(), heading, _kernels(case, result, measured), Text()]
    if any(row.threads for row in result.kernels):
        parts += [_threads(result), Text()]
    parts += [Text(line) for line in (*_ceilings(result.ceilings), *_steps(result), *subject.notes)]
    parts.append(Text(f"{TIMES[case.device]} {LEGEND.format(by=result.ceilings.by)}", style="dim"))
    return Group(*parts)


def command_lines(case: Case) -> str:
    """Those to be copied: unbroken, whatever the terminal's width."""
    lines = commands(case)
    where = "" if case.device == "cuda" else ", on a machine with a GPU"
    return f"Closer, by Nsight Systems and Nsight Compute{where}:\n\n{lines['nsys']}\n\n{lines['ncu']}\n{lines['read']}"


def _figure(value: float | None, style: str = "") -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text(f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}", style=style)


def _percent(value: float | None) -> Text:
    return Text("–", style="dim") if value is None else Text(f"{value:.1%}")


def _kernels(case: Case, result: Result, measured: Mapping[str, Measured]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kernel", overflow="fold")
    calls = "launches" if case.device == "cuda" else "calls"
    from_ncu = ("ncu ms", "DRAM GB/s", "DRAM", "SM", "warps", "registers") if measured else ()
    for column in (calls, "ms", "share", "GB/s", "TFLOP/s", "ceiling", *from_ncu):
        table.add_column(column, justify="right", no_wrap=True)
    left = dict(measured)
    for row in result.kernels:
        indent = "  " if row.within is not None else ""
        own = left.pop(row.name, None) if row.within is not None or case.device != "cuda" else None
        table.add_row(indent + row.name, *_cells(row), *(_ncu_cells(own) if measured else ()))
    for name, own in left.items():
        table.add_row(f"{name} (ncu)", _figure(own.launches), *[""] * 5, *_ncu_cells(own))
    table.add_section()
    kernel, rest = result.kernel_ms / result.step_ms, result.host_ms / result.step_ms
    table.add_row("kernels", "", _figure(result.kernel_ms), _percent(kernel), style="bold")
    if case.device == "cuda":
        table.add_row("the device idle", "", _figure(result.host_ms), _percent(rest), style="bold")
        table.add_row("host, meanwhile", "", _figure(result.call_ms), style="bold")
    else:
        table.add_row("host", "", _figure(result.host_ms), _percent(rest), style="bold")
    small = [row for row in result.host if row.share < LEAST]
    for row in result.host:
        if row.share >= LEAST:
            table.add_row(f"  {row.name}", _figure(row.calls), _figure(row.ms), _percent(row.share))
    if small:
        ms, share = sum(row.ms for row in small), sum(row.share for row in small)
        table.add_row(f"  {', '.join(row.name for row in small)}", "", _figure(ms), _percent(share))
    table.add_section()
    table.add_row("step", "", _figure(result.step_ms), _percent(1.0), style="bold")
    return table


def _cells(row: Row) -> list[Text]:
    calls = Text(f"{row.calls:.4g}")
    rates = [_figure(row.gb_per_s), _figure(row.tflop_per_s)]
    ceiling = _percent(row.ceiling)
    if row.ceiling is not None and row.precision is not None:
        ceiling = Text.assemble(ceiling, (f" {row.precision}", "dim"))
    return [calls, _figure(row.ms), _percent(row.share), *rates, ceiling]


def _ncu_cells(own: Measured | None) -> list[Text]:
    if own is None:
        return [_figure(None)] * 6
    percents = (own.memory_percent, own.sm_percent, own.occupancy)
    shares = [_percent(None if value is None else value / 100) for value in percents]
    return [_figure(own.ms), _figure(own.gb_per_s), *shares, _figure(own.registers)]


def _threads(result: Result) -> Table:
    table = Table(title="Time by thread", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kernel", "thread"):
        table.add_column(column)
    for column in ("busy ms", "of the kernel's time", "GB/s", "TFLOP/s"):
        table.add_column(column, justify="right")
    for row in result.kernels:
        for index, own in enumerate(row.threads):
            name = row.name if index == 0 else ""
            share = own.ms / row.ms if row.ms else None
            rates = _figure(own.gb_per_s), _figure(own.tflop_per_s)
            table.add_row(name, own.thread, _figure(own.ms), _percent(share), *rates)
    return table


def _ceilings(ceilings: Ceilings) -> list[str]:
    found = [f"ceilings in the same run, by torch: {ceilings.memory:.3g} GB/s of {ceilings.by}"]
    side = f"{roofline.SIDE}×{roofline.SIDE}"
    found += [f"{rate:.3g} TFLOP/s of a {side} product in {name}" for name, rate in ceilings.products.items()]
    return [", ".join(found)]


def _steps(result: Result) -> list[str]:
    turns = f"{result.samples * result.steps} steps" + (f", in turns of {result.steps}" if result.steps > 1 else "")
    if result.call_ms is not None:
        return [f"{turns}; step() returned after {result.call_ms:.3g} ms"]
    if result.unprofiled_ms is None:
        return [turns]
    return [f"{turns}; as many without a clock in them took {result.unprofiled_ms:.3g} ms each in the median"]


def as_json(
    case: Case, subject: Subject, result: Result, facts: Mapping[str, Any], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Everything that is known, ready for json.dump."""
    figures = {key: value for key, value in vars(result).items() if key not in ("trace", "kernels", "host", "each")}
    return {
        "machine": dict(facts),
        "case": asdict(case) | {"tensors": len(subject.shapes), "elements": elements(subject.shapes)},
        **figures,
        "ceilings": asdict(result.ceilings),
        "kernel_share": result.kernel_ms / result.step_ms,
        "host_share": result.host_ms / result.step_ms,
        "kernels": [asdict(row) for row in result.kernels],
        "host": [asdict(row) for row in result.host],
        "turns": result.each,
        "ncu": {name: asdict(own) for name, own in measured.items()},
        "commands": commands(case),
        "notes": list(subject.notes),
    }
