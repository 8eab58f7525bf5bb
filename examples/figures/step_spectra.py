"""The singular values of a step: the gradient's own, those of its signs, and those that Muon makes of it.

Gradients have random singular vectors and singular values that fall as i^(−p): the larger p, the more skewed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drawing import COLORS, command
from torch import Tensor

import stepladder as sl

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

SIDE = 32
SKEWS = (0.5, 1.0, 2.0)
OPTIMIZERS = {
    "gradient": lambda params: sl.SGD(params, lr=1.0),
    "SignSGD": lambda params: sl.SignSGD(params, lr=1.0),
    "Muon": lambda params: sl.Muon(params, lr=1.0, weight_decay=0.0),
}

# By skew and optimizer: the step's singular values, descending, [SIDE], fp64.
Measured = dict[float, dict[str, Tensor]]


def gradient(skew: float) -> Tensor:
    """A matrix with singular values i^(−skew), [SIDE, SIDE], fp64."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, SIDE, SIDE, generator=generator, dtype=torch.float64)
    u, v = torch.linalg.qr(normal).Q
    return (u * torch.arange(1, SIDE + 1, dtype=torch.float64) ** -skew) @ v.T


def spectra(g: Tensor) -> dict[str, Tensor]:
    """Singular values of the first step of each optimizer."""
    steps = {}
    for name, make in OPTIMIZERS.items():
        w = torch.zeros_like(g, requires_grad=True)
        w.grad = g.clone()
        make([w]).step()
        steps[name] = torch.linalg.svdvals(w.detach())
    return steps


def balance(values: Tensor) -> float:
    """(Σσ)²/(nΣσ²): 1 where all singular values are equal, 1/n where there is only one."""
    return float(values.sum().square() / (len(values) * values.square().sum()))


def measure() -> Measured:
    """All skews."""
    return {skew: spectra(gradient(skew)) for skew in SKEWS}


def draw(figure: FigureBase, measured: Measured) -> None:
    """A row of bars for each optimizer, scaled so that the tallest is 1, for each skew."""
    columns = figure.subplots(1, len(measured), sharey=True)
    for axes, (skew, steps) in zip(columns, measured.items(), strict=True):
        for name, values in steps.items():
            label = f"{name}: balance {balance(values):.2f}"
            axes.step(
                range(1, SIDE + 1), values / values[0], where="mid", color=COLORS[name], linewidth=1.8, label=label
            )
            axes.fill_between(range(1, SIDE + 1), values / values[0], step="mid", color=COLORS[name], alpha=0.15)
        axes.set(title=f"gradient's singular values $i^{{-{skew:g}}}$", xlabel="i", xlim=(1, SIDE), ylim=(0, 1.3))
        axes.legend(fontsize="small", loc="upper right", ncols=1)
    columns[0].set_ylabel("singular value / largest")


def caption(measured: Measured) -> str:
    """Balance, and Muon's band."""
    parts = [
        f"i^−{skew:g} " + ", ".join(f"{name} {balance(values):.2f}" for name, values in steps.items())
        for skew, steps in measured.items()
    ]
    muon = torch.cat([steps["Muon"] for steps in measured.values()])
    share = {name: float(values[0].square() / values.square().sum()) for name, values in measured[SKEWS[-1]].items()}
    return (
        f"Singular spectra of a step on a {SIDE}×{SIDE} gradient, each scaled to its largest value. Balance "
        f"(Σσ)²/(nΣσ²), 1 if flat: {'; '.join(parts)}. Muon's default iteration leaves singular values of "
        f"{muon.min():.2f} to {muon.max():.2f}. Of the most skewed gradient {share['gradient']:.0%} lies in one "
        f"direction, of its signs {share['SignSGD']:.0%}, of Muon's step {share['Muon']:.0%} (squared Frobenius norm)."
    )


main = command(measure, draw, caption)

if __name__ == "__main__":
    main()
