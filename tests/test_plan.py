"""The plan: what it notices, what it allocates, how it orders work, and how it reads tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, assert_same, same_bits, twins

import stepladder as sl
from stepladder import _C
from stepladder.optim import engine

# The members of the C library's struct mallinfo2.
MALLINFO2 = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


def graded(*tensors: torch.Tensor) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(t) for t in tensors]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def bound_again(optimizer) -> int:
    """How many parameters the next step has to bind anew."""
    stale = optimizer._engine._refresh(optimizer)
    optimizer._engine.plan.release()
    return -1 if stale is None else len(stale)


def test_steady_steps_bind_nothing():
    params = graded(torch.randn(5), torch.randn(4, 4))
    optimizer = sl.AdamW(params)
    optimizer.step()
    assert bound_again(optimizer) == 0
    for p in params:
        p.grad = torch.randn_like(p)  # moved, same layout
    assert bound_again(optimizer) == 0
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    assert bound_again(optimizer) == 0
    params[0].grad = None
    assert bound_again(optimizer) == 0


def swap_param_data(optimizer, p):
    p.data = p.data.clone()


def swap_state(optimizer, p):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()


def swap_state_data(optimizer, p):
    optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].data.clone()


def swap_step_data(optimizer, p):
    optimizer.state[p]["step"].data = optimizer.state[p]["step"].data.clone()


def grad_layout(optimizer, p):
    """Another layout at the same address."""
    p.grad = torch.empty_strided((8, 8), (1, 8)).set_(p.grad.untyped_storage(), 0, (8, 8), (1, 8))


def dtype(optimizer, p):
    p.data, p.grad = p.data.double(), p.grad.double()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][key] = optimizer.state[p][key].double()


def option(optimizer, p):
    optimizer.param_groups[0]["maximize"] = True


@pytest.mark.parametrize(
    "change", [swap_param_data, swap_state, swap_state_data, swap_step_data, grad_layout, dtype, option]
)
def test_notices(change):
    (p,), (q,) = twins([torch.randn(8, 8)])
    ours, theirs = sl.AdamW([p]), sl.AdamW([q], backend="reference")
    for step in range(4):
        p.grad = torch.randn(8, 8).to(p.dtype)
        q.grad = p.grad.clone()
        if step == 2:
            change(ours, p)
            change(theirs, q)
            assert bound_again(ours) != 0
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def hold_tensor(optimizer, p):
    moment = optimizer.state[p]["exp_avg"]

    def swap():
        moment.data = moment.data.clone()

    return swap


def hold_entry(optimizer, p):
    entry = optimizer.state[p]
    return lambda: entry.update(exp_avg=entry["exp_avg"].clone())


def hold_state(optimizer, p):
    state = optimizer.state
    return lambda: state[p].update(step=state[p]["step"] + 5)


def hold_checkpoint(optimizer, p):
    saved = optimizer.state_dict()["state"]
    return lambda: saved[0].update(exp_avg_sq=saved[0]["exp_avg_sq"] * 2)


@pytest.mark.parametrize("hold", [hold_tensor, hold_entry, hold_state, hold_checkpoint])
def test_notices_changes_through_references_held_since_long(hold):
    """States are trusted only while nobody holds a reference to them: here somebody does, and uses it later."""
    (p,), (q,) = twins([torch.randn(8, 8)])
    ours, theirs = sl.AdamW([p]), sl.AdamW([q], backend="reference")
    changes = None
    for step in range(8):
        p.grad = torch.randn(8, 8)
        q.grad = p.grad.clone()
        if step == 2:
            changes = hold(ours, p), hold(theirs, q)
        if step == 6:
            for change in changes:
                change()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_states_are_trusted_while_nobody_holds_them():
    """The steady state of training does not read the states; asking for them once does not end it."""
    params = graded(torch.randn(5), torch.randn(6))
    unused = torch.nn.Parameter(torch.zeros(3))
    optimizer = sl.AdamW([*params, unused])
    for _ in range(4):
        optimizer.step()
    assert not optimizer._state_touched
    assert optimizer._engine.plan.trusts_states
    assert optimizer.state[params[0]]["step"] == 4
    assert optimizer._state_touched
    optimizer.step()
    assert not optimizer._engine.plan.trusts_states
    optimizer.step()
    optimizer.step()
    assert optimizer._engine.plan.trusts_states


def test_groups_changed_by_hand():
    params = graded(*(torch.randn(6) for _ in range(4)))
    optimizer = sl.AdamW(params[:2])
    optimizer.step()
    optimizer.param_groups[0]["params"].append(params[2])
    optimizer.step()
    optimizer.add_param_group({"params": [params[3]], "lr": 0.5})
    optimizer.step()
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 4, 3, 2]


def test_second_step_allocates_nothing():
    params = graded(*(torch.randn(50, 7) for _ in range(300)))
    optimizer = sl.AdamW([{"params": params[i::3]} for i in range(3)], max_norm=1.0)

    def allocated() -> int:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        return sum(abs(event.cpu_memory_usage) for event in profile.events())

    assert allocated() > 0
    assert allocated() == 0

    # The C heap: nothing stays allocated, over steps whose gradients were reallocated too.
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library has no mallinfo2")

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]

    libc.mallinfo2.restype = Mallinfo2
    optimizer.step()
    before = libc.mallinfo2()
    for _ in range(20):
        optimizer.step()
    after = libc.mallinfo2()
    assert after.uordblks + after.hblkhd - before.uordblks - before.hblkhd <= 64 * 20

    tracemalloc.start()
    optimizer.step()
    start, _ = tracemalloc.get_traced_memory()
    optimizer.step()
    end, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert end - start < 2000


def test_threads_are_torchs_own():
    """The kernels run on torch's OpenMP runtime: no second team of threads appears."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("needs /proc")
    torch.set_num_threads(2)
    x = torch.randn(1 << 20)
    x.mul_(2.0)
    params = graded(torch.randn(1 << 20))
    optimizer = sl.AdamW(params)
    before = len(list(tasks.iterdir()))
    optimizer.step()
    optimizer.step()
    assert len(list(tasks.iterdir())) == before
    runtime = _C.openmp_runtime()
    assert runtime is None or Path(runtime).name.startswith(("libgomp", "libomp", "libiomp"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_with_any_number_of_threads(case: Case):
    tensors = [torch.randn(300_000), torch.randn(77), torch.randn(40_000).bfloat16()]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params, _ = twins(tensors)
        for i, p in enumerate(params):
            p.grad = torch.linspace(-1, 1, p.numel()).to(p.dtype) * (i + 1)
        optimizer = case.make(params, max_norm=2.0)
        for _ in range(3):
            optimizer.step()
        results.append((params, optimizer.grad_norm))
    for params, norm in results[1:]:
        assert norm == results[0][1]
        assert all(same_bits(a, b) for a, b in zip(params, results[0][0], strict=True))


def shared_storage(offset: int) -> list[torch.nn.Parameter]:
    base = torch.linspace(-1, 1, 60_000)
    params = [torch.nn.Parameter(base[:40_000]), torch.nn.Parameter(base[offset : offset + 20_000])]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
    return params


@pytest.mark.parametrize("offset", [0, 10_000, 40_000])
def test_parameters_that_share_memory_step_one_after_another(offset):
    p, q = shared_storage(offset), shared_storage(offset)
    ours, theirs = sl.AdamW(p, lr=0.1, backend="cpu"), torch.optim.AdamW(q, lr=0.1, foreach=False)
    for _ in range(5):
        ours.step()
        theirs.step()
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a, b)


def test_interleaved_views():
    base, other = torch.randn(400, 6), None
    other = base.clone()
    p = [torch.nn.Parameter(base[:, i::2]) for i in range(2)]
    q = [torch.nn.Parameter(other[:, i::2]) for i in range(2)]
    for a, b in zip(p, q, strict=True):
        a.grad = torch.randn(a.shape)
        b.grad = a.grad
    ours, theirs = sl.Lion(p, lr=0.1, backend="cpu"), sl.Lion(q, lr=0.1, backend="reference")
    for _ in range(3):
        ours.step()
        theirs.step()
    assert same_bits(base, other)


def test_gradient_that_is_the_parameter():
    p = torch.nn.Parameter(torch.linspace(-3, 3, 5000))
    q = torch.nn.Parameter(p.detach().clone())
    p.grad, q.grad = p.detach(), q.detach()
    sl.AdamW([p], lr=0.1, backend="cpu").step()
    sl.AdamW([q], lr=0.1, backend="reference").step()
    assert same_bits(p, q)


def test_one_gradient_for_two_parameters():
    p, q = twins([torch.randn(5000), torch.randn(5000)])
    g = torch.randn(5000)
    for x in (*p, *q):
        x.grad = g
    ours, theirs = sl.AdamW(p, backend="cpu"), sl.AdamW(q, backend="reference")
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_without_the_exchange_table(monkeypatch):
    """A torch without DLPack's exchange table is read through Python attributes, with the same results."""
    monkeypatch.setattr(
        engine, "new_plan", lambda: _C.StepPlan(None, engine.describe, engine.shares_memory, engine.current_stream)
    )
    tensors = [torch.randn(30), torch.randn(4, 5).t(), torch.randn(9).bfloat16(), torch.randn(3, dtype=torch.complex64)]
    p, q = twins(tensors)
    ours = sl.AdamW(p, backend="cpu")
    assert not ours._engine.plan.has_exchange
    theirs = sl.AdamW(q, backend="reference")
    for _ in range(3):
        for a, b in zip(p, q, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
    assert bound_again(ours) == 0


def test_this_torch_has_the_exchange_table():
    plan = sl.AdamW(graded(torch.zeros(1)))._engine.plan
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no DLPack exchange table")
    assert plan.has_exchange


def test_refuses_an_unknown_vector_width():
    with pytest.raises(RuntimeError, match="no 'avx1024' kernels"):
        sl.AdamW(graded(torch.zeros(1)))._engine.plan.isa = "avx1024"


def test_flush_to_zero_is_not_set():
    """Loading the extension leaves subnormal arithmetic alone, in every thread."""
    tiny = torch.tensor([1e-40])
    results = []
    thread = threading.Thread(target=lambda: results.append((tiny * 0.5).item()))
    thread.start()
    thread.join()
    assert (tiny * 0.5).item() == results[0] != 0.0


def test_steps_in_a_forked_child():
    """A process that has not stepped yet may fork workers that do."""
    code = (
        "import os, torch, stepladder as sl\n"
        "pid = os.fork()\n"
        "p = torch.nn.Parameter(torch.ones(10)); p.grad = torch.ones(10)\n"
        "sl.SGD([p], lr=0.5).step()\n"
        "assert p[0] == 0.5\n"
        "os._exit(0) if pid == 0 else os.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    """Every element of a tensor past the int32 range moves; bf16 SignSGD needs 8.6 GB for it."""
    n = 2**31 + 4099
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    p.grad = torch.ones(n, dtype=torch.bfloat16)
    p.grad[-1] = -1.0
    sl.SignSGD([p], lr=0.5).step()
    view = p.detach().view(torch.int16)
    minus_half, half = torch.tensor([-0.5, 0.5], dtype=torch.bfloat16).view(torch.int16).tolist()
    for start in range(0, n - 1, 1 << 28):
        part = view[start : min(start + (1 << 28), n - 1)]
        assert bool((part == minus_half).all()), f"elements from {start} on"
    assert view[-1].item() == half
