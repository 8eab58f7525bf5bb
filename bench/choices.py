"""`python -m stepladder.bench.choices`: makes the table of forms from rows of `stepladder bench-matrices --forms`."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

import click

from stepladder.choices import Choice

# Shorter side, longer side, by who multiplies.
Shape = tuple[str, int, int]


def choices(files: Iterable[Path]) -> list[Choice]:
    """The choices that measured rows make, by unit and shorter side.

    The Gram form is taken from the least n/m on at which, and at every wider one that was measured, it was faster in
    the geometric mean over the batches.

    Raises:
        ValueError: A file has no rows of both forms, or a case is in more than one row.
    """
    ratios: dict[Shape, dict[int, float]] = defaultdict(dict)
    sources: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    for file in files:
        rows = _rows(file)
        if not rows:
            raise ValueError(f"{file} has no rows of both forms, expected those of bench-matrices --forms")
        for row in rows:
            batch, m, n = map(int, row["what"].split("x"))
            seen = ratios[row["unit"], m, n]
            if batch in seen:
                raise ValueError(f"{row['what']} of {row['unit']} is measured twice, the second time in {file}")
            seen[batch] = float(row["standard_median"])
            sources[row["unit"], m].append((file.name, row["date"][:10]))
    aspects: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for (unit, m, n), by_batch in ratios.items():
        aspects[unit, m][n / m] = math.prod(by_batch.values()) ** (1 / len(by_batch))
    return [
        Choice(unit, m, _threshold(aspects[unit, m]), "+".join(sorted({name for name, _ in of})), max(d for _, d in of))
        for (unit, m), of in sorted(sources.items())
    ]


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of the Gram form that were timed beside the standard form."""
    with file.open(newline="") as rows:
        return [row for row in csv.DictReader(rows) if row.get("standard_median")]


def _threshold(ratios: Mapping[float, float]) -> float:
    """The least aspect from which on the standard form takes longer at every aspect; infinite where there is none."""
    found = math.inf
    for aspect in sorted(ratios, reverse=True):
        if ratios[aspect] <= 1.0:
            break
        found = aspect
    return found


def write(file: TextIO, rows: Iterable[Choice]) -> None:
    """The table as CSV."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Choice._fields)
    writer.writerows(row._replace(gram_from=f"{row.gram_from:g}") for row in rows)  # type: ignore[arg-type]


@click.command("choices")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.File("w", atomic=True), default="-", help="[default: standard output]")
def main(files: tuple[Path, ...], output: TextIO) -> None:
    """Make the table of forms from rows that `stepladder bench-matrices --forms --csv ROWS.csv` measured."""
    try:
        write(output, choices(files))
    except ValueError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
