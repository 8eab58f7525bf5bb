"""The Triton kernels against the reference, by Triton's interpreter: the same bits for every rule and dtype."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, Case, assert_same, gradient, same_bits, twins, with_infinities
from triton_interpreter import use_interpreter

import stepladder as sl
from stepladder import _C, backends, reference
from stepladder.optim.state import RULES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflows and NaN
ONE_CASE_A_RULE = tuple({case.rule: case for case in CASES}.values())


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    use_interpreter(monkeypatch)


def test_every_rule_is_there():
    from stepladder.triton_kernels.rules import RULES as in_triton

    assert set(in_triton) == set(RULES)


def misaligned(n: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A contiguous parameter that starts one element after an allocation does."""
    return torch.nn.Parameter(torch.randn(n + 1, dtype=torch.float64).to(dtype)[1:])


def run(ours, theirs, gradients, steps=4):
    pairs = list(zip(ours.param_groups, theirs.param_groups, strict=True))
    for step in range(steps):
        index = 0
        for group, other in pairs:
            for p, q in zip(group["params"], other["params"], strict=True):
                p.grad = gradients(index, step, p)
                q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.preserve_format)
                index += 1
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: Case, dtype: torch.dtype):
    """Whole and broken tiles, aligned or not; the last two steps meet Inf and NaN."""
    p, q = twins([torch.randn(n, dtype=torch.float64).to(dtype) for n in (0, 1, 31, 4097)])
    p.append(misaligned(133, dtype))
    q.append(torch.nn.Parameter(p[-1].detach().clone()))
    assert p[-1].data_ptr() % 16 != 0
    generator = torch.Generator().manual_seed(1)

    def gradients(i, step, x):
        g = gradient(x.shape, dtype, generator)
        return with_infinities(g) if step >= 2 else g

    run(case.make(p, backend="triton"), case.make(q, backend="reference"), gradients)
    assert p[3].isnan().any()


@pytest.mark.parametrize("case", ONE_CASE_A_RULE, ids=str)
def test_long_tensors(case: Case):
    """Several tiles to a chunk, several leaves to a sum, several chunks to a tensor."""
    p, q = twins([torch.randn({"adamw": 20_000, "lars": 40_000, "lamb": 40_000}.get(case.rule, 9001))])
    generator = torch.Generator().manual_seed(2)
    ours, theirs = case.make(p, backend="triton"), case.make(q, backend="reference")
    run(ours, theirs, lambda i, step, x: gradient(x.shape, x.dtype, generator), steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in ONE_CASE_A_RULE if RULES[case.rule]["states"]], ids=str)
def test_fp32_state(case: Case, dtype: torch.dtype):
    p, q = twins([torch.randn(n, dtype=torch.float64).to(dtype) for n in (3, 1032)])
    generator = torch.Generator().manual_seed(4)
    ours = case.make(p, backend="triton", state_dtype=torch.float32)
    theirs = case.make(q, backend="reference", state_dtype=torch.float32)
    run(ours, theirs, lambda i, step, x: gradient(x.shape, dtype, generator), steps=2)
    assert all(ours.state[p[0]][name].dtype == torch.float32 for name in RULES[case.rule]["states"])


@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("case", ONE_CASE_A_RULE, ids=str)
def test_layouts(case: Case, rounding: bool):
    """Gradients of the parameter's layout, contiguous, and expanded."""
    dtype = torch.bfloat16
    shapes = [torch.randn(2, 6, 2, 3).contiguous(memory_format=torch.channels_last), torch.randn(8, 15).t()]
    shapes += [torch.randn(9, 60)[:, ::2], torch.randn(3, 4, 5, 2).permute(2, 0, 3, 1), torch.randn(())]
    p, q = twins([x.to(dtype) for x in shapes])
    options = {"stochastic_rounding": True, "seed": 11} if rounding else {}
    generator = torch.Generator().manual_seed(5)
    ours, theirs = case.make(p, backend="triton", **options), case.make(q, backend="reference", **options)
    for step in range(2):
        for i, (a, b) in enumerate(zip(p, q, strict=True)):
            g = gradient(a.shape, dtype, generator)
            if i % 2 == 0:
                g = torch.empty_strided(a.shape, a.stride(), dtype=dtype).copy_(g)
            elif step == 1:
                g = g[:1].expand(a.shape)
            a.grad = b.grad = g
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("case", ONE_CASE_A_RULE, ids=str)
def test_stochastic_rounding(case: Case):
    p, q = twins([torch.randn(n).to(torch.bfloat16) for n in (7, 2056)] + [torch.randn(9)])
    options = {"stochastic_rounding": True, "seed": 2**63 + 12345}
    generator = torch.Generator().manual_seed(6)
    nearest, _ = twins([x.detach() for x in p])
    ours = case.make(p, backend="triton", **options)

    def gradients(i, step, x):
        g = gradient(x.shape, x.dtype, generator)
        return with_infinities(g) if i == 0 else g

    run(ours, case.make(q, backend="reference", **options), gradients, steps=2)
    plain = case.make(nearest, backend="triton")
    for a, b in zip(nearest, p, strict=True):
        a.grad = b.grad
    plain.step()
    assert not same_bits(nearest[1], p[1])


@pytest.mark.parametrize("case", ONE_CASE_A_RULE, ids=str)
def test_groups_gradient_dtypes_and_missing_gradients(case: Case):
    """One launch for each pair of dtypes: groups differ in every hyper-parameter, gradients in dtype."""
    tensors = [
        torch.randn(n, dtype=torch.float64).to(d) for d in (torch.float32, torch.bfloat16) for n in (5, 40, 33, 8)
    ]
    p, q = twins(tensors)

    def groups(params):
        first, second = params[::2], params[1::2]
        return [{"params": first}, {"params": second, "lr": 0.02, "weight_decay": 0.3, "maximize": True}]

    ours, theirs = case.make(groups(p), backend="triton"), case.make(groups(q), backend="reference")
    generator = torch.Generator().manual_seed(7)
    grad_dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    def gradients(i, step, x):
        if (i + step) % 5 == 4:
            return None
        g = gradient(x.shape, torch.float32, generator)
        return g.to(grad_dtypes[(i + step) % 4]) if mixed else g.to(x.dtype)

    mixed = hasattr(torch.Tensor, "grad_dtype")
    for x in [*p, *q] if mixed else []:
        x.grad_dtype = None
    run(ours, theirs, gradients, steps=3)


@pytest.mark.parametrize(
    "case", [case for case in ONE_CASE_A_RULE if case.optimizer in (sl.SGD, sl.Adam, sl.AdamW)], ids=str
)
def test_complex(case: Case):
    p, q = twins(
        [torch.randn(n, dtype=torch.complex64) for n in (3, 130)] + [torch.randn(6, 4, dtype=torch.complex128).t()]
    )
    run(case.make(p, backend="triton"), case.make(q, backend="reference"), lambda i, s, x: torch.randn_like(x), steps=2)


@pytest.mark.parametrize("case", ONE_CASE_A_RULE, ids=str)
def test_scaled_clipped_and_skipped(case: Case):
    """GradScaler's numbers and the clip factor stay on the device; a skipped step moves nothing, no count either."""
    tensors = [torch.randn(n, dtype=torch.float64).to(d) for d in (torch.float32, torch.float16) for n in (0, 9, 1032)]
    p, q = twins(tensors)
    ours, theirs = case.make(p, backend="triton", max_norm=0.5), case.make(q, backend="reference", max_norm=0.5)
    generator = torch.Generator().manual_seed(8)
    for step in range(4):
        for a, b in zip(p, q, strict=True):
            a.grad = gradient(a.shape, torch.float32, generator).to(a.dtype)
            b.grad = a.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.grad_scale = torch.tensor(2.0**step * 3.0)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        assert_same(ours, theirs)
        if step != 2:
            assert ours.grad_norm == theirs.grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_on_the_device(dtype: torch.dtype):
    p, q = twins([torch.randn(40)])
    rate = torch.tensor(0.1, dtype=dtype)
    ours, theirs = sl.Adam(p, lr=rate, backend="triton", capturable=False), sl.Adam(q, lr=0.1, backend="reference")
    theirs.param_groups[0]["lr"] = float(rate)
    for step in range(3):
        p[0].grad = torch.randn(40)
        q[0].grad = p[0].grad.clone()
        rate.fill_(0.1 / (step + 1))
        theirs.param_groups[0]["lr"] = float(rate)
        ours.step()
        theirs.step()
        assert same_bits(p[0], q[0])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_clip_grad_norm(norm_type: float, dtypes: tuple[torch.dtype, ...], monkeypatch):
    p, q = twins([torch.randn(n, dtype=torch.float64).to(d) for d in dtypes for n in (0, 7, 200, 8200)])
    p.append(misaligned(4099, dtypes[0]))
    q.append(torch.nn.Parameter(p[-1].detach().clone()))
    p.append(torch.nn.Parameter(torch.randn(10, 20).t()))
    q.append(torch.nn.Parameter(p[-1].detach().clone()))
    monkeypatch.setattr(backends, "choose", lambda name, device_type: "triton")
    for strange in (None, float("inf"), float("nan")):
        for a, b in zip(p, q, strict=True):
            a.grad = torch.randn(a.shape, dtype=torch.float64).to(a.dtype)
            b.grad = a.grad.clone()
        if strange is not None:
            p[3].grad[8000] = q[3].grad[8000] = strange
        for max_norm in (1e6, 3.0) if strange is None else (3.0,):
            found = torch.zeros(())
            ours = sl.ops.clip_grad_norm_(p, max_norm, norm_type, found_inf=found)
            theirs = reference.clip_grad_norm_(q, max_norm, norm_type)
            assert same_bits(ours, theirs)
            assert all(same_bits(a.grad, b.grad) for a, b in zip(p, q, strict=True))
            assert float(found) == (0.0 if strange is None else 1.0)


def test_overlapping_parameters_are_stepped_in_order():
    base, other = torch.randn(64), torch.randn(64)
    other.copy_(base)
    ours = sl.Lion([base[:40].requires_grad_(), base[20:].requires_grad_()], lr=0.1, backend="triton")
    theirs = sl.Lion([other[:40].requires_grad_(), other[20:].requires_grad_()], lr=0.1, backend="reference")
    run(ours, theirs, lambda i, step, x: torch.randn(x.shape), steps=2)


def test_with_parameters_elsewhere(monkeypatch):
    """Some parameters by Triton, some by the CPU's kernels: one norm over all."""
    choose = backends.choose
    p, q = twins([torch.randn(n) for n in (40, 50, 60)])
    ours = sl.LAMB(p, max_norm=0.5)
    chosen = iter(["cpu", "triton", "cpu"])
    monkeypatch.setattr(backends, "choose", lambda name, kind: next(chosen, None) or choose(name, kind))
    theirs = sl.LAMB(q, max_norm=0.5)
    for a, b in zip(p, q, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    ours.step()
    assert ours._engine.plan.only_device() is None
    monkeypatch.setattr(backends, "choose", lambda name, kind: "reference")
    theirs.step()
    assert all(same_bits(a, b) for a, b in zip(p, q, strict=True))
    assert ours.grad_norm == theirs.grad_norm


def test_a_table_lends_its_words():
    """The words of the C++ table are read where they are, and show what a later step refreshes."""
    p = torch.nn.Parameter(torch.randn(40))
    optimizer = sl.AdamW([p], backend="triton")
    p.grad = torch.randn(40)
    optimizer.step()
    from stepladder.triton_kernels import executor as module

    seen = []
    original = module.PlacedTable.launch

    def launch(self, kernels):
        seen.append(self)
        original(self, kernels)

    module.PlacedTable.launch = launch
    try:
        p.grad = torch.randn(40)
        optimizer.step()
    finally:
        module.PlacedTable.launch = original
    (placed,) = seen
    words = np.asarray(placed.table)
    shape = placed.table.shape
    assert not words.flags.writeable
    assert words[shape["grad"]] == p.grad.data_ptr()
    assert words[shape["param"]] == p.data_ptr()
    assert words[:3].view(np.float64).tolist() == [1e-3, 0.9, 0.999]
    assert (placed.table.rule, placed.table.param, placed.table.state) == ("adamw", "float32", "float32")
    assert placed.table.chunks == 1


def test_a_plan_without_triton_says_so():
    from stepladder.optim import engine

    p = torch.nn.Parameter(torch.randn(4))
    p.grad = torch.randn(4)
    plan = _C.StepPlan(None, engine.describe, engine.shares_memory, engine.current_stream)
    plan.reset([({"params": [p]}, "", ())])
    with pytest.raises(RuntimeError, match="made without Triton"):
        plan.bind_gradients(["triton"])


def test_triton_is_loaded_only_when_it_is_used():
    script = "import sys, stepladder; assert not {'triton', 'stepladder.triton_kernels.kernels'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from stepladder.triton_kernels.aot import compile_kernel, rule_kernels

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for rule, param, state in (("adamw", "float32", "float32"), ("lars", "bfloat16", "float32")):
    for kernel in rule_kernels(rule, param, state):
        compiled = compile_kernel(kernel, 90)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.cubin)
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        print(json.dumps([compiled.name, compiled.ptx, usage, compiled.num_warps, compiled.shared]))
"""


def test_what_is_compiled_ahead_of_time(tmp_path):
    """The interpreter hides approximate division and root, contraction and narrow accesses; the PTX does not."""
    import os

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=True,
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row[0].split("_")[0] for row in rows] == ["update", "prepare", "ratio", "apply"]
    for name, ptx, usage, num_warps, shared in rows:
        assert not re.search(r"fma|approx|\.ftz|\.full", ptx), name
        for instruction in re.findall(r"\b(?:add|sub|mul|div|sqrt|rcp)\.[\w.]*f(?:32|64)\b", ptx):
            assert ".rn." in instruction, f"{name}: {instruction}"
        if name.startswith(("update", "ratio")):
            assert {"div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"\b(?:div|sqrt)\.rn\.f32", ptx)), name
        assert "STACK:0" in usage, f"{name} spills: {usage}"
        assert "LOCAL:0" in usage
        assert num_warps == 4
        assert 0 <= shared <= 48 * 1024
        wide = {
            access: len(re.findall(rf"{access}\.v4\.b32|{access}\.v2\.b64", ptx))
            for access in ("ld.global", "st.global")
        }
        if name.startswith(("update", "apply")):
            # Parameter, state, and a gradient of each dtype: 8 elements of a thread by 16 bytes.
            assert wide["ld.global"] >= 2 + 4 + 2 + 1 + 1 + 1, f"{name}: {wide}"
            assert wide["st.global"] >= 2 + 4 + 2 + 1 + 1 + 1, f"{name}: {wide}"
