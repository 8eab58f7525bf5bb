"""Tasks on real data: handwritten digits, and the characters of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stepladder as sl
from stepladder.bench.charlm import GPT, Text, sample

# Peak learning rate of AdamW for what is no hidden matrix, beside an optimizer of matrices.
REST = 3e-3


class Student:
    """A module of one seed in training.

    Args:
        model: The module.
        training: The loss of a step's batch.
        recorded: The loss that is recorded.
    """

    def __init__(self, model: nn.Module, training: Callable[[int], Tensor], recorded: Callable[[], Tensor]) -> None:
        self.model, self.training, self.recorded = model, training, recorded

    def groups(self, algorithm: str | None, apart: bool) -> list[nn.Parameter] | list[dict[str, Any]]:
        """All parameters; or hidden matrices for an algorithm, and the others for AdamW without decay."""
        if algorithm is None:
            return [*self.model.parameters()]
        return sl.param_groups(self.model, algorithm=algorithm, adamw={"lr": REST, "weight_decay": 0.0})

    def backward(self, step: int) -> None:
        self.model.zero_grad()
        self.training(step).backward()

    @torch.no_grad()
    def losses(self, of: Sequence[int], above: float = math.inf) -> list[float]:
        return [self.recorded().item() for _ in of]


Model = TypeVar("Model", bound=nn.Module)


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """A module with the initial weights of a seed; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make()


DIGITS_BATCH = 128


@cache
def digits_data() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1797 digits of 8 by 8 pixels: values of 0 to 1 [1797, 64] in fp64, and classes [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.data) / 16.0, torch.from_numpy(bunch.target)


def digits(seeds: Sequence[int], steps: int, dtype: torch.dtype) -> Student:
    """A network 64-128-128-10 with ReLU: mean cross-entropy over all digits is recorded, batches are of 128."""
    (seed,) = seeds
    x, y = digits_data()
    x = x.to(dtype)
    batches = torch.randint(len(x), (steps, DIGITS_BATCH), generator=torch.Generator().manual_seed(seed))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    model = seeded(seed, make).to(dtype)
    return Student(
        model,
        lambda step: F.cross_entropy(model(x[batches[step]]), y[batches[step]]),
        lambda: F.cross_entropy(model(x), y),
    )


CONTEXT, WIDTH, LAYERS, HEADS = 64, 64, 2, 4
CHARLM_BATCH, HELD_OUT = 16, 64

text = cache(Text)


def charlm(seeds: Sequence[int], steps: int, dtype: torch.dtype) -> Student:
    """A GPT of two layers, 64 wide: the loss on 64 stretches that it never trains on is recorded."""
    (seed,) = seeds
    data = text()
    generator = torch.Generator().manual_seed(seed)
    model = seeded(seed, lambda: GPT(data.vocabulary, CONTEXT, WIDTH, LAYERS, HEADS)).to(dtype)
    batches = [sample(data.training, CHARLM_BATCH, CONTEXT, generator) for _ in range(steps)]
    # The same for all seeds, so that their losses can be compared.
    held_out = sample(data.validation, HELD_OUT, CONTEXT, torch.Generator().manual_seed(0))
    return Student(model, lambda step: model.loss(*batches[step]), lambda: model.loss(*held_out))
