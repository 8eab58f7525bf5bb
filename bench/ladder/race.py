"""Runs, what is made of them, and their form in JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stepladder.bench import report
from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS, Contender, Preset
from stepladder.bench.ladder.experiment import TARGET, Problem, Student, schedule

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
class Run:
    """A lap that was run.

    Attributes:
        lap: Which.
        final: The least loss recorded in the last 50 steps, in units of the initial one; infinite where it diverged.
        steps_to_target: The first recorded step with a loss of at most 0.03, or None.
        diverged: The step after which the loss was not finite, or None.
        steps: Of the curve, thinned, from 0.
        losses: The curve, in units of the initial loss.
    """

    lap: Lap
    final: float
    steps_to_target: int | None
    diverged: int | None
    steps: list[int]
    losses: list[float]


class StoppedError(Exception):
    """A run was called off."""


def run(lap: Lap, preset: Preset, steps: int, report: Callable[[int], None] = lambda count: None) -> Run:
    """Train, and record the full training loss over the initial one after every `preset.every` steps.

    A run ends early where that loss is not finite.

    Args:
        lap: What to run.
        preset: In which setting.
        steps: T.
        report: Told now and then how many steps were made; what it raises ends the run.
    """
    student = Student(Problem.of(lap.seed, steps, preset.dtype))
    step = CONTENDERS[lap.optimizer].begin(student.params, preset)
    curve = {0: 1.0}
    diverged = None
    for t in range(steps):
        student.backward(t)
        step(lap.rate * schedule(t, steps))
        done = t + 1
        if done % REPORTED == 0:
            report(REPORTED)
        if done % preset.every == 0 or done == steps:
            loss = student.loss() / student.initial
            if not math.isfinite(loss):
                diverged = done
                break
            curve[done] = loss
    return summary(lap, curve, steps, diverged)


def summary(lap: Lap, curve: dict[int, float], steps: int, diverged: int | None) -> Run:
    """What is kept of a run, from the losses by the number of steps before them."""
    final = math.inf if diverged is not None else min(loss for t, loss in curve.items() if t > steps - LAST and t)
    reached = next((t for t, loss in curve.items() if loss <= TARGET), None)
    kept = thinned(list(curve))
    return Run(lap, final, reached, diverged, kept, [curve[t] for t in kept])


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
        preset: Its name.
        steps: T.
        seeds: How many, from 0.
        standings: One for each optimizer, in the order of CONTENDERS.
    """

    machine: dict[str, Any]
    preset: str
    steps: int
    seeds: int
    standings: list[Standing]

    @property
    def laps(self) -> list[Lap]:
        """All that belong to the race: an optimizer's together, a rate's seeds together."""
        return [Lap(s.name, rate, seed) for s in self.standings for rate in s.rates for seed in range(self.seeds)]

    @property
    def done(self) -> int:
        """How many laps were run."""
        return sum(len(standing.runs) for standing in self.standings)

    @property
    def complete(self) -> bool:
        return self.done == len(self.laps)

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
    preset: Preset,
    contenders: Sequence[Contender],
    steps: int,
    seeds: int,
    rates: Sequence[float] | None,
) -> Results:
    """A race in which nothing was run yet; `rates` stand in place of every grid."""
    standings = [Standing(c.name, list(rates or c.grid(preset)), seeds, []) for c in contenders]
    return Results(machine, preset.name, steps, seeds, standings)


def as_json(results: Results) -> dict[str, Any]:
    """Everything that is known, ready for json.dump; what is infinite is null."""
    preset = PRESETS[results.preset]
    settings = {
        "preset": results.preset,
        "steps": results.steps,
        "seeds": results.seeds,
        "dtype": str(preset.dtype).removeprefix("torch."),
        "backend": preset.backend,
        "recorded_every": preset.every,
        "target": TARGET,
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
        standings = []
        for row in value["optimizers"]:
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
            standings.append(Standing(row["name"], row["rates"], settings["seeds"], runs))
            if row["name"] not in CONTENDERS:
                raise ValueError(f"it has an optimizer {row['name']!r}, expected {', '.join(CONTENDERS)}")
        if settings["preset"] not in PRESETS:
            raise ValueError(f"its preset is {settings['preset']!r}, expected {' or '.join(PRESETS)}")
        if not all(len(r.steps) == len(r.losses) == len(s.best_runs[0].steps) for s in standings for r in s.best_runs):
            raise ValueError("curves of one rate differ in length")
        report.header(value["machine"])
        return Results(value["machine"], settings["preset"], settings["steps"], settings["seeds"], standings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is not what `stepladder ladder --json` writes") from error
