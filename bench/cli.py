"""`stepladder bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, TextIO, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepladder.bench import report
from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.measure import Settings
from stepladder.bench.results import Result, run
from stepladder.bench.rivals import NAMES
from stepladder.bench.shapes import SETS

DEFAULTS = {
    "optimizer": ("adamw", "lion", "momentum"),
    "shapes": ("1000x768", "400x4096", "48x1M", "gpt2"),
    "dtype": ("fp32", "bf16"),
}
QUICK_SHAPES = ("1000x768", "400x4096")
F = TypeVar("F", bound=Callable[..., Any])
# Of a table that is not shown in a terminal, in characters.
WIDTH = 140


def _choice(flag: str, name: str, values: Iterable[str], default: str) -> Callable[[F], F]:
    listed = list(values)
    text = f"{', '.join(listed)}. Repeatable. [default: {default}]"
    return click.option(flag, name, multiple=True, type=click.Choice(listed), metavar="NAME", help=text)


@click.command()
@_choice("--optimizer", "optimizers", CASES, ", ".join(DEFAULTS["optimizer"]))
@_choice("--shapes", "shape_sets", SETS, ", ".join(DEFAULTS["shapes"]))
@_choice("--dtype", "dtypes", DTYPES, ", ".join(DEFAULTS["dtype"]))
@_choice("--rival", "rivals", NAMES, "all that are installed")
@click.option("--all", "everything", is_flag=True, help="Every optimizer, shape set and dtype, where none is named.")
@click.option("--quick", is_flag=True, help="Three rounds of each case, and the two smallest sets: does it work?")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=Settings.seconds, show_default=True, help="For a case's rounds."
)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and of our kernels. [default: torch's choice]")
@click.option("--fresh-grads", is_flag=True, help="Reallocate the gradients before each step, outside of its time.")
@click.option("--json", "json_file", type=click.File("w", atomic=True), help="Write everything that was measured.")
@click.option("--csv", "csv_file", type=click.File("w", atomic=True), help="Write a row for each contender.")
def bench(
    optimizers: tuple[str, ...],
    shape_sets: tuple[str, ...],
    dtypes: tuple[str, ...],
    rivals: tuple[str, ...],
    everything: bool,
    quick: bool,
    seconds: float,
    threads: int | None,
    fresh_grads: bool,
    json_file: TextIO | None,
    csv_file: TextIO | None,
) -> None:
    """Measure the optimizers against torch.optim's and other packages'.

    Each is checked before it is timed: without the bits of the reference there is no number, and the
    command fails. All contenders take turns in one process, on the same tensors with random data.
    A torch form that is slower by a factor of two shows as 2.00 in its column.
    """
    chosen = {
        "optimizer": optimizers or (tuple(CASES) if everything else DEFAULTS["optimizer"]),
        "shapes": shape_sets or (tuple(SETS) if everything else QUICK_SHAPES if quick else DEFAULTS["shapes"]),
        "dtype": dtypes or (tuple(DTYPES) if everything else DEFAULTS["dtype"]),
    }
    settings = Settings(0.0, fresh_grads=fresh_grads) if quick else Settings(seconds, fresh_grads=fresh_grads)
    if threads:
        torch.set_num_threads(threads)
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH
    facts = report.machine()
    screen.print(report.header(facts), highlight=False)

    results: list[Result] = []
    interrupted = False
    try:
        for result in _run(chosen, rivals or NAMES, settings):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    screen.print(report.tables(results))
    if json_file:
        json.dump(report.as_json(facts, settings, results), json_file, indent=2)
    if csv_file:
        report.write_csv(csv_file, facts, results)
    if interrupted:
        raise click.Abort
    if any(result.red for result in results):
        sys.exit(1)


def _run(chosen: dict[str, tuple[str, ...]], rivals: tuple[str, ...], settings: Settings) -> Iterator[Result]:
    cases = list(product(chosen["shapes"], chosen["optimizer"], chosen["dtype"]))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for shapes, optimizer, dtype in cases:
            progress.update(task, description=f"{shapes} {optimizer} {dtype}")
            yield run(CASES[optimizer], shapes, dtype, rivals, settings)
            progress.advance(task)
