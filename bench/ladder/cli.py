"""`stepladder ladder`."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import click
import psutil
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stepladder.bench import output, report
from stepladder.bench.ladder import pictures
from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS, Contender, Preset
from stepladder.bench.ladder.race import Results, Setting, Standing, as_json, from_json, start
from stepladder.bench.ladder.tasks import TASKS
from stepladder.bench.ladder.workers import run_all

# Of a table that is not shown in a terminal, in characters.
WIDTH = 120
# Products with larger ones may not be numbers of fp32 any more.
MOST_RATE = 1e30


def _parse_rates(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    if text is None:
        return None
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0.0 < rate <= MOST_RATE:
            raise click.BadParameter(
                f"{part!r} is no learning rate, expected numbers above 0 and at most {MOST_RATE:g}, as 0.01,0.03"
            )
        rates.append(rate)
    return sorted(set(rates))


def _load(flag: str, file: Path) -> Results:
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"'{file}' cannot be read: {error}", param_hint=f"'{flag}'") from error


def _input(flag: str, text: str) -> Callable[[Any], Any]:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(flag, f"{flag.strip('-')}_file", type=kind, help=text)


@click.command()
@click.option("--task", type=click.Choice(list(TASKS)), help="What is learned. [default: teacher, the essay's]")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="The setting. [default: fast]")
@click.option(
    "--optimizer",
    "names",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    metavar="NAME",
    help=f"{', '.join(CONTENDERS)}. Repeatable. [default: all; with --preset essay, those of the essay]",
)
@click.option("--all", "everything", is_flag=True, help="With --preset essay, every optimizer.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many. [default: 3; with --preset fast, 1]")
@click.option("--steps", type=click.IntRange(min=10), help="Of each run. [default: 4000; with --preset fast, by task]")
@click.option("--rates", callback=_parse_rates, help="Learning rates in place of every grid, as 0.01,0.03.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes, of one thread each. [default: one for each core]")
@output.option("--json", "Write every run, with its curve, to this file.")
@output.option("--csv", "Write a row for each run, without its curve.")
@output.option("--png", "Draw the curves and the steps to the target.")
@output.option("--html", "Write a page with the curves, a slider through training and a leaderboard.")
@_input("--read", "Run nothing: show and draw what --json has written.")
@_input("--resume", "Run what is missing of the race that --json has written, and write it there, too.")
def ladder(
    task: str | None,
    preset: str | None,
    names: tuple[str, ...],
    everything: bool,
    seeds: int | None,
    steps: int | None,
    rates: list[float] | None,
    jobs: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    png_file: Path | None,
    html_file: Path | None,
    read_file: Path | None,
    resume_file: Path | None,
) -> None:
    """Race the optimizers to one loss, each at the best learning rate of its grid.

    A small tanh network learns the outputs of another one, or with --task a network handwritten digits or the
    characters of a text, under one schedule for all. The preset essay is the essay's experiment in fp64, by the slow
    references; fast runs every optimizer's fused kernels in fp32, on fewer steps, seeds and rates.
    docs/ladder.md says what is computed.

    Ctrl-C ends a race early: what is finished then is shown and written, and --resume goes on from it.
    """
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH
    setting_given = bool(task or preset or names or everything or seeds or steps or rates)
    stopped = None
    if read_file:
        if setting_given or jobs or resume_file:
            raise click.UsageError("--read runs nothing: it goes with --json, --csv, --png and --html alone")
        results = _load("--read", read_file)
    else:
        machine = report.machine() | {"threads": 1}
        if resume_file:
            if setting_given:
                raise click.UsageError("--resume has its setting from the file: it goes with --jobs and outputs alone")
            results = _load("--resume", resume_file)
            _check_machine(resume_file, results.machine, machine)
            if json_file is None:
                output.check_writable(resume_file, "'--resume'")
                json_file = resume_file
        else:
            chosen = PRESETS[preset or "fast"]
            results = _new(machine, task or "teacher", chosen, names, everything, seeds, steps, rates)
        screen.print(report.header(results.machine), highlight=False)
        stopped = _race(results, jobs or _cores())
    screen.print(table(results))
    screen.print(pictures.about(results), style="dim", highlight=False)
    written = _write(results, json_file, csv_file, png_file, html_file)
    if stopped:
        kept = f"written to {', '.join(map(str, written))}" if written else "above"
        raise click.ClickException(f"{stopped} after {results.done} of {results.total} runs; these are {kept}")


def _new(
    machine: dict[str, Any],
    task: str,
    preset: Preset,
    names: tuple[str, ...],
    everything: bool,
    seeds: int | None,
    steps: int | None,
    rates: list[float] | None,
) -> Results:
    """A race of which nothing was run."""
    if preset.essays and task != "teacher":
        raise click.UsageError(f"--preset {preset.name} has the essay's task: it goes with --task teacher, not {task}")
    package = TASKS[task].missing
    if package:
        raise click.UsageError(
            f"--task {task} needs {package}, which is not installed: pip install 'stepladder[{task}]'"
        )
    racers = [c for c in CONTENDERS.values() if c.name in names or (not names and _by_default(c, preset, everything))]
    setting = Setting(task, preset.name, steps or preset.steps or TASKS[task].steps, seeds or preset.seeds)
    return start(machine, setting, racers, rates)


def _check_machine(file: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Runs of two machines, or versions, differ in their last digits and do not make one race."""
    if key := report.difference(then, now):
        message = f"'{file}' was begun with another {key}: {then.get(key)} there, {now[key]} here"
        raise click.BadParameter(message, param_hint="'--resume'")


def _by_default(contender: Contender, preset: Preset, everything: bool) -> bool:
    return everything or contender.essays or not preset.essays


def _cores() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return psutil.cpu_count() or 1


def _race(results: Results, jobs: int) -> str | None:
    """Run what is to be run into `results`; why it ended early, or None."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.fields[runs]}"))
    console = Console(stderr=True)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    setting, heats = results.setting, results.heats()
    if not heats:
        return None
    with Progress(*columns, *times, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(heats[0].optimizer, total=(results.total - results.done) * setting.steps, runs="")
        begun = results.done
        heats_run = run_all(heats, setting, min(jobs, len(heats)), lambda count: progress.advance(task, count))
        try:
            with closing(heats_run):
                for runs in heats_run:
                    for run in runs:
                        results.add(run)
                    lap = runs[0].lap
                    progress.update(
                        task,
                        # A run that diverged has made fewer steps, and reports are late.
                        completed=max(progress.tasks[0].completed, (results.done - begun) * setting.steps),
                        description=f"{lap.optimizer} {lap.rate:g}",
                        runs=f"{results.done}/{results.total} runs",
                    )
                    standing = next(s for s in results.standings if s.name == lap.optimizer)
                    if standing.finished:
                        console.print(_in_a_line(standing), highlight=False)
        except KeyboardInterrupt:
            return "interrupted"
        except BrokenProcessPool:
            return "a process of the race was ended by the system, which may have run out of memory,"
    return None


def _in_a_line(standing: Standing) -> str:
    """An optimizer that has finished."""
    if standing.best_rate is None:
        return f"{standing.name}: diverged at every rate"
    steps = standing.steps_to_target
    reached = pictures.missed(standing) if steps is None else f"{steps:.0f} steps"
    return f"{standing.name}: {standing.best_rate:g}, final {standing.final:.3g}, target: {reached}"


def table(results: Results) -> Table:
    """The leaderboard."""
    shown = Table(title=f"steps to {results.setting.target:g}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "optimizer", "best rate", "final", "steps", "by seed"):
        shown.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for number, standing in enumerate(results.ranking, 1):
        steps = standing.steps_to_target
        rate, final = standing.best_rate, standing.final
        by_seed = ["–" if t is None else str(t) for t in standing.crossings]
        shown.add_row(
            "" if steps is None else str(number),
            standing.name,
            "" if rate is None else f"{rate:g}{' *' if standing.at_an_end else ''}",
            "" if final is None else f"{final:.3g}",
            pictures.missed(standing) if steps is None else f"{steps:.0f}",
            " ".join(by_seed) if results.setting.seeds > 1 else "",
        )
    if any(standing.at_an_end for standing in results.standings):
        shown.caption, shown.caption_justify = "* the least or greatest rate that was tried", "left"
    return shown


def _write(
    results: Results, json_file: Path | None, csv_file: Path | None, png_file: Path | None, html_file: Path | None
) -> list[Path]:
    """The files that were written."""
    written = []
    drawn = any(standing.best_runs for standing in results.standings)

    def dump(file: IO[Any], results: Results) -> None:
        json.dump(as_json(results), file, indent=1, allow_nan=False)

    writers: list[tuple[Path | None, str, Callable[[IO[Any], Results], None]]] = [
        (json_file, "w", dump),
        (csv_file, "w", write_csv),
        (png_file, "wb", pictures.write_png),
        (html_file, "w", pictures.write_html),
    ]
    for path, mode, write in writers:
        if path is None:
            continue
        if write in (pictures.write_png, pictures.write_html) and not drawn:
            click.echo(f"{path} is not written: no rate of any optimizer has finished all of its seeds", err=True)
            continue
        output.replace(path, mode, partial(write, results=results))
        written.append(path)
    return written


def write_csv(file: IO[str], results: Results) -> None:
    """A row for each run, with the machine and its versions."""
    setting = results.setting
    columns = ("optimizer", "rate", "seed", "final", "steps_to_target", "diverged", "best_rate")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*results.machine, *asdict(setting), "target", *columns])
    for standing in results.standings:
        for run in standing.runs:
            lap, best = run.lap, run.lap.rate == standing.best_rate
            values = lap.optimizer, lap.rate, lap.seed, run.final, run.steps_to_target, run.diverged, best
            writer.writerow([*results.machine.values(), *asdict(setting).values(), setting.target, *values])
