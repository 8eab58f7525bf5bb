"""`stepladder bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import click
import torch
from click.core import ParameterSource
from rich.console import Console

from stepladder import backends
from stepladder.bench import base, files, gpu, gpu_report, output, pictures, report, roofline
from stepladder.bench.cases import DTYPES
from stepladder.bench.compare import Change, compare
from stepladder.bench.conditions import CHANGE, METRICS, Condition, parse
from stepladder.bench.matrices import OnGpu
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import merged
from stepladder.bench.processes import machine_of
from stepladder.bench.rivals import NAMES
from stepladder.bench.runner import COMPARED, DTYPE_NAMES, MATRICES, PROCESSES, SHAPES, Chosen, Outcome, run
from stepladder.bench.runner import OPTIMIZERS as DEFAULT_OPTIMIZERS
from stepladder.bench.shapes import SHAPES as SHAPES_TEXT
from stepladder.bench.shapes import shapes_of
from stepladder.bench.subjects import KERNELS, OPTIMIZERS

F = TypeVar("F", bound=Callable[..., Any])
# Of a table that is not shown in a terminal, in characters.
WIDTH = 140


def _choice(flag: str, name: str, values: Iterable[str], default: str) -> Callable[[F], F]:
    listed = list(values)
    text = f"{', '.join(listed)}. Repeatable. [default: {default}]"
    return click.option(flag, name, multiple=True, type=click.Choice(listed), metavar="NAME", help=text)


def _checked(
    check: Callable[[str], Any],
) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[Any, ...]]:
    """A callback that refuses what `check` raises a ValueError for, and passes on what it returns."""

    def callback(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
        try:
            return tuple(check(value) for value in values)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


def _known_shapes(name: str) -> str:
    shapes_of(name)
    return name


def _read(path: Path) -> files.Run:
    """A file of earlier results.

    Raises:
        click.BadParameter: It is none.
    """
    try:
        return files.read(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise click.BadParameter(f"'{path}' cannot be read: {said}") from None


def _base(context: click.Context, parameter: click.Parameter, value: str | None) -> files.Run | str | None:
    """The earlier results of a file, or the commit that a revision means."""
    if value is None:
        return None
    output.refuse_without("base")
    if Path(value).is_file():
        return _read(Path(value))
    try:
        return base.commit_of(value, Path.cwd())
    except base.Failure as error:
        raise click.BadParameter(f"{value!r} is no file, and no revision of this repository: {error}") from None


def _earlier(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> files.Run | None:
    """The results of one file, or those of several as processes of one run."""
    found = [_read(path) for path in paths]
    if not found:
        return None
    first = found[0].machine
    for path, one in zip(paths, found, strict=True):
        if key := report.difference(first, one.machine):
            then, now = first.get(key), one.machine.get(key)
            raise click.BadParameter(f"'{path}' and '{paths[0]}' differ in {key}: {now} and {then}")
    return files.Run(first, ceilings=found[0].ceilings, cases=merged(case for one in found for case in one.cases))


SHAPES_HELP = f"{SHAPES_TEXT}. Repeatable. [default: {', '.join(SHAPES)}; of matrices, what fits them]"
METRICS_HELP = ", ".join((*METRICS, CHANGE))


@click.command()
@_choice("--optimizer", "optimizers", OPTIMIZERS, ", ".join((*DEFAULT_OPTIMIZERS, MATRICES[0])))
@_choice("--kernel", "kernels", KERNELS, f"{', '.join(MATRICES[1:])}; with --optimizer, none")
@click.option(
    "--shapes", "shape_sets", multiple=True, callback=_checked(_known_shapes), metavar="NAME", help=SHAPES_HELP
)
@_choice("--dtype", "dtypes", DTYPES, ", ".join(DTYPE_NAMES))
@_choice("--rival", "rivals", NAMES, "all that are installed; of matrices, always all")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to step.")
@_choice("--backend", "backend_names", backends.ON_GPU, "with --device cuda, all that can run")
@click.option("--all", "everything", is_flag=True, help="Everything of each kind of which nothing is named.")
@click.option("--quick", is_flag=True, help="One process, three rounds, and small sets alone: does it work?")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="For a case's rounds, in all processes together. "
    f"[default: {Settings.seconds:g}; with --quick, of the fewest rounds]",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help=f"Fresh ones, in each of which every case is measured. [default: {PROCESSES}; with --quick, 1; "
    f"else with --base, {COMPARED}; else on a GPU, 1]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and of our kernels. [default: torch's choice]")
@click.option("--fresh-grads", is_flag=True, help="Reallocate the gradients before each step, outside of its time.")
@click.option(
    "--base",
    "base_run",
    metavar="REF|FILE",
    callback=_base,
    help="Compare with what --json or pytest-benchmark has written, or with the build of a git revision, in turns.",
)
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    callback=_checked(parse),
    help=f"Exit with 1 where it is met, as adamw.ratio<1.1 or '*.{CHANGE}>5'. Metrics: {METRICS_HELP}. Repeatable.",
)
@click.option(
    "--read",
    "earlier",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_earlier,
    help="Measure nothing: show, compare and draw what --json or pytest-benchmark has written. Repeatable.",
)
@output.option("--json", "Write everything that was measured.")
@output.option("--csv", "Write a row for each contender.")
@output.option("--png", "Draw the speed-ups.")
@output.option("--html", "Write a page with plots and tables that needs nothing else.")
def bench(
    optimizers: tuple[str, ...],
    kernels: tuple[str, ...],
    shape_sets: tuple[str, ...],
    dtypes: tuple[str, ...],
    rivals: tuple[str, ...],
    device: str,
    backend_names: tuple[str, ...],
    everything: bool,
    quick: bool,
    seconds: float | None,
    processes: int | None,
    threads: int | None,
    fresh_grads: bool,
    base_run: files.Run | str | None,
    conditions: tuple[Condition, ...],
    earlier: files.Run | None,
    json_file: Path | None,
    csv_file: Path | None,
    png_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure optimizers and kernels against torch's and other packages'.

    Each is checked before it is timed: without the bits of the reference, or of matrices within an error, there is no
    number, and the command fails. All contenders take turns, on the same random data. A torch form that is slower by a
    factor of two shows as 2.00 in its column.

    --base says what takes longer or shorter than before by more than the noise, which is how several processes
    differ. Ctrl-C ends a run early: what is measured then is shown and written.

    On a GPU each of our backends is a contender, events time the steps, and the yardstick is a copy within the device's
    memory; docs/bench.md says how.
    """
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH
    commit = base_run if isinstance(base_run, str) else None
    for condition in conditions:
        if condition.metric == CHANGE and base_run is None:
            raise click.UsageError(f"--fail-if {condition.text} needs --base")
    if earlier is not None:
        _refuse_with_read(commit)
        outcome = Outcome(earlier)
        screen.print(report.header(earlier.machine), highlight=False, markup=False)
        settings = None
    else:
        if backend_names and device == "cpu":
            raise click.UsageError("--backend chooses among the backends of a GPU: it needs --device cuda")
        ours = tuple(_ours(backend_names)) if device == "cuda" else ()
        subjects = (*optimizers, *kernels)
        try:
            chosen = Chosen(subjects, shape_sets, dtypes, rivals or NAMES, ours, everything, quick, fresh_grads)
            specs, left_out = chosen.specs()
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        for line in left_out:
            click.echo(line, err=True)
        for condition in conditions:
            if not any(condition.matches(spec.subject) for spec in specs):
                raise click.UsageError(f"--fail-if {condition.text}: nothing named {condition.pattern} is measured")
        if threads:
            torch.set_num_threads(threads)
        count = processes or (1 if quick else COMPARED if base_run else 1 if ours else PROCESSES)
        if seconds is None:
            seconds = 0.0 if quick else Settings.seconds
        settings = Settings(seconds / count, fresh_grads=fresh_grads)
        outcome = Outcome(files.Run(_machine(ours)))
        screen.print((gpu_report if ours else report).header(outcome.now.machine), highlight=False, markup=False)
        if (json_file or html_file) and not ours:
            outcome.now.ceilings = roofline.ceilings()
        try:
            run(outcome, specs, settings, count, torch.get_num_threads(), commit)
        except base.Failure as error:
            raise click.ClickException(f"{commit} cannot be measured: {error}") from None
    if isinstance(base_run, files.Run):
        outcome.base = base_run.cases
    changes = compare(outcome.base, outcome.now.cases) if outcome.base is not None else []
    screen.print(gpu_report.tables(outcome.details) if outcome.detailed else report.tables(outcome.now.cases))
    if outcome.base is not None:
        screen.print(report.comparison(changes))
    written = _write(outcome, settings, changes, json_file, csv_file, png_file, html_file)
    if outcome.stopped:
        kept = f"written to {', '.join(map(str, written))}" if written else "above"
        raise click.ClickException(f"{outcome.stopped}; what was measured until then is {kept}")
    failures = [line for m in outcome.now.cases for line in m.failures]
    for condition in conditions:
        failures += [f"{line} ({condition.text})" for line in condition.met(outcome.now.cases, changes)]
    if failures:
        raise click.ClickException("; ".join(failures))


# Options that go with --read.
READING = ("earlier", "base_run", "conditions", "json_file", "csv_file", "png_file", "html_file")


def _refuse_with_read(commit: str | None) -> None:
    """Refuse what asks for a measurement."""
    if commit:
        raise click.UsageError("--read measures nothing: --base of a revision does not go with it")
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if given and parameter.name not in READING:
            raise click.UsageError(f"--read measures nothing: {parameter.opts[0]} does not go with it")


def _machine(ours: tuple[str, ...]) -> dict[str, Any]:
    machine = machine_of(ours)
    return gpu_report.machine(machine.clock) if isinstance(machine, OnGpu) else report.machine()


def _ours(names: tuple[str, ...]) -> list[str]:
    """The backends that are measured on a GPU: all that are named, or all that can run."""
    found, missing = gpu.available(names or backends.ON_GPU)
    if missing and (names or not found):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise click.ClickException(f"no measurement on a GPU here. {reasons}")
    for name, reason in missing.items():
        click.echo(f"{name} is not measured: {reason}", err=True)
    return found


def _write(
    outcome: Outcome,
    settings: Settings | None,
    changes: Sequence[Change],
    json_file: Path | None,
    csv_file: Path | None,
    png_file: Path | None,
    html_file: Path | None,
) -> list[Path]:
    """The files that were written."""
    now = outcome.now

    def dump(file: IO[str]) -> None:
        values = report.as_json(now.machine, settings, now.cases, ceilings=now.ceilings, changes=changes)
        values |= gpu_report.as_json(outcome.details)
        json.dump(values, file, indent=1, allow_nan=False)

    def rows(file: IO[str]) -> None:
        if outcome.detailed:
            gpu_report.write_csv(file, now.machine, outcome.details)
        else:
            report.write_csv(file, now.machine, now.cases)

    written = []
    writers: list[tuple[Path | None, str, Callable[[IO[Any]], None]]] = [
        (json_file, "w", dump),
        (csv_file, "w", rows),
        (png_file, "wb", partial(pictures.write_png, run=now)),
        (html_file, "w", partial(pictures.write_html, run=now, changes=changes)),
    ]
    for path, mode, write in writers:
        if path is not None:
            output.replace(path, mode, write)
            written.append(path)
    return written
