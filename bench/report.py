"""Results as a table on screen, as CSV rows and as JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby
from typing import Any, TextIO

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepladder.bench.measure import OURS, Settings
from stepladder.bench.results import Quantiles, Result
from stepladder.bench.rivals import ADAMW, NAMES, NOT_INSTALLED

GREEN = "ok"
LEGEND = (
    "ms: median of our step, below it the quantiles 0.2 and 0.8. host: the part of it outside the kernels. "
    "share: our GB/s over those of torch's a += b in the same rounds, over as much memory. "
    "×: how many times longer a rival's step takes, ratios taken within rounds; "
    f"{ADAMW} is another rule, with more state. "
    "check: ok where the bits are the reference's and the values near torch's, else there is no number."
)


def machine() -> dict[str, Any]:
    """Where and with what was measured: the same for every row."""
    # Here, as stepladder.cli imports this package.
    from stepladder.cli.info import collect

    facts = collect()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": facts["cpu"]["name"],
        "cores": facts["cpu"]["cores"],
        "memory_gib": facts["cpu"]["memory_gib"],
        "threads": torch.get_num_threads(),
        "kernels": facts["cpu"]["kernels"],
        "stepladder": facts["versions"]["stepladder"],
        "torch": facts["versions"]["torch"],
        "python": facts["versions"]["python"],
        "compiler": facts["versions"]["compiler"],
    }


def header(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads · {facts['kernels']} kernels by "
        f"{facts['compiler']} · stepladder {facts['stepladder']} · torch {facts['torch']} · Python {facts['python']}"
    )


def tables(results: Sequence[Result]) -> Group:
    """A table for each shape set, what is missing and why, and how to read it."""
    parts: list[RenderableType] = []
    for _, rows in groupby(results, key=lambda result: result.shapes):
        parts += [_table(list(rows)), Text()]
    parts += [Text(f"{_label(r)}: the check is RED: {r.red}", style="bold red") for r in results if r.red]
    parts += [Text(f"{_label(r)}: skipped, {r.skipped}") for r in results if r.skipped]
    missing = {name: None for r in results for name, reason in r.absent.items() if reason == NOT_INSTALLED}
    if missing:
        parts.append(Text(f"{NOT_INSTALLED}: {', '.join(missing)}"))
    reasons = {
        f"{name}, {_label(r)}: {reason}": None
        for r in results
        for name, reason in r.absent.items()
        if reason != NOT_INSTALLED
    }
    parts += [Text(reason) for reason in reasons]
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts)


def _table(results: list[Result]) -> Table:
    rivals = [name for name in NAMES if any(name in result.ratios for result in results)]
    first = results[0]
    table = Table(
        title=f"{first.shapes}: {first.tensors} tensors, {first.elements / 1e6:.2f} M elements",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("optimizer", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "host", "GB/s", "share", *(f"× {name}" for name in rivals)):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("check")
    for result in results:
        if result.skipped or result.red:
            blank = [""] * (4 + len(rivals))
            state = Text("RED", style="bold red") if result.red else "skipped"
            table.add_row(result.optimizer, result.dtype, *blank, state)
            continue
        assert result.host is not None
        table.add_row(
            result.optimizer,
            result.dtype,
            cell(result.milliseconds[OURS]),
            f"{result.host.median:.2g}",
            f"{result.gigabytes_per_second:.3g}",
            f"{result.share:.0%}",
            *(_ratio(name, result) for name in rivals),
            Text(GREEN, style="green"),
        )
    return table


def cell(quantiles: Quantiles, style: str = "") -> Text:
    median, p20, p80 = map(_three_digits, quantiles)
    return Text.assemble((median, style), (f"\n{p20}–{p80}", "dim"), justify="right")


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(rival: str, result: Result) -> Text:
    if rival not in result.ratios:
        return Text("–", style="dim")
    ratio = result.ratios[rival]
    # AdamW moves other bytes than a rule with less state: no race is lost against it.
    return cell(ratio, "bold red" if ratio.median < 1.0 and rival != ADAMW else "bold")


def _label(result: Result) -> str:
    return f"{result.optimizer} {result.dtype} {result.shapes}"


def as_json(facts: dict[str, Any], settings: Settings, results: Iterable[Result]) -> dict[str, Any]:
    """Everything that is known, ready for json.dump."""
    rows = []
    for result in results:
        row = asdict(result) | {"share": result.share}
        for name in ("milliseconds", "ratios"):
            row[name] = {key: value._asdict() for key, value in getattr(result, name).items()}
        row["host"] = result.host._asdict() if result.host else None
        rows.append(row)
    return {"machine": facts, "settings": asdict(settings), "results": rows}


COLUMNS = (
    *("optimizer", "shapes", "tensors", "elements", "dtype", "contender", "check", "reason", "rounds"),
    *("ms_median", "ms_p20", "ms_p80", "host_ms", "gb_per_s", "bandwidth_gb_per_s", "share"),
    *("ratio_median", "ratio_p20", "ratio_p80"),
)


def write_csv(file: TextIO, facts: dict[str, Any], results: Iterable[Result]) -> None:
    """One row for each contender of each case, ours first, each with the machine and its versions."""
    write_rows(file, facts, COLUMNS, (row for result in results for row in _csv_rows(result)))


def write_rows(file: TextIO, facts: dict[str, Any], columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Rows of CSV, each with the machine's facts before its own columns."""
    writer = csv.DictWriter(file, [*facts, *columns], lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow(facts | {key: short(value) for key, value in row.items()})


def _csv_rows(result: Result) -> Iterator[dict[str, Any]]:
    case = {name: getattr(result, name) for name in ("optimizer", "shapes", "tensors", "elements", "dtype")}
    if result.skipped or result.red:
        state = {"check": "red" if result.red else "skipped", "reason": result.red or result.skipped}
        yield case | {"contender": OURS} | state
        return
    assert result.host is not None
    for name, times in result.milliseconds.items():
        verdict = GREEN if name == OURS else "another rule" if name == ADAMW else "near ours"
        row = case | {"contender": name, "check": verdict, "rounds": result.rounds}
        row |= {f"ms_{key}": value for key, value in times._asdict().items()}
        if name == OURS:
            row |= {"host_ms": result.host.median, "gb_per_s": result.gigabytes_per_second}
            row |= {"bandwidth_gb_per_s": result.bandwidth, "share": result.share}
        else:
            row |= {f"ratio_{key}": value for key, value in result.ratios[name]._asdict().items()}
        yield row
    for name, reason in result.absent.items():
        yield case | {"contender": name, "check": "no number", "reason": reason}


def short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
