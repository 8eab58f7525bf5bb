"""What the benchmark promises: real shapes, a check that can fail, no number without it, reasons for gaps."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner

import stepladder as sl
from stepladder.bench import cli, matrices, preconditioners, rivals, roots
from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.check import TENSOR_ELEMENTS, TOTAL_ELEMENTS, check, sample
from stepladder.bench.choices import choices
from stepladder.bench.matrices import bench_matrices
from stepladder.bench.measure import FEWEST_ROUNDS, Contenders, Settings, measure
from stepladder.bench.measurement import OURS, YARDSTICK
from stepladder.bench.preconditioners import bench_preconditioners
from stepladder.bench.results import fit, run
from stepladder.bench.rivals import Other, Rival, names_of, rivals_of
from stepladder.bench.roots import bench_roots
from stepladder.bench.shapes import SETS, elements

SHAPES = [(40, 30), (7,), (1,), (5000,)]
QUICK = Settings(0.0)


class OwnStep(sl.AdamW):
    """Its kernels and its reference disagree: only the former have another ε."""

    def __init__(self, params: Any, backend: str | None = None, **options: Any) -> None:
        super().__init__(params, backend=backend, **options | ({} if backend else {"eps": 1e-4}))


class OwnRule(sl.AdamW):
    """Kernels and reference agree on a rule that is not AdamW."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options | {"betas": (0.8, 0.999)})


@pytest.mark.parametrize(
    ("name", "tensors", "count"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("llama-1b", 146, 1_235_814_400),
        ("1000x768", 1000, 768_000),
        ("400x4096", 400, 1_638_400),
        ("48x1M", 48, 48 * 2**20),
    ],
)
def test_shape_sets_have_the_models_parameters(name: str, tensors: int, count: int) -> None:
    shapes = SETS[name]()
    assert (len(shapes), elements(shapes)) == (tensors, count)


@pytest.mark.parametrize("name", SETS)
def test_sample_has_every_kind_of_tensor(name: str) -> None:
    shapes, taken = SETS[name](), sample(SETS[name]())
    assert {shape[1:] for shape in taken} == {shape[1:] for shape in shapes}
    assert all(shape[0] == 1 or elements([shape]) <= TENSOR_ELEMENTS for shape in taken)
    assert len(taken) == len(shapes) or elements(taken) > TOTAL_ELEMENTS - TENSOR_ELEMENTS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_green(name: str, dtype: str) -> None:
    found, _ = rivals_of(CASES[name], ["loop", "foreach"])
    verdict = check(CASES[name], SHAPES, DTYPES[dtype], found)
    assert verdict.red is None
    assert verdict.wrong == {}


@pytest.mark.parametrize(("cls", "message"), [(OwnStep, "differ from the reference"), (OwnRule, "torch's loop form")])
def test_red_check_gives_no_number(
    cls: type[sl.AdamW], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "adamw", replace(CASES["adamw"], ours=cls))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}
    options = [f"--{kind}={file}" for kind, file in files.items()]
    done = CliRunner().invoke(
        cli.bench, ["--quick", "--optimizer=adamw", "--dtype=fp32", "--shapes=400x4096", *options]
    )
    assert done.exit_code == 1
    assert "RED" in done.output
    assert message in done.output
    (row,) = json.loads(files["json"].read_text())["cases"]
    assert message in row["red"]
    assert row["milliseconds"] == row["ratios"] == {}
    (line,) = csv.DictReader(files["csv"].open())
    assert (line["check"], line["ms_median"]) == ("red", "")


def test_wrong_and_failing_rivals_have_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rivals,
        "OTHERS",
        (
            Other("timm", "adamw", "torch.optim:NAdam"),
            Other("deepspeed", "adamw", "torch.optim:LBFGS"),
            Other("lion-pytorch", "adamw", "no_such_package:AdamW"),
        ),
    )
    result = run(CASES["adamw"], "400x4096", "fp32", ["timm", "deepspeed", "lion-pytorch", "foreach"], QUICK)
    assert set(result.milliseconds) == {OURS, "foreach"}
    assert set(result.ratios) == {"foreach"}
    assert "values differ from ours" in result.absent["timm"]
    assert "TypeError" in result.absent["deepspeed"]
    assert result.absent["lion-pytorch"] == "not installed"


def test_command_writes_a_row_for_each_contender(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}
    options = [f"--{kind}={file}" for kind, file in files.items()]
    done = CliRunner().invoke(
        cli.bench, ["--quick", "--optimizer=rmsprop", "--dtype=fp32", "--shapes=400x4096", *options]
    )
    assert done.exit_code == 0, done.output
    assert " ok" in done.output
    written = json.loads(files["json"].read_text())
    (result,) = written["cases"]
    assert set(result["milliseconds"]) == {OURS, "loop", "foreach"}
    assert result["absent"] == {"fused": "torch.optim.RMSprop has no fused form"}
    rows = {row["contender"]: row for row in csv.DictReader(files["csv"].open())}
    assert set(rows) == {OURS, "loop", "foreach", "fused", YARDSTICK}
    for name in (OURS, "loop", "foreach"):
        assert float(rows[name]["ms_p20"]) <= float(rows[name]["ms_median"]) <= float(rows[name]["ms_p80"])
        assert rows[name]["check"] == ("ok" if name == OURS else "near ours")
        assert rows[name]["torch"] == written["machine"]["torch"] == torch.__version__
    assert rows["fused"]["reason"] == result["absent"]["fused"]


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw", 28), ("lion", 20), ("sgd", 12), ("amsgrad", 36)])
def test_bytes_moved(name: str, bytes_each: int) -> None:
    timing = measure(CASES[name], SHAPES, torch.float32, [], [], QUICK)
    assert timing.moved == bytes_each * elements(SHAPES)
    assert set(timing.steps) == {OURS, YARDSTICK}
    assert len(timing.steps[OURS]) == FEWEST_ROUNDS


@pytest.mark.parametrize("fresh_grads", [False, True])
def test_contenders_find_the_same_gradients(fresh_grads: bool) -> None:
    found, _ = rivals_of(CASES["nesterov"], ["foreach", "fused"])
    verdict = check(CASES["nesterov"], SHAPES, torch.float32, found)
    assert verdict.writers == {"foreach"}
    contenders = Contenders(CASES["nesterov"], SHAPES, torch.float32, found, verdict.writers, fresh_grads)
    given = [p.grad for p in contenders.params]
    before = [g.clone() for g in given if g is not None]
    for name in ("foreach", "fused", OURS):
        contenders.prepare(name)
        now = [p.grad for p in contenders.params if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        moved = [a is not b for a, b in zip(now, given, strict=True)]
        assert all(moved) if fresh_grads or name == "foreach" else not any(moved)
        contenders.step(name)


def test_harness_holds_no_state() -> None:
    """Else each of our steps would look at all of them again, as it does where somebody holds one."""
    contenders = Contenders(CASES["adamw"], SHAPES, torch.float32, rivals_of(CASES["adamw"], ["fused"])[0])
    contenders.sizes()
    for _ in range(2):
        for name in contenders.optimizers:
            contenders.step(name)
    assert contenders.ours._engine.plan.trusts_states


def test_short_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    result = run(CASES["adamw"], "llama-1b", "fp32", names_of(CASES["adamw"]), QUICK)
    assert result.skipped is not None
    assert result.skipped.startswith("needs 18.4 GiB of memory")
    assert result.milliseconds == {}


def test_rivals_without_room_are_left_out() -> None:
    wide = Rival("wide", torch.optim.SGD, states=0, scratch=4)
    forms = [Rival(name, torch.optim.Adam, states=2, shares_states=True) for name in ("loop", "fused")]
    own = Rival("own", torch.optim.Adam, states=2)
    taken, absent = fit([wide, *forms, own], column=2**30, room=3 * 2**30)
    assert taken == forms
    assert absent == {
        "wide": "needs 4.0 GiB of memory beside ours, 3.0 GiB are free",
        "own": "needs 4.0 GiB of memory beside ours, 3.0 GiB are free",
    }


def test_matrices_are_checked_timed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    size = ["--side", "24", "--aspect", "2", "--batch", "1", "--batch", "3"]
    result = CliRunner().invoke(bench_matrices, [*size, "--no-muon", "--seconds", "0", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    assert "geometric mean of the ratios of torch:" in result.output
    assert "geometric mean of the ratios of torch plain:" in result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    what = product(("1x24x48", "3x24x48"), ("stepladder", "torch", "torch plain"))
    assert [(row["what"], row["contender"]) for row in rows] == list(what)
    for row in rows:
        ours = row["contender"] == OURS
        assert row["check"] == ("ok" if ours else "")
        assert (row["ratio_median"] == "") == ours
        count = matrices.flops(24, 48, int(row["what"][0]))
        assert float(row["gflops"]) * float(row["ms_median"]) == pytest.approx(count / 1e6, rel=1e-4)


def test_forms_are_contenders(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    size = ["--side", "24", "--aspect", "1.5", "--batch", "2", "--forms", "--no-muon", "--seconds", "0"]
    result = CliRunner().invoke(bench_matrices, [*size, "--csv", str(path)])
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert [row["what"] for row in rows.values()] == ["2x24x36"] * 4
    assert [(name, row["form"]) for name, row in rows.items()] == [
        ("stepladder standard", "standard"),
        ("stepladder gram", "gram"),
        ("torch", ""),
        ("torch plain", ""),
    ]
    unit = matrices.matrix_unit()
    assert [row["unit"] for row in rows.values()] == [unit] * 4
    assert [name for name, row in rows.items() if row["standard_median"]] == ["stepladder gram"]
    (found,) = choices([path])
    assert (found.unit, found.m, found.results) == (unit, 24, "rows.csv")


def test_an_interrupted_measurement_writes_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"

    def interrupted(*args: Any) -> matrices.Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrices, "measure_muon", interrupted)
    options = ["--side", "24", "--aspect", "1", "--batch", "1", "--seconds", "0", "--csv", str(path)]
    result = CliRunner().invoke(bench_matrices, options)
    assert result.exit_code == 1
    with path.open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == ["stepladder", "torch", "torch plain"]


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (3, 24, 48)], ids=str)
def test_rivals_iterate_alike(shape: tuple[int, ...]) -> None:
    """Within the gate that ours have to pass."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fused, plain = (run(x).float() for run in matrices.Cpu.rivals.values())
    assert (fused - plain).norm() <= matrices.TOLERANCE * fused.norm()
    assert not torch.equal(fused, plain)


def test_wrong_matrices_get_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matrices.Cpu.rivals, matrices.THEIRS, lambda x: 1.5 * sl.reference.newton_schulz(x))
    result = CliRunner().invoke(bench_matrices, ["--side", "24", "--aspect", "1", "--batch", "1", "--no-muon"])
    assert result.exit_code == 1
    assert "red" in result.output


@pytest.mark.parametrize("family", ["Shampoo", "SOAP"])
def test_preconditioners_are_checked_timed_and_written(family: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    size = ["--layers", "1", "--width", "40", "--seconds", "0"]
    result = CliRunner().invoke(bench_preconditioners, ["--family", family, *size, "--csv", str(path)])
    assert result.exit_code == 0, result.output
    with path.open() as file:
        first, second, *_ = csv.DictReader(file)
    assert (first["contender"], first["check"], first["ratio_median"]) == ("stepladder", "ok", "")
    assert float(second["ratio_median"]) > 0
    # Factors, and as many roots or bases; two moments; a step count and a count of failures.
    other = (120, 40, 160, 160)
    factors = sum(40**2 + n**2 for n in other)
    assert int(first["state_bytes"]) == 4 * (2 * factors + 2 * 40 * sum(other) + 2 * len(other))


def test_wrong_preconditioners_get_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioners, "checked", lambda family: float("nan"))
    result = CliRunner().invoke(bench_preconditioners, ["--family", "SOAP", "--layers", "1", "--width", "16"])
    assert result.exit_code == 1
    assert "red" in result.output


def test_roots_and_bases_are_checked_timed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    result = CliRunner().invoke(bench_roots, ["--batch", "3", "24", "--seconds", "0", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["check"]) for row in rows] == [
        ("3 roots of 24, p=4", "ok"),
        ("3 roots of 24, p=4", ""),
        ("3 bases of 24", "ok"),
        ("3 bases of 24", ""),
    ]
    assert all(float(row["ms_median"]) > 0 for row in rows)


def test_wrong_roots_get_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "worst", lambda X, exact: float("nan"))
    result = CliRunner().invoke(bench_roots, ["--batch", "2", "8", "--seconds", "0"])
    assert result.exit_code == 1
    assert "red" in result.output


def test_muons_step_is_checked() -> None:
    row = matrices.measure_muon(matrices.Cpu(), [(24, 40), (40, 24)], "two", 0.0)
    assert row.red == []
    assert set(row.ratios) == {matrices.THEIRS}
    assert row.flops == 2 * matrices.flops(24, 40, 1)


def test_matrices_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the GPU's place: every backend of ours, torch eager and compiled."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    clock = SimpleNamespace(device=torch.device("cpu"), alone=lambda run: (run() is None or 2.0, 0.0))
    machine = matrices.OnGpu(clock, ("cpu", "reference"))  # type: ignore[arg-type]
    row = matrices.measure_iteration(machine, 2, 20, 30, 0.0)
    assert list(row.errors) == ["stepladder-cpu", "stepladder-reference"]
    assert row.red == []
    assert list(row.ratios) == ["stepladder-reference", "torch", "torch compiled"]
    row = matrices.measure_iteration(machine, 2, 20, 30, 0.0, ("standard", "gram"))
    units = {found["contender"]: found["unit"] for found in matrices.csv_rows(row, machine.unit)}
    assert units["stepladder-cpu gram"] == "cpu"
    assert units["stepladder-reference standard"] == "reference"
    assert units["torch compiled"] == "cpu"  # the device
    assert list(row.standard) == ["stepladder-cpu gram", "stepladder-reference gram"]


def test_matrices_need_a_gpu_for_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    result = CliRunner().invoke(bench_matrices, ["--device", "cuda"])
    assert result.exit_code == 1
    assert "no measurement on a GPU here. cuda: " in result.output
