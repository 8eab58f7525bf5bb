"""Runs, what is made of them, and their form in JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS, Contender
from stepladder.bench.ladder.tasks import TASKS

WARMUP, COOLDOWN = 0.1, 0.2
# `final` is the least loss of these last steps.
LAST = 50
# Of a curve that is kept, at the most.
INTERVALS = 250
# Steps between two calls of `report`.
REPORTED = 20


@dataclass(frozen=True)
class Lap:
    """One optimizer at one learning rate from one seed.

    Attributes:
        optimizer: Its name.
        rate: The peak learning rate.
        seed: Of the problem.
    """

    optimizer: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Heat:
    """Laps of one optimizer at one learning rate that are run together.

    Attributes:
        optimizer: Its name.
        rate: The peak learning rate.
        seeds: Of the laps.
    """

    optimizer: str
    rate: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A lap that was run.

    Attributes:
        lap: Which.
        final: The least loss recorded in the last 50 steps; infinite where it diverged.
        steps_to_target: The first recorded step with a loss of at most the target, or None.
        diverged: The step at which a computed loss was not finite, or None.
        steps: Of the curve, thinned, from 0.
        losses: The curve.
    """

    lap: Lap
    final: float
    steps_to_target: int | None
    diverged: int | None
    steps: list[int]
    losses: list[float]


class StoppedError(Exception):
    """A run was called off."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a race have in common.

    Attributes:
        task: Its name.
        preset: Its name.
        steps: T.
        seeds: How many, from 0.
    """

    task: str
    preset: str
    steps: int
    seeds: int

    @property
    def every(self) -> int:
        """Steps between two records of the loss."""
        return PRESETS[self.preset].every or TASKS[self.task].every

    @property
    def rates(self) -> int | None:
        """How many of a grid are tried; None is all."""
        return None if PRESETS[self.preset].essays else TASKS[self.task].rates

    @property
    def target(self) -> float:
        """The loss to reach."""
        return TASKS[self.task].target


def schedule(step: int, steps: int) -> float:
    """The part of the learning rate that a step takes, numbered from 0: linear warm-up, constant, cosine cool-down.

    The first step takes 0, as t/T is 0 there.
    """
    done = step / steps
    if done < WARMUP:
        return done / WARMUP
    if done <= 1.0 - COOLDOWN:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (done - (1.0 - COOLDOWN)) / COOLDOWN)


def run(heat: Heat, setting: Setting, report: Callable[[int], None] = lambda count: None) -> list[Run]:
    """Train one optimizer at one rate from some seeds, together, and record the loss of each.

    It is recorded after every `setting.every` steps. Not all of these losses are computed, but those that are kept,
    those of the last steps, and before a run has reached the target whatever is needed to know that it has not. Runs
    end early where no loss is finite any more.

    Args:
        heat: What to run.
        setting: Of the race.
        report: Told now and then how many steps were made, of all runs; what it raises ends them.
    """
    preset, steps, seeds = PRESETS[setting.preset], setting.steps, heat.seeds
    students = TASKS[setting.task].begin(seeds, steps, preset.dtype)
    step = CONTENDERS[heat.optimizer].begin(students, preset, heat.rate)
    recorded = [*range(0, steps, setting.every), steps]
    kept = set(thinned(recorded))
    curves: list[dict[int, float]] = [{} for _ in seeds]
    reached: list[int | None] = [None for _ in seeds]
    diverged: list[int | None] = [None for _ in seeds]
    due = iter(recorded)
    following = next(due)
    for t in range(steps + 1):
        if t:
            students.backward(t - 1)
            step(schedule(t - 1, steps))
            if t % REPORTED == 0:
                report(REPORTED * len(seeds))
        if t < following:
            continue
        following = next(due, steps + 1)
        finite = [k for k in range(len(seeds)) if diverged[k] is None]
        if t in kept or t > steps - LAST:
            watched, losses = finite, students.losses(finite)
        else:
            watched = [k for k in finite if reached[k] is None]
            losses = students.losses(watched, above=setting.target) if watched else None
        if losses is None:
            continue
        for k, loss in zip(watched, losses, strict=True):
            if not math.isfinite(loss):
                diverged[k] = t
                continue
            curves[k][t] = loss
            if loss <= setting.target and reached[k] is None:
                reached[k] = t
        if None not in diverged:
            break
    laps = [Lap(heat.optimizer, heat.rate, seed) for seed in seeds]
    return [summary(lap, curves[k], kept, steps, reached[k], diverged[k]) for k, lap in enumerate(laps)]


def summary(
    lap: Lap, curve: dict[int, float], kept: Collection[int], steps: int, reached: int | None, diverged: int | None
) -> Run:
    """What is kept of a run, from the losses that were computed by the number of steps before them."""
    final = math.inf if diverged is not None else min(loss for t, loss in curve.items() if t > steps - LAST and t)
    points = {t: loss for t, loss in curve.items() if t in kept}
    return Run(lap, final, reached, diverged, list(points), list(points.values()))


def thinned(recorded: Sequence[int]) -> list[int]:
    """Evenly spaced ones of the recorded steps, the first and the last among them."""
    stride = max(1, -(-(len(recorded) - 1) // INTERVALS))
    return [*recorded[:-1:stride], recorded[-1]]


@dataclass
class Standing:
    """What is known of an optimizer.

    Attributes:
        name: The optimizer's.
        rates: Those that it tries.
        seeds: That each of them is to run from.
        runs: That are done, in the order of rates and seeds.
    """

    name: str
    rates: list[float]
    seeds: int
    runs: list[Run]

    def at(self, rate: float) -> list[Run]:
        """The runs at a rate."""
        return [run for run in self.runs if run.lap.rate == rate]

    @property
    def finished(self) -> bool:
        """Whether all of its runs are done."""
        return len(self.runs) == len(self.rates) * self.seeds

    @property
    def best_rate(self) -> float | None:
        """The rate with the least mean `final` over all seeds, the lower one of equals.

        None where no rate has run from all seeds, or all of them have diverged.
        """
        means = {rate: mean([r.final for r in self.at(rate)]) for rate in self.rates if self._complete(rate)}
        finite = {rate: value for rate, value in means.items() if math.isfinite(value)}
        return min(finite, key=lambda rate: (finite[rate], rate), default=None)

    @property
    def best_runs(self) -> list[Run]:
        """The runs at the best rate, by seed."""
        return [] if self.best_rate is None else self.at(self.best_rate)

    @property
    def final(self) -> float | None:
        """The mean `final` at the best rate."""
        return mean([run.final for run in self.best_runs]) if self.best_runs else None

    @property
    def crossings(self) -> list[int | None]:
        """The steps to the target at the best rate, by seed."""
        return [run.steps_to_target for run in self.best_runs]

    @property
    def steps_to_target(self) -> float | None:
        """Their mean; None where a seed never reached it."""
        reached = [t for t in self.crossings if t is not None]
        return mean(reached) if reached and len(reached) == len(self.crossings) else None

    @property
    def at_an_end(self) -> bool:
        """Whether the best rate is the least or greatest that was tried: a better one may lie beyond."""
        return len(self.rates) > 1 and self.best_rate in (min(self.rates), max(self.rates))

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """The geometric mean over the seeds of the curves at the best rate."""
        if not self.best_runs:
            return [], []
        columns = zip(*(run.losses for run in self.best_runs), strict=True)
        return self.best_runs[0].steps, [math.exp(mean([math.log(max(x, 1e-300)) for x in xs])) for xs in columns]

    def _complete(self, rate: float) -> bool:
        return len(self.at(rate)) == self.seeds


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass
class Results:
    """A race, finished or not.

    Attributes:
        machine: As `stepladder bench` reports it.
        setting: Of all its runs.
        standings: One for each optimizer, in the order of CONTENDERS.
    """

    machine: dict[str, Any]
    setting: Setting
    standings: list[Standing]

    @property
    def total(self) -> int:
        """How many laps belong to the race."""
        return sum(len(s.rates) for s in self.standings) * self.setting.seeds

    def heats(self) -> list[Heat]:
        """What is still to be run: an optimizer's together, a rate's seeds together."""
        heats = []
        for standing in self.standings:
            for rate in standing.rates:
                done = {run.lap.seed for run in standing.at(rate)}
                seeds = [seed for seed in range(self.setting.seeds) if seed not in done]
                together = [seeds] if TASKS[self.setting.task].together else [[seed] for seed in seeds]
                heats += [Heat(standing.name, rate, tuple(some)) for some in together if some]
        return heats

    @property
    def done(self) -> int:
        """How many laps were run."""
        return sum(len(standing.runs) for standing in self.standings)

    @property
    def complete(self) -> bool:
        return self.done == self.total

    @property
    def ranking(self) -> list[Standing]:
        """By mean steps to the target; then by how many seeds reached it, and by `final`."""

        def key(s: Standing) -> tuple[float, int, float]:
            reached = sum(t is not None for t in s.crossings)
            never = math.inf
            return (
                never if s.steps_to_target is None else s.steps_to_target,
                -reached,
                never if s.final is None else s.final,
            )

        return sorted(self.standings, key=key)

    def add(self, new: Run) -> None:
        standing = next(s for s in self.standings if s.name == new.lap.optimizer)
        standing.runs.append(new)
        standing.runs.sort(key=lambda run: (standing.rates.index(run.lap.rate), run.lap.seed))


def start(
    machine: dict[str, Any],
    setting: Setting,
    contenders: Sequence[Contender],
    rates: Sequence[float] | None,
) -> Results:
    """A race in which nothing was run yet; `rates` stand in place of every grid."""
    grids = [list(rates or contender.grid(setting.rates)) for contender in contenders]
    standings = [Standing(c.name, grid, setting.seeds, []) for c, grid in zip(contenders, grids, strict=True)]
    return Results(machine, setting, standings)


def as_json(results: Results) -> dict[str, Any]:
    """Everything that is known, ready for json.dump; what is infinite is null."""
    setting, preset = results.setting, PRESETS[results.setting.preset]
    settings = asdict(setting) | {
        "dtype": str(preset.dtype).removeprefix("torch."),
        "backend": preset.backend,
        "recorded_every": setting.every,
        "target": setting.target,
    }
    optimizers = []
    for standing in results.standings:
        runs = []
        for run in standing.runs:
            row = asdict(run)
            runs.append(row.pop("lap") | row | {"final": run.final if math.isfinite(run.final) else None})
        optimizers.append(
            {
                "name": standing.name,
                "rates": standing.rates,
                "best_rate": standing.best_rate,
                "final": standing.final,
                "steps_to_target": standing.steps_to_target,
                "steps_to_target_by_seed": standing.crossings,
                "runs": runs,
            }
        )
    return {
        "machine": results.machine,
        "settings": settings,
        "complete": results.complete,
        "optimizers": optimizers,
    }


def from_json(value: dict[str, Any]) -> Results:
    """What `as_json` was made of.

    Raises:
        ValueError: It is something else.
    """
    try:
        settings = value["settings"]
        setting = Setting(*(settings[field.name] for field in fields(Setting)))
        for what, name, known in (("preset", setting.preset, PRESETS), ("task", setting.task, TASKS)):
            if name not in known:
                raise ValueError(f"its {what} is {name!r}, expected {' or '.join(known)}")
        if settings["target"] != setting.target:
            raise ValueError(f"its target is {settings['target']}, expected {setting.target}")
        standings = []
        for row in value["optimizers"]:
            if row["name"] not in CONTENDERS:
                raise ValueError(f"it has an optimizer {row['name']!r}, expected {', '.join(CONTENDERS)}")
            runs = [
                Run(
                    Lap(row["name"], r["rate"], r["seed"]),
                    math.inf if r["final"] is None else r["final"],
                    r["steps_to_target"],
                    r["diverged"],
                    r["steps"],
                    r["losses"],
                )
                for r in row["runs"]
            ]
            standings.append(Standing(row["name"], row["rates"], setting.seeds, runs))
        if not all(len(r.steps) == len(r.losses) == len(s.best_runs[0].steps) for s in standings for r in s.best_runs):
            raise ValueError("curves of one rate differ in length")
        if not {"device", "date"} <= value["machine"].keys():
            raise KeyError("machine")
        return Results(value["machine"], setting, standings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is not what `stepladder ladder --json` writes") from error
