"""Shampoo and SOAP by the GPU's kernels, in the emulator and in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import use_interpreter

import stepladder as sl

# Of gradients whose factors have full rank: null spaces have no basis of their own.
SHAPES = ((12, 12), (9,), (3, 4, 5))
FREQUENCY = 3
LR, DAMPING = 0.01, 0.1


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    else:
        use_interpreter(monkeypatch)
    return request.param


def trained(make, backend: str | None, dtype=torch.float32) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = make(params, backend=backend)
    for _ in range(2 * FREQUENCY + 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def check(found: list[torch.Tensor], make) -> None:
    """No further from the reference in fp64 than twice as far as the reference in fp32 is."""
    exact, _ = trained(make, "reference", torch.float64)
    rounded, _ = trained(make, "reference")
    for x, y, e in zip(found, rounded, exact, strict=True):
        assert float((x - e).abs().max()) <= 2.0 * float((y - e).abs().max())


@pytest.mark.parametrize("stagger", [False, True])
def test_shampoo(backend, stagger):
    def make(params, backend):
        every = {"precondition_frequency": FREQUENCY, "stagger": stagger, "merge_dims": False}
        return sl.Shampoo(params, lr=LR, relative_eps=DAMPING, backend=backend, **every)

    found, optimizer = trained(make, backend)
    check(found, make)
    assert all(float(state["failed_roots"]) == 0.0 for state in optimizer.state.values())


@pytest.mark.parametrize("variant", [None, "kl"])
def test_soap(backend, variant):
    def make(params, backend):
        return sl.SOAP(params, lr=LR, precondition_frequency=FREQUENCY, variant=variant, backend=backend)

    found, optimizer = trained(make, backend)
    check(found, make)
    assert all(float(state["failed_bases"]) == 0.0 for state in optimizer.state.values())
