"""The numbers against torch.optim: every combination of options, dtypes, layouts, and what gradients may contain."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import (
    CLASSES,
    COMBINATIONS,
    FULL,
    HALF,
    SHAPES,
    SMALL_SHAPES,
    VARIANTS,
    Case,
    Pair,
    assert_close,
    copy_of,
    has_grad_dtype,
    normal,
    random_gradients,
    ulp_distance,
)

import stepladder as sl


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # torch forks its threads for a root of 2049 elements: on a busy machine that costs a hundred times the root.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hundred_gradients() -> dict[torch.dtype, list[list[Tensor]]]:
    return {dtype: [normal(SHAPES, dtype, seed) for seed in range(1, 101)] for dtype in FULL}


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("case", COMBINATIONS, ids=str)
def test_free_steps(case: Case, dtype: torch.dtype, hundred_gradients):
    tensors = normal(SHAPES, dtype, 0)
    p, q = [copy_of(x) for x in tensors], [copy_of(x) for x in tensors]
    ours, theirs = case.ours(p), case.theirs(q, foreach=False)
    for gradients in hundred_gradients[dtype]:
        for a, b, g in zip(p, q, gradients, strict=True):
            a.grad = b.grad = g
        ours.step()
        theirs.step()
    assert_close(ours, theirs)
    assert torch.equal(p[0].grad, normal(SHAPES, dtype, 100)[0])


def one_sided(shapes: Any, dtype: torch.dtype, maximize: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and gradients for five steps, under which no rule subtracts nearly equal numbers.

    Every parameter moves away from zero: its gradients keep one sign and outweigh the weight decay. Where terms
    cancel, two correct evaluations in fp32 (torch's contracts products and sums, ours do not) may differ by any
    number of half-precision values, so that no bound in ulps of the result could hold there.
    """
    generator = torch.Generator().manual_seed(3)

    def uniform(shape: Any, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    signs = [torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0 for shape in shapes]
    tensors = [(sign * uniform(sign.shape, 0.5, 2.0)).to(dtype) for sign in signs]
    uphill = 1.0 if maximize else -1.0
    gradients = [[(uphill * sign * uniform(sign.shape, 2.0, 4.0)).to(dtype) for sign in signs] for _ in range(5)]
    return tensors, gradients


def check_half_steps(
    case: Case, tensors: list[Tensor], gradients: list[list[Tensor]], fused: bool, moved: int = 0
) -> None:
    """Single steps from torch's own state: parameters and states to 1 ulp of the half type.

    Against torch's fused step, or else against torch in fp32 with every store rounded. `moved`: by how many ulps a
    step must move the median parameter, so that the comparison means something.
    """
    dtype = tensors[0].dtype
    q = [torch.nn.Parameter(x.to(dtype if fused else torch.float32, copy=True)) for x in tensors]
    theirs = case.theirs(q, **({"fused": True} if fused else {"foreach": False}))
    p = [copy_of(x) for x in tensors]
    ours = case.ours(p)
    for step_gradients in gradients:
        with torch.no_grad():
            for a, b in zip(p, q, strict=True):
                a.copy_(b)
        before = [a.detach().clone() for a in p]
        ours.load_state_dict(theirs.state_dict())
        for a, b, g in zip(p, q, step_gradients, strict=True):
            a.grad, b.grad = g.clone(), g.to(b.dtype, copy=True)
        ours.step()
        theirs.step()
        if not fused:
            round_stores(theirs, dtype)
        for a, b, old in zip(p, q, before, strict=True):
            state, expected = ours.state.get(a, {}), theirs.state.get(b, {})
            assert state.keys() == expected.keys()
            assert state.get("step") == expected.get("step")
            for name in ("value", *(set(state) - {"step"})):
                x, y = (a, b) if name == "value" else (state[name], expected[name])
                assert x.dtype == dtype
                distance = ulp_distance(x, y.to(dtype))
                assert x.numel() == 0 or distance.max() <= 1, f"{name}: {int(distance.max())} ulps"
            assert a.numel() < 100 or ulp_distance(a, old).float().median() >= moved


def round_stores(optimizer: Any, dtype: torch.dtype) -> None:
    """Round what a step in fp32 has written, as storing it in `dtype` would."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for param in group["params"]:
                stored = [value for name, value in optimizer.state.get(param, {}).items() if name != "step"]
                for x in (param, *stored):
                    x.copy_(x.to(dtype))


def has_fused_form(case: Case) -> bool:
    return "fused" in inspect.signature(getattr(torch.optim, case.name)).parameters


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", COMBINATIONS, ids=str)
def test_half_steps_against_rounded_stores(case: Case, dtype: torch.dtype):
    case = Case(case.name, case.hyper | {"lr": 0.125}, case.tensor_lr)
    check_half_steps(case, *one_sided(SHAPES, dtype, case.hyper["maximize"]), fused=False, moved=4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in COMBINATIONS if has_fused_form(case)], ids=str)
def test_half_steps_against_fused(case: Case, dtype: torch.dtype):
    case = Case(case.name, case.hyper | {"lr": 0.125}, case.tensor_lr)
    # torch's fused SGD (2.13) never stores half-precision parameters in its vectorised body, and reads the momentum
    # buffer as if it were fp32; its scalar remainder is right, which is all that tensors below 8 elements see.
    shapes = ((3,), (7,), (2, 3), ()) if case.name == "SGD" else SHAPES
    check_half_steps(case, *one_sided(shapes, dtype, case.hyper["maximize"]), fused=True, moved=4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_nan_and_infinity_in_half_precision(case: Case, dtype: torch.dtype):
    tensors, gradients = one_sided(SHAPES, dtype, maximize=False)
    for step_gradients in gradients[::2]:
        poison(step_gradients[0], case)
    check_half_steps(case, tensors, gradients, fused=False)


def poison(gradient: Tensor, case: Case) -> None:
    """Put NaN, both infinities and the largest finite numbers among a gradient's elements."""
    flat = gradient.view(-1)
    flat[1::19] = math.inf
    flat[2::23] = -math.inf
    flat[4::29] = math.nan
    if not case.hyper.get("centered"):
        # Centered, v - a² is inf - inf, or inf where a build of torch contracts it: torch differs from torch.
        flat[8::31] = torch.finfo(gradient.dtype).max
    flat[9::37] = 0.0


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_nan_and_infinity(case: Case, dtype: torch.dtype):
    pair = Pair(case, normal(SHAPES, dtype, 0), foreach=False)
    for step in range(4):
        gradients = random_gradients(pair.p, step)
        if step % 2 == 0:
            poison(gradients[0], case)
            gradients[2].fill_(math.nan)
        pair.step(gradients)
        pair.check(equal_nan=True)
    assert not pair.p[0].isfinite().all()
    assert pair.p[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_complex_parameters(case: Case, dtype: torch.dtype):
    Pair(case, normal(SHAPES, dtype, 0), foreach=False).run(20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_maximize_with_complex_and_real_parameters(case: Case, dtype: torch.dtype):
    Pair(case, normal(SHAPES, dtype, 0), foreach=False, maximize=True).run(5)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_step_count_is_the_parameters_own(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    counts = [0] * len(pair.p)
    for step in range(12):
        given = [step % 3 != 1, step >= 5, step % 2 == 0, True]
        gradients = random_gradients(pair.p, step)
        before = [x.detach().clone() for x in pair.p]
        pair.step([g if there else None for g, there in zip(gradients, given, strict=True)])
        pair.check()
        for i, there in enumerate(given):
            counts[i] += there
            assert there or torch.equal(pair.p[i], before[i])
            if case.name != "SGD" and counts[i]:
                assert float(pair.ours.state[pair.p[i]]["step"]) == counts[i]
    assert counts == [8, 7, 6, 12]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_group_added_in_mid_run_starts_at_one(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(3)
    for x in normal([(6, 7), (5,)], torch.float32, 9):
        pair.p.append(copy_of(x))
        pair.q.append(copy_of(x))
    pair.ours.add_param_group({"params": pair.p[-2:], "lr": 0.2})
    pair.theirs.add_param_group({"params": pair.q[-2:], "lr": 0.2})
    for step in range(4, 7):
        pair.step(random_gradients(pair.p, step))
        pair.check()
        if case.name != "SGD":
            assert [float(pair.ours.state[x]["step"]) for x in (pair.p[0], pair.p[-1])] == [step, step - 3]


def transposed(x: Tensor) -> Tensor:
    return x.t()


def every_second_column(x: Tensor) -> Tensor:
    return x[:, ::2]


def inner_block(x: Tensor) -> Tensor:
    return x[3:13, 2:9]


def one_column(x: Tensor) -> Tensor:
    return x[:, 4]


def off_alignment(x: Tensor) -> Tensor:
    return x.view(-1)[1:]


def permuted(x: Tensor) -> Tensor:
    return x.view(4, 5, -1).permute(2, 0, 1)


def with_a_gap_in_three_dimensions(x: Tensor) -> Tensor:
    return x.view(4, 5, -1)[:, 1:4, 2:].transpose(0, 2)


def eight_dimensions(x: Tensor) -> Tensor:
    return x.view(-1)[:256].view((2,) * 8).permute(7, 0, 6, 1, 5, 2, 4, 3)


def channels_last(x: Tensor) -> Tensor:
    return x.view(2, 5, 4, -1).to(memory_format=torch.channels_last)


def interleaved_rows(x: Tensor) -> Tensor:
    # Offsets 0 2 4 … and 3 5 7 …: the strides do not nest, yet no two elements meet.
    return x.view(-1).as_strided((2, 30), (3, 2))


LAYOUTS = (
    transposed,
    every_second_column,
    inner_block,
    one_column,
    off_alignment,
    permuted,
    with_a_gap_in_three_dimensions,
    eight_dimensions,
    channels_last,
    interleaved_rows,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_parameters_that_are_views(case: Case, layout: Any):
    def leaf() -> tuple[Tensor, Tensor]:
        memory = normal([(20, 14)], torch.float32, 0)[0]
        return memory, layout(memory).requires_grad_()

    (memory, p), (expected_memory, q) = leaf(), leaf()
    ours, theirs = case.ours([p]), case.theirs([q])
    for step in range(4):
        q.grad = random_gradients([q], step)[0]
        p.grad = q.grad.clone()
        ours.step()
        theirs.step()
    assert_close(ours, theirs)
    # What lies between the elements of the view is no business of the step.
    torch.testing.assert_close(memory, expected_memory)
    untouched = memory == normal([(20, 14)], torch.float32, 0)[0]
    assert torch.equal(untouched, expected_memory == normal([(20, 14)], torch.float32, 0)[0])


def gradient_layouts(g: Tensor) -> dict[str, Tensor]:
    """The values of a [4, 6] gradient (of its first row or element where expanded) in other strides."""
    padded = torch.full((9, 20), math.nan)
    strided = padded[1::2, 2::3].copy_(g)
    return {
        "transposed": g.t().contiguous().t(),
        "strided": strided,
        "expanded rows": g[:1].expand(4, 6),
        "expanded columns": g[:, :1].expand(4, 6),
        "expanded scalar": g[0, 0].expand(4, 6),
        "off alignment": torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(4, 6),
        "column of a wider one": torch.stack([g, g + 1], dim=-1)[..., 0],
    }


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients_of_any_layout(case: Case):
    names = tuple(gradient_layouts(torch.zeros(4, 6)))
    pair = Pair(case, [*normal([(4, 6)] * len(names), torch.float32, 0), normal([(6, 4)], torch.float32, 0)[0].t()])
    for step in range(3):
        g = normal([(4, 6)], torch.float32, step)[0]
        pair.step([*gradient_layouts(g).values(), g])
        pair.check()


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_channels_last_gradients_of_contiguous_parameters_and_the_other_way_round(case: Case):
    x = normal([(2, 5, 4, 7)], torch.float32, 0)[0]
    pair = Pair(case, [x, x.to(memory_format=torch.channels_last)])
    for step in range(3):
        g = normal([x.shape], torch.float32, step)[0]
        pair.step([g.to(memory_format=torch.channels_last), g])
        pair.check()


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_gradient_changes_its_layout_at_the_same_address(case: Case):
    pair = Pair(case, normal([(4, 6)], torch.float32, 0))
    memory = torch.empty(48)
    layouts = [(6, 1), (1, 4), (12, 2), (0, 1), (6, 1), (0, 0), (1, 4)]
    for step, strides in enumerate(layouts):
        memory.copy_(normal([(48,)], torch.float32, step)[0])
        g = memory.as_strided((4, 6), strides)
        assert g.data_ptr() == memory.data_ptr()
        pair.step([g])
        pair.check()


GRADIENT_DTYPES = (
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float64),
    (torch.complex64, torch.complex128),
    (torch.complex128, torch.complex64),
)


def parameters_with_gradients_of(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    params = [copy_of(x) for x in tensors]
    for p in params:
        p.grad_dtype = dtype
    return params


@has_grad_dtype
@pytest.mark.parametrize(("dtype", "grad_dtype"), GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients_of_another_dtype(case: Case, dtype: torch.dtype, grad_dtype: torch.dtype):
    # The same as torch in the arithmetic type with every store rounded.
    arithmetic = torch.float32 if dtype in HALF else dtype
    tensors, gradients = (
        one_sided(SHAPES, grad_dtype, maximize=False)
        if not dtype.is_complex
        else (normal(SHAPES, dtype, 0), [normal(SHAPES, grad_dtype, seed) for seed in range(5)])
    )
    p = parameters_with_gradients_of(grad_dtype, [x.to(dtype) for x in tensors])
    q = [torch.nn.Parameter(x.detach().to(arithmetic, copy=True)) for x in p]
    ours, theirs = case.ours(p), case.theirs(q, foreach=False)
    for step_gradients in gradients:
        with torch.no_grad():
            for a, b in zip(p, q, strict=True):
                a.copy_(b)
        ours.load_state_dict(theirs.state_dict())
        for a, b, g in zip(p, q, step_gradients, strict=True):
            a.grad, b.grad = g.clone(), g.to(arithmetic)
            assert a.grad.dtype == grad_dtype
        ours.step()
        theirs.step()
        if dtype not in HALF:
            assert_close(ours, theirs)
            continue
        round_stores(theirs, dtype)
        for a, b in zip(p, q, strict=True):
            state = ours.state.get(a, {})
            stored = [(a, b), *((state[name], theirs.state[b][name]) for name in state if name != "step")]
            assert all(x.numel() == 0 or ulp_distance(x, y.to(dtype)).max() <= 1 for x, y in stored)


@has_grad_dtype
def test_a_gradient_changes_its_dtype_in_mid_run():
    p, q = parameters_with_gradients_of(None, normal([(64, 33)] * 2, torch.float32, 0))
    q.data = p.detach().clone()
    ours, theirs = sl.AdamW([p]), torch.optim.AdamW([q])
    memory = torch.empty(64 * 33, dtype=torch.float64)
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16)):
        g = memory.view(dtype)[: 64 * 33].view(64, 33).copy_(normal([(64, 33)], dtype, step)[0])
        assert g.data_ptr() == memory.data_ptr()
        p.grad, q.grad = g, g.float()
        ours.step()
        theirs.step()
        assert_close(ours, theirs)


def tied(memory: Tensor) -> list[Tensor]:
    """Parameters that share memory: wholly, as a part, and overlapping one another."""
    flat = memory.view(-1)
    n = flat.numel()
    parts = [memory, memory, flat[n // 4 : n // 2], flat[n // 3 : 2 * n // 3], memory.t()]
    return [part.detach().requires_grad_() for part in parts]


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group each"])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_parameters_that_share_memory_step_one_after_the_other(case: Case, grouped: bool):
    # Several chunks for each thread: were the parameters stepped at once, the threads would race.
    size = 300 if case.name in ("SGD", "AdamW") else 30
    memory, expected_memory = normal([(size, size)] * 2, torch.float32, 0)
    expected_memory.copy_(memory)
    p, q = tied(memory), tied(expected_memory)

    def groups(params: list[Tensor]) -> Any:
        return [{"params": [x], "lr": 0.01 * (i + 1)} for i, x in enumerate(params)] if grouped else params

    ours, theirs = case.ours(groups(p)), case.theirs(groups(q))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for step in range(3):
            for a, b, g in zip(p, q, random_gradients(q, step), strict=True):
                a.grad, b.grad = g, g.clone()
            ours.step()
            theirs.step()
            torch.testing.assert_close(memory, expected_memory)
    finally:
        torch.set_num_threads(threads)
    assert_close(ours, theirs)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_parameter_listed_twice_steps_twice(case: Case):
    p, q = (copy_of(x) for x in normal([(17, 5)], torch.float32, 0) * 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = case.ours([p, p])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = case.theirs([q, q])
    for step in range(3):
        p.grad, q.grad = random_gradients([p, q], step)
        q.grad.copy_(p.grad)
        ours.step()
        theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_hundreds_of_groups_of_one_parameter(case: Case):
    tensors = normal([(7,)] * 465, torch.float32, 0)
    p, q = [copy_of(x) for x in tensors], [copy_of(x) for x in tensors]

    def groups(params: list[Tensor]) -> Any:
        return [{"params": [x], "lr": 0.001 * (i % 9), "weight_decay": 0.01 * (i % 4)} for i, x in enumerate(params)]

    ours, theirs = case.ours(groups(p)), case.theirs(groups(q))
    for step in range(3):
        for a, b, g in zip(p, q, normal([(7,)] * 465, torch.float32, step + 1), strict=True):
            a.grad, b.grad = g, g.clone()
        ours.step()
        theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_groups_of_different_dtypes_and_options_in_one_optimizer(case: Case):
    tensors = [normal([(17, 5)], dtype, 0)[0] for dtype in (*FULL, torch.complex64, torch.float32)]
    p, q = [copy_of(x) for x in tensors], [copy_of(x) for x in tensors]

    def groups(params: list[Tensor]) -> Any:
        return [
            {"params": params[:1], "lr": 0.1, "maximize": True},
            {"params": params[1:3], "weight_decay": 0.2},
            {"params": params[3:], "lr": torch.tensor(0.02)},
        ]

    ours, theirs = case.ours(groups(p)), case.theirs(groups(q), foreach=False)
    for step in range(5):
        for a, b, g in zip(p, q, random_gradients(q, step), strict=True):
            a.grad, b.grad = g, g.clone()
        ours.step()
        theirs.step()
    assert_close(ours, theirs)


def test_groups_of_half_and_full_precision_step_as_each_would_alone():
    tensors = [normal([(64, 33)], dtype, 0)[0] for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    together, alone = [copy_of(x) for x in tensors], [copy_of(x) for x in tensors]
    joint = sl.AdamW([{"params": [x], "lr": 0.01 * (i + 1)} for i, x in enumerate(together)])
    single = [sl.AdamW([x], lr=0.01 * (i + 1)) for i, x in enumerate(alone)]
    for step in range(3):
        for a, b, g in zip(together, alone, random_gradients(alone, step), strict=True):
            a.grad, b.grad = g, g.clone()
        joint.step()
        for optimizer in single:
            optimizer.step()
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(joint.state[a]["exp_avg_sq"], single[i].state[b]["exp_avg_sq"])
