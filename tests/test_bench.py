"""`stepladder bench`: what it compares, writes, draws and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from click import ClickException
from click.testing import CliRunner

from stepladder.bench import cli, files, output, preconditioners, processes, runner
from stepladder.bench.compare import FASTER, SAME, SLOWER, UNKNOWN, WRONG, compare
from stepladder.bench.conditions import parse
from stepladder.bench.matrices import Cpu
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import MEASURE, OURS, OWN, RIVAL, SCALE, YARDSTICK, Contender, Measurement
from stepladder.bench.processes import Ended, Spec, Worker, in_turns
from stepladder.bench.roofline import operations
from stepladder.bench.subjects import CASES, SUBJECTS

ROOT = Path(__file__).parents[1]
CHOSEN = ["--optimizer=adamw", "--kernel=newton_schulz", "--shapes=4*8x16", "--dtype=fp32", "--rival=fused"]
QUICK = Settings(0.0)
SCIPY = "has the distribution of intervals; pip install 'stepladder[bench]'"


def synthetic(rng, case="adamw", ours=1.0, machine=1.0, processes=8, rounds=15):
    """A case whose processes differ by 3 %, as was seen on a quiet machine, and its rounds by 10 %."""
    times = {OURS: ours, "fused": 3.0, "foreach": 10.0, YARDSTICK: 1.1}
    roles = {OURS: OWN, YARDSTICK: MEASURE}
    found = Measurement("optimizer", case, "400x4096", "fp32", 400, 400 * 4096)
    for name, time in times.items():
        own = rng.normal(0.0, 0.03, (processes, 1)) if name == OURS else 0.0
        ms = machine * time * np.exp(own + rng.normal(0.0, 0.1, (processes, rounds)))
        found.contenders[name] = Contender(roles.get(name, RIVAL), ms.tolist())
    return found


def names(count):
    return [f"case{i}" for i in range(count)]


@pytest.mark.parametrize("count", [2, 8])
def test_equal_builds_are_flagged_as_seldom_as_is_promised(count):
    stats = pytest.importorskip("scipy.stats", reason=SCIPY)
    rng = np.random.default_rng(1)
    runs, flagged = 100, 0
    for _ in range(runs):
        before, now = ([synthetic(rng, name, processes=count) for name in names(4)] for _ in range(2))
        flagged += any(change.flagged for change in compare(before, now))
    # As many as would be more than that once in a thousand, did each run flag something with that probability.
    assert flagged <= stats.binom.ppf(0.999, runs, WRONG)


def test_what_was_slowed_is_flagged_and_nothing_else():
    pytest.importorskip("scipy", reason=SCIPY)
    rng = np.random.default_rng(2)
    before = [synthetic(rng, name) for name in names(6)]
    # The machine has become slower by half as well, which is nobody's fault.
    now = [synthetic(rng, name, 1.2 if name == "case3" else 1.0, machine=1.5) for name in names(6)]
    changes = compare(before, now)
    assert [change.case for change in changes if change.verdict == SLOWER] == ["case3"]
    assert [change.verdict for change in changes].count(SAME) == 5
    slowed = changes[3]
    assert slowed.low < 0.2 < slowed.high
    assert slowed.low > 0.0
    assert slowed.processes == (8, 8)
    assert [change.case for change in compare(now, before) if change.verdict == FASTER] == ["case3"]


def test_what_cannot_be_compared_is_unknown_and_says_why():
    rng = np.random.default_rng(3)
    one, several = synthetic(rng, processes=1), synthetic(rng)
    alone = replace(several, contenders={OURS: several.contenders[OURS]})
    red = replace(several, contenders={}, red="wrong bits")
    for base, now, reason in (
        ([], several, "it is not in the base"),
        ([one], several, "the base was measured in one process"),
        ([several], one, "this run was measured in one process"),
        ([alone], several, "nothing took turns with it in both runs"),
        ([red], several, "wrong bits"),
    ):
        (change,) = compare(base, [now])
        assert change.verdict == UNKNOWN
        assert reason in change.reason
    assert compare([several], [red]) == []


def test_two_processes_have_intervals_that_end():
    pytest.importorskip("scipy", reason=SCIPY)
    rng = np.random.default_rng(4)
    base = [synthetic(rng, name, processes=2) for name in names(20)]
    now = [synthetic(rng, name, processes=2) for name in names(20)]
    for change in compare(base, now):
        assert np.isfinite([change.low, change.change, change.high]).all()


def test_results_survive_a_file(tmp_path):
    case = synthetic(np.random.default_rng(5))
    case.contenders[OURS].moved = 10**6
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"format": "stepladder bench 1", "machine": {}, "cases": [case.as_dict()] * 2}))
    (read,) = files.read(file).cases
    assert read.processes == 16
    assert read.contenders[OURS].ms == case.contenders[OURS].ms * 2
    assert (read.key, read.ratio, read.share) == (case.key, case.ratio, case.share)


def test_processes_add_up_without_what_one_of_them_lacks():
    rng = np.random.default_rng(6)
    first, second = synthetic(rng, processes=1), synthetic(rng, processes=1)
    del second.contenders["foreach"]
    second.absent["foreach"] = "no room"
    first.add(second)
    assert first.absent == {"foreach": "no room"}
    assert {len(contender.ms) for contender in first.contenders.values()} == {2}
    first.add(replace(second, red="wrong bits"))
    assert (first.red, first.contenders) == ("wrong bits", {})


def test_conditions():
    case = synthetic(np.random.default_rng(7), rounds=3)
    for text, met in (
        ("adamw.ratio<1.1", False),
        ("adamw.ratio < 1e3", True),
        ("ada*.ms>=1e-3", True),
        ("*.share<2", True),
        ("adamw.gb_per_s>0", True),
        ("*.host_ms>1", True),
    ):
        assert bool(parse(text).met([case], [])) == met, text
    assert parse("adamw.host_ms>1").met([case], []) == ["adamw fp32 400x4096 has no host_ms"]
    assert parse("adamw.ratio<1e3").met([case], [])[0].startswith("adamw fp32 400x4096: ratio is ")
    assert parse("lion.ms>1").met([case], []) == ["nothing was measured that is named lion"]
    alone = synthetic(np.random.default_rng(7), "lion", rounds=3)
    del alone.contenders["fused"], alone.contenders["foreach"]
    # A pattern is for whoever has the metric.
    assert parse("*.ratio<0.1").met([case, alone], []) == []


@pytest.mark.parametrize("text", ["adamw", "adamw.speed<1", "adamw.ratio=1", "adamw.ratio<one", "adamw.ratio<nan", ""])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|no number|nothing"):
        parse(text)


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name not in CASES])
def test_matrices_have_the_form_of_all_results(name, monkeypatch):
    # Which takes its time, and is tested beside bench-preconditioners.
    monkeypatch.setattr(preconditioners, "checked", lambda family: 1e-6)
    torch.set_num_threads(1)
    found = SUBJECTS[name].measure(Cpu(), "2*24x24", "fp32", (), QUICK, None)
    assert (found.red, found.skipped, found.tensors, found.elements) == (None, None, 2, 2 * 24 * 24)
    ours = found.contenders[OURS]
    assert ours.role == OWN
    assert ours.error is not None
    assert len(found.contenders) > 1
    assert {len(c.pooled) for c in found.contenders.values()} == {found.rounds}
    assert all(np.median(c.pooled) > 0 for c in found.contenders.values())
    assert (ours.state_bytes or 0) > 0 or found.kind == "kernel"
    assert files.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    others = {contender.role for other, contender in found.contenders.items() if other != OURS}
    assert others <= {RIVAL, SCALE}


def test_a_wrong_matrix_has_no_number(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "norm", lambda self, *args, **kwargs: torch.tensor(float("nan")))
    found = SUBJECTS["muonh"].measure(Cpu(), "2*24x24", "fp32", (), QUICK, None)
    assert found.red == "stepladder: relative error nan, above its limit"
    assert found.contenders == {}


@pytest.mark.parametrize(("name", "count"), [("sgd", 2), ("momentum", 5), ("adamw", 14), ("amsgrad", 14)])
def test_operations_of_a_rule(name, count):
    """Counted by hand in its reference: of AdamW a decay, 3 for m, 4 for v, and sqrt · + · / − for the step."""
    assert operations(CASES[name]) == count


def test_everything_is_chosen_or_said_to_be_left_out():
    specs, left_out = runner.Chosen((), (), (), (), everything=True).specs()
    assert left_out == []
    assert {spec.subject for spec in specs} == set(SUBJECTS)
    specs, _ = runner.Chosen((), (), (), ()).specs()
    assert {spec.subject for spec in specs} == {*runner.OPTIMIZERS, *runner.MATRICES}
    specs, left_out = runner.Chosen((), ("gpt2",), (), ()).specs()
    assert {spec.subject for spec in specs} == set(runner.OPTIMIZERS)
    assert [line.split()[0] for line in left_out] == list(runner.MATRICES)
    specs, _ = runner.Chosen((), (), (), (), ("cuda",)).specs()
    assert {spec.shapes for spec in specs} == set(runner.GPU_SHAPES)


def test_gradients_are_reallocated_for_element_wise_rules_alone():
    specs, left_out = runner.Chosen((), (), (), (), fresh_grads=True).specs()
    assert {spec.subject for spec in specs} == set(runner.OPTIMIZERS)
    assert [line.split()[0] for line in left_out] == list(runner.MATRICES)


@pytest.mark.parametrize(
    ("options", "processes", "seconds"),
    [
        ([], runner.PROCESSES, Settings.seconds / runner.PROCESSES),
        (["--quick"], 1, 0.0),
        (["--quick", "--seconds=5"], 1, 5.0),
        (["--quick", "--base={json}"], 1, 0.0),
        (["--base={json}"], runner.COMPARED, Settings.seconds / runner.COMPARED),
        (["--quick", "--processes=2", "--seconds=5"], 2, 2.5),
    ],
)
def test_how_long_and_in_how_many_processes(options, processes, seconds, measured, monkeypatch):
    pytest.importorskip("scipy", reason=SCIPY)
    asked = []
    monkeypatch.setattr(cli, "run", lambda outcome, specs, settings, count, *rest: asked.append((count, settings)))
    given = [option.format(json=measured / "out.json") for option in options]
    done = CliRunner().invoke(cli.bench, ["--optimizer=adamw", *given])
    assert done.exit_code == 0, done.output
    assert asked == [(processes, Settings(seconds))]


def test_files_of_several_machines_are_not_added_up(measured, tmp_path):
    values = json.loads((measured / "out.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values | {"machine": values["machine"] | {"torch": "1.0"}}))
    options = [f"--read={file}" for file in (measured / "out.json", measured / "out.json", other)]
    assert CliRunner().invoke(cli.bench, options[:2]).exit_code == 0
    done = CliRunner().invoke(cli.bench, options)
    assert done.exit_code == 2
    assert "differ in torch: 1.0 and" in " ".join(done.output.split())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)

    def fails(stream):
        stream.write("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        output.replace(file, "w", fails)
    assert file.read_text() == "before"
    output.replace(link, "w", lambda stream: stream.write("a\r\nb\n"))
    assert (link.is_symlink(), file.read_bytes()) == (True, b"a\r\nb\n")
    assert sorted(tmp_path.iterdir()) == [file, link]
    with pytest.raises(ClickException, match="File name too long"):
        output.replace(tmp_path / (254 * "x"), "w", lambda stream: None)
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    output.check_writable(pipe)
    output.replace(pipe, "w", lambda stream: stream.write("x"))
    assert (os.read(reader, 9), pipe.is_fifo()) == (b"x", True)
    os.close(reader)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two processes of one optimizer and one kernel, by the command, with all of its files."""
    folder = tmp_path_factory.mktemp("bench")
    options = [f"--{kind}={folder / f'out.{kind}'}" for kind in ("json", "csv", "png", "html")]
    threads = torch.get_num_threads()
    done = CliRunner().invoke(cli.bench, [*CHOSEN, "--threads=1", "--processes=2", "--seconds=0", *options])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return folder


def test_every_process_measures_every_case(measured):
    written = json.loads((measured / "out.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["adamw", "newton_schulz"]
    for case in written["cases"]:
        assert case["processes"] == 2
        assert all(len(turns) >= 3 for turns in case["contenders"][OURS]["ms"])
    assert written["ceilings"]["gb_per_s"] > 0
    rows = (measured / "out.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 + 3
    assert (measured / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_differs_from_itself_by_nothing(measured, tmp_path):
    pytest.importorskip("scipy", reason=SCIPY)
    file = measured / "out.json"
    page = tmp_path / "page.html"
    options = ["--read", str(file), "--base", str(file), "--html", str(page), "--fail-if", "*.change>0"]
    done = CliRunner().invoke(cli.bench, options)
    assert done.exit_code == 0, done.output
    assert "2 within the noise" in done.output
    assert "Compared with the base" in page.read_text()
    done = CliRunner().invoke(cli.bench, ["--read", str(file), "--fail-if", "adamw.ratio<1e9"])
    assert done.exit_code == 1
    assert "adamw fp32 4*8x16: ratio is" in done.output


def test_page_renders(measured, browser, tmp_path):
    pytest.importorskip("scipy", reason=SCIPY)
    page, file = tmp_path / "page.html", str(measured / "out.json")
    CliRunner().invoke(cli.bench, ["--read", file, "--base", file, "--html", str(page)])
    for width in (1200, 390):
        browser.open(page, width)
        # Comparison, one shape set, roofline, bandwidth, memory.
        assert browser.run("return document.querySelectorAll('.js-plotly-plot .main-svg').length") >= 5
        assert browser.run("return document.querySelectorAll('.js-plotly-plot').length") == 5
        assert browser.run("return document.querySelectorAll('.bars path').length") > 0
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.errors() == []
    headings = [heading.text for heading in browser.driver.find_elements("tag name", "h2")]
    assert headings == [
        "Compared with the base",
        "Speed-ups by shape set",
        "Roofline",
        "Bytes and memory",
        "Tables",
        "Machine",
    ]
    (table,) = browser.driver.find_elements("css selector", "#tables ~ .scroll table")
    assert len(table.find_elements("css selector", "tbody tr")) == 6
    # On paper, plots are narrowed to the page and widened again.
    browser.run("dispatchEvent(new Event('beforeprint'))")
    widths = "return [...document.querySelectorAll('.js-plotly-plot .main-svg')].map(svg => svg.clientWidth)"
    assert set(browser.run(widths)) == {680}
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.errors() == []


def test_pytest_benchmark_is_read(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="writes the JSON; pip install 'stepladder[test]'")
    file = tmp_path / "benchmark.json"
    steps = [f"bench/test_optimizers.py::test_step[400x4096-adamw-fp32-{name}]" for name in ("fused", OURS)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={file}", *steps]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (case,) = files.read(file).cases
    assert case.key == ("adamw", "400x4096", "fp32")
    assert {name: contender.role for name, contender in case.contenders.items()} == {OURS: OWN, "fused": RIVAL}
    data = {b["params"]["contender"]: b["stats"]["data"] for b in json.loads(file.read_text())["benchmarks"]}
    assert case.contenders[OURS].pooled == pytest.approx([1e3 * seconds for seconds in data[OURS]])
    done = CliRunner().invoke(cli.bench, ["--read", str(file), "--base", str(file)])
    assert done.exit_code == 0, done.output
    assert "the base was measured in one process" in done.output.replace("\n", " ")
    values = json.loads(file.read_text())
    values["benchmarks"][0]["params"] = {"n": 3}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no benchmark of bench/test_optimizers"):
        files.read(file)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--optimizer=adamww"], 2, "'adamww' is not one of 'sgd'"),
        (["--kernel=cholesky"], 2, "'cholesky' is not one of 'newton_schulz'"),
        (["--shapes=gpt5"], 2, "'gpt5' is no set and no shape, expected 1000x768"),
        (["--shapes=0*4x4"], 2, "'0*4x4' is no set and no shape"),
        (["--shapes=99999*99999x99999"], 2, "is more than 1000000 tensors or 68719476736 elements"),
        (["--dtype=fp8"], 2, "'fp8' is not one of 'fp32'"),
        (["--kernel=inverse_root", "--shapes=2*3x4"], 2, "it takes square matrices, and these are 3x4"),
        (["--kernel=newton_schulz", "--shapes=1000x768"], 2, "and a tensor there is 768"),
        (["--kernel=newton_schulz", "--shapes=16x25x51"], 2, "a tensor there is 16x25x51"),
        (["--optimizer=muon", "--fresh-grads"], 2, "--fresh-grads is for the element-wise optimizers"),
        (["--optimizer=muon", "--dtype=bf16"], 2, "it is measured in fp32 alone"),
        (["--fail-if=adamw.speed<1"], 2, "'speed' in 'adamw.speed<1' is no metric, expected one of ratio"),
        (["--optimizer=lion", "--fail-if=adamw.ratio<1"], 2, "nothing named adamw is measured"),
        (["--optimizer=lion", "--fail-if=lion.change>5"], 2, "lion.change>5 needs --base"),
        (["--base=no-such-thing"], 2, "'no-such-thing' is no file, and no revision of this repository"),
        (["--read={json}", "--base=HEAD"], 2, "--base of a revision does not go with it"),
        (["--read={json}", "--optimizer=adamw"], 2, "--read measures nothing: --optimizer does not go with it"),
        (["--json=/proc/out.json"], 2, "'/proc/out.json' cannot be written"),
        (["--html={json}/out.html"], 2, "cannot be written: Not a directory"),
        (["--csv={json}/../" + 254 * "x"], 2, "cannot be written: "),
        (["--processes=0"], 2, "0 is not in the range"),
    ],
)
def test_bad_input_is_refused_in_a_line(options, code, message, measured):
    given = [option.format(json=measured / "out.json") for option in options]
    done = CliRunner().invoke(cli.bench, given)
    assert done.exit_code == code, done.output
    assert message in done.output
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "it is no text"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"{}", "it is neither what `stepladder bench --json` nor what pytest-benchmark writes"),
        (b'{"machine_info": {}, "benchmarks": [1]}', "1 is no benchmark of bench/test_optimizers.py"),
        (b'{"format": "stepladder bench 1"}', "it lacks the machine or the cases"),
        (b'{"format": "stepladder bench 1", "machine": {}, "cases": [{}]}', "a case is not as stepladder writes it"),
        (b'{"format": "stepladder bench 1", "machine": {}, "cases": [3]}', "a case is not as stepladder writes it"),
        (
            b'{"format": "stepladder bench 1", "machine": {}, "cases": [], "ceilings": {"a": 1}}',
            "its ceilings lack one",
        ),
    ],
)
def test_a_base_that_is_none_is_refused(content, message, tmp_path):
    file = tmp_path / "base.json"
    file.write_bytes(content)
    done = CliRunner().invoke(cli.bench, ["--base", str(file)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ms", []),
        ("ms", [[]]),
        ("ms", [[-1.0]]),
        ("ms", [["x"]]),
        ("ms", 3),
        ("moved", "x"),
        ("flops", float("nan")),
        ("role", "rivals"),
        ("host_ms", [None]),
    ],
)
def test_a_damaged_case_is_refused(name, value):
    values = synthetic(np.random.default_rng(8)).as_dict()
    values["contenders"][OURS][name] = value
    with pytest.raises(ValueError, match="a case is not as stepladder writes it"):
        files.from_dict(values)
    values = synthetic(np.random.default_rng(8)).as_dict()
    values["contenders"][OURS]["ms"] = [[1.0]]
    with pytest.raises(ValueError, match="different numbers of turns"):
        files.from_dict(values)


@pytest.mark.parametrize(("option", "package"), [("--base", "scipy"), ("--png", "matplotlib"), ("--html", "plotly")])
def test_what_is_not_installed_is_said(option, package, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    done = CliRunner().invoke(cli.bench, [f"{option}={tmp_path / 'file'}"])
    assert done.exit_code == 2
    assert f"needs {package}, which is not installed: pip install 'stepladder[" in " ".join(done.output.split())


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    case = synthetic(np.random.default_rng(9), processes=1)

    def interrupted(*args):
        yield runner.NOW, case
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "in_turns", interrupted)
    files_ = [f"--{kind}={tmp_path / f'out.{kind}'}" for kind in ("json", "html", "png")]
    done = CliRunner().invoke(cli.bench, ["--optimizer=adamw", *files_])
    assert done.exit_code == 1
    assert "interrupted; what was measured until then is written to" in done.output
    (kept,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert kept["rounds"] == 15
    assert "adamw" in (tmp_path / "out.html").read_text()


def test_ctrl_c_ends_the_command_and_its_processes(tmp_path):
    file = tmp_path / "out.json"
    # A shell's background job ignores it, and so would what is started by its tests.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}; from stepladder.cli import main; main()", "bench", "--seconds=600"]
    run = subprocess.Popen(
        [*command, "--optimizer=adamw", "--shapes=400x4096", "--processes=2", f"--json={file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "cores" in run.stdout.readline()
    children = psutil.Process(run.pid).children
    while not (workers := children()):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "interrupted; what was measured until then is written to" in " ".join(output.split())
    assert "Traceback" not in output
    assert json.loads(file.read_text())["cases"] == []
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_a_process_that_ends_is_said(monkeypatch):
    worker = Worker(1)
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(Ended, match="signal 9"):
        worker.measure(Spec("adamw", "2*3x4", "fp32", ()), QUICK)
    worker = Worker(1)
    with pytest.raises(Ended, match="exit code 1: KeyError: 'adamww'"):
        worker.measure(Spec("adamww", "2*3x4", "fp32", ()), QUICK)
    monkeypatch.setattr(processes.Worker, "measure", lambda *args: (_ for _ in ()).throw(Ended("signal 9")))
    with pytest.raises(Ended, match=r"adamw fp32 2\*3x4: the process of now ended with signal 9"):
        next(in_turns([Spec("adamw", "2*3x4", "fp32", ())], QUICK, 1, 1, {"now": None}, lambda spec: None))
