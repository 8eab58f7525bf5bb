"""`stepladder bench-matrices`: Newton-Schulz iterations and Muon's step against torch's, by shape and batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from time import perf_counter, perf_counter_ns
from typing import Any, TextIO

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepladder as sl
from stepladder.bench import report
from stepladder.bench.measure import no_collection, wanted
from stepladder.bench.results import Quantiles
from stepladder.coefficients import SETS
from stepladder.newton_schulz import matrix_unit

SIDES = (64, 128, 256, 512, 1024, 2048)
ASPECTS = (1, 2, 4)
BATCHES = (1, 16)
STEPS = 5
OURS, THEIRS = "stepladder", "torch"
# Both round operands to bf16, three times in each of five steps; on random matrices, whose singular values spread over
# decades, the two roundings part by up to this, relative to the result.
TOLERANCE = 0.1


def plain(x: Tensor) -> Tensor:
    """The iteration as torch.optim.Muon writes it: bf16, two-dimensional products or batched ones."""
    a, b, c = SETS["jordan"].steps[0]
    y = x.bfloat16()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    add = torch.addmm if y.ndim == 2 else torch.baddbmm
    for _ in range(STEPS):
        gram = y @ y.mT
        y = add(y, add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


@dataclass
class Row:
    """What was measured of one shape.

    Attributes:
        name: What it is.
        flops: Of the standard form, 2·(2m²n + m³) a step and matrix.
        ms: Quantiles of milliseconds, by contender.
        ratio: Theirs over ours, within rounds.
        error: Relative distance of the two results.
    """

    name: str
    flops: float
    rounds: int
    error: float
    ms: dict[str, Quantiles] = field(default_factory=dict)
    ratio: Quantiles | None = None

    @property
    def green(self) -> bool:
        return self.error <= TOLERANCE


def flops(m: int, n: int, batch: int) -> float:
    return STEPS * batch * 2.0 * (2.0 * m * m * n + float(m) ** 3)


def measure_iteration(batch: int, m: int, n: int, seconds: float, method: str = "auto") -> Row:
    """One shape: checked, then timed in turns."""
    x = torch.randn((m, n) if batch == 1 else (batch, m, n), generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: sl.ops.newton_schulz(x, method=method),
        THEIRS: lambda: plain(x),
    }
    expected = plain(x).float()
    error = float((sl.ops.newton_schulz(x, method=method) - expected).norm() / expected.norm())
    row = Row(f"{batch}x{m}x{n}", flops(m, n, batch), 0, error)
    return timed(row, contenders, seconds) if row.green else row


def gpt2_matrices(layers: int = 12, width: int = 768) -> list[tuple[int, int]]:
    """The hidden matrices of GPT-2 124M."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers


def measure_muon(shapes: Sequence[tuple[int, int]], name: str, seconds: float) -> Row:
    """A step of sl.Muon against torch.optim.Muon's, on parameters of their own."""
    generator = torch.Generator().manual_seed(0)
    pairs: dict[str, list[torch.nn.Parameter]] = {}
    values = [(torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for s in shapes]
    for contender in (OURS, THEIRS):
        pairs[contender] = [torch.nn.Parameter(w.clone()) for w, _ in values]
        for p, (_, g) in zip(pairs[contender], values, strict=True):
            p.grad = g.clone()
    optimizers = {OURS: sl.Muon(pairs[OURS]), THEIRS: torch.optim.Muon(pairs[THEIRS])}
    for optimizer in optimizers.values():
        optimizer.step()
    moved = [
        torch.cat([(p - w).flatten() for p, (w, _) in zip(pairs[contender], values, strict=True)]).detach()
        for contender in (OURS, THEIRS)
    ]
    error = float((moved[0] - moved[1]).norm() / moved[1].norm())
    row = Row(name, sum(flops(*sorted(s), 1) for s in shapes), 0, error)
    return timed(row, {name: optimizer.step for name, optimizer in optimizers.items()}, seconds) if row.green else row


def timed(row: Row, contenders: dict[str, Callable[[], Any]], seconds: float) -> Row:
    """Time contenders in turns, in a new random order each round; small ones several times a turn."""
    begin = perf_counter()
    for run in contenders.values():
        run()
    repeats = max(1, min(50, int(0.004 / (perf_counter() - begin))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with no_collection():
        begin = perf_counter()
        while wanted(row.rounds, 15, perf_counter() - begin, seconds):
            shuffle(order)
            for name in order:
                start = perf_counter_ns()
                for _ in range(repeats):
                    contenders[name]()
                times[name].append((perf_counter_ns() - start) / 1e6 / repeats)
            row.rounds += 1
    arrays = {name: np.array(values) for name, values in times.items()}
    row.ms = {name: Quantiles.of(values) for name, values in arrays.items()}
    row.ratio = Quantiles.of(arrays[THEIRS] / arrays[OURS])
    return row


COLUMNS = (
    *("what", "unit", "check", "error", "rounds", "gflops", "torch_gflops"),
    *(f"{name}_ms_{quantile}" for name in ("ours", "torch") for quantile in Quantiles._fields),
    *(f"ratio_{quantile}" for quantile in Quantiles._fields),
)


def as_row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "what": row.name,
        "unit": matrix_unit(),
        "check": report.GREEN if row.green else "red",
        "error": row.error,
        "rounds": row.rounds,
    }
    if row.ratio is None:
        return values
    for column, name in (("ours", OURS), ("torch", THEIRS)):
        values |= {f"{column}_ms_{key}": value for key, value in row.ms[name]._asdict().items()}
    values |= {f"ratio_{key}": value for key, value in row.ratio._asdict().items()}
    rates = {name: row.flops / row.ms[name].median / 1e6 for name in row.ms}
    return values | {"gflops": rates[OURS], "torch_gflops": rates[THEIRS]}


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title=f"Newton-Schulz, 5 steps, fp32 in and out · matrix unit {matrix_unit()}", title_justify="left")
    for column in ("batch x m x n", "ms", "GFLOP/s", "torch GFLOP/s", "× torch", "p20", "p80", "check"):
        shown.add_column(column, justify="left" if column.startswith("batch") else "right")
    for row in rows:
        if row.ratio is None:
            shown.add_row(row.name, *[""] * 6, f"[bold red]red: {row.error:.2g}")
            continue
        rates = [f"{row.flops / row.ms[name].median / 1e6:.0f}" for name in (OURS, THEIRS)]
        ratios = [f"{value:.2f}" for value in (row.ratio.median, row.ratio.p20, row.ratio.p80)]
        shown.add_row(row.name, f"{row.ms[OURS].median:.3g}", *rates, *ratios, report.GREEN)
    return shown


def geometric_mean(rows: Sequence[Row]) -> float:
    ratios = [row.ratio.median for row in rows if row.ratio is not None]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")


@click.command("bench-matrices")
@click.option("--side", "sides", type=click.IntRange(min=1), multiple=True, help="Shorter sides. [default: 64 to 2048]")
@click.option("--aspect", "aspects", type=click.IntRange(min=1), multiple=True, help="Longer over shorter. [1, 2, 4]")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Matrices. [1, 16]")
@click.option("--method", type=click.Choice(["auto", "standard", "gram"]), default="auto", show_default=True)
@click.option("--muon/--no-muon", default=True, help="The step of GPT-2 124M's matrices, too.")
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True, help="For a case's rounds.")
@click.option("--csv", "csv_file", type=click.File("w", atomic=True), help="Write a row for each case.")
def bench_matrices(
    sides: tuple[int, ...],
    aspects: tuple[int, ...],
    batches: tuple[int, ...],
    method: str,
    muon: bool,
    seconds: float,
    csv_file: TextIO | None,
) -> None:
    """Measure Newton-Schulz iterations and Muon's step against torch's own, on the CPU.

    Each is checked against torch's before it is timed, and both take turns in one process. GFLOP/s are counted by
    the standard form, whatever form is taken.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 120
    facts = report.machine()
    console.print(report.header(facts), highlight=False)
    rows = []
    for side, aspect, batch in product(sides or SIDES, aspects or ASPECTS, batches or BATCHES):
        rows.append(measure_iteration(batch, side, side * aspect, seconds, method))
    if muon:
        rows.append(measure_muon(gpt2_matrices(), "Muon, GPT-2 124M", seconds))
    console.print(table(rows))
    console.print(f"geometric mean of the ratios: {geometric_mean(rows):.2f}")
    if csv_file:
        report.write_rows(csv_file, facts, COLUMNS, [as_row(row) for row in rows])
    if not all(row.green for row in rows):
        raise click.exceptions.Exit(1)
