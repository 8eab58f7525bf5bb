"""The hyperball's spectral squeeze: MuonH pays for what grows with everything that does not.

A weight matrix and a gradient share their singular vectors, and the gradient has four directions alone. MuonH adds a
step of length ηR along them and scales the sum back to the norm R, by a factor that meets every singular value. MuonW,
which is Muon with decay, takes a first step of the same length, lets the norm grow, and leaves the others as they are,
but for their decay.
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

SIDE, DIRECTIONS = 32, 4
STEPS, RATE, DECAY = 200, 0.02, 0.01
# Of the exact orthogonal factor, so that what is seen is the retraction and not Muon's band of singular values.
ITERATION = {"ns_coefficients": "polar_express", "ns_steps": None}


@dataclass(frozen=True)
class Measured:
    """Singular values after each step, the directions of the gradient first, [step, SIDE], fp64; first the start's."""

    muonh: Tensor
    muonw: Tensor


def start() -> Tensor:
    """The singular values to begin with, from 1.5 down to 0.5, fp64."""
    return torch.linspace(1.5, 0.5, SIDE, dtype=torch.float64)


def rate_of_muonw() -> float:
    """The learning rate at which MuonW's first step is as long as MuonH's: ηR over the root of the directions."""
    return RATE * float(torch.linalg.vector_norm(start())) / DIRECTIONS**0.5


def measure() -> Measured:
    """Both optimizers from the same start, in fp64."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(2, SIDE, SIDE, generator=generator, dtype=torch.float64)).Q
    gradient = -u[:, :DIRECTIONS] @ v[:, :DIRECTIONS].T

    def spectra(make) -> Tensor:
        w = ((u * start()) @ v.T).requires_grad_()
        optimizer = make([w])
        path = [start()]
        for _ in range(STEPS):
            w.grad = gradient.clone()
            optimizer.step()
            # The singular vectors stay; so UᵀWV is diagonal, and the values keep their places.
            path.append((u.T @ w.detach() @ v).diagonal().clone())
        return torch.stack(path)

    return Measured(
        spectra(lambda params: sl.MuonH(params, lr=RATE, **ITERATION)),
        spectra(lambda params: sl.Muon(params, lr=rate_of_muonw(), weight_decay=DECAY, **ITERATION)),
    )


def participation(values: Tensor) -> Tensor:
    """(Σσ²)²/Σσ⁴, how many directions take part, of spectra [..., SIDE]."""
    return values.square().sum(-1).square() / values.pow(4).sum(-1)


def draw(figure: FigureBase, measured: Measured) -> None:
    """Spectra at the end, the fate of the other directions, and how many take part."""
    spectra, others, taking_part = figure.subplots(1, 3)
    paths = {"MuonW": (measured.muonw, COLORS["Muon"]), "MuonH": (measured.muonh, COLORS["MuonH"])}
    spectra.plot(range(1, SIDE + 1), start(), color="#7f7f7f", label="start")
    for name, (path, color) in paths.items():
        spectra.plot(range(1, SIDE + 1), path[-1], ".-", color=color, label=f"{name}, after {STEPS} steps")
        others.plot(path[:, -1] / path[0, -1], color=color, label=name)
        taking_part.plot(participation(path), color=color, label=name)
    others.plot((1.0 + RATE) ** -torch.arange(STEPS + 1), ":", color="#444", label="(1 + η)$^{-t}$")
    spectra.set(yscale="log", xlabel="direction", ylabel="singular value", title="spectrum")
    others.set(yscale="log", xlabel="step", ylabel="singular value / its start", title="a direction without a gradient")
    taking_part.set(xlabel="step", ylabel="(Σσ²)² / Σσ⁴", title="directions that take part", ylim=(0, SIDE))
    taking_part.axhline(DIRECTIONS, color="#444", linestyle=":", linewidth=1)
    for axes in (spectra, others, taking_part):
        axes.legend(fontsize="small")


def caption(measured: Measured) -> str:
    """Norms, what is left of the other directions, participation."""
    h, w = measured.muonh, measured.muonw
    norm = torch.linalg.vector_norm(h, dim=1)
    drift = float((norm / norm[0] - 1.0).abs().max())
    growth = float(torch.linalg.vector_norm(w[-1]) / torch.linalg.vector_norm(w[0]))
    squeezed, kept = (float(path[-1, -1] / path[0, -1]) for path in (h, w))
    start_h, end_h, end_w = participation(torch.stack([h[0], h[-1], w[-1]])).tolist()
    return (
        f"The hyperball's spectral squeeze: a gradient with {DIRECTIONS} of {SIDE} directions, {STEPS} steps of equal "
        f"first length, {RATE:g}‖W‖F. MuonH keeps the norm (to {drift:.0e}) and has scaled every other direction to "
        f"{squeezed:.3f} of its start, by {float(h[-1, -1] / h[-2, -1]):.4f} in the last step, where 1/(1 + η) = "
        f"{1.0 / (1.0 + RATE):.4f}; directions that take part went from {start_h:.1f} to {end_h:.2f}. MuonW's norm "
        f"grew {growth:.2f}-fold; of the others decay left {kept:.2f}, and {end_w:.2f} take part."
    )


main = command(measure, draw, caption)

if __name__ == "__main__":
    main()
