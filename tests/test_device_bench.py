"""What `stepladder bench --device cuda` and `make device` do, with a CPU in the GPU's place."""

from __future__ import annotations

import csv
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

import pytest
import torch
from click.testing import CliRunner

import stepladder as sl
from stepladder.bench import (
    cli,
    device,
    gpu,
    gpu_report,
    matrices,
    processes,
    report,
    rivals,
    roots,
    runner,
    soap_step,
    targets,
    traffic,
)
from stepladder.bench.cases import CASES
from stepladder.bench.measure import Contenders, Settings
from stepladder.bench.rivals import COMPILED, MOST_COMPILED, Other, rivals_of
from stepladder.bench.shapes import SETS
from stepladder.bench.workload import grouped
from stepladder.cli import main
from stepladder.optim.state import RULES

ROOT = Path(__file__).parents[1]
FACTS = {"date": "now", "device": "none", "torch": torch.__version__}
QUICK = Settings(0.0, rounds=(3, 3))


class FakeGpu:
    """The CPU's clock in place of a GPU's events."""

    def __init__(self, room: int = 2**40) -> None:
        self.device = torch.device("cpu")
        self.room = room
        self.captured = 0

    def alone(self, step: gpu.Step) -> tuple[float, float]:
        begin = perf_counter_ns()
        step()
        took = (perf_counter_ns() - begin) / 1e6
        return took, took

    def queued(self, step: gpu.Step, host_ms: float) -> float:
        assert host_ms >= 0.0
        return self.alone(step)[0]

    def capture(self, step: gpu.Step) -> gpu.Step:
        self.captured += 1
        return lambda: None

    def free(self) -> int:
        return self.room


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Sets that a CPU steps in no time."""
    small = {"1000x768": [(9,)] * 20, "465-groups": [(7,)] * 15, "gpt2": [(300, 300), (5,)]}
    for name, shapes in small.items():
        monkeypatch.setitem(SETS, name, lambda shapes=shapes: shapes)
    monkeypatch.setattr(gpu, "COPY_LEAST", 2**20)
    monkeypatch.setattr(gpu, "COPY_MOST", 2**21)
    # The real one takes a minute of the compiler's time.
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda f: f))


def measured(case="adamw", shapes="1000x768", names=("loop", "fused"), ours=("cpu",), dtype="fp32"):
    return gpu.run(FakeGpu(), CASES[case], shapes, dtype, names, QUICK, ours)


def test_a_case_from_check_to_numbers():
    result = measured(names=("loop", "foreach", "fused"))
    assert result.red == {}
    assert (result.groups, result.tensors, result.elements) == (1, 20, 180)
    assert list(result.contenders) == ["stepladder-cpu", "loop", "foreach", "fused"]
    ours, fused = result.contenders["stepladder-cpu"], result.contenders["fused"]
    assert result.rounds == 3
    assert ours.ratio is None
    assert fused.ratio is not None
    assert fused.device_ratio is not None
    assert ours.gb_per_s is not None
    assert ours.share == pytest.approx(ours.gb_per_s / result.bandwidth)
    # 28 bytes an element, in the median time of the device.
    assert ours.gb_per_s == pytest.approx(28 * 180 / ours.device_ms.median / 1e6)
    assert ours.host_fresh_ms is not None
    assert fused.host_fresh_ms is None
    for contender in (ours, fused):
        assert contender.replay_host_ms is not None
    assert result.contenders["loop"].replay_ms is None


def test_groups_have_a_parameter_each():
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    assert grouped(params, 0.5, apart=False) == params
    groups = grouped(params, 0.5, apart=True)
    assert [group["lr"] for group in groups] == [0.5, 0.625, 0.75, 0.875]
    result = measured(shapes="465-groups", names=("foreach", "fused"))
    assert result.groups == result.tensors == 15
    assert result.red == {}
    assert "fused" in result.contenders
    contenders = Contenders(CASES["lion"], [(3,)] * 5, torch.float32, rivals_of(CASES["lion"])[0], apart=True)
    assert {len(o.param_groups) for o in contenders.optimizers.values()} == {5}


def test_several_backends_are_contenders():
    result = measured(names=("fused",), ours=("cpu", "reference"))
    assert list(result.contenders) == ["stepladder-cpu", "stepladder-reference", "fused"]
    other = result.contenders["stepladder-reference"]
    assert other.ratio is not None
    assert other.share is not None


class Broken(sl.AdamW):
    """Wrong on one backend, and unable to run on another."""

    def __init__(self, params, backend=None, **options):
        if backend == "cuda":
            raise RuntimeError("no kernel image")
        super().__init__(params, backend=backend, **options | ({"eps": 1e-4} if backend == "cpu" else {}))


def test_a_red_backend_has_no_number_and_the_others_have(monkeypatch):
    monkeypatch.setitem(CASES, "adamw", replace(CASES["adamw"], ours=Broken))
    result = measured(ours=("cuda", "cpu", "reference"))
    assert "differ from the reference" in result.red["stepladder-cpu"]
    assert result.red["stepladder-cuda"] == "RuntimeError: no kernel image"
    assert list(result.contenders) == ["stepladder-reference", "loop", "fused"]
    common = gpu_report.measurement(result)
    assert (common.red, common.ours) == (None, "stepladder-reference")
    assert common.absent["stepladder-cuda"] == "the check is RED: RuntimeError: no kernel image"
    assert len(common.failures) == 2
    alone = measured(ours=("cpu",))
    assert alone.contenders == {}
    common = gpu_report.measurement(alone)
    assert common.red is not None
    assert common.red.startswith("stepladder-cpu: ")
    assert common.failures == ["adamw fp32 1000x768: the check is RED"]


def test_an_error_loses_no_other_case(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeGpu, "queued", fails)
    assert measured().red == {"stepladder": "RuntimeError: out of memory"}


class WrongTail(sl.AdamW):
    """Leaves the end of a large tensor as it was."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        for group in self.param_groups:
            for p, old in zip(group["params"], before, strict=True):
                p.data.flatten()[80_000:].copy_(old.flatten()[80_000:])


def test_the_whole_set_is_checked_too(monkeypatch):
    monkeypatch.setitem(CASES, "adamw", replace(CASES["adamw"], ours=WrongTail))
    assert measured(shapes="1000x768").red == {}
    assert "on the whole set" in measured(shapes="gpt2").red["stepladder-cpu"]


def test_compiled_is_measured():
    # Torch refuses Adam's capturable form on a CPU.
    result = measured("momentum", names=("fused", COMPILED))
    assert list(result.contenders) == ["stepladder-cpu", "fused", COMPILED]
    assert result.absent == {}


def test_compiled_is_left_out_with_its_reason(monkeypatch):
    def fails(**options):
        raise RuntimeError("no\ncompiler " + "x" * 1000)

    monkeypatch.setattr(torch, "compile", fails)
    result = measured(names=("fused", COMPILED))
    assert result.absent[COMPILED].startswith("RuntimeError: no compiler xxx")
    assert len(result.absent[COMPILED]) <= 400
    assert set(result.contenders) == {"stepladder-cpu", "fused"}


def test_rivals_on_a_gpu():
    found, absent = rivals_of(CASES["adamw"], gpu=True, tensors=3)
    # The fused form's step counts are on the GPU, and those of the others are not.
    assert {r.name: r.shares_states for r in found if r.name in ("loop", "foreach", "fused", COMPILED)} == {
        "loop": True,
        "foreach": True,
        "fused": False,
        COMPILED: False,
    }
    assert not any("deepspeed" in name for name in (*absent, *(r.name for r in found)))
    assert COMPILED in rivals_of(CASES["adamw"], gpu=True, tensors=MOST_COMPILED + 1)[1]
    assert COMPILED in rivals_of(CASES["lamb"], gpu=True)[1]
    assert COMPILED in {r.name for r in rivals_of(CASES["lion"], gpu=True)[0]}
    on_cpu, absent = rivals_of(CASES["adamw"])
    assert COMPILED not in {*absent, *(r.name for r in on_cpu)}


def test_compiled_form_has_its_rate_in_a_tensor():
    (rival,) = rivals_of(CASES["adamw"], [COMPILED], gpu=True)[0]
    assert rival.make.keywords == {"foreach": True, "capturable": True}
    (plain,) = rivals_of(CASES["momentum"], [COMPILED], gpu=True)[0]
    assert plain.make.keywords == {"foreach": True}
    p = torch.nn.Parameter(torch.zeros(2))
    assert isinstance(rival.make([p], lr=0.1).param_groups[0]["lr"], torch.Tensor)


def test_short_memory_is_said():
    result = gpu.run(FakeGpu(room=10), CASES["adamw"], "gpt2", "fp32", (), QUICK, ("cpu",))
    assert result.skipped is not None
    assert "of the GPU's memory" in result.skipped


def test_rivals_without_room_are_left_out(monkeypatch):
    own = Other("timm", "adamw", "torch.optim:AdamW", {"foreach": False})
    monkeypatch.setattr(rivals, "OTHERS", (own,))
    # The check takes 12 columns; timed are 5 of ours, states of 2 rivals and 2 columns of scratch, and 1 is left.
    names = ("foreach", "fused", "timm")
    result = gpu.run(FakeGpu(12 * 180 * 4), CASES["adamw"], "1000x768", "fp32", names, QUICK, ("cpu",))
    assert list(result.contenders) == ["stepladder-cpu", "foreach", "fused"]
    assert "of memory beside ours" in result.absent["timm"]


def test_triton_launches_are_counted():
    triton = pytest.importorskip("triton", reason="launches the kernel; pip install 'stepladder[test]'")
    hooks = triton.knobs.runtime.launch_enter_hook

    def step():
        for _ in range(2):
            hooks(None)

    assert gpu.count_launches("triton", step) == 2
    assert gpu.count_launches("triton", lambda: None) is None
    assert gpu.count_launches("cpu", lambda: None) is None


def test_files_have_a_row_for_each_contender(tmp_path):
    results = [measured("momentum", "465-groups", ("fused", COMPILED)), measured("lion", names=("foreach",))]
    results.append(replace(results[0], contenders={}, red={"stepladder-cuda": "wrong"}, absent={}))
    results.append(replace(results[0], contenders={}, absent={}, skipped="no room"))
    file = tmp_path / "rows.csv"
    with file.open("w") as stream:
        gpu_report.write_csv(stream, FACTS, results)
    rows = list(csv.DictReader(file.open()))
    assert list(rows[0]) == [*FACTS, *gpu_report.COLUMNS]
    assert [row["contender"] for row in rows[:3]] == ["stepladder-cpu", "fused", COMPILED]
    assert [row["check"] for row in rows[-2:]] == ["red", "skipped"]
    assert rows[0]["groups"] == "15"
    assert float(rows[0]["share"]) > 0
    assert rows[0]["ratio_median"] == rows[0]["launches"] == ""
    assert float(rows[1]["ratio_p20"]) <= float(rows[1]["ratio_median"]) <= float(rows[1]["ratio_p80"])
    written = json.loads(json.dumps(gpu_report.as_json(results)))
    assert written["results"][0]["contenders"]["fused"]["ratio"]["median"] > 0
    shown = gpu_report.tables(results)
    from rich.console import Console

    console = Console(width=160, file=(tmp_path / "table").open("w"))
    console.print(shown)
    console.file.close()
    assert "stepladder-cpu" in (tmp_path / "table").read_text()


def test_command_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli.bench, ["--device=cuda", "--quick"])
    assert done.exit_code == 1
    assert "no measurement on a GPU here. cuda: " in done.output
    done = CliRunner().invoke(cli.bench, ["--backend=cuda"])
    assert done.exit_code == 2
    assert "needs --device cuda" in done.output


def test_command_on_a_gpu(monkeypatch, tmp_path):
    """All of the command, with a CPU backend under the name of a GPU's."""
    fake = FakeGpu()
    processes.machine_of.cache_clear()
    monkeypatch.setattr(gpu, "Gpu", lambda: fake)
    monkeypatch.setattr(gpu_report, "machine", lambda gpu: FACTS)
    monkeypatch.setattr(gpu_report, "header", lambda facts: "a machine")
    monkeypatch.setattr(cli, "_ours", lambda names: ["cpu", "reference"])
    options = [f"--json={tmp_path / 'out.json'}", f"--csv={tmp_path / 'out.csv'}"]
    chosen = ["--shapes=1000x768", "--shapes=465-groups", "--optimizer=adamw", "--dtype=fp32", "--rival=fused"]
    done = CliRunner().invoke(cli.bench, ["--device=cuda", "--seconds=0", *chosen, *options])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["shapes"] for row in found] == ["1000x768", "465-groups"]
    assert fake.captured == 6
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [list(case["ratios"]) for case in cases] == [["stepladder-reference", "fused"]] * 2
    assert all(case["share"] > 0 for case in cases)
    processes.machine_of.cache_clear()
    # Ours is called otherwise here, so that every target is there and none is measured.
    assert {v.reached for v in targets.verdicts(found)} == {None}


def test_measuring_processes_know_the_gpu(monkeypatch):
    processes.machine_of.cache_clear()
    monkeypatch.setattr(gpu, "Gpu", FakeGpu)
    ours = ("cpu", "reference")
    step = processes.measure(processes.Spec("adamw", "1000x768", "fp32", ("fused",), ours), QUICK)
    assert [contender.role for contender in step.contenders.values()] == ["ours", "ours", "rival", "yardstick"]
    kernel = processes.measure(processes.Spec("newton_schulz", "2*20x30", "fp32", (), ours), QUICK)
    assert list(kernel.contenders) == ["stepladder-cpu", "stepladder-reference", "torch", "torch compiled"]
    muon = processes.measure(processes.Spec("muon", "2*20x30", "fp32", (), ours), QUICK)
    assert [contender.role for contender in muon.contenders.values()] == ["ours", "ours", "rival"]
    processes.machine_of.cache_clear()


def row(optimizer, dtype, shapes, elements, ours=None, fused=None):
    def spread(value):
        return {"median": value, "p20": value, "p80": value}

    def contender(values):
        return {k: spread(v) if k.endswith(("ms", "ratio")) else v for k, v in values.items()}

    contenders = {}
    if ours is not None:
        empty = {"share": None, "launches": None, "host_fresh_ms": None, "replay_host_ms": None}
        contenders["stepladder-cuda"] = empty | contender(ours)
    if fused is not None:
        contenders["fused"] = contender(fused)
    return {"optimizer": optimizer, "dtype": dtype, "shapes": shapes, "elements": elements, "contenders": contenders}


def verdict_of(rows, target):
    (found,) = [v for v in targets.verdicts(rows) if v.target == target]
    return found.word, found.measured


def test_targets():
    share = "share of the copy's bandwidth, adamw fp32 gpt2"
    fused = "torch fused over ours, adamw fp32 gpt2"
    rows = [row("adamw", "fp32", "gpt2", 124e6, {"share": 0.95, "launches": 1}, {"ratio": 1.2, "device_ratio": 1.0})]
    assert verdict_of(rows, share) == ("reached", "95.0%")
    assert verdict_of(rows, fused) == ("reached", "1.000")
    assert verdict_of(rows, "launches a step") == ("reached", "1")
    assert verdict_of(rows, "share of the copy's bandwidth, lion bf16 llama-1b") == ("not measured", None)
    slower = row("adamw", "fp32", "gpt2", 124e6, {"share": 0.94, "launches": 2}, {"ratio": 1.2, "device_ratio": 0.99})
    assert verdict_of([slower], share)[0] == verdict_of([slower], fused)[0] == "MISSED"
    assert verdict_of([slower], "launches a step") == ("MISSED", "2")
    # The first of two runs counts, and one that was red does not.
    assert verdict_of([*rows, slower], share)[0] == "reached"
    assert verdict_of([row("adamw", "fp32", "gpt2", 124e6), *rows], share)[0] == "reached"
    # A large set that is not among the usual ones is held to the same.
    other = row("lion", "bf16", "huge", 1e9, {"share": 0.5})
    assert verdict_of([other], "share of the copy's bandwidth, lion bf16 huge")[0] == "MISSED"


def test_targets_of_small_tensors():
    small = {"share": 0.1, "host_fresh_ms": 0.4, "replay_host_ms": 0.031}
    rows = [row("adamw", "bf16", "1000x768", 768e3, small, {"ratio": 10.0, "device_ratio": 3.0})]
    rows += [row("adamw", "bf16", "465-groups", 357e3, {"share": 0.1}, {"ratio": 9.9, "device_ratio": 3.0})]
    assert verdict_of(rows, "torch fused over ours, adamw bf16 1000x768") == ("reached", "10.0")
    assert verdict_of(rows, "torch fused over ours, adamw bf16 465-groups")[0] == "MISSED"
    assert verdict_of(rows, "host time, fresh gradients, adamw bf16 1000x768") == ("reached", "400 µs")
    assert verdict_of(rows, "host time, graph replay, adamw bf16 1000x768") == ("MISSED", "31 µs")
    assert verdict_of(rows, "launches a step") == ("not measured", None)


def root_row(what, contender, ms="", ratio="", note=""):
    return {"what": what, "contender": contender, "ms_median": ms, "ratio_median": ratio, "note": note}


def test_targets_of_roots():
    (first, eigh, _), *_, (soap, loop, _) = targets.ROOTS
    rows = [root_row(first, targets.OURS, "59.5"), root_row(first, eigh, "1190", "20.0")]
    rows += [root_row(soap, targets.OURS, "100", note="3 of 64 fell back"), root_row(soap, "torch.bmm", "79", "0.79")]
    found = {v.target: (v.word, v.measured) for v in targets.root_verdicts(rows)}
    assert found[first] == ("reached", "59.5 ms")
    assert found[f"{eigh} over ours, {first}"] == ("reached", "20.0")
    assert found[f"torch.bmm over ours, {soap} (3 of 64 fell back)"] == ("MISSED", "0.79")
    assert found[f"{loop} over ours, {soap} (3 of 64 fell back)"] == ("not measured", None)
    # One that is red has no time, and its rivals' are not counted.
    red = [root_row(first, targets.OURS), root_row(first, eigh, "1190", "20.0")]
    assert {v.reached for v in targets.root_verdicts(red)} == {None}


def test_roots_and_steps_of_the_command_are_those_of_the_targets(monkeypatch, tmp_path):
    """All of `bench-roots --device cuda`, with a CPU in the GPU's place and small matrices under the names."""

    class Fake(matrices.Cpu):
        ours = {targets.OURS: None}  # noqa: RUF012

        def __init__(self, clock, names):
            super().__init__()

    monkeypatch.setattr(gpu, "available", lambda names: (["cuda"], {}))
    monkeypatch.setattr(gpu, "Gpu", lambda: None)
    monkeypatch.setattr(matrices, "OnGpu", Fake)
    Fake.clock = None
    monkeypatch.setattr(gpu_report, "machine", lambda gpu: FACTS)
    monkeypatch.setattr(gpu_report, "header", lambda facts: "a machine")

    def small(measure):
        def measured(machine, count, n, *rest):
            row = measure(machine, 2, 6, *rest)
            row.name = row.name.replace("2 ", f"{count} ", 1).replace("of 6", f"of {n}")
            return row

        return measured

    for name in ("measure_roots", "measure_bases"):
        monkeypatch.setattr(roots, name, small(getattr(roots, name)))
    monkeypatch.setattr(roots, "hidden_matrices", lambda layers: [(8, 6), (6, 8), (6, 6)])
    file = tmp_path / "rows.csv"
    options = ["--device=cuda", "--layers=1", "--seconds=0", f"--csv={file}"]
    done = CliRunner().invoke(roots.bench_roots, options)
    assert done.exit_code == 0, done.output
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all(v.reached is not None for v in targets.root_verdicts(rows)), done.output
    assert {row["check"] for row in rows if row["contender"] == targets.OURS} == {report.GREEN}


def test_a_part_counts_as_the_whole_in_every_figure(monkeypatch):
    monkeypatch.setattr(matrices.Cpu, "milliseconds", lambda self, run, repeats: 2.0)
    row = matrices.Row("parts", errors={"stepladder": 0.0})
    row = matrices.timed(row, matrices.Cpu(), {"stepladder": int, "eigh": int}, 0.0, {"eigh": 8.0})
    assert row.samples == {"stepladder": [2.0] * row.rounds, "eigh": [16.0] * row.rounds}
    assert (row.ms["eigh"].median, row.ratios["eigh"].median) == (16.0, 8.0)


def test_a_step_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(soap_step, "checked", lambda *arguments: 0.5)
    row = soap_step.measure_soap(matrices.Cpu(), [(6, 4)], "small", 0.0)
    assert row.red == ["stepladder"]
    assert row.ms == {}


def test_hidden_matrices_are_those_of_the_model():
    found = soap_step.hidden_matrices(soap_step.LAYERS)
    assert len(found) == 7 * 16
    assert sum(m * n for m, n in found) == 973_078_528
    assert soap_step.hidden_matrices(1) * 16 == found


def test_sets_and_optimizers_of_the_targets_exist():
    assert {*targets.LARGE_SETS, targets.MANY_TENSORS, targets.MANY_GROUPS} <= set(SETS)
    assert {*targets.LARGE_SETS, targets.MANY_TENSORS, targets.MANY_GROUPS} <= set(runner.GPU_SHAPES)
    assert set(targets.OPTIMIZERS) <= set(CASES)
    assert set(gpu.REPLAYED) <= set(SETS)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_budget_keeps_time_for_later_parts():
    assert sum(device.RESERVED.values()) < 600 - 2 * device.GRACE
    assert device.RESERVED["bench"] >= device.COMPILING + device.MATRICES + device.ROOTS + 60
    assert min(device.COMPILING, device.MATRICES, device.ROOTS) > 2 * device.GRACE
    clock = Clock()
    budget = device.Budget(
        ("build", "test", "bench"), {"build": 10.0, "test": 20.0, "sanitize": 5.0, "bench": 30.0}, clock
    )
    # What is kept for a part that does not run is there for the others.
    assert budget.limit("build") == 15.0
    clock.now += 4.0
    assert budget.limit("test") == 31.0
    clock.now += 40.0
    assert budget.limit("bench") == 21.0


class FakeSession:
    rows = ()

    def __init__(self, **failures):
        self.failures = failures
        self.ran = []

    def __getattr__(self, part):
        def run(limit):
            self.ran.append(part)
            failure = self.failures.get(part)
            if isinstance(failure, Exception):
                raise failure
            return [failure] if failure else []

        return run


def carried_out(session):
    parts = tuple(device.RESERVED)
    return device.carry_out(session, parts, device.Budget(parts), Clock())


def test_a_failing_part_does_not_stop_the_next(capsys):
    session = FakeSession(test="3 failed", sanitize=OSError("gone"))
    outcomes = carried_out(session)
    assert session.ran == list(device.RESERVED)
    assert [o.failures for o in outcomes] == [[], ["3 failed"], ["OSError: gone"], []]
    assert "test FAILED: 3 failed" in capsys.readouterr().out
    shown = device.report(outcomes, [])
    assert "3 failed" in shown
    assert "not measured" in shown
    without_build = FakeSession(build="no compiler")
    assert all(o.failures for o in carried_out(without_build))
    assert without_build.ran == ["build"]


def execute(code, tmp_path, limit=30.0):
    log = tmp_path / "log"
    return device.run([sys.executable, "-c", code], log, limit, device.environment()), log


def test_commands_are_logged_and_judged(tmp_path, capfd):
    failures, log = execute("print('hello')", tmp_path)
    assert failures == []
    assert log.read_text() == "hello\n" == capfd.readouterr().out
    assert "ended with status 3" in execute("raise SystemExit(3)", tmp_path)[0][0]
    assert "no time was left" in execute("", tmp_path, limit=0.0)[0][0]


@pytest.mark.parametrize("stubborn", [False, True])
def test_commands_are_interrupted_in_time(tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr(device, "GRACE", 1.0)
    code = """
import signal, time
if STUBBORN: signal.signal(signal.SIGINT, signal.SIG_IGN)
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("wrote what there was")
""".replace("STUBBORN", str(stubborn))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failures, log = execute(code, tmp_path, limit=2.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "not done after 2 s" in failures[0]
    assert ("wrote what there was" in log.read_text()) == (not stubborn)


FOUND = {"torch": "2.11", "torch_cuda": "13.0", "gpu": "A GPU", "capability": [9, 0], "missing": [], "xdist": False}


def test_refusals_are_one_sentence(monkeypatch, capsys):
    assert device.refusal(FOUND) is None
    for change, words in (
        ({"torch": None}, "has no torch"),
        ({"gpu": None}, "sees none here"),
        ({"missing": ["pybind11", "nvcc"]}, "lacks pybind11, nvcc"),
    ):
        reason = device.refusal(FOUND | change)
        assert words in reason
        assert "\n" not in reason
    monkeypatch.setattr(device, "probe", lambda: FOUND | {"gpu": None})
    monkeypatch.setattr(device, "Session", None)
    assert device.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        device.main(["no-such-part"])


def test_probe_runs_here():
    found = device.probe()
    assert found["torch"] == torch.__version__
    assert "click" not in found["missing"]


def test_what_the_parts_run(monkeypatch, tmp_path):
    ran = []

    def record(command, log, limit, env):
        ran.append((command, log, limit, env))
        for option in command:
            if option.startswith("--json="):
                Path(option[7:]).write_text(json.dumps({"results": [len(ran)]}))
        return []

    monkeypatch.setattr(device, "run", record)
    monkeypatch.setattr(device, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(device, "SITE", tmp_path / "site")
    session = device.Session(FOUND, tmp_path, tmp_path)
    assert session.build(1.0) == []
    command, _, _, env = ran.pop()
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(command)
    assert (env["STEPLADDER_CUDA"], env["STEPLADDER_CUDA_ARCHITECTURES"]) == ("1", "90a")
    assert session.test(1.0) == session.sanitize(10.0) == []
    assert all(env["STEPLADDER_TEST_DEVICE"] == "cuda" for *_, env in ran)
    assert all(any(option.endswith("test_bitwise.py") for option in command) for command, *_ in ran)
    assert [command[2] for command, *_ in ran[2:]] == ["memcheck", "racecheck"]
    del ran[:]
    assert session.bench(200.0) == []
    # Nothing took any time, so that the last has all of it, but for what runs between the clock's readings.
    *limits, matrices, last = [limit for _, _, limit, _ in ran]
    kept = device.COMPILING + device.MATRICES + device.ROOTS
    assert limits == [200.0 - kept, device.COMPILING - device.GRACE]
    assert 190.0 < matrices + device.ROOTS <= 200.0
    assert 190.0 < last <= 200.0
    assert session.rows == [1, 2]
    assert session.root_rows == []
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]
    # Every option is one that the command has; the last writes its rows beside the others'.
    for command, *_ in ran:
        accepted = {option for parameter in main.commands[command[3]].params for option in parameter.opts}
        assert {option.partition("=")[0] for option in command[4:]} <= accepted
    assert [command[3] for command, *_ in ran] == ["bench", "bench", "bench-matrices", "bench-roots"]
    assert {log.name for _, log, *_ in ran} == {
        "device-bench.log",
        "device-bench-compiled.log",
        "device-bench-matrices.log",
        "device-bench-roots.log",
    }
    assert f"--csv={tmp_path / session.stem}-matrices.csv" in ran[-2][0]
    roots = tmp_path / f"{session.stem}-roots.csv"
    assert f"--csv={roots}" in ran[-1][0]
    roots.write_text("what,contender\nroots,ours\n")
    assert session._bench_roots(1.0) == []
    assert session.root_rows == [{"what": "roots", "contender": "ours"}]
    monkeypatch.setattr(device, "find_sanitizer", lambda: None)
    assert "compute-sanitizer" in session.sanitize(1.0)[0]


@pytest.mark.parametrize(("capability", "name"), [([9, 0], "90a"), ([8, 0], "80"), ([12, 0], "120")])
def test_architectures(capability, name):
    assert device.architecture(capability) == name


def test_documented_bytes_are_those_of_the_rules():
    assert set(traffic.names()) == set(RULES)
    assert traffic.bytes_per_element("adamw", 4, 4, 4) == 28
    assert traffic.bytes_per_element("lion", 2, 2, 4) == 14
    assert traffic.table() in (ROOT / "docs" / "performance.md").read_text(), (
        "docs/performance.md is out of date: "
        "python -c 'from stepladder.bench.traffic import table; print(table())' prints its table"
    )
