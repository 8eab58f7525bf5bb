"""Gradient norms and clipping: the op against torch and the reference, and the fused form."""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import CASES, DTYPES, Case, assert_same, gradient, same_bits, twins, with_infinities

import stepladder as sl
from stepladder import reference

NORMS = (1.0, 2.0, math.inf)


def parameters(dtype=torch.float32, sizes=(0, 1, 130, 4097, 50_000)):
    p, q = twins([torch.randn(n, dtype=torch.float64).to(dtype) for n in sizes])
    for a, b in zip(p, q, strict=True):
        a.grad = torch.randn(a.shape, dtype=torch.float64).to(dtype)
        b.grad = a.grad.clone()
    return p, q


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [*NORMS, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_against_torch(dtype, norm_type, max_norm):
    p, q = parameters(dtype)
    ours = sl.ops.clip_grad_norm_(p, max_norm, norm_type)
    if norm_type in NORMS:
        # torch rounds each tensor's norm to the gradients' dtype, which in double does not matter.
        for x in q:
            x.data, x.grad = x.data.double(), x.grad.double()
    theirs = torch.nn.utils.clip_grad_norm_([x for x in q if x.numel()], max_norm, norm_type)
    torch.testing.assert_close(ours, theirs.to(ours.dtype))
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a.grad, b.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_same_bits_as_the_reference(dtype, norm_type):
    p, q = parameters(dtype)
    assert same_bits(sl.ops.clip_grad_norm_(p, 0.7, norm_type), reference.clip_grad_norm_(q, 0.7, norm_type))
    for a, b in zip(p, q, strict=True):
        assert same_bits(a.grad, b.grad)


def test_same_bits_with_any_layout_and_number_of_threads():
    base = torch.randn(64, 33, 9, 5)
    norms = []
    for threads in (1, 2, 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.set_num_threads(threads)
            p = torch.nn.Parameter(torch.empty_like(base, memory_format=layout))
            p.grad = base.clone(memory_format=layout)
            norms.append(sl.ops.clip_grad_norm_([p], 1.0))
    assert all(same_bits(norms[0], norm) for norm in norms)


def test_no_write_where_nothing_is_clipped():
    p = torch.nn.Parameter(torch.ones(10))
    p.grad = torch.ones(10)
    version = p.grad._version
    sl.ops.clip_grad_norm_(p, 100.0)
    assert p.grad._version == version
    sl.ops.clip_grad_norm_(p, 1.0)
    assert p.grad._version > version


def test_found_inf_looks_at_elements_not_at_the_sum():
    p = torch.nn.Parameter(torch.zeros(5000))
    found = torch.zeros(())
    p.grad = torch.full_like(p, 1e30)  # finite, its square is not
    assert sl.ops.clip_grad_norm_(p, 1.0, found_inf=found).isinf()
    assert found == 0.0
    p.grad = torch.ones_like(p)
    p.grad[4321] = float("nan")
    sl.ops.clip_grad_norm_(p, 1.0, found_inf=found)
    assert found == 1.0
    p.grad = torch.ones_like(p)
    sl.ops.clip_grad_norm_(p, 1.0, found_inf=found)
    assert found == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_as_torch(value):
    p, q = parameters()
    for x in (p, q):
        x[3].grad[7] = value
    ours = sl.ops.clip_grad_norm_(p, 1.0)
    theirs = torch.nn.utils.clip_grad_norm_(q, 1.0)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
    before = [x.grad.clone() for x in p]
    p[3].grad[7] = value
    with pytest.raises(RuntimeError, match=re.escape("The total norm of order 2.0 for gradients from `parameters`")):
        sl.ops.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    for x, g in zip(p[:3], before[:3], strict=True):
        assert same_bits(x.grad, g)


def test_complex_and_empty():
    p, q = twins([torch.randn(300, dtype=torch.complex64), torch.randn(4)])
    for a, b in zip(p, q, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    torch.testing.assert_close(sl.ops.clip_grad_norm_(p, 0.5), torch.nn.utils.clip_grad_norm_(q, 0.5))
    torch.testing.assert_close(p[0].grad, q[0].grad)
    assert sl.ops.clip_grad_norm_([torch.nn.Parameter(torch.ones(3))], 1.0) == 0.0
    assert sl.ops.clip_grad_norm_([], 1.0) == 0.0


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_refuses_max_norm(max_norm):
    with pytest.raises(ValueError, match=r"max_norm=.* is out of range, expected at least 0"):
        sl.ops.clip_grad_norm_([], max_norm)


def test_refuses_sparse_gradients():
    p = torch.nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="clip_grad_norm_ does not support sparse gradients"):
        sl.ops.clip_grad_norm_([p], 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused(case: Case, dtype):
    """A step with max_norm: as the reference, bit for bit, gradients untouched, the norm told."""
    p, q = parameters(dtype)
    ours = case.make(p, max_norm=0.3, backend="cpu")
    theirs = case.make(q, max_norm=0.3, backend="reference")
    assert ours.grad_norm is None
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for a, b in zip(p, q, strict=True):
            a.grad = gradient(a.shape, dtype, generator)
            b.grad = a.grad
        kept = [a.grad.clone() for a in p]
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        assert ours.grad_norm == theirs.grad_norm > 0.3
        assert all(same_bits(a.grad, g) for a, g in zip(p, kept, strict=True))


def test_fused_equals_clip_then_step():
    p, q = parameters()
    ours, apart = sl.AdamW(p, max_norm=0.3), sl.AdamW(q)
    norm = sl.ops.clip_grad_norm_(q, 0.3)
    ours.step()
    apart.step()
    assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for a, b in zip(p, q, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unscaling_clipping_and_maximizing_together(case: Case, dtype):
    """GradScaler's scale, max_norm and maximize in one step; unscaled gradients are written back."""
    p, q = parameters(dtype)
    options = {"max_norm": 0.3, "maximize": True}
    ours, theirs = case.make(p, backend="cpu", **options), case.make(q, backend="reference", **options)
    for optimizer in (ours, theirs):
        optimizer.grad_scale = torch.tensor(3.0)
        optimizer.found_inf = torch.tensor(0.0)
    for _ in range(2):
        scaled = [torch.randn(a.shape, dtype=torch.float64).to(dtype) for a in p]
        for a, b, g in zip(p, q, scaled, strict=True):
            a.grad, b.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        assert ours.grad_norm == theirs.grad_norm
        for a, g in zip(p, scaled, strict=True):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert same_bits(a.grad, (g.to(wide) * (1 / 3)).to(dtype))


def test_nan_norm_spoils_the_step_as_torch_does():
    p, q = parameters()
    for x in (p, q):
        with_infinities(x[2].grad)
    sl.AdamW(p, max_norm=1.0).step()
    torch.nn.utils.clip_grad_norm_(q, 1.0)
    torch.optim.AdamW(q).step()
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), math.inf])
def test_fused_refuses_max_norm(max_norm):
    with pytest.raises(ValueError, match=r"max_norm=.* is out of range"):
        sl.AdamW([torch.nn.Parameter(torch.zeros(1))], max_norm=max_norm)
