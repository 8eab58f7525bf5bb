"""`stepladder bench-preconditioners`: steps of Shampoo and SOAP against those of other packages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepladder as sl
from stepladder.bench import output, report
from stepladder.bench.matrices import gpt2_matrices
from stepladder.bench.measure import no_collection, wanted
from stepladder.bench.measurement import Quantiles
from stepladder.optim.base import Optimizer

FREQUENCY = 10
SMALL = ((40, 30), (33, 33), (17,), (6, 5, 3))
# A gate, not a bound: in fp32 fast and slow version part by 1e-6 over three refreshes; a wrong one by the order of 1.
TOLERANCE = 1e-3

Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def contenders(family: str) -> tuple[dict[str, Make], dict[str, str]]:
    """Ours first, AdamW for scale, then the rivals that are installed; and why others are not there."""
    every = {"precondition_frequency": FREQUENCY}
    ours = getattr(sl, family)
    found: dict[str, Make] = {
        "stepladder": lambda params: ours(params, **every),
        "stepladder, staggered": lambda params: ours(params, stagger=True, **every),
        "stepladder AdamW": sl.AdamW,
    }
    missing = {}
    try:
        import pytorch_optimizer as rival
    except ImportError as error:
        missing["pytorch-optimizer"] = f"not installed: {error}"
    else:
        # Blocks of 1024 as ours has them, and roots as often; the first is in use from step 10 on.
        scalable = {"preconditioning_compute_steps": FREQUENCY, "start_preconditioning_step": FREQUENCY}
        named: dict[str, dict[str, Make]] = {
            "SOAP": {"pytorch-optimizer SOAP": lambda params: rival.SOAP(params, **every)},
            "Shampoo": {
                "pytorch-optimizer ScalableShampoo": lambda params: rival.ScalableShampoo(
                    params, block_size=1024, **scalable
                ),
                "pytorch-optimizer Shampoo": lambda params: rival.Shampoo(
                    params, preconditioning_compute_steps=FREQUENCY
                ),
            },
        }
        found |= named[family]
    return found, missing


@dataclass
class Row:
    """What was measured of one set of shapes.

    Attributes:
        name: Of the set.
        family: The optimizer.
        error: How far ours is from the reference on small tensors, relative.
        rounds: Cycles of one refresh that were measured.
        ms: Quantiles of milliseconds a step, in the mean over a cycle, by contender.
        longest: Of the longest step of a cycle.
        ratios: Of a contender's cycle over ours.
        state_bytes: What the states of ours take, by contender.
        samples: Milliseconds a step, in the mean over each cycle, by contender.
    """

    name: str
    family: str
    error: float
    rounds: int = 0
    ms: dict[str, Quantiles] = field(default_factory=dict)
    longest: dict[str, Quantiles] = field(default_factory=dict)
    ratios: dict[str, Quantiles] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def red(self) -> bool:
        return not self.error <= TOLERANCE


def checked(family: str, device: torch.device | str = "cpu", ours: str | None = None) -> float:
    """The largest relative distance of weights from the reference's, over three refreshes of small tensors."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device) for shape in SMALL]
    grads = [[torch.randn(s, generator=generator).to(device) for s in SMALL] for _ in range(3 * FREQUENCY + 1)]
    moved = []
    for backend in (ours, "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        extra = {"relative_eps": 1e-3} if family == "Shampoo" else {}
        optimizer = getattr(sl, family)(params, precondition_frequency=FREQUENCY, backend=backend, **extra)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        moved.append(torch.cat([(p.detach() - x).flatten() for p, x in zip(params, start, strict=True)]))
    return float((moved[0] - moved[1]).norm() / moved[1].norm())


def measure(family: str, name: str, shapes: Sequence[tuple[int, int]], makes: dict[str, Make], seconds: float) -> Row:
    """Whole cycles of one refresh, step by step in turns; the cycle before the first is not counted."""
    row = Row(name, family, checked(family))
    if row.red:
        return row
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    params: dict[str, list[Tensor]] = {}
    for contender, make in makes.items():
        params[contender] = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizers[contender] = make(params[contender])
    cycles: dict[str, list[list[float]]] = {contender: [] for contender in makes}
    order, shuffle = list(makes), random.Random(0).shuffle
    begin = perf_counter()
    with no_collection():
        while row.rounds == 0 or wanted(row.rounds - 1, 5, perf_counter() - begin, seconds):
            for times in cycles.values():
                times.append([])
            for _ in range(FREQUENCY):
                # A gradient that drifts, as one in training does.
                for g in grads:
                    g.mul_(0.7).add_(torch.randn(g.shape, generator=generator), alpha=0.7)
                shuffle(order)
                for contender in order:
                    for p, g in zip(params[contender], grads, strict=True):
                        p.grad = g.clone()
                    start = perf_counter_ns()
                    optimizers[contender].step()
                    cycles[contender][-1].append((perf_counter_ns() - start) / 1e6)
            if row.rounds == 0:  # states, bases and roots are made
                begin = perf_counter()
            row.rounds += 1
    row.rounds -= 1
    arrays = {contender: np.array(times[1:]) for contender, times in cycles.items()}  # [cycles, steps]
    means = {contender: values.mean(1) for contender, values in arrays.items()}
    first = next(iter(makes))
    row.samples = {contender: values.tolist() for contender, values in means.items()}
    row.ms = {contender: Quantiles.of(values) for contender, values in means.items()}
    row.longest = {contender: Quantiles.of(values.max(1)) for contender, values in arrays.items()}
    row.ratios = {contender: Quantiles.of(v / means[first]) for contender, v in means.items() if contender != first}
    row.state_bytes = {name: o.state_bytes() for name, o in optimizers.items() if isinstance(o, Optimizer)}
    return row


COLUMNS = (
    *("what", "family", "contender", "check", "error", "rounds", "state_bytes"),
    *(f"ms_{quantile}" for quantile in Quantiles._fields),
    *(f"longest_{quantile}" for quantile in Quantiles._fields),
    *(f"ratio_{quantile}" for quantile in Quantiles._fields),
)


def csv_rows(row: Row) -> Iterator[dict[str, Any]]:
    for index, contender in enumerate(row.ms or ("stepladder",)):
        values: dict[str, Any] = {"what": row.name, "family": row.family, "contender": contender, "rounds": row.rounds}
        if index == 0:
            values |= {"check": "red" if row.red else report.GREEN, "error": row.error}
        values["state_bytes"] = row.state_bytes.get(contender, "")
        for prefix, quantiles in (("ms", row.ms), ("longest", row.longest), ("ratio", row.ratios)):
            if contender in quantiles:
                values |= {f"{prefix}_{key}": v for key, v in quantiles[contender]._asdict().items()}
        yield values


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title=f"A step, a refresh every {FREQUENCY} steps, fp32", title_justify="left")
    for column in ("matrices", "contender", "ms a step", "longest", "× ours", "p20", "p80", "state MiB"):
        shown.add_column(column, justify="left" if column in ("matrices", "contender") else "right")
    for row in rows:
        if row.red:
            shown.add_row(row.name, row.family, f"[bold red]red: {row.error:.2g}")
        for contender, ms in row.ms.items():
            ratio = row.ratios.get(contender)
            ratios = [f"{value:.3g}" for value in (ratio.median, ratio.p20, ratio.p80)] if ratio else [""] * 3
            longest, size = f"{row.longest[contender].median:.4g}", ""
            if contender in row.state_bytes:
                size = f"{row.state_bytes[contender] / 2**20:.0f}"
            shown.add_row(row.name, f"{row.family}: {contender}", f"{ms.median:.4g}", longest, *ratios, size)
    return shown


@click.command("bench-preconditioners")
@click.option("--family", "families", type=click.Choice(["Shampoo", "SOAP"]), multiple=True, help="[default: both]")
@click.option("--layers", type=click.IntRange(min=1), default=12, show_default=True, help="Of GPT-2's 12.")
@click.option("--width", type=click.IntRange(min=8), default=768, show_default=True, help="Of GPT-2 124M: 768.")
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, show_default=True, help="For a case's cycles.")
@output.option("--csv", "Write a row for each contender.")
def bench_preconditioners(
    families: tuple[str, ...], layers: int, width: int, seconds: float, csv_file: Path | None
) -> None:
    """Measure steps of Shampoo and SOAP on the CPU, on the hidden matrices of GPT-2.

    Rivals are those of pytorch-optimizer, where it is installed. Ours is checked against the reference first. All
    step in turns in one process, and whole cycles from one refresh to the next are compared.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 140
    facts = report.machine()
    console.print(report.header(facts), highlight=False)
    rows: list[Row] = []
    interrupted = False
    name = f"GPT-2, {layers} layers of {width}"
    try:
        for family, shapes in product(families or ("Shampoo", "SOAP"), [gpt2_matrices(layers, width)]):
            makes, missing = contenders(family)
            for rival, reason in missing.items():
                console.print(f"without {rival}: {reason}", highlight=False)
            rows.append(measure(family, name, shapes, makes, seconds))
    except KeyboardInterrupt:
        interrupted = True
    console.print(table(rows))
    if csv_file:
        written = [r for row in rows for r in csv_rows(row)]
        output.replace(csv_file, "w", lambda file: report.write_rows(file, facts, COLUMNS, written))
    if interrupted:
        raise click.Abort
    if any(row.red for row in rows):
        raise click.exceptions.Exit(1)
