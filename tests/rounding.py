"""How far rounding operands to bf16 takes a Newton-Schulz iteration from exact arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

import stepladder as sl
from stepladder.coefficients import Coefficients, resolve
from stepladder.reference.newton_schulz import RESTART_EVERY, aol, normalised

# Two sums of as many roundings of the same size, of thousands of elements, have nearly the same norm; a kernel that
# rounds once more or less, or in another order, stays below twice.
REALISATIONS = 2.0
# Half a unit in the last place of what a result is stored in.
STORED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def allowed_error(
    x: Tensor,
    coefficients: Coefficients = "jordan",
    steps: int | None = None,
    method: str = "standard",
    *,
    diagonal_apart: bool = True,
) -> float:
    """Relative error of the result that these roundings explain: of X, and of every square, to bf16.

    `method="auto"` allows what the form with the larger error does.
    """
    if method == "auto":
        forms = ("standard", "gram")
        return max(allowed_error(x, coefficients, steps, form, diagonal_apart=diagonal_apart) for form in forms)
    exact = sl.reference.newton_schulz(x.double(), coefficients, steps)
    rounded = emulated(x, coefficients, steps, method, diagonal_apart)
    return REALISATIONS * relative_error(rounded, exact) + STORED[x.dtype]


def emulated(x: Tensor, coefficients: Coefficients, steps: int | None, method: str, diagonal_apart: bool) -> Tensor:
    """Products in fp64 of operands that were rounded to bf16.

    Of a square, what is below the diagonal mirrors what is above: in the Gram form, where rounded factors no longer
    commute, that is an error of its own.
    """

    def narrow(y: Tensor) -> Tensor:
        return y.bfloat16().double()

    def square(y: Tensor) -> Tensor:
        y = y.triu() + y.triu(1).mT
        if not diagonal_apart:
            return narrow(y)
        diagonal = torch.diag_embed(torch.diagonal(y, dim1=-2, dim2=-1))
        return narrow(y - diagonal) + diagonal

    chosen = resolve(coefficients, steps)
    transposed = x.shape[-2] > x.shape[-1]
    y = normalised(x.double(), 0.0, chosen.divisor)
    y = narrow(y.mT if transposed else y)
    y = narrow(aol(y)) if chosen.aol else y
    length = RESTART_EVERY if method == "gram" and not chosen.aol else 1
    for begin in range(0, len(chosen.steps), length):
        segment = chosen.steps[begin : begin + length]
        r = square(y @ y.mT)
        q = torch.eye(r.shape[-1], dtype=r.dtype)
        for k, (a, b, c) in enumerate(segment):
            z = square(b * r + c * (r @ r))
            q = a * q + q @ z if k == 0 else square(a * q + q @ z)
            if k + 1 < len(segment):
                p = square(a * r + r @ z)
                r = square(a * p + z @ p)
        y = q @ y
        y = narrow(y) if begin + length < len(chosen.steps) else y
    return y.mT if transposed else y
