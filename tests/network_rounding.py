"""How far rounding takes a tanh network's outputs and gradients from exact arithmetic: running error bounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

U = 2.0**-53
# Of torch's tanh, in units of U, which is the most that a unit in the last place of numbers below 1 can be: MKL's (in
# its high accuracy, which torch asks for) and Sleef's (u10) err by at most one, the C library's by two on x86-64 (the
# table "Errors in Math Functions" of glibc's manual).
TANH = 2.0


def gamma(n: int) -> float:
    """A sum of n products in any order, relative to the sum of their sizes (Higham, Accuracy and Stability, 3.5)."""
    return n * U / (1.0 - n * U)


def product(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> Tensor:
    """Of a @ b, where both factors are off by as much as is given."""
    size = a.abs() @ b.abs()
    return a_error @ b.abs() + a.abs() @ b_error + a_error @ b_error + gamma(a.shape[-1]) * size


def layers_and_errors(weights: Sequence[Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs, hidden layers and outputs, each [B, n], with what each number of them may be off by."""
    h, error = x, torch.zeros_like(x)
    found = [(h, error)]
    for k, w in enumerate(weights):
        h, error = h @ w.mT, product(h, error, w.mT, torch.zeros_like(w.mT))
        if k + 1 < len(weights):
            h, error = h.tanh(), error + TANH * U  # tanh's slope is at most 1
        found.append((h, error))
    return found


def loss_error(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> float:
    """Of half the mean over samples of the squared error."""
    out, error = layers_and_errors(weights, x)[-1]
    difference = (out - y).abs()
    error = error + U * difference
    squares = (2.0 * difference + error) * error + U * difference.square()
    # The sum, and the division by the number of samples.
    return float(0.5 * (squares.sum() + gamma(out.numel() + 1) * difference.square().sum()) / len(x))


def gradient_errors(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Of that loss's gradients by the weights, as large as they are."""
    layers = layers_and_errors(weights, x)
    out, error = layers[-1]
    delta = (out - y) / len(x)
    delta_error = error / len(x) + 2.0 * U * delta.abs()
    found = []
    for k in reversed(range(len(weights))):
        h, h_error = layers[k]
        found.append(product(delta.mT, delta_error.mT, h, h_error))
        if k:
            back = delta @ weights[k]
            back_error = product(delta, delta_error, weights[k], torch.zeros_like(weights[k]))
            slope = 1.0 - h.square()
            slope_error = (2.0 * h.abs() + h_error) * h_error + 2.0 * U
            delta = back * slope
            delta_error = back_error * (slope + slope_error) + back.abs() * slope_error + U * delta.abs()
    return found[::-1]
