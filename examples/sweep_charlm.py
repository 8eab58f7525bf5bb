"""Trains the model of train_charlm.py at several learning rates, and counts the steps to the first optimizer's loss.

    python examples/sweep_charlm.py AdamW Muon --csv sweep.csv

Each optimizer is taken at its best rate. The first one's final loss is then the target of all.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import fmean

import click
import torch
from charlm_rows import prepared, size_options, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_charlm import OTHER_RATE, parse

from stepladder.bench.charlm import Text


@dataclass
class Row:
    """One run. Losses are validation losses in nats a character, `curve` by step; inf where training diverged."""

    optimizer: str
    lr: float
    fallback_lr: float
    seed: int
    steps: int
    final_loss: float = math.inf
    target: float = math.nan
    steps_to_target: int | None = None
    curve: dict[int, float] = field(default_factory=dict)


def train(row: Row, text: Text, options: dict[str, int | float | str | None], every: int) -> None:
    """Fill in a row's curve, a point for each `every` steps and the last one, and its final loss."""
    options |= {"lr": row.lr, "fallback_lr": row.fallback_lr, "seed": row.seed, "steps": row.steps}
    run, batches, held_out = prepared(row.optimizer, text, options)
    for step in range(1, row.steps + 1):
        run.advance(*next(batches))
        if not math.isfinite(run.losses[-1]):
            return
        if step % every == 0 or step == row.steps:
            row.curve[step] = run.validate(*held_out)
    if math.isfinite(row.curve[row.steps]):
        row.final_loss = row.curve[row.steps]


def best_rate(rows: list[Row], optimizer: str) -> float:
    """The rate with the least final loss, in the mean over the seeds."""
    rates = {row.lr for row in rows if row.optimizer == optimizer}
    return min(rates, key=lambda lr: mean_loss(rows, optimizer, lr))


def mean_loss(rows: list[Row], optimizer: str, lr: float) -> float:
    return fmean(row.final_loss for row in rows if row.optimizer == optimizer and row.lr == lr)


def set_target(rows: list[Row], target: float) -> None:
    """Fill in when each row first reached a loss."""
    for row in rows:
        row.target = target
        row.steps_to_target = next((step for step, loss in row.curve.items() if loss <= target), None)


def show(rows: list[Row], names: list[str], target: float) -> Table:
    """The best rate of each optimizer; a rate at the edge of those tried is marked."""
    title = f"validation loss, and steps to {target:.4f}"
    table = Table("optimizer", "best lr", "final loss", "steps to target", title=title, title_justify="left")
    for name in names:
        lr = best_rate(rows, name)
        rates = sorted({row.lr for row in rows if row.optimizer == name})
        at_edge = len(rates) > 1 and lr in (rates[0], rates[-1])
        best = [row for row in rows if (row.optimizer, row.lr) == (name, lr)]
        steps = ", ".join("never" if row.steps_to_target is None else str(row.steps_to_target) for row in best)
        losses = f"{fmean(row.final_loss for row in best):.4f}"
        table.add_row(name, f"{lr:g}" + (" (least or greatest tried)" if at_edge else ""), losses, steps)
    return table


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, required=True, metavar="OPTIMIZER...")
@click.option("--factor", "factors", type=float, multiple=True, default=(0.1, 0.3, 1.0, 3.0, 10.0),
              help="Learning rates to try, in parts of the optimizer's default; repeat.")  # fmt: skip
@click.option("--fallback-lr", type=float, default=OTHER_RATE, help="Peak learning rate of AdamW beside Muon.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs at each rate.")
@click.option("--steps", type=click.IntRange(min=5), default=300)
@click.option("--every", type=click.IntRange(min=1), default=5, help="Steps between two validations.")
@click.option("--max-norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of the parameters.")
@click.option("--threads", type=click.IntRange(min=1), help="Torch's choice where not given.")
@size_options
def main(
    names: tuple[str, ...],
    factors: tuple[float, ...],
    fallback_lr: float,
    seeds: int,
    steps: int,
    every: int,
    csv_file: str | None,
    **options: int | float | str | None,
) -> None:
    """Compare optimizers, each at its best learning rate, by the steps to the final loss of the first."""
    for name in names:
        parse(name)  # all names before hours of work
    if threads := options.pop("threads"):
        torch.set_num_threads(int(threads))
    text = Text()
    rows = [
        Row(name, float(f"{factor * parse(name)[1]['lr']:g}"), fallback_lr, seed, steps)
        for name in names
        for factor in factors
        for seed in range(seeds)
    ]
    for row in track(rows, "runs"):
        train(row, text, dict(options), every)
    target = mean_loss(rows, names[0], best_rate(rows, names[0]))
    if not math.isfinite(target):
        raise click.ClickException(f"{names[0]} diverged at every rate, so there is no loss to reach")
    set_target(rows, target)
    Console().print(show(rows, list(names), target))
    if csv_file:
        # Without their curves.
        write([{key: value for key, value in asdict(row).items() if key != "curve"} for row in rows], csv_file)


if __name__ == "__main__":
    main()
