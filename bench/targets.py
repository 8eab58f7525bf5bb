"""What a GPU is held to: each target with what was measured, and whether it was reached.

Knows only the rows that `stepladder bench --device cuda --json` and `stepladder bench-roots --csv` write, and imports
nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "stepladder-cuda"
# Of rows of `stepladder bench-roots --csv`: what, rival, least ratio of the rival's time to ours.
ROOTS = (
    ("230 roots of 1024, p=4", "torch.linalg.eigh", 20.0),
    ("1024 roots of 128, p=4", "torch.linalg.eigh", 20.0),
    ("64 bases of 1024", "torch.linalg.qr", 10.0),
    ("SOAP, 10 steps, Llama 1B, 1 of 16 layers", "torch.bmm", 0.8),  # ours takes at most 1.25 times as long
    ("SOAP, 10 steps, Llama 1B, 1 of 16 layers", "loop over parameters", 3.0),
)
ROOTS_MS = 60.0  # of the first
FUSED = "fused"
# From this many elements on, a step is held to the bandwidth.
LARGE = 100_000_000
SHARE = 0.95
SMALL_RATIO = 10.0
LARGE_RATIO = 1.0
HOST_FRESH_MS = 0.4
HOST_REPLAY_MS = 0.03
MANY_TENSORS = "1000x768"
MANY_GROUPS = "465-groups"
OPTIMIZERS = ("adamw", "lion")
DTYPES = ("fp32", "bf16")
LARGE_SETS = ("gpt2", "llama-1b")

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        target: What, and where.
        wanted: The bound.
        measured: None where there is no number.
        reached: Whether it is; None where there is no number.
    """

    target: str
    wanted: str
    measured: str | None = None
    reached: bool | None = None

    @property
    def word(self) -> str:
        return "not measured" if self.reached is None else "reached" if self.reached else "MISSED"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target, in order.

    Args:
        rows: `results` of the JSON file, of one run or of several; of a case that was measured twice, the first counts.
    """
    cases: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row["contenders"]:
            cases.setdefault((row["optimizer"], row["dtype"], row["shapes"]), row)
    return list(_verdicts(cases))


def root_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The targets of roots, bases and SOAP's step.

    Args:
        rows: Of the CSV file, as strings.
    """
    cases = {(row["what"], row["contender"]): row for row in rows}
    found = []
    for index, (what, rival, bound) in enumerate(ROOTS):
        ours, theirs = cases.get((what, OURS), {}), cases.get((what, rival), {})
        if index == 0:
            ms = float(ours["ms_median"]) if ours.get("ms_median") else None
            found.append(_at_most(what, ms, ROOTS_MS, lambda v: f"{v:.1f} ms"))
        ratio = float(theirs["ratio_median"]) if ours.get("ms_median") and theirs.get("ratio_median") else None
        note = ours.get("note")
        found.append(_at_least(f"{rival} over ours, {what}" + (f" ({note})" if note else ""), ratio, bound, _times))
    return found


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _verdicts(cases: dict[tuple[str, str, str], Row]) -> Iterator[Verdict]:
    # Whatever large set was measured, and those that must have been.
    measured = [shapes for (_, _, shapes), row in cases.items() if row["elements"] >= LARGE]
    large = list(dict.fromkeys((*LARGE_SETS, *measured)))
    for shapes in large:
        for optimizer in OPTIMIZERS:
            for dtype in DTYPES:
                value = _of(cases, optimizer, dtype, shapes, OURS, lambda c: c["share"])
                what = f"share of the copy's bandwidth, {optimizer} {dtype} {shapes}"
                yield _at_least(what, value, SHARE, lambda v: f"{v:.1%}")
    for shapes in large:
        for dtype in DTYPES:
            # Neither with the host ahead nor by itself.
            value = _of(cases, "adamw", dtype, shapes, FUSED, _smaller_ratio)
            yield _at_least(f"torch fused over ours, adamw {dtype} {shapes}", value, LARGE_RATIO, lambda v: f"{v:.3f}")
    for shapes in (MANY_TENSORS, MANY_GROUPS):
        for dtype in DTYPES:
            value = _of(cases, "adamw", dtype, shapes, FUSED, lambda c: c["ratio"]["median"])
            yield _at_least(f"torch fused over ours, adamw {dtype} {shapes}", value, SMALL_RATIO, lambda v: f"{v:.1f}")
    launches = [
        count
        for (optimizer, _, _), row in cases.items()
        if optimizer in OPTIMIZERS and (count := row["contenders"].get(OURS, {}).get("launches")) is not None
    ]
    yield _at_most("launches a step", max(launches, default=None), 1, str)
    for what, key, bound in (
        ("fresh gradients", "host_fresh_ms", HOST_FRESH_MS),
        ("graph replay", "replay_host_ms", HOST_REPLAY_MS),
    ):
        for dtype in DTYPES:
            value = _of(cases, "adamw", dtype, MANY_TENSORS, OURS, _median(key))
            name = f"host time, {what}, adamw {dtype} {MANY_TENSORS}"
            yield _at_most(name, value, bound, lambda v: f"{1000 * v:.0f} µs")


def _median(key: str) -> Callable[[Row], float]:
    return lambda contender: float(contender[key]["median"])


def _smaller_ratio(contender: Row) -> float:
    return float(min(contender["ratio"]["median"], contender["device_ratio"]["median"]))


def _of(
    cases: dict[tuple[str, str, str], Row],
    optimizer: str,
    dtype: str,
    shapes: str,
    contender: str,
    value: Callable[[Row], float],
) -> float | None:
    """A value of a contender, where ours was measured too."""
    contenders = cases.get((optimizer, dtype, shapes), {}).get("contenders", {})
    if OURS not in contenders or contender not in contenders:
        return None
    try:
        return value(contenders[contender])
    except TypeError:  # None stands where the number would
        return None


def _at_least(target: str, value: float | None, bound: float, shown: Callable[[float], str]) -> Verdict:
    wanted = f"≥ {shown(bound)}"
    return Verdict(target, wanted) if value is None else Verdict(target, wanted, shown(value), value >= bound)


def _at_most(target: str, value: float | None, bound: float, shown: Callable[[float], str]) -> Verdict:
    wanted = f"≤ {shown(bound)}"
    return Verdict(target, wanted) if value is None else Verdict(target, wanted, shown(value), value <= bound)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their headings, in columns as wide as they must be."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
