"""The ladder: the experiment is the essay's, and its runs are judged by the rules of docs/ladder.md."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from network_rounding import U, gradient_errors, layers_and_errors, loss_error
from race_cases import made_results, skip_without, standing

from stepladder.bench.charlm import GPT, Text, sample
from stepladder.bench.ladder import essay, pictures, race, real, teacher
from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS
from stepladder.bench.ladder.race import Heat, Lap, Setting, from_json, schedule, thinned
from stepladder.bench.ladder.tasks import TASKS
from stepladder.bench.ladder.teacher import BATCH, SAMPLES, TARGET, Problem, Students


@pytest.fixture(autouse=True)
def _one_thread():
    """As every run of a race has it."""
    torch.set_num_threads(1)


def essays(steps, seeds=1):
    return Setting("teacher", "essay", steps, seeds)


def fast(steps, task="teacher"):
    return Setting(task, "fast", steps, 1)


def one_run(name, rate, seed, setting):
    (run,) = race.run(Heat(name, rate, (seed,)), setting)
    return run


def test_schedule():
    """Linear over a tenth, constant, cosine over the last fifth; no step takes more than 1, the first takes 0."""
    expected = {0: 0.0, 1: 0.0025, 200: 0.5, 399: 0.9975, 400: 1.0, 2000: 1.0, 3200: 1.0}
    expected |= {3400: 0.5 + math.sqrt(0.125), 3600: 0.5, 3800: 0.5 - math.sqrt(0.125), 4000: 0.0}
    for step, value in expected.items():
        # t/T and its difference from 0.8 are off by U at most, which π/0.2 makes 16 U, and the half of a cosine 8. The
        # angle x is at most π, and off by 3 U of it (π, 0.2, product, quotient), of which half a cosine makes
        # 3/2·x·sin x ≤ 2.8; the cosine itself is off by a unit in the last place, half of which is counted, and so is
        # the sum by a half: 11.8 in all.
        assert schedule(step, 4000) == pytest.approx(value, rel=0.0, abs=12 * U), step
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
    original = teacher.random_weights

    def random_weights(scale, generator):
        drawn.append((scale, original(scale, generator)))
        return drawn[-1][1]

    monkeypatch.setattr(teacher, "random_weights", random_weights)
    problem = Problem.of(0, 10, torch.float64)
    (teacher_scale, weights), (student_scale, student) = drawn
    assert (teacher_scale, student_scale) == (1.2, 1.0)
    assert float(weights[1].square().mean()) * 64 == pytest.approx(1.44, abs=1.44 * 4 * math.sqrt(2 / 4096))
    assert all(torch.equal(a, b) for a, b in zip(student, problem.student, strict=True))
    _, error = layers_and_errors(weights, problem.x)[-1]
    # Both sides are off by at most that.
    assert bool(((problem.y - network(weights)(problem.x)).abs() <= 2.0 * error).all())


def test_problems_belong_to_their_seeds():
    a, again, b = (Problem.of(seed, 10, torch.float64) for seed in (0, 0, 1))
    assert torch.equal(a.x, again.x)
    assert torch.equal(a.batches, again.batches)
    assert not torch.equal(a.x, b.x)
    assert not torch.equal(a.student[0], b.student[0])
    narrow = Problem.of(0, 10, torch.float32)
    assert torch.equal(narrow.y, a.y.float())
    assert torch.equal(narrow.batches, a.batches)


@pytest.mark.parametrize("apart", [False, True])
def test_losses_and_gradients_are_autograds(apart):
    """Of each seed, in the tensors that an optimizer is given."""
    seeds = (1, 4)
    students = Students(seeds, 10, torch.float64)
    assert students.losses(range(2)) == [1.0, 1.0]
    params = students.groups("muon", apart)
    students.backward(4)
    for k, seed in enumerate(seeds):
        problem = Problem.of(seed, 10, torch.float64)
        model = network(problem.student)
        exact = half_squared_error(model, problem.x, problem.y)
        error = loss_error(problem.student, problem.x, problem.y)
        assert abs(float(students.initial[k]) - exact.item()) <= 2.0 * error
        chosen = problem.batches[4]
        x, y = problem.x[chosen], problem.y[chosen]
        half_squared_error(model, x, y).backward()
        own = params[k::2] if apart else params
        for p, q, error in zip(own, model.parameters(), gradient_errors(problem.student, x, y), strict=True):
            grad = p.grad if apart else p.grad[k]
            assert grad.shape == q.shape
            assert bool(((grad - q.grad).abs() <= 2.0 * error).all())
            # The bound is one of roundings: far below what a slip in a formula would do.
            assert float(error.max()) < 1e-6 * float(q.grad.abs().max())


def test_losses_above_a_value():
    """All samples are looked at unless some of them say enough, of every network that was asked about."""
    students = Students((0, 1, 2), 10, torch.float64)
    students.weights[-1][1] *= 0.0
    exact = students.losses(range(3))
    assert exact[1] < 0.9
    assert students.losses([2, 0]) == [exact[2], exact[0]]
    for value in (0.0, 0.01, 0.5, 0.9, math.nextafter(exact[1], 0.0)):
        assert students.losses(range(3), above=value) in (None, exact)
    assert students.losses(range(3), above=0.01) is None
    assert students.losses(range(3), above=exact[1]) == exact
    assert students.losses([0, 2], above=exact[1]) is None
    students.weights[-1][1] = torch.nan
    found = students.losses(range(3), above=0.01)
    assert math.isnan(found[1])
    assert (found[0], found[2]) == (exact[0], exact[2])


TORCH = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.0),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.0, betas=(0.9, 0.999), eps=1e-8),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.0, weight_decay=0.0),
}


def by_torch(name, rate, seed, steps, noise=None):
    """The losses by modules, autograd and torch.optim, from the definition.

    With a generator as `noise`, gradients are moved by as much as rounding may move them, up or down at random, and
    weights by a rounding of their own and sixteen of their update.
    """

    def moved(x, size):
        return x + size * (torch.randint(2, x.shape, generator=noise) * 2 - 1)

    problem = Problem.of(seed, steps, torch.float64)
    model = network(problem.student)
    optimizer = TORCH[name](model.parameters())
    losses = [half_squared_error(model, problem.x, problem.y).item()]
    for t in range(steps):
        x, y = problem.x[problem.batches[t]], problem.y[problem.batches[t]]
        optimizer.param_groups[0]["lr"] = rate * schedule(t, steps)
        optimizer.zero_grad()
        half_squared_error(model, x, y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if noise:
            for p, error in zip(model.parameters(), gradient_errors(before, x, y), strict=True):
                p.grad = moved(p.grad, error)
        optimizer.step()
        if noise:
            for p, old in zip(model.parameters(), before, strict=True):
                p.data = moved(p.data, U * (p.data.abs() + 16.0 * (p.data - old).abs()))
        losses.append(half_squared_error(model, problem.x, problem.y).item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("name", TORCH)
def test_a_run_is_what_torch_makes_of_it(name):
    """Data, order of events, schedule and record; rounding explains the difference."""
    rate, steps, seed = CONTENDERS[name].rates[2], 12, 2
    found = one_run(name, rate, seed, essays(steps))
    exact = by_torch(name, rate, seed, steps)
    assert found.steps == list(range(steps + 1))
    assert found.losses[0] == 1.0
    assert found.final == min(found.losses[1:])
    # How differences grow is no formula's to say, so it is measured. The real ones are sums of many roundings that
    # partly cancel; here each is as large as a sum can be, and the largest effect of four draws stands.
    moved = [by_torch(name, rate, seed, steps, torch.Generator().manual_seed(draw)) for draw in range(4)]
    bound = max(float((losses - exact).abs().max()) for losses in moved)
    assert float((torch.tensor(found.losses, dtype=torch.float64) * exact[0] - exact).abs().max()) <= bound
    # Each step moves the loss by far more, so that a wrong one would be seen.
    assert bound < 1e-4 * float(exact.diff().abs()[1:].min())


@pytest.mark.parametrize("name", CONTENDERS)
def test_seeds_do_not_depend_on_each_other(name):
    """Three seeds at once have the bits of each alone."""
    rate = CONTENDERS[name].rates[2]
    for setting in (essays(12), fast(20)):
        together = race.run(Heat(name, rate, (0, 1, 2)), setting)
        assert together == [one_run(name, rate, seed, setting) for seed in range(3)]


@pytest.mark.parametrize("name", ["sgd", "muon", "shampoo"])
def test_a_diverged_seed_leaves_the_others_alone(name, monkeypatch):
    original = Problem.of.__func__

    def of(cls, seed, steps, dtype):
        problem = original(cls, seed, steps, dtype)
        if seed == 1:
            # From where no product is a number any more.
            problem.student[-1] *= 1e308
        return problem

    monkeypatch.setattr(Problem, "of", classmethod(of))
    runs = race.run(Heat(name, 0.01, (0, 1, 2)), essays(12))
    assert [run.diverged for run in runs] == [None, 0, None]
    assert [runs[0], runs[2]] == race.run(Heat(name, 0.01, (0, 2)), essays(12))


def test_losses_that_are_not_computed(monkeypatch):
    """A run that computes every loss finds the same."""
    monkeypatch.setattr(race, "INTERVALS", 5)
    monkeypatch.setattr(race, "LAST", 10)
    monkeypatch.setitem(TASKS, "teacher", replace(TASKS["teacher"], target=0.25))
    heat, setting = Heat("muon", 0.01, (0, 1, 2)), essays(60)
    found = race.run(heat, setting)
    assert [run.steps for run in found] == 3 * [[0, 12, 24, 36, 48, 60]]
    monkeypatch.setattr(race, "INTERVALS", 60)
    everything = race.run(heat, setting)
    assert [run.steps for run in everything] == 3 * [list(range(61))]
    for run, full in zip(found, everything, strict=True):
        assert run.final == full.final == min(full.losses[-10:])
        assert run.losses == full.losses[::12]
        assert run.steps_to_target == full.steps_to_target
        assert full.steps_to_target == next(t for t, loss in enumerate(full.losses) if loss <= 0.25)
    assert any(run.steps_to_target not in run.steps for run in found)


def matrix(*shape, scale=1.0):
    p = torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64), requires_grad=False)
    p.grad = scale * torch.randn(*shape, dtype=torch.float64)
    return p


def test_epsilon_is_inside_of_the_essays_roots():
    for rule, second_moment, eps in ((essay.adagrad, 1.0, 1e-10), (essay.rmsprop, 1.0 - 0.99, 1e-8)):
        p = matrix(3, 4, scale=1e-4)
        before, g = p.clone(), p.grad.clone()
        rule([p])(0.5)
        update = 0.5 * g / torch.sqrt(second_moment * g * g + eps)
        # Six roundings on either way to the update, a root that may be off by a unit, and one of the difference.
        assert bool(((p - (before - update)).abs() <= U * (16.0 * update.abs() + 2.0 * before.abs())).all())


FLOOR = 1e-6


def root(factor):
    """A^(−1/4) from the singular value decomposition, with what is below 1e-6 taken for it; and its error's norm.

    LAPACK finds eigenvalues and singular values of a matrix that is 10n roundings off at the most (Users' Guide, 4.1
    and 4.9: "p(n) = 10n"). By how much more a function of symmetric matrices differs, in the Frobenius norm, its
    steepest slope says, here a quarter of 1e-6^(−5/4).
    """
    a, s, _ = torch.linalg.svd(factor)
    error = 0.25 * FLOOR**-1.25 * 10 * len(factor) * U * float(factor.norm())
    return a @ torch.diag(s.clamp(min=FLOOR) ** -0.25) @ a.T, 2.0 * error


def test_shampoo_of_the_essay():
    """Two matrices in one tensor, each as alone."""
    p = matrix(2, 4, 6)
    weights = p.clone()
    buffers = torch.zeros_like(p)
    lefts, rights = (FLOOR * torch.eye(n, dtype=torch.float64).repeat(2, 1, 1) for n in (4, 6))
    step, allowed, least = essay.shampoo([p]), 0.0, math.inf
    for _ in range(3):
        p.grad = torch.randn(2, 4, 6, dtype=torch.float64)
        before = weights.clone()
        for k, g in enumerate(p.grad):
            u = buffers[k] = 0.9 * buffers[k] + g
            lefts[k] = 0.95 * lefts[k] + 0.05 * g @ g.T
            rights[k] = 0.95 * rights[k] + 0.05 * g.T @ g
            (left, left_error), (right, right_error) = root(lefts[k]), root(rights[k])
            weights[k] -= 0.1 * left @ u @ right
            largest = FLOOR**-0.25
            allowed += 0.1 * float(u.norm()) * largest * (left_error + right_error)
        step(0.1)
        least = min(least, float((weights - before).abs().max()))
    # The products' own roundings are of the order of 10 U of what is multiplied, and these errors of 1e7 U.
    assert float((p - weights).norm()) <= allowed
    assert allowed < 1e-3 * least


def test_shampoos_eigenvalues_are_clipped():
    """Below the floor everywhere, both roots are those of 1e-6·I, together 1000."""
    p = matrix(4, 6, scale=1e-9)
    before = p.clone()
    step = essay.shampoo([p])
    step(0.5)
    update = 500.0 * p.grad
    # Orthogonal to 10n roundings, four times; without clipping 0.95e-6 would stand for 1e-6, 2.6 % more.
    allowed = 4 * 60 * U * float(update.norm()) + U * float(before.norm())
    assert float((before - p - update).norm()) <= allowed < 1e-3 * float(update.norm())


def test_shampoo_of_what_is_not_finite():
    """LAPACK would refuse it; a diverged seed ends as NaN, and the others go on."""
    p = matrix(3, 4, 6)
    p.grad[1, 0, 0] = torch.nan
    essay.shampoo([p])(0.5)
    assert bool(p[1].isnan().all())
    assert bool(p[[0, 2]].isfinite().all())


def test_grids():
    """Those of the essay, and three neighbours of them for the teacher with the preset fast."""
    assert CONTENDERS["sgd"].grid(None) == (0.03, 0.1, 0.3, 1.0, 3.0)
    assert CONTENDERS["momentum"].grid(None) == (0.01, 0.03, 0.1, 0.3, 1.0)
    for name in ("adam", "adamw", "muon", "shampoo"):
        assert CONTENDERS[name].grid(None) == (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    assert CONTENDERS["signsgd"].grid(None) == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    assert CONTENDERS["lion"].grid(None) == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert CONTENDERS["muonh"].grid(None) == (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    assert [essays(100).rates, fast(100).rates] == [None, 3]
    for contender in CONTENDERS.values():
        assert len(contender.grid(None)) == 5
        assert len(contender.grid(3)) == 3
        assert set(contender.grid(3)) < set(contender.rates)
        assert list(contender.rates) == sorted(contender.rates)


def test_every_optimizer_of_the_package_races():
    import stepladder as sl

    assert {c.cls for c in CONTENDERS.values()} == {getattr(sl.optim, name) for name in sl.optim.__all__}
    assert len({pictures.color(name) for name in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CONTENDERS)
def test_tiny_race(preset, name):
    run = one_run(name, CONTENDERS[name].rates[2], 0, Setting("teacher", preset, 20, 1))
    assert run.diverged is None
    assert run.steps == (list(range(21)) if preset == "essay" else [0, 10, 20])
    assert run.losses[0] == 1.0
    assert run.final < 1.0


def test_divergence_ends_a_run():
    run = one_run("sgd", 1e9, 0, essays(60))
    assert run.diverged is not None
    assert run.final == math.inf
    assert run.steps[-1] < run.diverged < 60
    assert all(map(math.isfinite, run.losses))


@pytest.mark.parametrize("task", ["digits", "charlm"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_real_data(task, name):
    """It trains, and the matrices of hidden layers are for the optimizers of matrices."""
    skip_without(task)
    setting = fast(10, task)
    run = one_run(name, CONTENDERS[name].rates[0], 1, setting)
    assert run.steps == [0, 10]
    assert run.final < run.losses[0]
    assert run == one_run(name, CONTENDERS[name].rates[0], 1, setting)


def test_digits_are_a_network_of_three_layers():
    skip_without("digits")
    student = real.digits((2,), 10, torch.float32)
    x, y = real.digits_data()
    assert x.shape == (1797, 64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert sorted(y.unique().tolist()) == list(range(10))
    assert [tuple(p.shape) for p in student.groups(None, False)] == [
        (128, 64),
        (128,),
        (128, 128),
        (128,),
        (10, 128),
        (10,),
    ]
    assert student.losses([0]) == [torch.nn.functional.cross_entropy(student.model(x.float()), y).item()]


@pytest.mark.parametrize(("task", "hidden"), [("digits", 2), ("charlm", 8)])
@pytest.mark.parametrize("name", ["muon", "muonh", "shampoo", "soap"])
def test_hidden_matrices_and_the_rest(task, hidden, name):
    """One optimizer object: hidden matrices by its rule, the others by AdamW without decay, at a rate of its own."""
    skip_without(task)
    student = TASKS[task].begin((0,), 10, torch.float32)
    begun = CONTENDERS[name].begin(student, PRESETS["fast"], 0.01)
    optimizer = begun.args[0]
    matrices, rest = optimizer.param_groups
    assert len(matrices["params"]) == hidden
    assert all(p.ndim == 2 for p in matrices["params"])
    assert (matrices["algorithm"], rest["algorithm"]) == (name, "adamw")
    assert rest["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(rest["params"]) == len([*student.model.parameters()])
    student.backward(0)
    begun(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.25 * real.REST]


def test_characters_are_those_of_the_example():
    """Training stretches by seed, and one set of held-out ones for all; the model is the example's."""
    setting = fast(10, "charlm")
    a, b, c = (one_run(*lap, setting) for lap in (("adamw", 0.003, 0), ("lion", 0.001, 0), ("adamw", 0.003, 1)))
    assert a.losses[0] == b.losses[0] != c.losses[0]
    text = Text()
    x, y = sample(text.validation, 64, 64, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = GPT(text.vocabulary, 64, 64, 2, 4)
    assert a.losses[0] == model.loss(x, y).item()
    x, y = sample(text.training, 16, 64, torch.Generator().manual_seed(0))
    student = real.charlm((0,), 10, torch.float32)
    student.backward(0)
    model.loss(x, y).backward()
    for p, q in zip(student.groups(None, False), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


class Scripted:
    """Networks of which it is known what their losses will be, one for each step."""

    def __init__(self, *curves):
        self.curves, self.step = curves, 0

    def groups(self, algorithm, apart):
        return [torch.nn.Parameter(torch.zeros(2, 2))]

    def backward(self, step):
        self.step = step + 1

    def losses(self, of, above=math.inf):
        found = [self.curves[k][self.step] for k in of]
        return None if all(loss > above for loss in found) else found


def scripted(monkeypatch, *curves):
    task = replace(TASKS["teacher"], begin=lambda seeds, steps, dtype: Scripted(*curves))
    monkeypatch.setitem(TASKS, "teacher", task)
    return race.run(Heat("sgd", 0.1, tuple(range(len(curves)))), essays(len(curves[0]) - 1, len(curves)))


def test_crossing_is_the_first(monkeypatch):
    above = math.nextafter(TARGET, 1.0)
    first = [1.0, 0.2, TARGET, 0.5, 0.001, 0.6]
    second = [1.0, 0.2, above, 0.5, TARGET, 0.6]
    never = [1.0, *5 * [above]]
    # A run that reached the target and then diverged has reached it, but no rate is chosen for it.
    diverged = [1.0, 0.01, math.nan, 0.01, 0.01, 0.01]
    runs = scripted(monkeypatch, first, second, never, diverged)
    assert [run.steps_to_target for run in runs] == [2, 4, None, 1]
    assert [run.diverged for run in runs] == [None, None, None, 2]
    assert [run.final for run in runs] == [0.001, TARGET, above, math.inf]
    assert [run.losses for run in runs] == [first, second, never, [1.0, 0.01]]
    assert [run.lap for run in runs] == [Lap("sgd", 0.1, seed) for seed in range(4)]


def test_final_is_the_least_of_the_last_50_steps(monkeypatch):
    """Whether or not the curve keeps that step."""
    monkeypatch.setattr(race, "INTERVALS", 2)
    losses = [1.0] * 101
    losses[50], losses[51], losses[100] = 0.1, 0.4, 0.5
    (early,) = scripted(monkeypatch, losses)
    assert (early.steps, early.final) == ([0, 50, 100], 0.4)
    losses[51] = 0.6
    (late,) = scripted(monkeypatch, losses)
    assert late.final == 0.5


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
