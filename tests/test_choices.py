"""The table of forms: what measured rows make of it, that the committed one is theirs, and that it is used."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from stepladder import choices
from stepladder.bench import choices as generator
from stepladder.choices import Choice
from stepladder.coefficients import resolve
from stepladder.newton_schulz import TORCH, form_for

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def rows_file(path: Path, rows: list[tuple[str, str, float | None]], date: str = "2026-01-02T03:04:05+00:00") -> Path:
    """Rows (what, unit, standard over Gram), as bench-matrices writes them; with None, one of another contender."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "what", "unit", "contender", "form", "standard_median"])
        for what, unit, ratio in rows:
            form = "gram" if ratio is not None else "standard"
            writer.writerow([date, what, unit, f"stepladder {form}", form, "" if ratio is None else ratio])
    return path


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({64: 1.1, 96: 1.2, 128: 1.3}, 1.0),
        ({64: 0.9, 96: 1.01, 128: 1.3}, 1.5),
        ({64: 1.2, 96: 0.9, 128: 1.3}, 2.0),  # a narrower one that was faster by chance
        ({64: 1.2, 96: 1.3, 128: 1.0}, math.inf),
        ({70: 0.9, 140: 1.2}, 140 / 64),
    ],
)
def test_from_where_on_the_gram_form_is_taken(ratios: dict[int, float], expected: float, tmp_path: Path):
    rows = [(f"1x64x{n}", "unit", ratio) for n, ratio in ratios.items()]
    (found,) = generator.choices([rows_file(tmp_path / "a.csv", [*rows, ("1x64x64", "unit", None)])])
    assert found == Choice("unit", 64, expected, "a.csv", "2026-01-02")


def test_batches_count_alike_and_files_are_named(tmp_path: Path):
    # √(0.5 · 2.1) is above 1, √(0.5 · 1.9) below.
    rows = [("1x64x64", "amx", 0.5), ("16x64x64", "amx", 2.1), ("1x128x128", "amx", 0.5), ("16x128x128", "amx", 1.9)]
    first = rows_file(tmp_path / "first.csv", [*rows, ("1x32x32", "cuda", 2.0)])
    second = rows_file(tmp_path / "second.csv", [("1x64x128", "amx", 1.5)], "2026-02-03T00:00:00+00:00")
    result = CliRunner().invoke(generator.main, [str(first), str(second)])
    assert result.exit_code == 0, result.output
    assert result.output == (
        "unit,m,gram_from,results,date\n"
        "amx,64,1,first.csv+second.csv,2026-02-03\n"
        "amx,128,inf,first.csv,2026-01-02\n"
        "cuda,32,1,first.csv,2026-01-02\n"
    )


def test_rows_that_make_no_table_are_refused(tmp_path: Path):
    none = rows_file(tmp_path / "none.csv", [("1x64x64", "amx", None)])
    with pytest.raises(ValueError, match=r"none.csv has no rows of both forms"):
        generator.choices([none])
    result = CliRunner().invoke(generator.main, [str(none)])
    assert result.exit_code == 1
    assert "Error: " in result.output
    twice = rows_file(tmp_path / "twice.csv", [("1x64x64", "amx", 1.0)] * 2)
    with pytest.raises(ValueError, match=r"1x64x64 of amx is measured twice, the second time in .*twice.csv"):
        generator.choices([twice])


def test_the_committed_table_is_that_of_the_committed_rows():
    files = {name: RESULTS / name for choice in choices.table() for name in choice.results.split("+")}
    assert files
    text = io.StringIO()
    generator.write(text, generator.choices(files.values()))
    assert choices.TABLE.read_text() == text.getvalue(), (
        f"python -m stepladder.bench.choices --output {choices.TABLE} {' '.join(map(str, files.values()))} makes it"
    )


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "choices.csv"
    path.write_text("unit,m,gram_from,results,date\namx,64,3,,\namx,256,1.5,,\ncuda,64,inf,,\n")
    read = choices.table
    monkeypatch.setattr(choices, "table", lambda: read(path))
    choices.gram_from.cache_clear()
    yield
    choices.gram_from.cache_clear()


def form(unit: str, *shape: int, method: str = "auto", name: str = "jordan") -> str:
    return form_for(method, torch.Size(shape), unit, resolve(name, None))


def test_forms_are_chosen_by_the_table(table):
    assert [form("amx", 64, n) for n in (128, 191, 192)] == ["standard", "standard", "gram"]
    assert [form("amx", n, 256) for n in (256, 383, 384)] == ["standard", "standard", "gram"]
    # The nearest side in proportion: 64 and 256 meet at 128.
    assert [form("amx", 5, m, 2 * m) for m in (1, 127, 129, 4000)] == ["standard", "standard", "gram", "gram"]
    assert form("cuda", 64, 64000) == "standard"
    # Nothing was measured.
    assert [form("triton", 64, n) for n in (127, 128)] == ["standard", "gram"]
    assert form("amx", 0, 5) == "gram"
    # Nothing to choose.
    assert form(TORCH, 64, 6400) == form("amx", 64, 640, name="aol4") == "standard"
    assert form("amx", 64, 64, method="gram") == "gram"
