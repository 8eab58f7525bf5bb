"""Shampoo and SOAP by the GPU's kernels, in the emulator and in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import use_interpreter

import stepladder as sl

SHAPES = ((12, 20), (9,), (3, 4, 5))
FREQUENCY = 3
# In parts of a step, which moves a weight by about lr. Roots in fp32 have errors of 1e-5 of their norm, and as much
# more in the directions in which they are small as the condition's root says: 3 with this damping. Four steps add up.
LR, APART, DAMPING = 0.01, 2e-4, 0.1
# KL-SOAP divides by eigenvalues down to 1e-6 of the largest, which fp32 knows to 6 %.
APART_KL = 1e-2


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    else:
        use_interpreter(monkeypatch)
    return request.param


def trained(make, backend: str | None) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params, backend=backend)
    for _ in range(2 * FREQUENCY + 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params], optimizer


@pytest.mark.parametrize("stagger", [False, True])
def test_shampoo(backend, stagger):
    def make(params, backend):
        every = {"precondition_frequency": FREQUENCY, "stagger": stagger, "merge_dims": False}
        return sl.Shampoo(params, lr=LR, relative_eps=DAMPING, backend=backend, **every)

    found, optimizer = trained(make, backend)
    expected, _ = trained(make, "reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=APART * LR)
    assert all(float(state["failed_roots"]) == 0.0 for state in optimizer.state.values())


@pytest.mark.parametrize("variant", [None, "kl"])
def test_soap(backend, variant):
    def make(params, backend):
        return sl.SOAP(params, lr=LR, precondition_frequency=FREQUENCY, variant=variant, backend=backend)

    found, optimizer = trained(make, backend)
    expected, _ = trained(make, "reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=(APART_KL if variant else APART) * LR)
    assert all(float(state["failed_bases"]) == 0.0 for state in optimizer.state.values())
