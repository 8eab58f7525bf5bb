"""Parameters and gradients with random data in them."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from stepladder.bench.shapes import Shapes

# The size of weights, beside gradients of size one: GPT-2's initial standard deviation.
WEIGHT = 0.02


class Source:
    """Random tensors, the same in every run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(2024)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
        """Random values of both signs whose magnitude is between size/2 and size.

        Bounded away from zero, so that no rounding error turns a sign and no square underflows in float16.
        """
        values = torch.empty(shape).uniform_(0.5, 1.5, generator=self._generator)
        return values.sub_(2.0 * (values > 1.0)).mul_(size).to(dtype)


def make_parameters(shapes: Shapes, dtype: torch.dtype) -> list[Parameter]:
    """Parameters of these shapes, each with a gradient."""
    source = Source()
    params = []
    for shape in shapes:
        param = Parameter(source.tensor(shape, dtype, WEIGHT))
        param.grad = source.tensor(shape, dtype)
        params.append(param)
    return params
