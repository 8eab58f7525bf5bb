"""Which form of an iteration is faster, as it was measured: choices.csv, which `stepladder.bench.choices` writes."""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("choices.csv")
# Where nothing was measured. Five steps take 15n/m + 5 operations, over m³, in the standard form and 9n/m + 11 in the
# Gram form, each symmetric product counted by half: as many at n = m, a sixth fewer here, which leaves room for what
# smaller products lose.
UNMEASURED = 2.0


class Choice(NamedTuple):
    """What was measured of matrices [m, n] with one shorter side.

    Attributes:
        unit: Who multiplies: a matrix unit of the CPU, or a GPU's backend.
        m: The shorter side.
        gram_from: The least n/m from which the Gram form was faster; infinite where it never was.
        results: The CSV of the measured rows, in bench/results; several are joined by "+".
        date: Of the newest of these rows.
    """

    unit: str
    m: int
    gram_from: float
    results: str
    date: str


@functools.cache
def table(path: Path = TABLE) -> tuple[Choice, ...]:
    """The rows of the table."""
    with path.open(newline="") as file:
        return tuple(
            Choice(row["unit"], int(row["m"]), float(row["gram_from"]), row["results"], row["date"])
            for row in csv.DictReader(file)
        )


@functools.cache
def gram_from(unit: str, m: int) -> float:
    """The least n/m from which matrices with a shorter side of m take the Gram form.

    That of the nearest side that was measured for this unit, in proportion; `UNMEASURED` where none was.
    """
    measured = [choice for choice in table() if choice.unit == unit]
    if not measured or m < 1:
        return UNMEASURED
    return min(measured, key=lambda choice: abs(math.log(choice.m / m))).gram_from
