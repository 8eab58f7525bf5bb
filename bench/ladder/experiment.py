"""The experiment of the essay's ladder: a tanh network that learns another one's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTHS = (16, 64, 64, 64, 32, 8)
TEACHER_SCALE, STUDENT_SCALE = 1.2, 1.0
SAMPLES, BATCH = 2048, 128
WARMUP, COOLDOWN = 0.1, 0.2
# In units of the student's initial loss.
TARGET = 0.03


def schedule(step: int, steps: int) -> float:
    """The part of the learning rate that a step takes, numbered from 0: linear warm-up, constant, cosine cool-down.

    The first step takes 0, as t/T is 0 there.
    """
    done = step / steps
    if done < WARMUP:
        return done / WARMUP
    if done <= 1.0 - COOLDOWN:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (done - (1.0 - COOLDOWN)) / COOLDOWN)


def random_weights(scale: float, generator: torch.Generator) -> list[Tensor]:
    """Matrices [out, in] of N(0, 1)·scale/√in, in fp64."""
    shapes = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) * (scale / math.sqrt(n)) for m, n in shapes]


def activations(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs x [B, 16], what each hidden layer makes of them, and the linear output [B, 8]."""
    layers = [x]
    for w in weights[:-1]:
        layers.append(torch.mm(layers[-1], w.mT).tanh_())
    return [*layers, torch.mm(layers[-1], weights[-1].mT)]


def loss(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> float:
    """Half the mean over samples of the squared error, summed over outputs; x is [B, 16], y [B, 8]."""
    error = activations(weights, x)[-1] - y
    return 0.5 * float(error.square().sum()) / len(x)


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
        y = activations(teacher, x)[-1]
        student = random_weights(STUDENT_SCALE, generator)
        batches = torch.randint(SAMPLES, (steps, BATCH), generator=generator)
        return cls(x.to(dtype), y.to(dtype), [w.to(dtype) for w in student], batches)


class Student:
    """The network in training; its gradients are written by hand, as autograd would take longer than the products."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.params = [nn.Parameter(w.clone(), requires_grad=False) for w in problem.student]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.initial = self.loss()

    def loss(self) -> float:
        """The training loss over all samples."""
        return loss(self.params, self.problem.x, self.problem.y)

    def backward(self, step: int) -> None:
        """Write the gradients of a step's batch."""
        chosen = self.problem.batches[step]
        layers = activations(self.params, self.problem.x[chosen])
        delta = (layers[-1] - self.problem.y[chosen]).div_(len(chosen))  # dL/d(output), [B, out]
        for k in reversed(range(len(self.params))):
            torch.mm(delta.mT, layers[k], out=self.params[k].grad)
            if k:
                delta = torch.mm(delta, self.params[k]).mul_(1.0 - layers[k].square())
