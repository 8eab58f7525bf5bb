"""Parameters and gradients with random data in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from stepladder.bench.shapes import Shapes

# The size of weights, beside gradients of size one: GPT-2's initial standard deviation.
WEIGHT = 0.02


class Source:
    """Random tensors, the same in every run.

    Args:
        device: Where they are drawn and stay: other values on another type of device.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(2024)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
        """Random values of both signs whose magnitude is between size/2 and size.

        Bounded away from zero, so that no rounding error turns a sign and no square underflows in float16.
        """
        values = torch.empty(shape, device=self._device).uniform_(0.5, 1.5, generator=self._generator)
        return values.sub_(2.0 * (values > 1.0)).mul_(size).to(dtype)


def make_parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Parameter]:
    """Parameters of these shapes, each with a gradient."""
    source = Source(device)
    params = []
    for shape in shapes:
        param = Parameter(source.tensor(shape, dtype, WEIGHT))
        param.grad = source.tensor(shape, dtype)
        params.append(param)
    return params


def grouped(params: Iterable[Parameter], lr: float, apart: bool) -> list[Any]:
    """What an optimizer is constructed from: the parameters, or a group for each.

    Args:
        params: In the order of their shapes.
        lr: Of the first group; it doubles up to the last.
        apart: Whether each parameter is to have a group of its own.
    """
    listed = list(params)
    if not apart:
        return listed
    return [{"params": [param], "lr": lr * (1 + i / len(listed))} for i, param in enumerate(listed)]
