"""What the size of a gradient does to a step: five parameters, whose gradients span five orders of magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drawing import COLORS, command
from torch import Tensor

import stepladder as sl

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

GRADIENTS = torch.logspace(-3, 2, 5, dtype=torch.float64)
MOMENTUM, STEPS = 0.9, 200
OPTIMIZERS = {
    "SGD": lambda params: sl.SGD(params, lr=1.0),
    "momentum": lambda params: sl.SGD(params, lr=1.0, momentum=MOMENTUM),
    "AdamW": lambda params: sl.AdamW(params, lr=1.0, weight_decay=0.0),
    "Lion": lambda params: sl.Lion(params, lr=1.0),
    "SignSGD": lambda params: sl.SignSGD(params, lr=1.0),
}

# By optimizer: the last step of each parameter, in units of the learning rate, [5], fp64.
Measured = dict[str, Tensor]


def measure() -> Measured:
    """The last of 200 steps, when momentum has settled."""
    steps = {}
    for name, make in OPTIMIZERS.items():
        w = torch.zeros_like(GRADIENTS, requires_grad=True)
        optimizer = make([w])
        for _ in range(STEPS):
            before = w.detach().clone()
            w.grad = GRADIENTS.clone()
            optimizer.step()
        steps[name] = before - w.detach()
    return steps


def draw(figure: FigureBase, measured: Measured) -> None:
    """Bars for each gradient, on a logarithmic axis."""
    axes = figure.subplots()
    width = 0.8 / len(measured)
    for index, (name, steps) in enumerate(measured.items()):
        x = [place + (index - (len(measured) - 1) / 2) * width for place in range(len(GRADIENTS))]
        axes.bar(x, steps.tolist(), width * 0.92, color=COLORS[name], label=name)
    axes.set(yscale="log", ylim=(1e-4, 1e5))
    axes.set_xticks(range(len(GRADIENTS)), [f"{g:.3g}" for g in GRADIENTS.tolist()])
    axes.set(xlabel="the parameter's gradient", ylabel="step / learning rate")
    axes.legend(ncols=len(measured), loc="upper left", fontsize="small")


def caption(measured: Measured) -> str:
    """How far apart the largest and the smallest step are."""
    ratios = ", ".join(f"{name} {float(steps.max() / steps.min()):,.7g}" for name, steps in measured.items())
    gain = float((measured["momentum"] / measured["SGD"]).mean())
    adamw = measured["AdamW"]
    return (
        f"Per-parameter normalisation: gradients from {GRADIENTS[0]:g} to {GRADIENTS[-1]:g}, a factor of "
        f"{float(GRADIENTS[-1] / GRADIENTS[0]):,.0f}. The largest step over the smallest: {ratios}. Momentum "
        f"{MOMENTUM:g} makes every step of SGD {gain:.3f} times as long, and normalises nothing; AdamW's steps lie "
        f"between {adamw.min():.5f} and {adamw.max():.5f} learning rates."
    )


main = command(measure, draw, caption)

if __name__ == "__main__":
    main()
