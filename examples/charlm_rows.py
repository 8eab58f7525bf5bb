"""What precision_charlm.py and sweep_charlm.py share: runs of train_charlm.py's model, each a row of CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from train_charlm import Run

from stepladder.bench import report
from stepladder.bench.charlm import Text, sample

Batch = tuple[Tensor, Tensor]


def size_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of batches and model, and `--csv`."""
    least_one = click.IntRange(min=1)
    for option in (
        click.option("--csv", "csv_file", type=click.Path(dir_okay=False), help="Write a row for each run."),
        click.option("--heads", type=least_one, default=4),
        click.option("--layers", type=least_one, default=4),
        click.option("--width", type=least_one, default=128),
        click.option("--context", type=least_one, default=64, help="Characters."),
        click.option("--batch", type=least_one, default=16),
    ):
        command = option(command)
    return command


def prepared(name: str, text: Text, options: Mapping[str, Any]) -> tuple[Run, Iterator[Batch], Batch]:
    """A run, the batches of its seed without end, and held-out text, the same for all runs."""
    batch, context = options["batch"], options["context"]
    generator = torch.Generator().manual_seed(options["seed"])
    batches = iter(lambda: sample(text.training, batch, context, generator), None)
    held_out = sample(text.validation, 8 * batch, context, torch.Generator().manual_seed(0))
    return Run(name, text.vocabulary, dict(options)), batches, held_out


def write(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Rows with the same columns, each with the machine and its versions before them."""
    machine = report.machine()
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine, *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(machine | dict(row) for row in rows)
