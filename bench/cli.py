"""`stepladder bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, TextIO, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepladder import backends
from stepladder.bench import gpu, gpu_report, report, results
from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.measure import Settings
from stepladder.bench.rivals import NAMES
from stepladder.bench.shapes import SETS

DEFAULTS = {
    "optimizer": ("adamw", "lion", "momentum"),
    "shapes": ("1000x768", "400x4096", "48x1M", "gpt2"),
    "dtype": ("fp32", "bf16"),
}
QUICK_SHAPES = ("1000x768", "400x4096")
# Those that fill a GPU, beside those that keep its host busy.
GPU_SHAPES = ("1000x768", "465-groups", "48x1M", "gpt2", "llama-1b")
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
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to step.")
@_choice("--backend", "backend_names", backends.ON_GPU, "with --device cuda, all that can run")
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
    device: str,
    backend_names: tuple[str, ...],
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

    On a GPU each of our backends is a contender, events time the steps, and the yardstick is a copy
    within the device's memory; docs/performance.md says how.
    """
    on_gpu = device == "cuda"
    default_shapes = QUICK_SHAPES if quick else GPU_SHAPES if on_gpu else DEFAULTS["shapes"]
    chosen = {
        "optimizer": optimizers or (tuple(CASES) if everything else DEFAULTS["optimizer"]),
        "shapes": shape_sets or (tuple(SETS) if everything else default_shapes),
        "dtype": dtypes or (tuple(DTYPES) if everything else DEFAULTS["dtype"]),
    }
    settings = Settings(0.0, fresh_grads=fresh_grads) if quick else Settings(seconds, fresh_grads=fresh_grads)
    if threads:
        torch.set_num_threads(threads)
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH
    kind: Any
    one: Callable[..., Any]
    if on_gpu:
        ours = _ours(backend_names)
        kind, the_gpu = gpu_report, gpu.Gpu()
        facts = gpu_report.machine(the_gpu)
        one = partial(gpu.run, the_gpu, ours=ours)
    elif backend_names:
        raise click.UsageError("--backend chooses among the backends of a GPU: it needs --device cuda")
    else:
        kind, facts, one = report, report.machine(), results.run
    screen.print(kind.header(facts), highlight=False)

    measured: list[Any] = []
    interrupted = False
    try:
        for result in _run(chosen, partial(one, rival_names=rivals or NAMES, settings=settings)):
            measured.append(result)
    except KeyboardInterrupt:
        interrupted = True
    screen.print(kind.tables(measured))
    if json_file:
        json.dump(kind.as_json(facts, settings, measured), json_file, indent=2)
    if csv_file:
        kind.write_csv(csv_file, facts, measured)
    if interrupted:
        raise click.Abort
    if any(result.red for result in measured):
        sys.exit(1)


def _ours(names: tuple[str, ...]) -> list[str]:
    """The backends that are measured on a GPU: all that are named, or all that can run."""
    found, missing = gpu.available(names or backends.ON_GPU)
    if missing and (names or not found):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise click.ClickException(f"no measurement on a GPU here. {reasons}")
    for name, reason in missing.items():
        click.echo(f"{name} is not measured: {reason}", err=True)
    return found


def _run(chosen: dict[str, tuple[str, ...]], one: Callable[..., Any]) -> Iterator[Any]:
    cases = list(product(chosen["shapes"], chosen["optimizer"], chosen["dtype"]))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for shapes, optimizer, dtype in cases:
            progress.update(task, description=f"{shapes} {optimizer} {dtype}")
            yield one(CASES[optimizer], shapes, dtype)
            progress.advance(task)
