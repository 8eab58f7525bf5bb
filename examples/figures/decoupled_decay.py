"""Decoupled weight decay against L2: Adam divides an L2 term by the size of the gradients, AdamW does not.

Two parameters begin at 1 and get gradients whose mean is zero, so that decay alone moves them: a loud one ±4, a quiet
one ±0.4. Each is a pair whose gradients are opposite, as the mean of both is free of what the gradients themselves do.
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

LOUD, QUIET = 4.0, 0.4
RATE, DECAY, STEPS = 0.01, 0.1, 2000


@dataclass(frozen=True)
class Measured:
    """Weights after each step, [step, (loud, quiet)], fp64; the first row is the start."""

    adamw: Tensor
    adam: Tensor


def decayed(kind: type[sl.Adam] | type[sl.AdamW]) -> Tensor:
    """The weights after each step."""
    sizes = torch.tensor([LOUD, QUIET], dtype=torch.float64)
    w = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = kind([w], lr=RATE, weight_decay=DECAY)
    path = [w.detach().mean(0)]
    for step in range(STEPS):
        w.grad = torch.stack([sizes, -sizes]) * (-1.0) ** step
        optimizer.step()
        path.append(w.detach().mean(0))
    return torch.stack(path)


def measure() -> Measured:
    """Both ways of decay."""
    return Measured(decayed(sl.AdamW), decayed(sl.Adam))


def draw(figure: FigureBase, measured: Measured) -> None:
    """Weights over steps, and how fast each decays."""
    paths, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, color, path in (("AdamW", COLORS["Muon"], measured.adamw), ("Adam, L2", COLORS["Adam"], measured.adam)):
        paths.plot(path[:, 0], color=color, linewidth=2, label=f"{name}: loud, ±{LOUD:g}")
        paths.plot(path[:, 1], color=color, linewidth=2, linestyle="--", label=f"{name}: quiet, ±{QUIET:g}")
    paths.set(xlabel="step", ylabel="weight", ylim=(0, 1.05), title="gradients of mean zero: decay alone moves weights")
    paths.legend(fontsize="small")

    values = [*rates(measured.adamw), *rates(measured.adam)]
    colors = [COLORS["Muon"]] * 2 + [COLORS["Adam"]] * 2
    bars.bar(range(4), values, color=colors, width=0.6)
    bars.plot(range(4), [1.0, 1.0, 1.0 / LOUD, 1.0 / QUIET], "k_", markersize=44, label="theory: 1, and 1/√v")
    bars.set_xticks(range(4), ["AdamW\nloud", "AdamW\nquiet", "Adam, L2\nloud", "Adam, L2\nquiet"])
    for x, value in enumerate(values):
        bars.text(x, value + 0.05, f"{value:.2f}", ha="center", fontsize="small")
    bars.set(ylabel="decay in units of ηλ", title="rate of decay", ylim=(0, 2.9))
    bars.legend(fontsize="small", loc="upper left", markerscale=0.4)


def rates(path: Tensor) -> list[float]:
    """How fast both decay, in units of ηλ: between a tenth and a half of the way, before the quiet one is gone."""
    begin, end = STEPS // 10, STEPS // 2
    return [math.log(column[begin] / column[end]) / ((end - begin) * RATE * DECAY) for column in path.T]


def caption(measured: Measured) -> str:
    """What is left, and the rates."""
    (w_loud, w_quiet), (loud, quiet) = measured.adamw[-1].tolist(), measured.adam[-1].tolist()
    slow, fast = rates(measured.adam)
    return (
        f"Decoupled against L2 decay, η = {RATE:g}, λ = {DECAY:g}: after {STEPS} steps sl.AdamW has left {w_loud:.1%} "
        f"of the loud weight and {w_quiet:.1%} of the quiet one, (1 − ηλ)^{STEPS} = {(1 - RATE * DECAY) ** STEPS:.1%}; "
        f"sl.Adam with the same λ as L2 has left {loud:.1%} and {quiet:.1%}. L2 decays in inverse proportion to the "
        f"gradients' size: at {slow:.2f} and {fast:.2f} times ηλ, a factor of {fast / slow:.1f} where gradients are "
        f"{LOUD / QUIET:.0f} times apart."
    )


main = command(measure, draw, caption)

if __name__ == "__main__":
    main()
