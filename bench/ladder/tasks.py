"""What is raced on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from stepladder.bench.ladder import real, teacher


class Students(Protocol):
    """The networks of some seeds in training, all by one optimizer."""

    def groups(self, algorithm: str | None, apart: bool) -> Sequence[Any]:
        """What an optimizer is given: parameters, or groups of them.

        Args:
            algorithm: For hidden matrices; None where it takes every parameter alike.
            apart: No parameter may belong to more than one seed.
        """
        ...

    def backward(self, step: int) -> None:
        """Write the gradients of a step's batch."""
        ...

    def losses(self, of: Sequence[int], above: float = ...) -> list[float] | None:
        """The loss that is recorded, of some of the networks; perhaps None where all of them are above a value."""
        ...


@dataclass(frozen=True)
class Task:
    """Networks and data.

    Attributes:
        name: What `--task` takes.
        about: What is learned, in half a sentence.
        loss: What is recorded, for an axis.
        target: The loss to reach.
        steps: T, with the preset "fast".
        begin: Makes the networks of some seeds for a number of steps.
        every: Steps between two records of the loss, with the preset "fast".
        rates: How many of each grid are tried, likewise; None is all.
        together: All seeds of a rate train at once.
        module: That must be installed for it, if any.
        package: Which has that module; an extra of the task's name installs it.
    """

    name: str
    about: str
    loss: str
    target: float
    steps: int
    begin: Callable[[Sequence[int], int, torch.dtype], Students]
    every: int = 10
    rates: int | None = None
    together: bool = False
    module: str | None = None
    package: str | None = None

    @property
    def missing(self) -> str | None:
        """The package that would have to be installed for it, if any."""
        return self.package if self.module and find_spec(self.module) is None else None


TASKS = {
    task.name: task
    for task in (
        Task(
            name="teacher",
            about="a tanh network learns another one's outputs",
            loss="training loss / initial loss",
            target=teacher.TARGET,
            steps=1500,
            begin=teacher.Students,
            rates=3,
            together=True,
        ),
        Task(
            name="digits",
            about="a network of three layers learns scikit-learn's handwritten digits",
            loss="training loss in nats",
            target=0.03,
            steps=400,
            begin=real.digits,
            module="sklearn",
            package="scikit-learn",
        ),
        Task(
            name="charlm",
            about="a GPT of two layers learns the characters of Python's manual",
            loss="validation loss in nats a character",
            target=2.3,
            steps=300,
            begin=real.charlm,
        ),
    )
}
