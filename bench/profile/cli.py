"""What `stepladder profile NAME` does: everything but --static."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console

from stepladder import ranges
from stepladder.bench import gpu, gpu_report, output
from stepladder.bench import report as bench_report
from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.profile import measure, ncu, report, subjects
from stepladder.bench.profile.report import Case
from stepladder.bench.profile.subjects import Subject
from stepladder.bench.results import RESERVE, gib
from stepladder.bench.shapes import Shapes, elements, shapes_of

# Of a table that is not shown in a terminal, in characters.
WIDTH = 120
WARM = 3


def profile_case(
    case: Case,
    seconds: float,
    steps: int | None,
    bare: bool,
    json_file: Path | None,
    trace_file: Path | None,
    ncu_file: Path | None,
) -> None:
    """Profile a case, show it, and write what was asked for.

    Args:
        case: Checked.
        seconds: For the turns.
        steps: In place of that.
        bare: Only step, for another profiler.
        json_file: To be written.
        trace_file: To be written.
        ncu_file: To be read into the table.
    """
    measured = read_ncu(ncu_file) if ncu_file is not None else {}
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    on_gpu = case.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device: --device cuda cannot be profiled here")
    machine = gpu.Gpu() if on_gpu else None
    with _status(f"making {case.name} for {case.shapes}"):
        subject = make(case)
    if bare:
        step_alone(subject, steps or 1, on_gpu)
        return
    with _status(f"stepping {subject.title}, {case.shapes}"):
        if machine is not None:
            result = measure.on_gpu(machine, subject, seconds, steps)
        else:
            result = measure.on_cpu(subject, seconds, steps, trace_file is not None)
    facts = gpu_report.machine(machine) if machine is not None else bench_report.machine()
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH + (60 if measured else 0)
    console.print((gpu_report if on_gpu else bench_report).header(facts), highlight=False)
    console.print(report.tables(case, subject, result, torch.get_num_threads(), measured))
    click.echo("\n" + report.command_lines(case))
    if json_file is not None:
        values = report.as_json(case, subject, result, facts, measured)
        output.replace(json_file, "w", lambda file: json.dump(values, file, indent=2))
    if trace_file is not None and result.trace is not None:
        output.replace(trace_file, "w", lambda file: json.dump(result.trace, file))
        click.echo(f"\nThe trace is in {trace_file}: open it at ui.perfetto.dev or chrome://tracing.")
    if result.interrupted:
        click.echo("Interrupted: these are the turns that were done.", err=True)
        raise click.Abort


def _status(text: str) -> AbstractContextManager[Any]:
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def make(case: Case) -> Subject:
    """The subject of a case.

    Raises:
        click.ClickException: It cannot be made; the message says why.
    """
    try:
        shapes = shapes_of(case.shapes)
        check_memory(case, shapes)
        return subjects.make(case.name, case.shapes, DTYPES[case.dtype], case.device, case.backend)
    except (ValueError, TypeError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


def check_memory(case: Case, shapes: Shapes) -> None:
    """Refuse what would not fit.

    Raises:
        ValueError: It does not.
    """
    # Parameters, gradients and states; of optimizers of matrices it is the least.
    copies = 2 + (len(CASES[case.name].states) if case.name in CASES else 1)
    need = copies * elements(shapes) * DTYPES[case.dtype].itemsize
    available = torch.cuda.mem_get_info()[0] if case.device == "cuda" else psutil.virtual_memory().available
    if need > available - RESERVE:
        raise ValueError(
            f"{case.name} for {case.shapes} in {case.dtype} needs {gib(need)} of memory, {gib(available - RESERVE)} "
            "are free"
        )


def read_ncu(file: Path) -> dict[str, ncu.Measured]:
    """What Nsight Compute's file says.

    Raises:
        click.ClickException: It cannot be read.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return ncu.read(lines)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise click.ClickException(f"{file} cannot be read: {reason}") from error


class Nvtx:
    """Marks ranges for Nsight Systems."""

    @contextmanager
    def range(self, name: str, kernel: bool, work: Any = None) -> Iterator[None]:
        torch.cuda.nvtx.range_push(ranges.PREFIX + name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def workers(self) -> AbstractContextManager[Any]:
        return nullcontext(lambda function: function)


def step_alone(subject: Subject, steps: int, on_gpu: bool) -> None:
    """Steps without anything around them: on a GPU between cudaProfilerStart and Stop, in NVTX ranges."""
    for _ in range(WARM):
        subject.step()
    if not on_gpu:
        for _ in range(steps):
            subject.step()
        return
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile(), ranges.listening(Nvtx()):
        for _ in range(steps):
            with ranges.phase(subject.title):
                subject.step()
        torch.cuda.synchronize()
