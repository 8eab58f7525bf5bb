"""What only a step on a GPU does: one launch, tables, scalars that stay on the device, graphs, refusals.

Without a GPU the CUDA kernels run in the emulator; with STEPLADDER_TEST_DEVICE=cuda, on the device.
"""

from __future__ import annotations

import math
import sys
import threading

import pytest
import torch
from cases import CASES, Case, Kernels, assert_same, gradient, moved, same_bits, twins, with_infinities
from conftest import DEVICE
from rounding import allowed_error, relative_error

import stepladder as sl
from stepladder import _C, reference
from stepladder.optim.state import RULES


# Triton's interpreter has tests of its own, in test_triton.py.
@pytest.fixture(params=["cuda"] if DEVICE == "cpu" else ["cuda", "triton"])
def gpu(request) -> Kernels:
    if DEVICE == "cpu":
        request.getfixturevalue("emulated")
    return Kernels(request.param, DEVICE)


@pytest.fixture
def launches(request, gpu):
    """How many kernels have been launched."""
    if gpu.backend != "cuda":
        pytest.skip("launches are counted for CUDA kernels alone")
    module = request.getfixturevalue("emulated").module if DEVICE == "cpu" else _C
    return module.launches


def give_gradients(p, q, generator, change=lambda g: g):
    for a, b in zip(p, q, strict=True):
        b.grad = change(gradient(b.shape, b.dtype, generator))
        a.grad = moved(b.grad.clone(), a.device.type)


def groups_of(params, options):
    return [{"params": params[i :: len(options)]} | option for i, option in enumerate(options)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch_for_all_groups(case: Case, gpu: Kernels, launches):
    """Hundreds of groups, more than fit in a kernel's arguments, some with a gradient at some steps only."""
    p, q = twins([torch.randn(1 + i % 40) for i in range(300)], gpu.device)
    options = [{"lr": 0.01 * (i + 1)} for i in range(100)]
    ours = case.make(groups_of(p, options), backend=gpu.backend)
    theirs = case.make(groups_of(q, options), backend="reference")
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        give_gradients(p, q, generator)
        for i in range(0, 300, 7):
            if step == 1:
                p[i].grad = q[i].grad = None
        before = launches()
        ours.step()
        assert launches() - before == (3 if RULES[case.rule]["norms"] else 1)
        theirs.step()
        assert_same(ours, theirs)


def test_a_launch_for_each_pair_of_dtypes(gpu: Kernels, launches):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    p, q = twins([torch.randn(33).to(dtypes[i % 4]) for i in range(20)], gpu.device)
    ours, theirs = sl.AdamW(p, backend=gpu.backend), sl.AdamW(q, backend="reference")
    give_gradients(p, q, torch.Generator().manual_seed(0))
    before = launches()
    ours.step()
    assert launches() - before == 4
    theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("tensors", [3, 400])
def test_gradients_that_move_and_groups_that_change(gpu: Kernels, tensors: int):
    """In a kernel's arguments and in device memory, of which only what changed is written again."""
    p, q = twins([torch.randn(20) for _ in range(tensors)], gpu.device)
    ours, theirs = sl.AdamW(p, backend=gpu.backend), sl.AdamW(q, backend="reference")
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        give_gradients(p, q, generator)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * step, 0.999)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_shared_memory_is_stepped_in_order(gpu: Kernels):
    def shared(device: str):
        base = torch.linspace(-1, 1, 6000).to(device)
        return [torch.nn.Parameter(base[:4000]), torch.nn.Parameter(base[1000:])]

    p, q = shared(gpu.device), shared("cpu")
    ours, theirs = sl.AdamW(p, backend=gpu.backend), sl.AdamW(q, backend="reference")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        give_gradients(p, q, generator)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_learning_rate_on_the_device(case: Case, dtype: torch.dtype, gpu: Kernels):
    p, q = twins([torch.randn(50), torch.randn(7).bfloat16()], gpu.device)
    lr = torch.tensor(0.02, dtype=dtype, device=gpu.device)
    ours, theirs = case.make(p, backend=gpu.backend, lr=lr), case.make(q, backend="reference", lr=float(lr))
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        give_gradients(p, q, generator)
        lr.fill_(0.02 / (step + 1))
        theirs.param_groups[0]["lr"] = float(lr)
        ours.step()
        theirs.step()
        for a, b in zip(p, q, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaled_gradients(case: Case, gpu: Kernels):
    """GradScaler's scale is applied, and its found_inf heeded, on the device; a skipped step counts nowhere."""
    p, q = twins([torch.randn(4100), torch.randn(9).half()], gpu.device)
    ours, theirs = case.make(p, backend=gpu.backend, max_norm=0.7), case.make(q, backend="reference", max_norm=0.7)
    scale = torch.tensor(64.0, device=gpu.device)
    generator = torch.Generator().manual_seed(0)
    for step, found_inf in enumerate((1.0, 0.0, 1.0, 0.0, 0.0)):
        give_gradients(p, q, generator)
        before = [x.detach().clone() for x in p]
        ours.grad_scale, ours.found_inf = scale, torch.tensor(found_inf, device=gpu.device)
        ours.step()
        if found_inf:
            assert all(same_bits(a, b) for a, b in zip(before, p, strict=True))
            continue
        theirs.grad_scale, theirs.found_inf = scale.cpu(), torch.tensor(0.0)
        theirs.step()
        if step == 1:
            theirs_state = {name: value for name, value in theirs.state.get(q[0], {}).items() if name == "step"}
            assert all(int(ours.state[p[0]][name]) == int(value) == 1 for name, value in theirs_state.items())
        assert_same(ours, theirs)
        assert ours.grad_norm == theirs.grad_norm


def test_a_first_step_that_was_skipped_is_still_to_come(gpu: Kernels):
    """Though states exist already, and the gradient is bound anew: momentum starts with v = g."""
    p, q = twins([torch.randn(8, 8)], gpu.device)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, theirs = sl.SGD(p, backend=gpu.backend, **options), sl.SGD(q, backend="reference", **options)
    generator = torch.Generator().manual_seed(0)
    give_gradients(p, q, generator)
    ours.found_inf = torch.tensor(1.0, device=gpu.device)
    ours.step()
    del ours.found_inf
    for layout in ((8, 1), (1, 8)):
        give_gradients(p, q, generator)
        p[0].grad = torch.empty_strided((8, 8), layout, device=gpu.device).copy_(p[0].grad)
        q[0].grad = p[0].grad.cpu()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipping_on_the_device(case: Case, gpu: Kernels, launches):
    sizes = (0, 1, 130, 4097, 9000, 0)
    p, q = twins([torch.randn(n).to((torch.float32, torch.float64)[i % 2]) for i, n in enumerate(sizes)], gpu.device)
    ours, theirs = case.make(p, backend=gpu.backend, max_norm=0.5), case.make(q, backend="reference", max_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    for change in (lambda g: g, lambda g: g * 1e-9, with_infinities):
        give_gradients(p, q, generator, change)
        before = launches()
        ours.step()
        # Two for the norm, then one (or three) for each of the two dtypes.
        assert launches() - before == 2 + 2 * (3 if RULES[case.rule]["norms"] else 1)
        theirs.step()
        assert_same(ours, theirs)
        assert ours.grad_norm == theirs.grad_norm or (math.isnan(ours.grad_norm) and math.isnan(theirs.grad_norm))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.7, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_clip_grad_norm(dtype, max_norm, norm_type, gpu: Kernels, monkeypatch):
    monkeypatch.setattr(sl.ops.backends, "choose", lambda name, device: gpu.backend)
    tensors = [torch.randn(n).to(dtype) for n in (0, 1, 130, 4097, 9000)] + [torch.randn(40, 30).to(dtype).t()]
    p, q = twins(tensors, gpu.device)
    generator = torch.Generator().manual_seed(0)
    flag = torch.tensor(7.0, device=gpu.device)
    for change, found in ((lambda g: g, 0.0), (with_infinities, 1.0), (lambda g: g, 0.0)):
        give_gradients(p, q, generator, change)
        norm = sl.ops.clip_grad_norm_(p, max_norm, norm_type, found_inf=flag)
        assert same_bits(norm, reference.clip_grad_norm_(q, max_norm, norm_type))
        assert float(flag) == found
        for a, b in zip(p, q, strict=True):
            assert same_bits(a.grad, b.grad)


def test_clip_grad_norm_keeps_nothing_alive(gpu: Kernels, monkeypatch):
    monkeypatch.setattr(sl.ops.backends, "choose", lambda name, device: gpu.backend)
    from weakref import ref

    p = torch.nn.Parameter(torch.ones(5, device=gpu.device))
    p.grad = torch.ones(5, device=gpu.device)
    sl.ops.clip_grad_norm_(p, 1.0)
    gone = ref(p)
    del p
    assert gone() is None


def test_parameters_on_both_sides(gpu: Kernels):
    """Some on the GPU and some on the CPU: one optimizer, one norm."""
    if DEVICE == "cpu":
        pytest.skip("the emulator's device is the CPU itself")
    p, q = twins([torch.randn(50), torch.randn(4097)])
    p[1] = torch.nn.Parameter(q[1].detach().to(DEVICE))
    ours, theirs = sl.AdamW(p, max_norm=0.1), sl.AdamW(q, backend="reference", max_norm=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(p, q, strict=True):
            b.grad = gradient(b.shape, b.dtype, generator)
            a.grad = b.grad.to(a.device)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        assert ours.grad_norm == theirs.grad_norm


@pytest.mark.parametrize("tensors", [3, 400])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replay(case: Case, tensors: int, gpu: Kernels, request):
    """Replays with another learning rate and with gradients replaced in place, eager steps in between."""
    p, q = twins([torch.randn(20 + i % 5) for i in range(tensors)], gpu.device)
    lr = torch.tensor(0.02, dtype=torch.float64, device=gpu.device)
    ours, theirs = case.make(p, backend=gpu.backend, lr=lr, capturable=True), case.make(q, backend="reference", lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def copy_gradients():
        for a, b in zip(p, q, strict=True):
            b.grad = gradient(b.shape, b.dtype, generator)
            if a.grad is None:
                a.grad = torch.empty_like(a)
            a.grad.copy_(b.grad)

    copy_gradients()
    ours.step()
    theirs.step()
    copy_gradients()
    replay = capture(ours, request)
    for step in range(4):
        copy_gradients()
        lr.fill_(0.02 / (step + 1))
        theirs.param_groups[0]["lr"] = float(lr)
        if step == 2:
            ours.step()
        else:
            replay()
        theirs.step()
        for a, b in zip(p, q, strict=True):
            assert same_bits(a, b)
            for name, value in theirs.state.get(b, {}).items():
                assert same_bits(ours.state[a][name], value)


@pytest.mark.parametrize("case", [case for case in CASES if case.rule in ("adamw", "lamb")], ids=str)
def test_graph_outlives_other_steps(case: Case, gpu: Kernels, request):
    """Eager steps of fewer and of more parameters leave alone what a captured step points to."""
    p, q = twins([torch.randn(30) for _ in range(400)], gpu.device)
    ours, theirs = case.make(p, backend=gpu.backend, capturable=True, max_norm=0.5), case.make(q, max_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.empty_like(x) for x in p]

    def step(take, present):
        for i, (a, b, g) in enumerate(zip(p, q, gradients, strict=True)):
            b.grad = gradient(b.shape, b.dtype, generator) if i < present else None
            a.grad = g.copy_(b.grad) if i < present else None
        take()
        theirs.step()
        for a, b in zip(p, q, strict=True):
            assert same_bits(a, b)

    step(ours.step, 400)
    for a, g in zip(p, gradients, strict=True):
        a.grad = g
    replay = capture(ours, request)
    step(replay, 400)
    step(ours.step, 50)
    step(replay, 400)
    for optimizer, like in ((ours, p), (theirs, q)):
        more = torch.nn.Parameter(torch.ones(20_000, device=like[0].device))
        optimizer.add_param_group({"params": [more]})
        like.append(more)
    gradients.append(torch.empty_like(p[-1]))
    step(ours.step, 401)
    for _ in range(2):
        step(replay, 400)


def capture(optimizer, request):
    """Capture one step; returns what replays it."""
    if DEVICE != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return graph.replay
    device = request.getfixturevalue("emulated")
    device.module.begin_capture()
    device.capturing = True
    optimizer.step()
    device.capturing = False
    return device.module.replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_graph_replay_of_muon(gpu: Kernels, request, dtype: torch.dtype):
    """The rate is read from the device, by replays and by eager steps, with the bits of one that the host reads."""
    if gpu.backend != "cuda":
        pytest.skip("matrices are captured with the CUDA kernels alone")
    shapes = [(12, 9), (9, 30), (2, 6, 6), (7, 3, 2, 2), (40, 90)]
    p, q = twins([torch.randn(s) for s in shapes] + [torch.randn(40, 50).bfloat16()], gpu.device)
    vectors = [torch.nn.Parameter(torch.zeros(5, device=gpu.device)) for _ in range(2)]
    rate = torch.tensor(0.05, dtype=dtype, device=gpu.device)
    optimizers = []
    for params, vector, lr, capturable in ((p, vectors[0], rate, True), (q, vectors[1], float(rate), False)):
        params = [torch.nn.Parameter(x.detach().to(gpu.device)) for x in params]
        groups = [{"params": params[:2], "ns_coefficients": "you"}, {"params": params[2:], "weight_decay": 0.3}]
        groups.append({"params": [vector], "algorithm": "adamw", "lr": lr})
        optimizers.append(sl.Muon(groups, lr=lr, backend="cuda", capturable=capturable))
    ours, theirs = optimizers
    pairs = [
        (a, b)
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True)
        for a, b in zip(group["params"], other["params"], strict=True)
    ]
    generator = torch.Generator().manual_seed(0)

    def copy_gradients():
        for a, b in pairs:
            b.grad = torch.randn(b.shape, generator=generator).to(b)
            if a.grad is None:
                a.grad = torch.empty_like(a)
            a.grad.copy_(b.grad)

    copy_gradients()
    ours.step()
    theirs.step()
    copy_gradients()
    replay = capture(ours, request)
    for step, lr in enumerate((0.05, 0.025, 0.1, 0.3)):
        copy_gradients()
        rate.fill_(lr)
        for group in theirs.param_groups:
            group["lr"] = float(rate)
        ours.step() if step == 2 else replay()
        theirs.step()
        for a, b in pairs:
            assert torch.equal(a, b)
            for name, value in theirs.state[b].items():
                assert torch.equal(ours.state[a][name].to(value.device), value)


def test_a_replay_at_a_rate_of_0_leaves_weights_bit_for_bit(gpu: Kernels, request):
    """Where the factor is no number, and zeros keep their signs."""
    if gpu.backend != "cuda":
        pytest.skip("matrices are captured with the CUDA kernels alone")
    start = torch.tensor([[-0.0, 0.0], [1.0, -1.0]])
    p = torch.nn.Parameter(start.to(gpu.device))
    rate = torch.tensor(0.0, device=gpu.device)
    optimizer = sl.Muon([p], lr=rate, backend="cuda", capturable=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    replay = capture(optimizer, request)
    for value in (1.0, math.nan):
        p.grad.fill_(value)
        replay()
        assert same_bits(p.detach().cpu(), start)
    assert bool(optimizer.state[p]["momentum_buffer"].isnan().all())


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator's capture")
def test_a_graph_of_muon_outlives_the_thread_that_captured_it(gpu: Kernels, request):
    """Tables belong to a thread's iterations, and to the optimizers that have captured them."""
    p = torch.nn.Parameter(torch.randn(20, 30))
    p.grad = torch.randn(20, 30)
    optimizer = sl.Muon([p], lr=torch.tensor(0.1), backend="cuda", capturable=True)
    optimizer.step()
    replays = []
    thread = threading.Thread(target=lambda: replays.append(capture(optimizer, request)))
    thread.start()
    thread.join()
    twin = torch.nn.Parameter(p.detach().clone())
    twin.grad = p.grad.clone()
    eager = sl.Muon([twin], lr=0.1, backend="cuda")
    eager.state[twin]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    eager.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
    (kept,) = optimizer._engine._captured.values()
    # This one, the engine's dictionary's, and the argument's: nobody else holds it any more.
    assert sys.getrefcount(kept) <= 3
    eager.step()
    replays[0]()
    assert torch.equal(p, twin)


def test_captures_of_muon_are_refused_with_the_reason(gpu: Kernels, request):
    def optimizer_of(*, dtype=torch.float32, steps=1, backend=gpu.backend, **options):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype, device=gpu.device))
        p.grad = torch.ones_like(p)
        optimizer = sl.Muon([p], backend=backend, **options)
        for _ in range(steps):
            optimizer.step()
        return optimizer

    def refused(optimizer, message):
        (p,) = optimizer.param_groups[0]["params"]
        before = p.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            capture(optimizer, request)
        if DEVICE == "cpu":
            request.getfixturevalue("emulated").capturing = False
        assert torch.equal(p, before)

    refused(optimizer_of(), "capturable=False: construct the optimizer with capturable=True")
    if gpu.backend != "cuda":
        refused(optimizer_of(capturable=True), "stepped by backend 'triton'")
        return
    refused(optimizer_of(capturable=True, steps=0), "take at least one step with the same tensors before the capture")
    refused(optimizer_of(capturable=True, max_norm=1.0), "a GradScaler or max_norm waits for the GPU.*max_norm=1.0")
    scaled = optimizer_of(capturable=True)
    scaled.grad_scale = torch.ones((), device=gpu.device)
    refused(scaled, "a GradScaler or max_norm waits for the GPU")
    refused(optimizer_of(capturable=True, lr=0.0), "lr=0 of parameter 0 would be captured")
    momentum = optimizer_of(capturable=True)
    momentum.param_groups[0]["momentum"] = torch.tensor(0.9, device=gpu.device)
    refused(momentum, "'momentum' of group 0 is a tensor on the GPU")
    without = optimizer_of(capturable=True)
    without.param_groups[0]["params"][0].grad = None
    refused(without, "parameter 0 of group 0 has no gradient")
    wide = optimizer_of(capturable=True)
    wide.state[wide.param_groups[0]["params"][0]]["momentum_buffer"] = torch.zeros(4, 3, device=gpu.device).double()
    refused(wide, "dtypes torch.float32, torch.float32, torch.float64, which cannot be captured")


def test_capture_is_refused_with_the_reason(gpu: Kernels, request):
    def optimizer_of(*sizes, **options):
        params = [torch.nn.Parameter(torch.ones(n, device=gpu.device)) for n in sizes]
        for x in params:
            x.grad = torch.ones_like(x)
        return sl.AdamW(params, backend=gpu.backend, **options), params

    def refused(optimizer, message):
        with pytest.raises(RuntimeError, match=message):
            capture(optimizer, request)
        if DEVICE == "cpu":
            request.getfixturevalue("emulated").capturing = False

    optimizer, _ = optimizer_of(3)
    optimizer.step()
    refused(optimizer, "capturable=False: construct the optimizer with capturable=True")
    optimizer, _ = optimizer_of(3, capturable=True)
    refused(optimizer, "take at least one step with the same tensors before the capture")
    optimizer, params = optimizer_of(3, 4, capturable=True)
    optimizer.step()
    params[1].grad = None
    refused(optimizer, "parameter 1 of group 0 has no gradient")
    params[1].requires_grad_(False)
    refused(optimizer, "take at least one step with the same tensors before the capture")
    optimizer.step()
    capture(optimizer, request)
    optimizer, _ = optimizer_of(3, capturable=True)
    optimizer.step()
    optimizer.param_groups[0]["eps"] = torch.tensor(1e-8, device=gpu.device)
    refused(optimizer, "'eps' of group 0 is a tensor on the GPU")


def test_states_of_unequal_dtype_are_refused(gpu: Kernels):
    p = torch.nn.Parameter(torch.ones(3, device=gpu.device))
    p.grad = torch.ones_like(p)
    optimizer = sl.AdamW([p], backend=gpu.backend)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].double()
    before = p.detach().clone()
    with pytest.raises(TypeError, match=r"'exp_avg' of parameter 0 has dtype torch.float64; on a GPU"):
        optimizer.step()
    assert torch.equal(before, p)


def test_step_counts_are_on_the_device_and_travel(gpu: Kernels):
    p, q = twins([torch.randn(5)], gpu.device)
    ours = sl.AdamW(p, backend=gpu.backend)
    give_gradients(p, q, torch.Generator().manual_seed(0))
    ours.step()
    ours.step()
    assert ours.state[p[0]]["step"].device == p[0].device
    other = torch.optim.AdamW(q)
    other.load_state_dict(ours.state_dict())
    assert int(other.state[q[0]]["step"]) == 2
    again = sl.AdamW(p, backend=gpu.backend)
    again.load_state_dict(other.state_dict())
    assert again.state[p[0]]["step"].device == p[0].device
    assert int(again.state[p[0]]["step"]) == 2


def test_other_streams(gpu: Kernels):
    if DEVICE == "cpu":
        pytest.skip("needs a GPU: the emulator has one stream")
    p, q = twins([torch.randn(3000) for _ in range(400)], gpu.device)
    ours, theirs = sl.AdamW(p, backend=gpu.backend), sl.AdamW(q, backend="reference")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            give_gradients(p, q, generator)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        theirs.step()
    assert_same(ours, theirs)


def test_several_devices(gpu: Kernels):
    if DEVICE == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p, q = twins([torch.randn(50), torch.randn(4097)])
    p = [torch.nn.Parameter(x.detach().to(f"cuda:{i}")) for i, x in enumerate(p)]
    ours, theirs = sl.AdamW(p, max_norm=0.1), sl.AdamW(q, backend="reference", max_norm=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(p, q, strict=True):
            b.grad = gradient(b.shape, b.dtype, generator)
            a.grad = b.grad.to(a.device)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_newton_schulz_of_a_list(gpu: Kernels, method: str):
    shapes = [(12, 9), (8, 40), (2, 5, 6), (40, 70), (0, 3)]
    given = [torch.randn(s).to(dtype) for s, dtype in zip(shapes, [torch.float32, torch.bfloat16] * 3, strict=False)]
    results = sl.ops.newton_schulz([x.to(gpu.device) for x in given], method=method, backend=gpu.backend)
    for x, y in zip(given, results, strict=True):
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        if x.numel():
            allowed = allowed_error(x, method=method, diagonal_apart=gpu.backend != "triton")
            assert relative_error(y.cpu(), reference.newton_schulz(x.double())) < allowed


def test_muon_beside_adamw(gpu: Kernels):
    """Momentum, iteration, decay and update of all matrices in one call; the other group in a launch of its own."""
    starts = [torch.randn(s) for s in [(12, 9), (9, 30), (2, 6, 6)]]
    params = [torch.nn.Parameter(w.clone().to(gpu.device)) for w in starts]
    vector = torch.nn.Parameter(torch.zeros(5, device=gpu.device))
    copies = [torch.nn.Parameter(w.double()) for w in starts]
    ours = sl.Muon([{"params": params}, {"params": [vector], "algorithm": "adamw"}], lr=0.1, backend=gpu.backend)
    exact = sl.Muon(copies, lr=0.1)
    for _ in range(3):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn(q.shape, device=gpu.device)
            q.grad = p.grad.cpu().double()
            q.data.copy_(p.detach())
        vector.grad = torch.ones(5, device=gpu.device)
        before = [q.detach().clone() for q in copies]
        ours.step()
        exact.step()
        for w, p, q in zip(before, params, copies, strict=True):
            u = exact.state[q]["momentum_buffer"]
            # The buffer is an average in fp32, with three roundings a step.
            buffer = ours.state[p]["momentum_buffer"].cpu().double()
            torch.testing.assert_close(buffer, u, rtol=0, atol=9 * 2.0**-24 * float(q.grad.abs().max()))
            ahead = torch.lerp(q.grad, u, 0.95).float()
            allowed = allowed_error(ahead, method="auto", diagonal_apart=gpu.backend != "triton")
            # The weight itself is rounded twice.
            stored = 2 * 2.0**-24 * float(w.norm())
            error = float((p.detach().cpu().double() - q.detach()).norm())
            assert error <= allowed * float((q.detach() - (1 - 0.1 * 0.1) * w).norm()) + stored
    assert (vector.detach() < 0).all()


def test_muon_of_weights_stored_as_in_out(gpu: Kernels):
    """Bit for bit what the transposed weight gets, split along its columns."""
    start, grad = torch.randn(24, 40), torch.randn(24, 40)
    moved_by = []
    for transposed in (False, True):
        w, g = (x.to(gpu.device) for x in ((start.T, grad.T) if transposed else (start, grad)))
        p = torch.nn.Parameter(w.clone(memory_format=torch.contiguous_format))
        p.grad = g.contiguous()
        group = {"params": [p], "split_sizes": (8, 16), "fan_in_fan_out": transposed}
        sl.Muon([group], lr=0.1, adjust_lr_fn="spectral", backend=gpu.backend).step()
        moved_by.append(p.detach().cpu())
    assert torch.equal(moved_by[1].T, moved_by[0])
