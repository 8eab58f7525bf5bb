"""Shampoo, Muon and AdamW on one gradient of a matrix, some of whose rows are louder than others.

Gradients are D·Z, with D the loudness of the rows, from 1 to 16, and Z a new random matrix with orthonormal rows each
time. Momentum is off everywhere, so that each optimizer makes a step of the same last gradient. By their definitions,

- AdamW divides each entry by its own root mean square, so that all rows step alike;
- Muon makes Z of D·Z, so that all rows step alike;
- Shampoo has L = D² and R near a multiple of the identity, so that L^(−1/4)·D·Z·R^(−1/4) is near D^(1/2)·Z: half of the
  loudness, in orders of magnitude, is left.

After one gradient alone, Shampoo's step (GGᵀ)^(−1/4)·G·(GᵀG)^(−1/4) is the orthogonal factor of G, as Muon's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from drawing import COLORS, command
from torch import Tensor

import stepladder as sl

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

ROWS, COLUMNS, STEPS = 8, 24, 200
LOUDNESS = torch.logspace(4, 0, ROWS, base=2.0, dtype=torch.float64)
BETA2 = 0.999
# Each takes its parameters and how often Shampoo computes its roots.
OPTIMIZERS = {
    "gradient": lambda params, _: sl.SGD(params, lr=1.0),
    "AdamW": lambda params, _: sl.AdamW(params, lr=1.0, betas=(0.0, BETA2), weight_decay=0.0),
    # All steps of "polar_express", as its singular values come near 1, where the default's stay in a band around it.
    "Muon": lambda params, _: sl.Muon(
        params, lr=1.0, weight_decay=0.0, momentum=0.0, ns_coefficients="polar_express", ns_steps=None
    ),
    "Shampoo": lambda params, frequency: sl.Shampoo(
        params,
        lr=1.0,
        betas=(0.0, BETA2),
        relative_eps=0.0,
        precondition_frequency=frequency,
        start_preconditioning_step=frequency,
        grafting="none",
        merge_dims=False,
    ),
}
# How much of the loudness, in orders of magnitude, is left in a step.
EXPONENTS = {"gradient": 1.0, "AdamW": 0.0, "Muon": 0.0, "Shampoo": 0.5}


@dataclass(frozen=True)
class Measured:
    """Steps by optimizer in units of the learning rate, [ROWS, COLUMNS], fp64."""

    first: dict[str, Tensor]
    last: dict[str, Tensor]


def last_step(name: str, gradients: Tensor) -> Tensor:
    """An optimizer's last step of as many as there are gradients, the only one for which Shampoo computes roots."""
    w = torch.zeros(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS[name]([w], len(gradients))
    for gradient in gradients:
        w.grad = gradient
        before = w.detach().clone()
        optimizer.step()
    return before - w.detach()


def measure() -> Measured:
    """Of the first gradient alone, and of all."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(STEPS, COLUMNS, ROWS, generator=generator, dtype=torch.float64)
    gradients = LOUDNESS[:, None] * torch.linalg.qr(normal).Q.mT
    first, last = ({name: last_step(name, given) for name in OPTIMIZERS} for given in (gradients[:1], gradients))
    return Measured(first, last)


def norms(step: Tensor) -> Tensor:
    """Of the rows, in units of the last one's, which is the quietest."""
    rows = torch.linalg.vector_norm(step, dim=1)
    return rows / rows[-1]


def difference(measured: Measured) -> float:
    """How far Shampoo's first step is from Muon's, relative to it, by Frobenius norms."""
    muon, shampoo = measured.first["Muon"], measured.first["Shampoo"]
    return float(torch.linalg.matrix_norm(shampoo - muon) / torch.linalg.matrix_norm(muon))


def draw(figure: FigureBase, measured: Measured) -> None:
    """The four matrices, and the norms of their rows."""
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    for axes, (name, step) in zip(left.subplots(2, 2).flat, measured.last.items(), strict=True):
        extent = float(step.abs().max())
        axes.imshow(step.numpy(), cmap="RdBu_r", vmin=-extent, vmax=extent, aspect="auto", interpolation="nearest")
        axes.set_title("gradient" if name == "gradient" else f"{name}'s step", fontsize="medium")
        axes.set(xticks=[], yticks=[0, ROWS - 1])
        axes.set_yticklabels(["loud", "quiet"], fontsize="small")
    axes = right.subplots()
    for name, step in measured.last.items():
        axes.plot(LOUDNESS, norms(step), "o", color=COLORS[name], label=name)
        axes.plot(LOUDNESS, LOUDNESS ** EXPONENTS[name], "-", color=COLORS[name], linewidth=1, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="loudness of a row's gradients", ylabel="norm of the row's step / quietest row's")
    axes.set_title("lines: loudness to the power 1, 1/2, 0", fontsize="medium")
    axes.legend(fontsize="small")


def caption(measured: Measured) -> str:
    """The loudest row over the quietest."""
    ratios = ", ".join(f"{name} {float(norms(step)[0]):.2f}" for name, step in measured.last.items())
    return (
        f"One gradient of a {ROWS}×{COLUMNS} matrix after {STEPS - 1} alike, the loudest row over the quietest in the "
        f"step: {ratios}. AdamW and Muon level the rows; Shampoo keeps the root of their ratio, "
        f"√{float(LOUDNESS[0]):g} = {float(LOUDNESS[0]) ** 0.5:g}. After a single gradient there is no history "
        f"to tell them apart: Shampoo's first step differs from Muon's by {difference(measured):.0e} of its norm."
    )


main = command(measure, draw, caption, (11.0, 4.4))

if __name__ == "__main__":
    main()
