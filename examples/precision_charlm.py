"""What the precision of SOAP's projections does to the training of train_charlm.py's model.

    python examples/precision_charlm.py --csv precision.csv

On a GPU products of fp32 matrices are made of several products of tf32, or could be made of other, cheaper ones. Here
their operands are rounded on a CPU before they are multiplied: what remains of the GPU's arithmetic is the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from unittest.mock import patch

import click
import torch
from charlm_rows import prepared, size_options, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_charlm import OTHER_RATE, Run

from stepladder.bench.charlm import Text
from stepladder.optim import preconditioned

# Bits of a mantissa, the leading one among them.
BITS = {"tf32": 11, "bf16": 8}
PRECISIONS = ("fp32", "tf32x3", "bf16x3", "tf32", "bf16")
EARLY = 20  # steps after which weights are compared


def rounded(x: Tensor, bits: int) -> Tensor:
    """fp32 to the nearest number with so many bits of mantissa, halves away from zero."""
    dropped = 24 - bits
    return ((x.contiguous().view(torch.int32) + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def multiplier(precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Products of two fp32 matrices in "fp32"; of operands rounded once, "tf32" and "bf16"; or of each as a sum of two
    such numbers, without the product of both small ones, "tf32x3" and "bf16x3".
    """
    if precision == "fp32":
        return torch.mm
    bits = BITS[precision.removesuffix("x3")]

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        large_a, large_b = rounded(a, bits), rounded(b, bits)
        product = large_a @ large_b
        if precision.endswith("x3"):
            small_a, small_b = rounded(a - large_a, bits), rounded(b - large_b, bits)
            product += small_a @ large_b + large_a @ small_b
        return product

    return multiply


@dataclass
class Row:
    """One run.

    Attributes:
        precision: Of the projections.
        seed: Of weights and batches.
        lr: The peak learning rate.
        steps: Of training.
        error: ‖C − AB‖F/‖AB‖F of the first 1000 products, in the mean.
        apart: ‖w − w'‖F/‖w' − w₀‖F after the first steps, w' with "fp32".
        final_loss: On validation data, nats a character.
    """

    precision: str
    seed: int
    lr: float
    steps: int
    error: float = math.nan
    apart: float = math.nan
    final_loss: float = math.nan


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def train(row: Row, text: Text, options: dict[str, int | float | str]) -> tuple[Tensor, Tensor]:
    """Fill in a row's error and loss; returns the first weights, and those after the first steps."""
    own = options | {"lr": row.lr, "seed": row.seed, "steps": row.steps}
    run, batches, held_out = prepared("SOAP", text, own)
    begin = early = weights(run)
    errors: list[float] = []
    multiply = multiplier(row.precision)

    def measured(a: Tensor, b: Tensor) -> Tensor:
        product = multiply(a, b)
        if len(errors) < 1000:  # of both sides, there and back
            exact = a.double() @ b.double()
            errors.append(float((product - exact).norm() / exact.norm().clamp(min=1e-300)))
        return product

    with patch.object(preconditioned, "mm", measured):
        for step in range(1, row.steps + 1):
            run.advance(*next(batches))
            if step == min(EARLY, row.steps):
                early = weights(run)
    row.error, row.final_loss = fmean(errors), run.validate(*held_out)
    return begin, early


@click.command(context_settings={"show_default": True})
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS,
              help="Repeat for several.")  # fmt: skip
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), help="Repeat for several.")
@click.option("--steps", type=click.IntRange(min=5), default=150)
@click.option("--lr", type=float, default=9e-3, help="Peak learning rate.")
@click.option("--fallback-lr", type=float, default=OTHER_RATE, help="Peak learning rate of AdamW beside SOAP.")
@size_options
def main(
    precisions: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int,
    lr: float,
    csv_file: str | None,
    **options: int | float | str,
) -> None:
    """Train with SOAP, its projections in several precisions, and compare the losses."""
    torch.set_num_threads(1)  # the parameters' steps one after another, as errors are gathered from all
    text = Text()
    options |= {"max_norm": 1.0, "dtype": "float32"}
    rows: list[Row] = []
    baseline: dict[int, tuple[Tensor, Tensor]] = {}
    chosen = dict.fromkeys(("fp32", *precisions))  # what the others are compared with comes first
    for seed, precision in track([(seed, precision) for seed in seeds for precision in chosen], "runs"):
        row = Row(precision, seed, lr, steps)
        begin, early = train(row, text, options)
        if precision == "fp32":
            baseline[seed] = begin, early
        first, reference = baseline[seed]
        row.apart = float((early - reference).norm() / (reference - first).norm())
        rows.append(row)
    table = Table("precision", "error of a product", f"apart after {EARLY} steps", "final losses", "mean")
    for precision in dict.fromkeys(row.precision for row in rows):
        own = [row for row in rows if row.precision == precision]
        losses = [row.final_loss for row in own]
        shown = [f"{fmean(row.error for row in own):.1e}", f"{fmean(row.apart for row in own):.1e}"]
        table.add_row(precision, *shown, ", ".join(f"{x:.4f}" for x in losses), f"{fmean(losses):.4f}")
    Console().print(table)
    if csv_file:
        write([asdict(row) for row in rows], csv_file)


if __name__ == "__main__":
    main()
