"""Adam's update is a signal-to-noise ratio: signal/√(signal² + σ²), whatever the size of the gradient.

Each scenario of the essay is a stream of gradients, signal + σ·noise, for 500 parameters that `sl.Adam` steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from drawing import COLORS, command
from torch import Tensor

import stepladder as sl

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

BETAS = (0.9, 0.999)
# β₂'s memory is 1000 steps; the last thousand of three are averaged.
STEPS, AVERAGED, PARAMETERS = 3000, 1000, 500


@dataclass(frozen=True)
class Scenario:
    """A stream of gradients; one that oscillates has the signal's sign change at each step."""

    letter: str
    name: str
    signal: float
    noise: float
    oscillates: bool = False

    @property
    def expected(self) -> float:
        """The mean update in the steady state: E[m]/√E[g²]."""
        return 0.0 if self.oscillates else self.signal / math.hypot(self.signal, self.noise)


SCENARIOS = (
    Scenario("A", "clean, strong", 0.3, 0.0),
    Scenario("B", "moderate noise", 0.3, 1.0),
    Scenario("C", "weak signal", 0.1, 1.0),
    Scenario("D", "pure noise", 0.0, 1.0),
    Scenario("E", "oscillating", 1.0, 0.0, oscillates=True),
    Scenario("F", "loud parameter", 100.0, 0.0),
)


@dataclass(frozen=True)
class Measured:
    """Updates in units of the learning rate, fp64."""

    # [step, scenario], of one parameter.
    path: Tensor
    # [scenario]: over parameters and the last steps.
    mean: Tensor
    spread: Tensor


def measure() -> Measured:
    """Step all scenarios side by side, at a learning rate of 1."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.tensor([[s.signal] for s in SCENARIOS], dtype=torch.float64)
    noise = torch.tensor([[s.noise] for s in SCENARIOS], dtype=torch.float64)
    oscillates = torch.tensor([[s.oscillates] for s in SCENARIOS])
    w = torch.zeros(len(SCENARIOS), PARAMETERS, dtype=torch.float64, requires_grad=True)
    optimizer = sl.Adam([w], lr=1.0, betas=BETAS)
    path, total, squares = [], torch.zeros(len(SCENARIOS)).double(), torch.zeros(len(SCENARIOS)).double()
    for step in range(STEPS):
        sign = torch.where(oscillates & (step % 2 == 1), -1.0, 1.0)
        w.grad = sign * signal + noise * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        before = w.detach().clone()
        optimizer.step()
        update = before - w.detach()
        path.append(update[:, 0])
        if step >= STEPS - AVERAGED:
            total += update.mean(1)
            squares += update.square().mean(1)
    mean = total / AVERAGED
    return Measured(torch.stack(path), mean, (squares / AVERAGED - mean.square()).clamp(min=0.0).sqrt())


def draw(figure: FigureBase, measured: Measured) -> None:
    """Three streams as they go, and the table of all six."""
    paths, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, color in ((0, COLORS["Muon"]), (4, COLORS["Adam"]), (1, COLORS["AdamW"])):
        scenario = SCENARIOS[index]
        paths.plot(measured.path[:400, index], color=color, linewidth=1.2, label=f"{scenario.letter}  {scenario.name}")
    paths.axhline(SCENARIOS[1].expected, color="#444", linestyle=":", linewidth=1)
    paths.set(xlabel="step", ylabel="update / learning rate", title="one parameter of three streams")
    paths.legend(loc="lower right", fontsize="small")

    rows = range(len(SCENARIOS))
    mean, spread = measured.mean.tolist(), measured.spread.tolist()
    bars.barh(rows, mean, xerr=spread, color=COLORS["Adam"], ecolor="#999", height=0.6)
    bars.plot([s.expected for s in SCENARIOS], rows, "k|", markersize=16, markeredgewidth=2, label="theory")
    names = [f"{s.letter}  {s.name}\n{'±' * s.oscillates}{s.signal:g}, σ = {s.noise:g}" for s in SCENARIOS]
    bars.set_yticks(rows, names, fontsize="small")
    bars.invert_yaxis()
    bars.set(xlabel="mean update / learning rate", title="steady state; grey: spread of a step", xlim=(-0.35, 1.2))
    for row, value in enumerate(mean):
        bars.text(1.03, row, shown(value), va="center", fontsize="small")
    bars.legend(loc="center", fontsize="small", markerscale=0.6, bbox_to_anchor=(0.7, 0.36))


def shown(value: float) -> str:
    """With two digits, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def caption(measured: Measured) -> str:
    """The table's numbers."""
    values = "; ".join(
        f"{s.letter} {shown(mean)} (theory {s.expected:.2f})"
        for s, mean in zip(SCENARIOS, measured.mean.tolist(), strict=True)
    )
    noise, oscillating = measured.spread[3], measured.path[-AVERAGED:, 4].abs().max()
    return (
        "Adam as a signal-to-noise ratio: where gradients are signal + σ·noise, the mean update of sl.Adam nears "
        f"signal/√(signal² + σ²). Measured over the last {AVERAGED} of {STEPS} steps of {PARAMETERS} parameters, in "
        f"units of the learning rate: {values}. A single step scatters around that: by ±{noise:.2f} for pure noise, "
        f"and an oscillating gradient leaves {oscillating:.3f}."
    )


main = command(measure, draw, caption)

if __name__ == "__main__":
    main()
