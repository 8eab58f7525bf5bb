"""The race as a PNG, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO

from stepladder.bench import report
from stepladder.bench.ladder.contenders import CONTENDERS, PRESETS
from stepladder.bench.ladder.race import Results, Standing
from stepladder.bench.ladder.tasks import TASKS

PAGE = Path(__file__).with_name("page.html")
# The essay's optimizers have the strong colours, each palette one for each optimizer.
STRONG = ("#7f7f7f", "#8c564b", "#1f77b4", "#17becf", "#e377c2", "#bcbd22", "#d62728", "#2ca02c", "#9467bd")
SOFT = (
    "#c49c94",
    "#aec7e8",
    "#9edae5",
    "#f7b6d2",
    "#b8a000",
    "#c7c7c7",
    "#ff7f0e",
    "#ff9896",
    "#98df8a",
    "#5254a3",
)


def color(name: str) -> str:
    """An optimizer's, the same in every race, as #rrggbb."""
    palette = STRONG if CONTENDERS[name].essays else SOFT
    alike = [c.name for c in CONTENDERS.values() if c.essays == CONTENDERS[name].essays]
    return palette[alike.index(name)]


def about(results: Results) -> str:
    """What was raced, in a sentence or two."""
    setting = results.setting
    task, preset = TASKS[setting.task], PRESETS[setting.preset]
    dtype = {"torch.float64": "fp64", "torch.float32": "fp32"}[str(preset.dtype)]
    every = "at every step" if setting.every == 1 else f"every {setting.every} steps"
    mean = "" if setting.seeds == 1 else f", means over {setting.seeds} seeds"
    partly = "" if results.complete else f" Interrupted: {results.done} of {results.total} runs were finished."
    return (
        f"Preset {preset.name}: {task.about}, {setting.steps} steps in {dtype}, each optimizer at its best learning "
        f"rate{mean}. The {task.loss} is recorded {every}; the target is {task.target:g}.{partly}"
    )


def extent(results: Results) -> tuple[float, float]:
    """Of the axis of losses: with the least loss on any curve and the target, up to a bit above the first loss."""
    curves = [standing.curve[1] for standing in results.standings if standing.best_runs]
    losses = [loss for curve in curves for loss in curve]
    return min([results.setting.target, *losses]) / 1.5, 2.0 * max(curve[0] for curve in curves)


def write_png(file: IO[bytes], results: Results) -> None:
    """Curves on a logarithmic axis, and the steps to the target as bars."""
    from matplotlib.figure import Figure

    ranking = results.ranking
    figure = Figure(figsize=(13, 6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for standing in ranking:
        if standing.best_runs:
            curves.plot(*standing.curve, color=color(standing.name), label=f"{standing.name}, {standing.best_rate:g}")
    curves.axhline(results.setting.target, color="#444", linestyle="--", linewidth=1)
    curves.set(yscale="log", xlabel="step", ylabel=TASKS[results.setting.task].loss, ylim=extent(results))
    curves.set_xlim(0, results.setting.steps)
    curves.legend(fontsize="small", ncols=2, title="best rate")

    for row, standing in enumerate(reversed(ranking)):
        steps = standing.steps_to_target
        if steps is not None:
            bars.barh(row, steps, color=color(standing.name))
        text = f" {steps:.0f}" if steps is not None else f" {missed(standing)}"
        bars.text(steps or 0, row, text, va="center", fontsize="small")
    bars.set_yticks(range(len(ranking)), [standing.name for standing in reversed(ranking)])
    bars.set(
        xlabel=f"steps to {results.setting.target:g}",
        xlim=(0, 1.1 * results.setting.steps),
        ylim=(-0.6, len(ranking) - 0.4),
    )
    figure.suptitle(about(results), fontsize="small", wrap=True)
    figure.savefig(file, format="png", dpi=130)


def missed(standing: Standing) -> str:
    """Why there is no mean number of steps."""
    reached = sum(t is not None for t in standing.crossings)
    if reached:
        return f"{reached} of {len(standing.crossings)} seeds"
    if standing.best_runs:
        return "not reached"
    return "diverged" if standing.finished else "not finished"


def write_html(file: IO[str], results: Results) -> None:
    """Curves, a slider through training, and a leaderboard that fills in; the plotting library is in the page."""
    from plotly.offline import get_plotlyjs

    ranking = results.ranking
    racers = []
    for standing in ranking:
        steps, losses = standing.curve
        racers.append(
            {
                "name": standing.name,
                "color": color(standing.name),
                "rate": standing.best_rate,
                "steps_to_target": standing.steps_to_target,
                "missed": missed(standing),
                "steps": steps,
                "losses": [float(f"{loss:.5g}") for loss in losses],
            }
        )
    data = {
        "about": about(results),
        "machine": report.header(results.machine) + " · " + results.machine["date"],
        "steps": results.setting.steps,
        "target": results.setting.target,
        "loss": TASKS[results.setting.task].loss,
        "range": [math.log10(value) for value in extent(results)],
        "racers": racers,
    }
    # A browser ends a script at any </, in a string too.
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("</", "<\\/")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("@PLOTLY@")
    between, _, after = rest.partition("@DATA@")
    file.writelines([before, get_plotlyjs(), between, text, after])
