"""A cycle of SOAP's steps against its products alone, and against a loop over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stepladder as sl
from stepladder.bench.matrices import Machine, Row, timed
from stepladder.bench.preconditioners import FREQUENCY, TOLERANCE, checked
from stepladder.bench.shapes import llama_1b

PRODUCTS, LOOP = "torch.bmm", "loop over parameters"
LAYERS = 16
# Passes of the bases' Cholesky-QR, each of two products in fp64.
PASSES = 3


def hidden_matrices(layers: int) -> list[tuple[int, int]]:
    """Those of so many of Llama 3.2 1B's 16 layers, which are all alike."""
    return [(shape[0], shape[1]) for shape in llama_1b(layers=layers)[1:] if len(shape) == 2]


class Problem:
    """Weights, the gradients of a cycle, and a factor and a basis for each length of a side.

    Args:
        shapes: Of the matrices.
        device: Where.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.weights = [normal(*shape) * 0.02 for shape in shapes]
        self.grads = [[normal(*shape) for shape in shapes] for _ in range(FREQUENCY)]
        self.factors: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}
        for n in sorted({side for shape in shapes for side in shape}):
            x = normal(n, n)
            self.factors[n] = x @ x.mT / n + torch.eye(n, device=device)
            self.bases[n] = torch.linalg.qr(normal(n, n)).Q

    def optimizer(self, backend: str | None) -> tuple[sl.SOAP, list[torch.nn.Parameter]]:
        """SOAP behind its first step: that makes bases of eigenvectors, which takes long and happens once."""
        params = [torch.nn.Parameter(w.clone()) for w in self.weights]
        optimizer = sl.SOAP(params, precondition_frequency=FREQUENCY, backend=backend)
        given = optimizer.state_dict()
        given["state"] = {
            index: {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": torch.zeros_like(w),
                "factors": torch.cat([self.factors[n].flatten() for n in w.shape]),
                "bases": torch.cat([self.bases[n].flatten() for n in w.shape]),
                "failed_bases": torch.zeros((), device=w.device),
            }
            for index, w in enumerate(self.weights)
        }
        optimizer.load_state_dict(given)
        return optimizer, params

    def step(self, optimizer: sl.SOAP, params: Sequence[torch.nn.Parameter], which: int) -> None:
        for p, g in zip(params, self.grads[which], strict=True):
            p.grad = g
        optimizer.step()

    def cycle(self, optimizer: sl.SOAP, params: Sequence[torch.nn.Parameter]) -> None:
        """Steps of which one refreshes the bases."""
        for which in range(FREQUENCY):
            self.step(optimizer, params, which)

    def products(self) -> Callable[[], None]:
        """What a cycle must multiply, matrices of one shape as a batch: whole Gram matrices, as torch has no half."""
        batches: dict[tuple[int, int], list[Tensor]] = {}
        for g in self.grads[0]:
            batches.setdefault((g.shape[0], g.shape[1]), []).append(g)
        stacks = [
            (torch.stack(own), *(torch.stack([self.bases[n]] * len(own)) for n in shape))
            for shape, own in batches.items()
        ]
        out: dict[tuple[int, ...], Tensor] = {}

        def bmm(a: Tensor, b: Tensor) -> Tensor:
            shape = (len(a), a.shape[1], b.shape[2], a.element_size())
            if shape not in out:
                out[shape] = a.new_empty(shape[:3])
            return torch.bmm(a, b, out=out[shape])

        def two_sided(x: Tensor, left: Tensor, right: Tensor) -> None:
            bmm(left, x)
            bmm(x, right)

        def run() -> None:
            for _ in range(FREQUENCY):
                for g, left, right in stacks:
                    two_sided(g, left.mT, right)
                    two_sided(g, left, right.mT)
                    bmm(g, g.mT)
                    bmm(g.mT, g)
            for g, left, right in stacks:
                two_sided(g, left, right.mT)
                two_sided(g, left.mT, right)
                for basis in (left, right):
                    bmm(basis, basis)
                    wide = basis.double()
                    for _ in range(PASSES):
                        bmm(wide.mT, wide)
                        bmm(wide, wide)

        return run


def measure_soap(machine: Machine, shapes: Sequence[tuple[int, int]], name: str, seconds: float) -> Row:
    """Cycles of ours, of its products by torch.bmm, and of a loop over the parameters in torch, timed in turns.

    Each backend is checked first: over three refreshes of small tensors, and by a step of the matrices themselves,
    against the reference.
    """
    row = Row(f"SOAP, {FREQUENCY} steps, {name}", limit=TOLERANCE)
    problem = Problem(shapes, machine.device)

    def moved(backend: str | None) -> Tensor:
        optimizer, params = problem.optimizer(backend)
        problem.step(optimizer, params, 0)
        return torch.cat([(p.detach() - w).flatten() for p, w in zip(params, problem.weights, strict=True)])

    expected = moved("reference")
    contenders: dict[str, Callable[[], Any]] = {}
    for contender, backend in machine.ours.items():
        whole = float((moved(backend) - expected).norm() / expected.norm())
        row.errors[contender] = max(checked("SOAP", machine.device, backend), whole)
        if contender not in row.red:
            contenders[contender] = partial(problem.cycle, *problem.optimizer(backend))
    del expected
    contenders[PRODUCTS] = problem.products()
    contenders[LOOP] = partial(problem.cycle, *problem.optimizer("reference"))
    return timed(row, machine, contenders, seconds)
