"""Results as a table on screen, as CSV rows and as JSON."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, TextIO

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepladder.bench.compare import FASTER, SAME, SLOWER, UNKNOWN, WRONG, Change
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import OURS, RIVAL, Contender, Measurement, Quantiles
from stepladder.bench.results import GREEN
from stepladder.bench.rivals import ADAMW, NOT_INSTALLED

# Of the JSON file.
FORMAT = "stepladder bench 1"
LEGEND = (
    "ms: median of our step, below it the quantiles 0.2 and 0.8. host: the part of it outside the kernels. "
    "share: our GB/s over those of torch's a += b in the same rounds, over as much memory. "
    "×: how many times longer a rival's step takes, ratios taken within rounds; "
    f"{ADAMW} and torch's Muon beside its kin are other rules. "
    "check: ok where bits are the reference's and values near torch's, or, of matrices, where the error is within its "
    "limit, else there is no number."
)
INTERVALS = (
    "time: how much longer a step takes than in the base, in units of the others that took turns with it in both. The "
    f"intervals are so wide that equal builds leave any of them with a probability of {WRONG:.0%}."
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


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what two machines, or what was built there, differ, so that figures of one are none of the other's."""
    keys = ("device", "threads", "kernels", "stepladder", "torch")
    return next((key for key in keys if then.get(key) != now.get(key)), None)


def header(facts: Mapping[str, Any]) -> str:
    """The machine in a line; facts that are not known are left out."""
    device = str(facts.get("device", "an unknown machine"))
    counts = [f"{facts[name]} {name}" for name in ("cores", "threads") if name in facts]
    kernels = [f"{facts['kernels']} kernels by {facts['compiler']}"] if {"kernels", "compiler"} <= facts.keys() else []
    names = {"stepladder": "stepladder", "torch": "torch", "python": "Python"}
    versions = [f"{name} {facts[key]}" for key, name in names.items() if facts.get(key)]
    return " · ".join([", ".join([device, *counts]), *kernels, *versions])


def tables(results: Sequence[Measurement]) -> Group:
    """A table for each shape set, what is missing and why, and how to read it."""
    parts: list[RenderableType] = []
    for shapes in dict.fromkeys(result.shapes for result in results):
        parts += [_table([result for result in results if result.shapes == shapes]), Text()]
    parts += [Text(f"{r.label}: the check is RED: {r.red}", style="bold red") for r in results if r.red]
    parts += [Text(line) for line in remarks(results)]
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts)


def remarks(results: Sequence[Measurement]) -> list[str]:
    """What was skipped, which rivals are missing, and why."""
    lines = [f"{r.label}: skipped, {r.skipped}" for r in results if r.skipped]
    missing = {name: None for r in results for name, reason in r.absent.items() if reason == NOT_INSTALLED}
    if missing:
        lines.append(f"{NOT_INSTALLED}: {', '.join(missing)}")
    for result in results:
        reasons = (item for item in result.absent.items() if item[1] != NOT_INSTALLED)
        lines += [f"{name}, {result.label}: {reason}" for name, reason in reasons]
    return list(dict.fromkeys(lines))


def title(result: Measurement) -> str:
    """The shape set and its size."""
    return f"{result.shapes}: {result.tensors} tensors, {result.elements / 1e6:.2f} M elements"


def _table(results: list[Measurement]) -> Table:
    others = list(dict.fromkeys(name for result in results for name in result.ratios))
    columns: dict[str, list[Text]] = {
        "ms": [_ours(r, lambda c: cell(c.milliseconds)) for r in results],
        "host": [_ours(r, lambda c: Text(f"{c.host.median:.2g}") if c.host else Text()) for r in results],
        "GB/s": [_ours(r, lambda c: _number(c.gb_per_s)) for r in results],
        "share": [Text() if r.share is None else Text(f"{r.share:.0%}") for r in results],
        "GFLOP/s": [_ours(r, lambda c: _number(c.gflops)) for r in results],
        "state": [_ours(r, lambda c: Text(mib(c.state_bytes)) if c.state_bytes else Text()) for r in results],
        **{f"× {name}": [_ratio(name, r) for r in results] for name in others},
    }
    table = Table(title=title(results[0]), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding = True
    for column in ("what", "dtype"):
        table.add_column(column, no_wrap=True)
    shown = [column for column, cells in columns.items() if any(cells)]
    for column in shown:
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("check")
    for row, result in enumerate(results):
        state = Text(GREEN, style="green")
        if result.red_or_skipped:
            state = Text("RED", style="bold red") if result.red else Text("skipped")
        table.add_row(result.case, result.dtype, *(columns[column][row] for column in shown), state)
    return table


def _ours(result: Measurement, of: Callable[[Contender], Text]) -> Text:
    return of(result.contenders[result.ours]) if result.ours else Text()


def _number(value: float | None) -> Text:
    return Text() if value is None else Text(_three_digits(value))


def mib(size: int) -> str:
    """A size in words."""
    return f"{size / 2**20:.3g} MiB"


def cell(quantiles: Quantiles, style: str = "") -> Text:
    median, p20, p80 = map(_three_digits, quantiles)
    return Text.assemble((median, style), (f"\n{p20}–{p80}", "dim"), justify="right")


def comparison(changes: Sequence[Change]) -> Group:
    """What takes longer or shorter than the base."""
    table = Table(title="compared with the base", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "dtype", "shapes", "contender"):
        table.add_column(column)
    for column in ("time", "interval"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    styles = {SLOWER: "bold red", FASTER: "bold green"}
    for change in changes:
        verdict = Text(change.reason or change.verdict, style=styles.get(change.verdict, ""))
        names = (change.case, change.dtype, change.shapes, change.contender)
        table.add_row(*names, percent(change.change), interval(change), verdict)
    return Group(table, Text(summary(changes)), Text(INTERVALS, style="dim"))


def summary(changes: Sequence[Change]) -> str:
    """How many exceed the noise."""
    counts = {word: sum(change.verdict == word for change in changes) for word in (SLOWER, FASTER, SAME, UNKNOWN)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing to compare"


def percent(part: float | None) -> str:
    """A part with its sign, in percent."""
    return "" if part is None else f"{100.0 * part:+.1f} %"


def interval(change: Change) -> str:
    return "" if change.low is None else f"{percent(change.low)} to {percent(change.high)}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(rival: str, result: Measurement) -> Text:
    if rival not in result.ratios:
        return Text()
    ratio = result.ratios[rival]
    # Another rule moves other bytes: no race is lost against it.
    lost = ratio.median < 1.0 and result.contenders[rival].role == RIVAL
    return cell(ratio, "bold red" if lost else "bold")


def as_json(
    facts: dict[str, Any],
    settings: Settings | None,
    results: Iterable[Measurement],
    ceilings: Mapping[str, float] = MappingProxyType({}),
    changes: Iterable[Change] = (),
) -> dict[str, Any]:
    """Everything that is known, ready for json.dump.

    Args:
        facts: Of the machine.
        settings: How long each process has measured a case; None where that is not known.
        results: The cases.
        ceilings: As of `roofline.ceilings`.
        changes: Against a base.
    """
    cases = [result.as_dict() for result in results]
    compared = [asdict(change) for change in changes]
    values = {
        "format": FORMAT,
        "machine": facts,
        "settings": asdict(settings) if settings else None,
        "ceilings": dict(ceilings),
    }
    return values | {"cases": cases, "changes": compared}


COLUMNS = (
    *("kind", "case", "shapes", "tensors", "elements", "dtype", "contender", "check", "reason", "error"),
    *("processes", "rounds", "ms_median", "ms_p20", "ms_p80", "host_ms", "gb_per_s", "bandwidth_gb_per_s", "share"),
    *("gflops", "state_bytes", "ratio_median", "ratio_p20", "ratio_p80"),
)


def write_csv(file: TextIO, facts: dict[str, Any], results: Iterable[Measurement]) -> None:
    """One row for each contender of each case, ours first, each with the machine and its versions."""
    write_rows(file, facts, COLUMNS, (row for result in results for row in csv_rows(result)))


def write_rows(file: TextIO, facts: dict[str, Any], columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Rows of CSV, each with the machine's facts before its own columns."""
    writer = csv.DictWriter(file, [*facts, *columns], lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow(facts | {key: short(value) for key, value in row.items()})


def csv_rows(result: Measurement) -> Iterator[dict[str, Any]]:
    """A row for each contender, the yardstick among them, and for each that is absent."""
    case = {name: getattr(result, name) for name in ("kind", "case", "shapes", "tensors", "elements", "dtype")}
    if result.red_or_skipped:
        state = {"check": "red" if result.red else "skipped", "reason": result.red or result.skipped}
        yield case | {"contender": OURS} | state
        return
    ratios = result.ratios
    for name, contender in result.contenders.items():
        row = case | {"contender": name, "check": contender.check, "processes": result.processes}
        row |= {"rounds": result.rounds}
        row |= {f"ms_{key}": value for key, value in contender.milliseconds._asdict().items()}
        measured = {key: getattr(contender, key) for key in ("error", "gb_per_s", "gflops", "state_bytes")}
        row |= {key: value for key, value in measured.items() if value is not None}
        if contender.host:
            row["host_ms"] = contender.host.median
        if name == result.ours and result.share is not None:
            row |= {"share": result.share, "bandwidth_gb_per_s": row["gb_per_s"] / result.share}
        if name in ratios:
            row |= {f"ratio_{key}": value for key, value in ratios[name]._asdict().items()}
        yield row
    for name, reason in result.absent.items():
        yield case | {"contender": name, "check": "no number", "reason": reason}


def short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
