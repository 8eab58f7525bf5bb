"""`stepladder ladder`, as a user calls it."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from race_cases import made_results, skip_without, skip_without_plots

from stepladder.bench import output
from stepladder.bench.ladder import cli, race, tasks, workers
from stepladder.bench.ladder.contenders import CONTENDERS
from stepladder.bench.ladder.race import Heat, Setting, from_json
from stepladder.cli import main


def invoke(*arguments):
    result = CliRunner().invoke(main, ["ladder", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def texts(facts):
    """As CSV has them."""
    return {key: str(value) for key, value in facts.items()}


TINY = ("--preset", "essay", "--optimizer", "muon", "--optimizer", "sgd", "--seeds", 2, "--steps", 12)
TINY += ("--rates", "0.1,0.01,1e30", "--jobs", 1)


def test_command(tmp_path, monkeypatch):
    """A race, its files, and the same files from the JSON of the first; no display is needed."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    files = [tmp_path / name for name in ("a.json", "b.json", "a.html", "b.html", "a.png", "a.csv")]
    (a, b, page, second_page, png, rows) = files
    skip_without_plots()
    result = invoke(*TINY, "--json", a, "--csv", rows, "--png", png, "--html", page)
    assert result.exit_code == 0, result.output
    value = json.loads(a.read_text())
    assert value["complete"] is True
    assert value["machine"]["threads"] == 1
    assert "sgd: 0.1, final 0." in result.stderr
    assert value["settings"] == {
        "task": "teacher",
        "preset": "essay",
        "steps": 12,
        "seeds": 2,
        "dtype": "float64",
        "backend": "reference",
        "recorded_every": 1,
        "target": 0.03,
    }
    sgd, muon = value["optimizers"]
    assert (sgd["name"], muon["name"]) == ("sgd", "muon")
    assert sgd["rates"] == [0.01, 0.1, 1e30]
    assert sgd["best_rate"] == 0.1
    assert [(run["rate"], run["seed"]) for run in sgd["runs"]] == [(r, s) for r in (0.01, 0.1, 1e30) for s in (0, 1)]
    assert [run["final"] is None for run in sgd["runs"]] == [False] * 4 + [True] * 2
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    text = page.read_text()
    assert text.count("</script>") == 2
    assert "src=" not in text.partition("<script>")[0] + text.rpartition("<script>")[2]
    data = json.loads(text.rpartition("const race = ")[2].partition(";\n")[0])
    assert [racer["name"] for racer in data["racers"]] == [s.name for s in from_json(value).ranking]
    assert data["racers"][0]["steps"] == list(range(13))

    with rows.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 12
    assert all({key: row[key] for key in value["machine"]} == texts(value["machine"]) for row in read)
    assert {(row["task"], row["preset"], row["steps"], row["seeds"], row["target"]) for row in read} == {
        ("teacher", "essay", "12", "2", "0.03")
    }
    assert [float(row["final"]) for row in read[:4]] == [run["final"] for run in sgd["runs"][:4]]
    assert [row["best_rate"] for row in read[:6]] == ["False", "False", "True", "True", "False", "False"]
    assert (read[5]["final"], read[5]["diverged"]) == ("inf", str(sgd["runs"][5]["diverged"]))
    assert read[0]["steps_to_target"] == read[0]["diverged"] == ""

    result = invoke("--read", a, "--json", b, "--html", second_page)
    assert result.exit_code == 0, result.output
    assert b.read_text() == a.read_text()
    assert second_page.read_text() == text


def test_command_shows_the_standings(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(race.as_json(made_results())))
    result = invoke("--read", file)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["1", "muon", "0.03", "0.015", "85", "80", "90"] in rows
    assert ["sgd", "0.03", "0.0205", "1", "of", "2", "seeds", "10", "–"] in rows
    assert "6 of 12 runs were finished" in " ".join(result.output.split())


def test_essay_races_the_essays_optimizers(monkeypatch):
    monkeypatch.setattr(cli, "run_all", lambda *arguments: (run for run in ()))
    essays = {"sgd", "momentum", "adam", "adamw", "signsgd", "lion", "muon", "shampoo", "muonh"}

    def raced(*arguments):
        return {line.split()[0] for line in invoke(*arguments).output.splitlines() if "not finished" in line}

    assert raced("--preset", "essay") == essays
    assert raced("--preset", "essay", "--all") == raced() == set(CONTENDERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizer", "adamm"), "'adamm' is not one of"),
        (("--task", "mnist"), "'mnist' is not one of 'teacher', 'digits', 'charlm'"),
        (("--preset", "essay", "--task", "digits"), "--preset essay has the essay's task"),
        (("--preset", "slow"), "'slow' is not one of 'essay', 'fast'"),
        (("--steps", 9), "9 is not in the range x>=10"),
        (("--seeds", 0), "0 is not in the range x>=1"),
        (("--jobs", 0), "0 is not in the range x>=1"),
        (("--rates", "0.1,fast"), "'fast' is no learning rate, expected numbers above 0 and at most 1e+30"),
        (("--rates", "0.1,-1"), "'-1' is no learning rate"),
        (("--rates", "inf"), "'inf' is no learning rate"),
        (("--rates", "1e31"), "'1e31' is no learning rate"),
        (("--rates", "0.1,"), "'' is no learning rate"),
        (("--json", "{tmp}/none/file.json"), "cannot be written: No such file or directory"),
        (("--json", "{tmp}/text/file.json"), "cannot be written: Not a directory"),
        (("--json", "{tmp}"), "is a directory"),
        *[((flag, "/proc/file"), "'/proc/file' cannot be written") for flag in ("--json", "--csv", "--png", "--html")],
        (("--json", "{tmp}/" + 256 * "x"), "cannot be written: File name too long"),
        (("--read", "{tmp}/none.json"), "does not exist"),
        (("--read", "{tmp}/text"), "cannot be read: Expecting value"),
        (("--read", "{tmp}/other.json"), "cannot be read: it is not what `stepladder ladder --json` writes"),
        (("--read", "{tmp}/bytes"), "cannot be read: 'utf-8' codec can't decode"),
        (("--read", "{tmp}/task.json"), "cannot be read: its task is 'mnist', expected teacher or digits or charlm"),
        (("--read", "{tmp}/target.json"), "cannot be read: its target is 0.3, expected 0.03"),
        (("--read", "{tmp}/slow.json"), "cannot be read: its preset is 'slow', expected essay or fast"),
        (("--read", "{tmp}/name.json"), "cannot be read: it has an optimizer 'sgdd', expected sgd, momentum"),
        (("--read", "{tmp}/curve.json"), "cannot be read: curves of one rate differ in length"),
        (("--read", "{tmp}/machine.json"), "cannot be read: it is not what `stepladder ladder --json` writes"),
        (("--read", "{tmp}/good.json", "--seeds", 2), "--read runs nothing"),
        (("--read", "{tmp}/good.json", "--jobs", 2), "--read runs nothing"),
        (("--read", "{tmp}/good.json", "--resume", "{tmp}/good.json"), "--read runs nothing"),
        (("--resume", "{tmp}/good.json", "--task", "digits"), "--resume has its setting from the file"),
        (("--resume", "{tmp}/good.json"), "was begun with another device: none there,"),
        (("--resume", "{tmp}/text"), "cannot be read: Expecting value"),
        (("--resume", "{tmp}/none.json"), "does not exist"),
    ],
)
def test_refusals_before_any_work(arguments, message, tmp_path, monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("something was run")

    monkeypatch.setattr(cli, "run_all", unexpected)
    good = race.as_json(made_results())
    (tmp_path / "text").write_text("text")
    (tmp_path / "other.json").write_text(json.dumps({"settings": []}))
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "slow.json").write_text(json.dumps(good | {"settings": good["settings"] | {"preset": "slow"}}))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "task.json").write_text(json.dumps(good | {"settings": good["settings"] | {"task": "mnist"}}))
    (tmp_path / "target.json").write_text(json.dumps(good | {"settings": good["settings"] | {"target": 0.3}}))
    (tmp_path / "machine.json").write_text(json.dumps(good | {"machine": {}}))
    (tmp_path / "name.json").write_text(json.dumps(good).replace('"sgd"', '"sgdd"'))
    good["optimizers"][1]["runs"][1]["losses"].pop()
    (tmp_path / "curve.json").write_text(json.dumps(good))
    result = invoke(*(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("flag", "package"), [("--png", "matplotlib"), ("--html", "plotly")])
def test_missing_packages(flag, package, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    result = invoke(flag, tmp_path / "file")
    assert result.exit_code == 2
    assert f"needs {package}, which is not installed: pip install 'stepladder[plot]'" in result.output


def test_missing_data(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    result = invoke("--task", "digits")
    assert result.exit_code == 2
    message = "--task digits needs scikit-learn, which is not installed: pip install 'stepladder[digits]'"
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("task", ["digits", "charlm"])
def test_tasks(task, tmp_path):
    """Two seeds, each on its own, and the files say what was learned."""
    skip_without_plots()
    skip_without(task)
    a, png, page = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.html"
    names = ("--optimizer", "muon", "--optimizer", "adamw", "--seeds", 2, "--steps", 10, "--rates", "0.01", "--jobs", 1)
    result = invoke("--task", task, *names, "--json", a, "--png", png, "--html", page)
    assert result.exit_code == 0, result.output
    value = json.loads(a.read_text())
    assert value["settings"]["task"] == task
    assert value["settings"]["target"] == tasks.TASKS[task].target
    assert [[run["seed"] for run in row["runs"]] for row in value["optimizers"]] == [[0, 1], [0, 1]]
    assert f"the target is {tasks.TASKS[task].target:g}" in " ".join(result.output.split())
    assert tasks.TASKS[task].loss in page.read_text()
    assert invoke("--read", a).exit_code == 0


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "as_json", full)
    (tmp_path / "good.json").write_text(json.dumps(race.as_json(made_results())))
    result = invoke("--read", tmp_path / "good.json", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "out.json' cannot be written: No space left on device" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["good.json"]


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: what is begun in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupt_keeps_what_is_finished(jobs, tmp_path, monkeypatch, interruptible):
    """A signal after three runs, to the workers as well, as a terminal sends it; then the race goes on."""
    torch.set_num_threads(1)
    file = tmp_path / "results.json"
    add = race.Results.add
    others = set(multiprocessing.active_children())  # the ranks that other tests have

    def workers():
        return set(multiprocessing.active_children()) - others

    def add_and_interrupt(results, run):
        add(results, run)
        if results.done == 3:
            for process in [*workers(), SimpleNamespace(pid=os.getpid())]:
                os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(race.Results, "add", add_and_interrupt)
    rates = ",".join(f"{rate / 100}" for rate in range(1, 13))
    result = invoke("--optimizer", "sgd", "--rates", rates, "--steps", 40, "--jobs", jobs, "--json", file)
    assert result.exit_code == 1
    value = json.loads(file.read_text())
    assert value["complete"] is False
    assert not workers()
    kept = from_json(value).standings[0].runs
    # With two processes another one may have ended meanwhile.
    assert 3 <= len(kept) < 3 + jobs
    assert f"Error: interrupted after {len(kept)} of 12 runs; these are written to {file}" in result.output
    # What several processes found is what one finds.
    alone = [race.run(Heat("sgd", run.lap.rate, (0,)), Setting("teacher", "fast", 40, 1)) for run in kept]
    assert [[run] for run in kept] == alone

    monkeypatch.undo()
    result = invoke("--resume", file, "--jobs", 1)
    assert result.exit_code == 0, result.output
    resumed = from_json(json.loads(file.read_text()))
    assert resumed.complete
    assert all(run in resumed.standings[0].runs for run in kept)
    runs = [run for rate in resumed.standings[0].rates for run in race.run(Heat("sgd", rate, (0,)), resumed.setting)]
    assert resumed.standings[0].runs == runs


def test_a_finished_race_is_only_shown(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    arguments = ("--optimizer", "sgd", "--rates", "0.1", "--steps", 10, "--jobs", 1)
    before = invoke(*arguments, "--json", file)
    text = file.read_text()
    monkeypatch.setattr(cli, "run_all", None)
    after = invoke("--resume", file)
    assert after.exit_code == 0
    assert after.stdout == before.stdout
    assert file.read_text() == text


def test_interrupts_wait_for_a_safe_place(interruptible):
    """An exception from within the pool's waiting would leave its locks taken."""
    handler = signal.getsignal(signal.SIGINT)
    with workers._interrupts_at_rest() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with workers._interrupts_at_rest() as check:
        signal.raise_signal(signal.SIGINT)
        check()


def test_a_killed_worker_keeps_what_is_finished(monkeypatch):
    def killed(*arguments):
        yield race.run(Heat("sgd", 0.1, (0,)), Setting("teacher", "fast", 10, 1))
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(cli, "run_all", killed)
    result = invoke("--optimizer", "sgd", "--rates", "0.1,0.2", "--steps", 10)
    assert result.exit_code == 1
    assert "ended by the system" in result.output
    assert "after 1 of 2 runs; these are above" in result.output
