"""Every backend against the reference: the same bits for every rule, dtype, layout and vector width."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPES, Case, Kernels, assert_same, gradient, moved, same_bits, twins, with_infinities

import stepladder as sl
from stepladder import _C, reference
from stepladder.optim.state import RULES


def misaligned(n: int, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that starts one element after an allocation does."""
    return torch.randn(n + 1, dtype=torch.float64).to(dtype)[1:]


def run(ours, theirs, gradients, steps=10):
    for step in range(steps):
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            for i, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
                q.grad = gradients(i, step, q)
                g = None if q.grad is None else q.grad.clone(memory_format=torch.preserve_format)
                p.grad = None if g is None else moved(g, p.device.type)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_every_rule_has_a_case_and_a_reference():
    assert {case.rule for case in CASES} == set(RULES) == set(reference.RULES)
    for case in CASES:
        group = case.make([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        assert case.optimizer.rule(group) == case.rule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: Case, dtype: torch.dtype, kernels: Kernels):
    tensors = [torch.randn(n, dtype=torch.float64).to(dtype) for n in kernels.sizes]
    p, q = twins(tensors, kernels.device)
    base = misaligned(4099, dtype)
    q.append(torch.nn.Parameter(base.clone()))
    p.append(torch.nn.Parameter(moved(base, kernels.device)))
    assert p[-1].data_ptr() % 16 != 0
    generator = torch.Generator().manual_seed(1)
    run(
        case.make(p, backend=kernels.backend),
        case.make(q, backend="reference"),
        lambda i, step, x: gradient(x.shape, dtype, generator),
    )
    # Centered RMSprop in a half dtype may round its variance below zero, as torch's does.
    if "centered" not in case.rule:
        assert p[4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infinities_and_nan(case: Case, dtype: torch.dtype, kernels: Kernels):
    p, q = twins([torch.randn(n, dtype=torch.float64).to(dtype) for n in (31, 4097, 20_000)], kernels.device)
    generator = torch.Generator().manual_seed(2)

    def gradients(i, step, x):
        g = gradient(x.shape, dtype, generator)
        return with_infinities(g) if step >= 3 else g

    run(case.make(p, backend=kernels.backend), case.make(q, backend="reference"), gradients)
    assert p[1].isnan().any()


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vector_widths(case: Case, isa: str):
    tensors = [torch.randn(n, dtype=torch.float64).to(dtype) for dtype in DTYPES for n in (1, 33, 5000)]
    p, q = twins(tensors)
    ours = case.make(p, backend="cpu")
    ours._engine.plan.isa = isa
    generator = torch.Generator().manual_seed(3)
    run(ours, case.make(q, backend="reference"), lambda i, s, x: gradient(x.shape, x.dtype, generator), steps=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_state(case: Case, dtype: torch.dtype, kernels: Kernels):
    p, q = twins([torch.randn(n, dtype=torch.float64).to(dtype) for n in (3, 4097, 9000)], kernels.device)
    generator = torch.Generator().manual_seed(4)
    ours = case.make(p, backend=kernels.backend, state_dtype=torch.float32)
    run(
        ours,
        case.make(q, backend="reference", state_dtype=torch.float32),
        lambda i, step, x: gradient(x.shape, dtype, generator),
    )
    for name in RULES[case.rule]["states"]:
        assert ours.state[p[0]][name].dtype == torch.float32


LAYOUTS = {
    "channels_last": lambda dtype: torch.randn(4, 6, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last),
    "transposed": lambda dtype: torch.randn(70, 31).to(dtype).t(),
    "sliced": lambda dtype: torch.randn(40, 60).to(dtype)[:, ::2],
    "permuted": lambda dtype: torch.randn(5, 70, 7, 3).to(dtype).permute(2, 0, 3, 1),
    "narrowed": lambda dtype: torch.randn(90, 130).to(dtype)[3:80, 5:110],
    "scalar": lambda dtype: torch.randn(()).to(dtype),
    "ones": lambda dtype: torch.randn(1, 5, 1).to(dtype),
}


@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: Case, layout: str, rounding: bool, kernels: Kernels):
    """Parameters of every layout, with gradients of the same, of contiguous, and of expanded layout."""
    dtype = torch.bfloat16
    tensors = [LAYOUTS[layout](dtype) for _ in range(3)]
    p, q = twins(tensors, kernels.device)
    options = {"stochastic_rounding": True, "seed": 11} if rounding else {}
    generator = torch.Generator().manual_seed(5)

    def gradients(i, step, x):
        g = gradient(x.shape, dtype, generator)
        if i == 0:
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(g)
        if i == 1 and x.dim() > 1:
            return g[:1].expand(x.shape)
        return g

    ours, theirs = case.make(p, backend=kernels.backend, **options), case.make(q, backend="reference", **options)
    for step in range(4):
        for i, (a, b) in enumerate(zip(p, q, strict=True)):
            b.grad = gradients(i, step, b)
            a.grad = moved(b.grad, kernels.device)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stochastic_rounding(case: Case, kernels: Kernels):
    sizes = (1, 7, 31, 4097, min(70_001, kernels.largest))
    p, q = twins([torch.randn(n).to(torch.bfloat16) for n in sizes] + [torch.randn(9)], kernels.device)
    options = {"stochastic_rounding": True, "seed": 2**63 + 12345}
    generator = torch.Generator().manual_seed(6)
    nearest, _ = twins([x.detach().cpu() for x in p])
    plain = case.make(nearest, backend="cpu")

    def gradients(i, step, x):
        g = gradient(x.shape, x.dtype, generator)
        return with_infinities(g) if i == 3 else g

    ours = case.make(p, backend=kernels.backend, **options)
    run(ours, case.make(q, backend="reference", **options), gradients)
    for a, b in zip(nearest, p, strict=True):
        a.grad = b.grad.cpu()
    plain.step()
    assert not same_bits(nearest[4], p[4])


def test_stochastic_rounding_is_unbiased():
    """A step of a hundredth of bf16's spacing moves the mean by that much, and never a value to the nearest."""
    p = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1.0)
    spacing = 2.0**-8  # below 1
    sl.SGD([p], lr=0.01 * spacing, stochastic_rounding=True, seed=3).step()
    moved = (1.0 - p.detach().double()) / spacing
    assert set(moved.tolist()) == {0.0, 1.0}
    # Binomial with success 0.01: five standard deviations of the mean.
    assert abs(moved.mean().item() - 0.01) < 5 * (0.01 * 0.99 / (1 << 16)) ** 0.5


def test_rounding_does_not_depend_on_threads_or_layout():
    results = []
    for threads, shape in ((1, (300, 400)), (2, (300, 400)), (2, (400, 300))):
        torch.set_num_threads(threads)
        base = torch.linspace(-1, 1, 120_000).to(torch.bfloat16)
        p = torch.nn.Parameter(base.view(300, 400).clone() if shape[0] == 300 else base.view(300, 400).t().clone().t())
        p.grad = torch.full_like(p, 0.37)
        sl.SGD([p], lr=1e-3, stochastic_rounding=True, seed=1).step()
        results.append(p.detach().contiguous())
    torch.set_num_threads(2)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype, kernels: Kernels):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    p, q = twins([torch.randn(n).to(dtype) for n in (5, 5000)], kernels.device)
    for x in (*p, *q):
        x.grad_dtype = grad_dtype
    generator = torch.Generator().manual_seed(7)
    run(
        sl.AdamW(p, backend=kernels.backend),
        sl.AdamW(q, backend="reference"),
        lambda i, step, x: gradient(x.shape, grad_dtype, generator),
        steps=3,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_with_their_own_hyper_parameters(case: Case, kernels: Kernels):
    tensors = [torch.randn(50 + i, dtype=torch.float64).to(DTYPES[i % 4]) for i in range(12)]
    p, q = twins(tensors, kernels.device)
    groups = [[{"params": x[i : i + 3], "lr": 0.01 * (i + 1)} for i in range(0, 12, 3)] for x in (p, q)]
    generator = torch.Generator().manual_seed(8)
    run(
        case.make(groups[0], backend=kernels.backend),
        case.make(groups[1], backend="reference"),
        # Gradients come and go, so that step counts differ within a group.
        lambda i, step, x: None if (i + step) % 3 == 0 else gradient(x.shape, x.dtype, generator),
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer.complex_parameters], ids=str)
def test_complex(case: Case, dtype: torch.dtype, kernels: Kernels):
    tensors = [torch.randn(5, dtype=dtype), torch.randn(70, 40, dtype=dtype).t(), torch.randn((), dtype=dtype)]
    p, q = twins(tensors, kernels.device)
    generator = torch.Generator().manual_seed(9)
    run(
        case.make(p, backend=kernels.backend),
        case.make(q, backend="reference"),
        lambda i, step, x: torch.randn(x.shape, dtype=dtype, generator=generator),
        steps=4,
    )
