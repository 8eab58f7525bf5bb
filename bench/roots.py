"""`stepladder bench-roots`: inverse roots and bases of many matrices against torch.linalg, and SOAP's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepladder.bench import output, report
from stepladder.bench.matrices import COLUMNS, Machine, Row, csv_rows, machine_on, timed
from stepladder.bench.soap_step import LAYERS, hidden_matrices, measure_soap
from stepladder.matrix_root import roots
from stepladder.orthonormalize import bases
from stepladder.reference.matrix_root import newton_roots

CONDITION = 1e4
EIGH, QR = "torch.linalg.eigh", "torch.linalg.qr"
# Relative error of a root at that condition, and ‖QᵀQ - I‖F of a basis.
ROOT_LIMIT, BASIS_LIMIT = 1e-3, 1e-5
# Matrices and their side: a model's blocks of factors, and many small ones.
ON_GPU, ON_CPU = ((230, 1024), (1024, 128)), ((4, 1024), (64, 128))
BASES_ON_GPU, BASES_ON_CPU = ((64, 1024),), ((4, 1024),)
# On a GPU torch decomposes the matrices of a batch one after another: one of so many is timed, and they count as all.
EIGH_PART = 10
# Of the exact roots, by Newton's method in fp64, so many are compared with those by an eigendecomposition.
COMPARED = 8


def spd(count: int, n: int, condition: float, device: torch.device) -> Tensor:
    """Random symmetric matrices with logarithmically spaced eigenvalues from 1/condition to 1. [count, n, n]"""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.logspace(0.0, -float(torch.tensor(condition).log10()), n, dtype=torch.float64, device=device)
    found = []
    for _ in range(count):
        x = torch.randn(n, n, generator=generator, dtype=torch.float64, device=device)
        q = torch.linalg.qr(x).Q
        found.append(((q * values) @ q.mT).float())
    stack = torch.stack(found)
    return (stack + stack.mT) / 2


def by_eigh(A: Tensor, p: int) -> Tensor:
    """The root as one writes it with torch alone."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values.clamp(min=1e-12) ** (-1.0 / p))[..., None, :]) @ vectors.mT


def measure_roots(machine: Machine, count: int, n: int, p: int, seconds: float) -> Row:
    """Roots of one batch: the worst of them checked against fp64, then timed in turns."""
    A = spd(count, n, CONDITION, machine.device)
    row = Row(f"{count} roots of {n}, p={p}", limit=ROOT_LIMIT)
    exact = exact_roots(A, p)
    ours: dict[str, Callable[[], Any]] = {}
    for name, backend in machine.ours.items():
        ours[name] = partial(roots, [A], p, 0.0, 0.0, "auto", backend)
        row.errors[name] = worst(ours[name]()[0][0], exact)
    part = EIGH_PART if machine.device.type == "cuda" and count >= EIGH_PART else 1
    rivals = {EIGH: partial(by_eigh, A[: count // part], p)}
    if part > 1:
        row.notes[EIGH] = f"of {count // part}, counted as {count}"
    green = {name: run for name, run in ours.items() if name not in row.red}
    return timed(row, machine, green | rivals, seconds, {EIGH: count / (count // part)})


def exact_roots(A: Tensor, p: int) -> Tensor:
    """In fp64, all NaN where they are not what an eigendecomposition gives; which takes too long for all of them."""
    exact = newton_roots(A.double(), p, 0.0, 0.0)[0]
    few = [by_eigh(a.double(), p) for a in A[:COMPARED]]
    # A decomposition of a matrix of norm 1 moves the eigenvalues by up to n·2⁻⁵², the smallest by κ times that.
    if not worst(exact[:COMPARED], torch.stack(few)) <= A.shape[-1] * CONDITION * 2.0**-52:
        return torch.full_like(exact, torch.nan)
    return exact


def worst(X: Tensor, exact: Tensor) -> float:
    """The largest relative error, matrix by matrix; NaN where one is."""
    errors = (X.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return float(errors.max())


def measure_bases(machine: Machine, count: int, n: int, seconds: float) -> Row:
    """Bases of L@Q for factors of conditions from 1e2 to 1e8, as SOAP refreshes them."""
    quarter = -(-count // 4)
    L = torch.cat([spd(quarter, n, condition, machine.device) for condition in (1e2, 1e4, 1e6, 1e8)])[:count]
    X = L @ torch.linalg.qr(torch.randn(L.shape, generator=torch.Generator().manual_seed(1)).to(machine.device)).Q
    row = Row(f"{count} bases of {n}", limit=BASIS_LIMIT)
    ours: dict[str, Callable[[], Any]] = {}
    for name, backend in machine.ours.items():
        ours[name] = partial(bases, [X], "auto", backend)
        q, info = ours[name]()[0]
        wide = q.double()
        eye = torch.eye(n, dtype=torch.float64, device=q.device)
        row.errors[name] = float((wide.mT @ wide - eye).flatten(1).norm(dim=1).max())
        row.notes[name] = f"{int(info.fallback.sum())} of {count} fell back"
    rivals = {QR: partial(torch.linalg.qr, X)}
    return timed(row, machine, {name: run for name, run in ours.items() if name not in row.red} | rivals, seconds)


def table(rows: Sequence[Row], unit: str) -> Table:
    shown = Table(title=f"fp32, roots at a condition of {CONDITION:g} · {unit}", title_justify="left")
    for column in ("matrices", "contender", "ms", "× ours", "p20", "p80", "error", "check"):
        shown.add_column(column, justify="left" if column in ("matrices", "contender") else "right")
    for row in rows:
        for name in {**row.errors, **row.ms}:
            note = row.notes.get(name, "")
            ratio = row.ratios.get(name)
            ratios = [f"{value:.2f}" for value in (ratio.median, ratio.p20, ratio.p80)] if ratio else [""] * 3
            ms = f"{row.ms[name].median:.4g}" if name in row.ms else ""
            error = f"{row.errors[name]:.1e}" if name in row.errors else ""
            check = "[bold red]red" if name in row.red else report.GREEN if error else ""
            shown.add_row(row.name, name, ms, *ratios, error, ", ".join(filter(None, (check, note))))
    return shown


@click.command("bench-roots")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where.")
@click.option("--batch", "batches", type=(click.IntRange(min=1), click.IntRange(min=1)), multiple=True,
              help="Matrices and their side. [default: what fits the device]")  # fmt: skip
@click.option("--layers", type=click.IntRange(min=0, max=LAYERS), default=0, show_default=True,
              help="Steps of SOAP on the hidden matrices of so many of Llama 1B's layers, too.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0), default=3.0, show_default=True, help="For a case's rounds.")
@output.option("--csv", "Write a row for each contender.")
def bench_roots(
    device: str, batches: tuple[tuple[int, int], ...], layers: int, seconds: float, csv_file: Path | None
) -> None:
    """Measure inverse fourth roots against torch.linalg.eigh, and bases of SOAP's refresh against torch.linalg.qr.

    With --layers also steps of SOAP, from one refresh to the next, against their products by torch.bmm alone and a
    loop over the parameters. All are checked first: a root against fp64, a basis by its orthogonality, steps against
    the reference.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 120
    machine, facts = machine_on(device, console)
    on_gpu = device == "cuda"
    rows: list[Row] = []
    interrupted = False
    try:
        for count, n in batches or (ON_GPU if on_gpu else ON_CPU):
            rows.append(measure_roots(machine, count, n, 4, seconds))
        for count, n in batches or (BASES_ON_GPU if on_gpu else BASES_ON_CPU):
            rows.append(measure_bases(machine, count, n, seconds))
        if layers:
            name = f"Llama 1B, {layers} of {LAYERS} layers"
            rows.append(measure_soap(machine, hidden_matrices(layers), name, seconds))
    except KeyboardInterrupt:
        interrupted = True
    console.print(table(rows, str(machine.device)))
    if csv_file:
        columns = [column for column in COLUMNS if column not in ("form", "gflops") and "standard" not in column]
        written = [
            {k: v for k, v in r.items() if k in columns} | {"note": row.notes.get(r["contender"], "")}
            for row in rows
            for r in csv_rows(row, str(machine.device))
        ]
        columns.append("note")
        output.replace(csv_file, "w", lambda file: report.write_rows(file, facts, columns, written))
    if interrupted:
        raise click.Abort
    if any(row.red for row in rows):
        raise click.exceptions.Exit(1)
