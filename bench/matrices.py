"""`stepladder bench-matrices`: Newton-Schulz iterations and Muon's step against torch's, by shape and batch."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter, perf_counter_ns
from types import MappingProxyType
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepladder as sl
from stepladder import backends
from stepladder.bench import gpu, gpu_report, output, report
from stepladder.bench.measure import no_collection, wanted
from stepladder.bench.measurement import Quantiles
from stepladder.coefficients import SETS
from stepladder.newton_schulz import CLUSTERS_VARIABLE, matrix_unit

SIDES = (64, 128, 256, 512, 1024, 2048)
ASPECTS = (1, 2, 4)
BATCHES = (1, 16)
STEPS = 5
OURS, THEIRS = "stepladder", "torch"
PLAIN = f"{THEIRS} plain"
STANDARD, GRAM = "standard", "gram"
CLUSTERS = f"{OURS}-cuda clusters"
# A gate, not a bound: both round operands to bf16, and the two results part by up to 0.016 in the rows that are kept;
# a wrong product is off by the order of 1.
TOLERANCE = 0.05


def fused(y: Tensor, a: float, b: float, c: float) -> Tensor:
    """A step as torch.optim.Muon writes it, each sum within a product."""
    add = torch.addmm if y.ndim == 2 else torch.baddbmm
    gram = y @ y.mT
    return add(y, add(gram, gram, gram, beta=b, alpha=c), y, beta=a)


def plain(y: Tensor, a: float, b: float, c: float) -> Tensor:
    """A step as the method was published, and as most code has it: products, and sums after them."""
    gram = y @ y.mT
    return a * y + (b * gram + c * gram @ gram) @ y


def iteration(x: Tensor, step: Callable[[Tensor, float, float, float], Tensor] = fused) -> Tensor:
    """In torch's bf16 products, two-dimensional ones or batched."""
    y = x.bfloat16()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        y = step(y, *SETS["jordan"].steps[0])
    return y.mT if tall else y


class Cpu:
    """Who takes turns on the CPU, and how a turn is timed."""

    device = torch.device("cpu")
    ours: Mapping[str, str | None] = {OURS: None}
    rivals: dict[str, Callable[[Tensor], Tensor]] = {  # noqa: RUF012
        THEIRS: iteration,
        PLAIN: partial(iteration, step=plain),
    }

    def __init__(self) -> None:
        self.unit = matrix_unit()

    def unit_of(self, backend: str | None) -> str:
        """Who multiplies, by the name under which forms are chosen."""
        return self.unit

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> float:
        start = perf_counter_ns()
        for _ in range(repeats):
            run()
        return (perf_counter_ns() - start) / 1e6 / repeats


class OnGpu:
    """The same on a GPU: each of our backends, torch eager and compiled, by events, the cache flushed before each.

    Args:
        clock: Times a step.
        names: Our backends.
    """

    def __init__(self, clock: gpu.Gpu, names: Sequence[str]) -> None:
        self.clock = clock
        self.device = clock.device
        self.unit = str(self.device)
        self.ours: Mapping[str, str | None] = {f"{OURS}-{name}": name for name in names}
        self.rivals = {THEIRS: iteration, f"{THEIRS} compiled": torch.compile(iteration)}

    def unit_of(self, backend: str | None) -> str:
        """Who multiplies, by the name under which forms are chosen."""
        return backend or self.unit

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> float:
        return self.clock.alone(run)[0]


Machine = Cpu | OnGpu


def machine_on(device: str, console: Console) -> tuple[Machine, dict[str, Any]]:
    """Who measures on "cpu" or "cuda", and what is known of it, which is shown.

    Raises:
        click.ClickException: No backend of ours can run on a GPU here.
    """
    if device == "cpu":
        facts = report.machine()
        console.print(report.header(facts), highlight=False)
        return Cpu(), facts
    names, missing = gpu.available(backends.ON_GPU)
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise click.ClickException(f"no measurement on a GPU here. {reasons}")
    machine = OnGpu(gpu.Gpu(), names)
    facts = gpu_report.machine(machine.clock)
    console.print(gpu_report.header(facts), highlight=False)
    return machine, facts


@dataclass
class Row:
    """What was measured of one shape.

    Attributes:
        name: What it is.
        flops: Of the standard form, 2·(2m²n + m³) a step and matrix; NaN where none are counted.
        limit: Of the errors.
        rounds: How many turns each contender had.
        errors: Relative distance of each of ours from torch's result.
        samples: Milliseconds of each turn, by contender; without those of ours that are red.
        ms: Quantiles of them.
        ratios: Of each other contender over the first of ours, within rounds.
        forms: Of ours, the form asked for and who multiplies.
        notes: What else is to be said of one of ours.
        state_bytes: What the states of an optimizer take, by contender.
        standard: By contender in the Gram form, how many times longer the standard form of the same takes, within
            rounds.
    """

    name: str
    flops: float = float("nan")
    limit: float = TOLERANCE
    rounds: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)
    standard: dict[str, Quantiles] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    ms: dict[str, Quantiles] = field(default_factory=dict)
    ratios: dict[str, Quantiles] = field(default_factory=dict)

    @property
    def red(self) -> list[str]:
        """Those of ours whose result is not torch's. NaN is not."""
        return [name for name, error in self.errors.items() if not error <= self.limit]

    def rate(self, name: str) -> float:
        """GFLOP/s of a contender."""
        return self.flops / self.ms[name].median / 1e6


def flops(m: int, n: int, batch: int = 1) -> float:
    return STEPS * batch * 2.0 * (2.0 * m * m * n + float(m) ** 3)


def by_clusters(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with clusters of blocks, for which the environment has to ask."""

    def asked() -> Tensor:
        before = os.environ.get(CLUSTERS_VARIABLE, "0")
        os.environ[CLUSTERS_VARIABLE] = "1"
        try:
            return run()
        finally:
            os.environ[CLUSTERS_VARIABLE] = before

    return asked


def measure_iteration(
    machine: Machine, batch: int, m: int, n: int, seconds: float, methods: Sequence[str] = ("auto",)
) -> Row:
    """One shape: checked, then timed in turns, ours by each of the methods."""
    x = torch.randn((m, n) if batch == 1 else (batch, m, n), generator=torch.Generator().manual_seed(0))
    x = x.to(machine.device)
    expected = machine.rivals[THEIRS](x).float()
    row = Row(f"{batch}x{m}x{n}", flops(m, n, batch))
    ours: dict[str, Callable[[], Any]] = {}
    for (name, backend), method in product(machine.ours.items(), methods):
        label = name if len(methods) == 1 else f"{name} {method}"
        ours[label] = partial(sl.ops.newton_schulz, x, method=method, backend=backend)
        row.forms[label] = method, machine.unit_of(backend)
    if f"{OURS}-cuda" in machine.ours and 128 < m <= 256 and torch.cuda.get_device_capability()[0] >= 9:
        ours[CLUSTERS] = by_clusters(partial(sl.ops.newton_schulz, x, method=STANDARD, backend="cuda"))
    for label, run in ours.items():
        row.errors[label] = float((run() - expected).norm() / expected.norm())
    rivals = {name: partial(run, x) for name, run in machine.rivals.items()}
    return timed(row, machine, {name: run for name, run in ours.items() if name not in row.red} | rivals, seconds)


def gpt2_matrices(layers: int = 12, width: int = 768) -> list[tuple[int, int]]:
    """The hidden matrices of GPT-2 124M."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers


def measure_muon(machine: Machine, shapes: Sequence[tuple[int, int]], name: str, seconds: float) -> Row:
    """A step of sl.Muon against torch.optim.Muon's, on parameters of their own."""
    generator = torch.Generator().manual_seed(0)
    values = [tuple(torch.randn(s, generator=generator).to(machine.device) for _ in range(2)) for s in shapes]
    row = Row(name, sum(flops(min(s), max(s)) for s in shapes))
    moved: dict[str, Tensor] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for contender in (*machine.ours, THEIRS):
        params = [torch.nn.Parameter(w.clone()) for w, _ in values]
        for p, (_, g) in zip(params, values, strict=True):
            p.grad = g.clone()
        ours = contender in machine.ours
        optimizer = sl.Muon(params, backend=machine.ours[contender]) if ours else torch.optim.Muon(params)
        optimizer.step()
        moved[contender] = torch.cat([(p.detach() - w).flatten() for p, (w, _) in zip(params, values, strict=True)])
        optimizers[contender] = optimizer
    for contender in machine.ours:
        row.errors[contender] = float((moved[contender] - moved[THEIRS]).norm() / moved[THEIRS].norm())
    steps: dict[str, Callable[[], Any]] = {
        name: optimizer.step for name, optimizer in optimizers.items() if name not in row.red
    }
    return timed(row, machine, steps, seconds)


def timed(
    row: Row,
    machine: Machine,
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float,
    counted: Mapping[str, float] = MappingProxyType({}),
) -> Row:
    """Time contenders in turns, in a new random order each round; small ones several times a turn.

    Args:
        row: What was found by the checks; to be filled.
        machine: Where.
        contenders: By name, ours first.
        seconds: For the rounds.
        counted: As how many turns one of a contender counts, where that is not one.
    """
    first = next(iter(contenders))
    if first not in row.errors:
        return row
    for run in contenders.values():
        run()
    begin = perf_counter()
    contenders[first]()
    repeats = max(1, min(50, int(0.002 / (perf_counter() - begin))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with no_collection():
        begin = perf_counter()
        while wanted(row.rounds, 15, perf_counter() - begin, seconds):
            shuffle(order)
            for name in order:
                times[name].append(counted.get(name, 1.0) * machine.milliseconds(contenders[name], repeats))
            row.rounds += 1
    arrays = {name: np.array(values) for name, values in times.items()}
    row.samples = times
    row.ms = {name: Quantiles.of(values) for name, values in arrays.items()}
    row.ratios = {name: Quantiles.of(values / arrays[first]) for name, values in arrays.items() if name != first}
    for name, values in arrays.items():
        standard = name.removesuffix(GRAM) + STANDARD
        if name.endswith(f" {GRAM}") and standard in arrays:
            row.standard[name] = Quantiles.of(arrays[standard] / values)
    return row


COLUMNS = (
    *("what", "unit", "contender", "form", "check", "error", "rounds", "gflops"),
    *(f"ms_{quantile}" for quantile in Quantiles._fields),
    *(f"ratio_{quantile}" for quantile in Quantiles._fields),
    *(f"standard_{quantile}" for quantile in Quantiles._fields),
)


def csv_rows(row: Row, unit: str) -> Iterator[dict[str, Any]]:
    """One for each contender; ratios are to the first of ours, `standard` those of the standard form to this one."""
    for name in {**row.errors, **row.ms}:
        verdict = "red" if name in row.red else report.GREEN if name in row.errors else ""
        form, own_unit = row.forms.get(name, ("", unit))
        values: dict[str, Any] = {"what": row.name, "unit": own_unit, "contender": name, "form": form, "check": verdict}
        values |= {"rounds": row.rounds, "error": row.errors.get(name, "")}
        if name in row.ms:
            values |= {"gflops": row.rate(name)} | {f"ms_{key}": v for key, v in row.ms[name]._asdict().items()}
        if name in row.ratios:
            values |= {f"ratio_{key}": v for key, v in row.ratios[name]._asdict().items()}
        if name in row.standard:
            values |= {f"standard_{key}": v for key, v in row.standard[name]._asdict().items()}
        yield values


def table(rows: Sequence[Row], unit: str) -> Table:
    shown = Table(title=f"Newton-Schulz, 5 steps, fp32 in and out · {unit}", title_justify="left")
    for column in ("batch x m x n", "contender", "ms", "GFLOP/s", "× ours", "p20", "p80", "check"):
        shown.add_column(column, justify="left" if column in ("batch x m x n", "contender") else "right")
    for row in rows:
        for name in {**row.errors, **row.ms}:
            if name in row.red:
                shown.add_row(row.name, name, *[""] * 5, f"[bold red]red: {row.errors[name]:.2g}")
                continue
            ratio = row.ratios.get(name)
            ratios = [f"{value:.2f}" for value in (ratio.median, ratio.p20, ratio.p80)] if ratio else [""] * 3
            check = report.GREEN if name in row.errors else ""
            measured = [f"{row.ms[name].median:.3g}", f"{row.rate(name):.0f}"] if name in row.ms else [""] * 2
            shown.add_row(row.name, name, *measured, *ratios, check)
    return shown


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """Of each rival's ratios to ours."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, ratio in row.ratios.items():
            if name.startswith(THEIRS):
                ratios.setdefault(name, []).append(ratio.median)
    return {name: float(np.exp(np.mean(np.log(values)))) for name, values in ratios.items()}


@click.command("bench-matrices")
@click.option("--side", "sides", type=click.IntRange(min=1), multiple=True, help="Shorter sides. [default: 64 to 2048]")
@click.option("--aspect", "aspects", type=click.FloatRange(min=1), multiple=True, help="Longer over shorter. [1, 2, 4]")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Matrices. [1, 16]")
@click.option("--method", type=click.Choice(["auto", "standard", "gram"]), default="auto", show_default=True)
@click.option("--forms", is_flag=True, help="Both forms of ours, in place of --method.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where.")
@click.option("--muon/--no-muon", default=True, help="The step of GPT-2 124M's matrices, too.")
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True, help="For a case's rounds.")
@output.option("--csv", "Write a row for each case.")
def bench_matrices(
    sides: tuple[int, ...],
    aspects: tuple[float, ...],
    batches: tuple[int, ...],
    method: str,
    forms: bool,
    device: str,
    muon: bool,
    seconds: float,
    csv_file: Path | None,
) -> None:
    """Measure Newton-Schulz iterations and Muon's step against torch's own.

    Each is checked against torch's before it is timed, and all take turns in one process. GFLOP/s are counted by
    the standard form, whatever form is taken; the columns behind say how many times longer than ours a rival takes.
    On a GPU each of our backends is a contender, and events time them. The rows of --forms are what
    `python -m stepladder.bench.choices` makes the table of forms from.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 120
    machine, facts = machine_on(device, console)
    rows: list[Row] = []
    interrupted = False
    methods = (STANDARD, GRAM) if forms else (method,)
    try:
        for side, aspect, batch in product(sides or SIDES, aspects or ASPECTS, batches or BATCHES):
            rows.append(measure_iteration(machine, batch, side, round(side * aspect), seconds, methods))
        if muon:
            rows.append(measure_muon(machine, gpt2_matrices(), "Muon, GPT-2 124M", seconds))
    except KeyboardInterrupt:
        interrupted = True
    console.print(table(rows, machine.unit))
    for name, mean in geometric_means(rows).items():
        console.print(f"geometric mean of the ratios of {name}: {mean:.2f}", highlight=False)
    if csv_file:
        written = [r for row in rows for r in csv_rows(row, machine.unit)]
        output.replace(csv_file, "w", lambda file: report.write_rows(file, facts, COLUMNS, written))
    if interrupted:
        raise click.Abort
    if any(row.red for row in rows):
        raise click.exceptions.Exit(1)
