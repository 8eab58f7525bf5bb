"""The essay's task: a tanh network that learns another one's outputs, from several seeds at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTHS = (16, 64, 64, 64, 32, 8)
TEACHER_SCALE, STUDENT_SCALE = 1.2, 1.0
SAMPLES, BATCH = 2048, 128
# In units of the student's initial loss.
TARGET = 0.03
# Samples over which the training loss is summed at once: their activations stay in a cache.
CHUNK = 256


def random_weights(scale: float, generator: torch.Generator) -> list[Tensor]:
    """Matrices [out, in] of N(0, 1)·scale/√in, in fp64."""
    shapes = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) * (scale / math.sqrt(n)) for m, n in shapes]


def activations(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs x [S, B, 16] of S networks [S, out, in], what each hidden layer makes of them, the outputs [S, B, 8]."""
    layers = [x]
    for w in weights[:-1]:
        layers.append(torch.bmm(layers[-1], w.mT).tanh_())
    return [*layers, torch.bmm(layers[-1], weights[-1].mT)]


@dataclass
class Problem:
    """What a seed decides, in the dtype of the run.

    Attributes:
        x: Inputs [2048, 16].
        y: The teacher's outputs [2048, 8].
        student: The weights that every optimizer starts from.
        batches: Indices of the samples of each step [T, 128], drawn with replacement.
    """

    x: Tensor
    y: Tensor
    student: list[Tensor]
    batches: Tensor

    @classmethod
    def of(cls, seed: int, steps: int, dtype: torch.dtype) -> Problem:
        """Everything is drawn and computed in fp64 and rounded once, so that dtypes share their problems."""
        generator = torch.Generator().manual_seed(seed)
        teacher = random_weights(TEACHER_SCALE, generator)
        x = torch.randn(SAMPLES, WIDTHS[0], generator=generator, dtype=torch.float64)
        y = activations([w[None] for w in teacher], x[None])[-1][0]
        student = random_weights(STUDENT_SCALE, generator)
        batches = torch.randint(SAMPLES, (steps, BATCH), generator=generator)
        return cls(x.to(dtype), y.to(dtype), [w.to(dtype) for w in student], batches)


class Students:
    """The networks of S seeds in training, each matrix of theirs as one tensor [S, out, in].

    A network of this size keeps a processor waiting for Python; several take hardly longer than one. Every product is
    a batch of products, one for each seed, and has the bits that it has alone. Gradients are written by hand, as
    autograd would take longer than the products.
    """

    def __init__(self, seeds: Sequence[int], steps: int, dtype: torch.dtype) -> None:
        problems = [Problem.of(seed, steps, dtype) for seed in seeds]
        self.x, self.y = torch.stack([p.x for p in problems]), torch.stack([p.y for p in problems])
        self.weights = [torch.stack(matrices) for matrices in zip(*(p.student for p in problems), strict=True)]
        self.grads = [torch.zeros_like(w) for w in self.weights]
        # Of a step [S·128], into the samples of all seeds.
        self.batches = torch.cat([p.batches + k * SAMPLES for k, p in enumerate(problems)], 1)
        self.initial = torch.ones(len(seeds), dtype=dtype)
        self.initial = torch.tensor(self.losses(range(len(seeds))), dtype=dtype)

    def groups(self, algorithm: str | None, apart: bool) -> list[nn.Parameter]:
        """All weights, with their gradients: of all seeds together [S, out, in], or `apart` [out, in] for each seed.

        All of them are matrices, so that any `algorithm` takes all.
        """
        params = []
        for w, g in zip(self.weights, self.grads, strict=True):
            for part, grad in zip(w, g, strict=True) if apart else [(w, g)]:
                params.append(nn.Parameter(part, requires_grad=False))
                params[-1].grad = grad
        return params

    def losses(self, of: Sequence[int], above: float = math.inf) -> list[float] | None:
        """Half the mean over all samples of the squared error, summed over outputs, in units of the initial one.

        Args:
            of: Which networks.
            above: Where the loss of every one of them is more than that, None may be returned instead. Squares only
                add up, so that some of the samples can be enough to know.
        """
        tensors = [self.x, self.y, self.initial, *self.weights]
        if len(of) < len(self.x):
            tensors = [tensor[list(of)] for tensor in tensors]
        x, y, initial, *weights = tensors
        sums = torch.zeros_like(initial)
        losses: list[float] = []
        for first in range(0, SAMPLES, CHUNK):
            chunk = slice(first, first + CHUNK)
            error = activations(weights, x[:, chunk])[-1] - y[:, chunk]
            sums += error.square_().sum((1, 2))
            losses = (sums / (2 * SAMPLES) / initial).tolist()
            if all(loss > above for loss in losses):
                return None
        return losses

    def backward(self, step: int) -> None:
        """Write the gradients of a step's batch."""
        chosen = self.batches[step]
        shape = (len(self.x), BATCH, -1)
        layers = activations(self.weights, self.x.flatten(0, 1)[chosen].view(shape))
        delta = (layers[-1] - self.y.flatten(0, 1)[chosen].view(shape)).div_(BATCH)  # dL/d(output), [S, B, out]
        for k in reversed(range(len(self.weights))):
            torch.bmm(delta.mT, layers[k], out=self.grads[k])
            if k:
                delta = torch.bmm(delta, self.weights[k]).mul_(1.0 - layers[k].square())
