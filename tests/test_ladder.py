"""The ladder: the experiment is the essay's, and its runs are judged by the rules of docs/ladder.md."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from stepladder.bench.ladder import cli, essay, pictures, race
from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS
from stepladder.bench.ladder.experiment import BATCH, SAMPLES, TARGET, Problem, Student, schedule
from stepladder.bench.ladder.race import Lap, Run, Standing, from_json, summary, thinned
from stepladder.cli import main

ESSAY, FAST = PRESETS["essay"], PRESETS["fast"]


def test_schedule():
    """Linear over a tenth, constant, cosine over the last fifth; no step takes more than 1, the first takes 0."""
    expected = {0: 0.0, 1: 0.0025, 200: 0.5, 399: 0.9975, 400: 1.0, 2000: 1.0, 3200: 1.0}
    expected |= {3400: 0.5 + math.sqrt(0.125), 3600: 0.5, 3800: 0.5 - math.sqrt(0.125), 4000: 0.0}
    for step, value in expected.items():
        assert schedule(step, 4000) == pytest.approx(value, abs=1e-14), step
    assert schedule(0, 4000) == 0.0
    assert max(schedule(t, 4000) for t in range(4000)) == 1.0


def network(weights):
    """The same network made of torch's modules."""
    layers = []
    for w in weights:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.weight.data.copy_(w)
        layers += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def half_squared_error(model, x, y):
    return 0.5 * torch.nn.functional.mse_loss(model(x), y, reduction="none").sum(1).mean()


def test_problem():
    problem = Problem.of(3, 60, torch.float64)
    shapes = [(64, 16), (64, 64), (64, 64), (32, 64), (8, 32)]
    assert [tuple(w.shape) for w in problem.student] == shapes
    assert problem.x.shape == (2048, 16)
    assert problem.y.shape == (2048, 8)
    assert problem.batches.shape == (60, 128)
    # Mean squares of n normal numbers have the standard deviation √(2/n); four of them leave one case in 16000.
    for w in problem.student:
        assert float(w.square().mean()) * w.shape[1] == pytest.approx(1.0, abs=4 * math.sqrt(2 / w.numel()))
    assert float(problem.x.square().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / problem.x.numel()))
    assert 0 <= int(problem.batches.min()) <= int(problem.batches.max()) < SAMPLES
    assert any(len(set(batch.tolist())) < BATCH for batch in problem.batches), "drawn with replacement"


def test_teacher_is_a_network_of_scale_1_2(monkeypatch):
    drawn = []
    original = Problem.of.__globals__["random_weights"]

    def random_weights(scale, generator):
        drawn.append((scale, original(scale, generator)))
        return drawn[-1][1]

    monkeypatch.setitem(Problem.of.__globals__, "random_weights", random_weights)
    problem = Problem.of(0, 10, torch.float64)
    (teacher_scale, teacher), (student_scale, student) = drawn
    assert (teacher_scale, student_scale) == (1.2, 1.0)
    assert float(teacher[1].square().mean()) * 64 == pytest.approx(1.44, abs=1.44 * 4 * math.sqrt(2 / 4096))
    assert all(torch.equal(a, b) for a, b in zip(student, problem.student, strict=True))
    torch.testing.assert_close(problem.y, network(teacher)(problem.x).detach(), rtol=1e-12, atol=1e-12)


def test_problems_belong_to_their_seeds():
    a, again, b = (Problem.of(seed, 10, torch.float64) for seed in (0, 0, 1))
    assert torch.equal(a.x, again.x)
    assert torch.equal(a.batches, again.batches)
    assert not torch.equal(a.x, b.x)
    assert not torch.equal(a.student[0], b.student[0])
    narrow = Problem.of(0, 10, torch.float32)
    assert torch.equal(narrow.y, a.y.float())
    assert torch.equal(narrow.batches, a.batches)


def test_loss_and_gradients_are_autograds():
    problem = Problem.of(1, 10, torch.float64)
    student, model = Student(problem), network(problem.student)
    exact = half_squared_error(model, problem.x, problem.y)
    assert student.initial == pytest.approx(exact.item(), rel=1e-13)
    student.backward(4)
    chosen = problem.batches[4]
    half_squared_error(model, problem.x[chosen], problem.y[chosen]).backward()
    for p, q in zip(student.params, model.parameters(), strict=True):
        # Sums of at most 128 products, through five layers.
        torch.testing.assert_close(p.grad, q.grad, rtol=0.0, atol=1000 * 2.0**-53 * float(q.grad.abs().max()))


TORCH = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.0),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.0, betas=(0.9, 0.999), eps=1e-8),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.0, weight_decay=0.0),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_run_is_what_torch_makes_of_it(name):
    """Modules, autograd and torch.optim, from the definition: data, order of events, schedule, record."""
    lap, steps = Lap(name, CONTENDERS[name].rates[2], 2), 12
    found = race.run(lap, ESSAY, steps)
    problem = Problem.of(2, steps, torch.float64)
    model = network(problem.student)
    optimizer = TORCH[name](model.parameters())
    losses = [half_squared_error(model, problem.x, problem.y).item()]
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lap.rate * schedule(t, steps)
        optimizer.zero_grad()
        half_squared_error(model, problem.x[problem.batches[t]], problem.y[problem.batches[t]]).backward()
        optimizer.step()
        losses.append(half_squared_error(model, problem.x, problem.y).item())
    assert found.steps == list(range(steps + 1))
    # Rounding of 2^-53, which 12 steps let grow; a wrong rate or batch moves the loss by a per cent and more.
    assert found.losses == pytest.approx([value / losses[0] for value in losses], rel=1e-9)
    assert found.losses[1] == 1.0
    assert found.final == min(found.losses[1:])


def matrix(rows, columns, scale=1.0):
    p = torch.nn.Parameter(torch.randn(rows, columns, dtype=torch.float64), requires_grad=False)
    p.grad = scale * torch.randn(rows, columns, dtype=torch.float64)
    return p


def test_epsilon_is_inside_of_the_essays_roots():
    for rule, second_moment, eps in ((essay.adagrad, 1.0, 1e-10), (essay.rmsprop, 0.01, 1e-8)):
        p = matrix(3, 4, 1e-4)
        before, g = p.clone(), p.grad.clone()
        rule([p])(0.5)
        torch.testing.assert_close(p, before - 0.5 * g / torch.sqrt(second_moment * g * g + eps), rtol=1e-13, atol=0)


def test_shampoo_of_the_essay():
    p = matrix(4, 6)
    w, u = p.clone(), torch.zeros(4, 6, dtype=torch.float64)
    left, right = 1e-6 * torch.eye(4, dtype=torch.float64), 1e-6 * torch.eye(6, dtype=torch.float64)
    step = essay.shampoo([p])
    for _ in range(3):
        g = p.grad = torch.randn(4, 6, dtype=torch.float64)
        u = 0.9 * u + g
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        step(0.1)
        preconditioned = u
        # A^(-1/4) from the singular value decomposition, with what is below 1e-6 taken for it.
        for k, factor in enumerate((left, right)):
            a, s, _ = torch.linalg.svd(factor)
            root = a @ torch.diag(s.clamp(min=1e-6) ** -0.25) @ a.T
            preconditioned = preconditioned @ root if k else root @ preconditioned
        w = w - 0.1 * preconditioned
    # Condition of a root: 1e6^(1/4), on each side.
    torch.testing.assert_close(p.data, w, rtol=1e-9, atol=1e-9)


def test_shampoos_eigenvalues_are_clipped():
    """Below the floor everywhere, both roots are those of 1e-6·I, together 1000."""
    p = matrix(4, 6, 1e-9)
    before = p.clone()
    essay.shampoo([p])(0.5)
    # Without clipping 0.95e-6 would stand for 1e-6, and the factor be 2.6 % larger.
    torch.testing.assert_close(before - p, 500.0 * p.grad, rtol=1e-6, atol=0)
    p.grad[0, 0] = torch.nan
    step = essay.shampoo([p])
    step(0.5)
    assert p.isnan().all()


def test_grids():
    """Those of the essay, and three neighbours of them in the preset fast."""
    assert CONTENDERS["sgd"].grid(ESSAY) == (0.03, 0.1, 0.3, 1.0, 3.0)
    assert CONTENDERS["momentum"].grid(ESSAY) == (0.01, 0.03, 0.1, 0.3, 1.0)
    for name in ("adam", "adamw", "muon", "shampoo"):
        assert CONTENDERS[name].grid(ESSAY) == (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    assert CONTENDERS["signsgd"].grid(ESSAY) == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    assert CONTENDERS["lion"].grid(ESSAY) == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert CONTENDERS["muonh"].grid(ESSAY) == (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    for contender in CONTENDERS.values():
        assert len(contender.grid(ESSAY)) == 5
        assert len(contender.grid(FAST)) == 3
        assert set(contender.grid(FAST)) < set(contender.rates)
        assert list(contender.rates) == sorted(contender.rates)


def test_every_optimizer_of_the_package_races():
    import stepladder as sl

    assert {c.cls for c in CONTENDERS.values()} == {getattr(sl.optim, name) for name in sl.optim.__all__}
    assert len({pictures.color(name) for name in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CONTENDERS)
def test_tiny_race(preset, name):
    contender = CONTENDERS[name]
    run = race.run(Lap(name, contender.rates[2], 0), PRESETS[preset], 20)
    assert run.diverged is None
    assert run.steps == (list(range(21)) if preset == "essay" else [0, 10, 20])
    assert run.losses[0] == 1.0
    assert run.final < 0.97


def test_muon_in_both_presets():
    """The bf16 iteration of the kernels stays near the reference's in fp64."""
    curves = [race.run(Lap("muon", 0.01, 0), preset, 20).losses for preset in (ESSAY, FAST)]
    assert curves[1] == pytest.approx(curves[0][::10], rel=0.02)
    assert curves[0][20] < 0.9


def test_divergence_ends_a_run():
    run = race.run(Lap("sgd", 1e9, 0), ESSAY, 60)
    assert run.diverged is not None
    assert run.final == math.inf
    assert run.steps[-1] < run.diverged < 60
    assert all(map(math.isfinite, run.losses))


LAP = Lap("adamw", 0.01, 0)


def test_crossing_is_the_first():
    curve = {0: 1.0, 10: 0.2, 20: TARGET, 30: 0.5, 40: 0.001}
    assert summary(LAP, curve, 40, None).steps_to_target == 20
    assert summary(LAP, curve | {20: math.nextafter(TARGET, 1.0)}, 40, None).steps_to_target == 40
    assert summary(LAP, {0: 1.0, 40: 0.031}, 40, None).steps_to_target is None
    # A run that reached the target and then diverged has reached it, but no rate is chosen for it.
    diverged = summary(LAP, curve, 60, 41)
    assert (diverged.steps_to_target, diverged.final, diverged.diverged) == (20, math.inf, 41)


def test_final_is_the_least_of_the_last_50_steps():
    curve = {t: 1.0 for t in range(101)}
    assert summary(LAP, curve | {50: 0.1, 51: 0.4, 100: 0.5}, 100, None).final == 0.4
    assert summary(LAP, curve | {50: 0.1, 100: 0.5}, 100, None).final == 0.5


def test_thinned_curves():
    for steps, every in ((4000, 1), (1500, 10), (10, 1), (251, 1), (1999, 1), (10**6, 7)):
        recorded = [*range(0, steps, every), steps]
        kept = thinned(recorded)
        assert kept[0] == 0
        assert kept[-1] == steps
        assert set(kept) <= set(recorded)
        assert min(len(recorded), 126) <= len(kept) <= 251
    assert thinned(range(251)) == list(range(251))
    assert thinned([0]) == [0]


def made_run(rate, seed, final, steps_to_target=None, name="adamw"):
    diverged = 7 if math.isinf(final) else None
    return Run(Lap(name, rate, seed), final, steps_to_target, diverged, [0, 10], [1.0, 0.5])


def standing(rows, seeds=2, rates=(0.01, 0.03, 0.1), name="adamw"):
    return Standing(name, list(rates), seeds, [made_run(*row, name=name) for row in rows])


def test_best_rate():
    """The least mean final over all seeds, not the least of one seed, nor the quickest."""
    rows = [(0.01, 0, 0.02, 50), (0.01, 1, 0.02, 70), (0.03, 0, 0.001, 10), (0.03, 1, 0.05, 20)]
    found = standing([*rows, (0.1, 0, 0.3), (0.1, 1, 0.3)])
    assert found.best_rate == 0.01
    assert found.final == pytest.approx(0.02)
    assert found.crossings == [50, 70]
    assert found.steps_to_target == 60
    assert found.at_an_end
    assert not standing([(0.03, 0, 0.1), (0.03, 1, 0.1), (0.1, 0, 0.2), (0.1, 1, 0.2)]).at_an_end


def test_best_rate_of_equals_is_the_lowest():
    assert standing([(0.03, 0, 0.1), (0.1, 0, 0.1)], seeds=1).best_rate == 0.03


def test_best_rate_needs_all_seeds():
    assert standing([(0.01, 0, 0.01), (0.03, 0, 0.2), (0.03, 1, 0.2)]).best_rate == 0.03
    assert standing([(0.01, 0, 0.01)]).best_rate is None
    assert standing([]).curve == ([], [])


def test_divergence_is_never_best():
    half = [(0.01, 0, 1e-9), (0.01, 1, math.inf), (0.03, 0, 0.2), (0.03, 1, 0.2)]
    assert standing(half).best_rate == 0.03
    assert standing([(0.01, 0, math.inf), (0.01, 1, math.inf)]).best_rate is None


def made_results():
    first = standing([(0.03, 0, 0.01, 80), (0.03, 1, 0.02, 90), (0.1, 0, math.inf), (0.1, 1, 0.2)], name="muon")
    second = standing([(0.03, 0, 0.001, 10), (0.03, 1, 0.04)], name="sgd")
    machine = {"date": "2026-11-22", "device": "none", "cores": 2, "threads": 1, "kernels": "avx2", "compiler": "GNU"}
    machine |= {"stepladder": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}
    return race.Results(machine, "essay", 100, 2, [second, first])


def test_ranking():
    """One seed that never reached the target counts for more than one that was quick."""
    results = made_results()
    results.standings.append(standing([(0.03, 0, 1e-6), (0.03, 1, 1e-6)], name="lion"))
    assert [s.name for s in results.ranking] == ["muon", "sgd", "lion"]
    assert results.standings[0].steps_to_target is None
    assert pictures.missed(results.standings[0]) == "1 of 2 seeds"
    assert pictures.missed(results.standings[2]) == "not reached"


def test_json_round_trip():
    results = made_results()
    text = json.dumps(race.as_json(results), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == results
    assert [s.best_rate for s in again.standings] == [0.03, 0.03]
    value = json.loads(text)
    assert value["complete"] is False
    assert value["optimizers"][1]["steps_to_target"] == 85
    assert value["optimizers"][1]["steps_to_target_by_seed"] == [80, 90]
    assert value["optimizers"][1]["runs"][2]["final"] is None


def invoke(*arguments):
    result = CliRunner().invoke(main, ["ladder", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


TINY = ("--preset", "essay", "--optimizer", "muon", "--optimizer", "sgd", "--seeds", 2, "--steps", 12)
TINY += ("--rates", "0.1,0.01,1e30", "--jobs", 1)


def test_command(tmp_path):
    """A race, its files, and the same files from the JSON of the first."""
    files = [tmp_path / name for name in ("a.json", "b.json", "a.html", "b.html", "a.png")]
    (a, b, page, second_page, png) = files
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    result = invoke(*TINY, "--json", a, "--png", png, "--html", page)
    assert result.exit_code == 0, result.output
    value = json.loads(a.read_text())
    assert value["complete"] is True
    assert value["machine"]["threads"] == 1
    assert "sgd: 0.1, final 0." in result.stderr
    assert value["settings"] == {
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
        (("--json", "/proc/file.json"), "cannot be written"),
        (("--read", "{tmp}/none.json"), "does not exist"),
        (("--read", "{tmp}/text"), "cannot be read: Expecting value"),
        (("--read", "{tmp}/other.json"), "cannot be read: it is not what `stepladder ladder --json` writes"),
        (("--read", "{tmp}/slow.json"), "cannot be read: its preset is 'slow', expected essay or fast"),
        (("--read", "{tmp}/name.json"), "cannot be read: it has an optimizer 'sgdd', expected sgd, momentum"),
        (("--read", "{tmp}/curve.json"), "cannot be read: curves of one rate differ in length"),
        (("--read", "{tmp}/machine.json"), "cannot be read: it is not what `stepladder ladder --json` writes"),
        (("--read", "{tmp}/good.json", "--seeds", 2), "--read runs nothing"),
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
    (tmp_path / "machine.json").write_text(json.dumps(good | {"machine": {}}))
    (tmp_path / "name.json").write_text(json.dumps(good).replace('"sgd"', '"sgdd"'))
    good["optimizers"][1]["runs"][1]["losses"].pop()
    (tmp_path / "curve.json").write_text(json.dumps(good))
    result = invoke(*(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("flag", "package"), [("--png", "matplotlib"), ("--html", "plotly")])
def test_missing_packages(flag, package, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    result = invoke(flag, tmp_path / "file")
    assert result.exit_code == 2
    assert f"needs {package}, which is not installed: pip install 'stepladder[plot]'" in result.output


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
    """A signal after three runs, to the workers as well, as a terminal sends it."""
    file = tmp_path / "results.json"
    add = race.Results.add

    def add_and_interrupt(results, run):
        add(results, run)
        if results.done == 3:
            for process in [*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())]:
                os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(race.Results, "add", add_and_interrupt)
    rates = ",".join(f"{rate / 100}" for rate in range(1, 31))
    result = invoke("--optimizer", "sgd", "--rates", rates, "--steps", 40, "--jobs", jobs, "--json", file)
    assert result.exit_code == 1
    assert f"Error: interrupted after 3 of 30 runs; these are written to {file}" in result.output
    value = json.loads(file.read_text())
    assert value["complete"] is False
    assert multiprocessing.active_children() == []
    kept = from_json(value).standings[0].runs
    assert len(kept) == 3
    # What several processes found is what one finds.
    assert kept == [race.run(run.lap, FAST, 40) for run in kept]


def test_a_killed_worker_keeps_what_is_finished(monkeypatch):
    def killed(*arguments):
        yield race.run(Lap("sgd", 0.1, 0), FAST, 10)
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(cli, "run_all", killed)
    result = invoke("--optimizer", "sgd", "--rates", "0.1,0.2", "--steps", 10)
    assert result.exit_code == 1
    assert "ended by the system" in result.output
    assert "after 1 of 2 runs; these are above" in result.output
