"""Large results of an iteration on the CPU: their memory goes to later ones, and to nobody else's while it is used."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import stepladder as sl
from stepladder import _C, newton_schulz, pool

SHAPE = (2, 512, 512)

pytestmark = pytest.mark.skipif(not _C.matrix_units(), reason="no matrix unit runs here")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def given(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", newton_schulz.KERNEL_DTYPES)
def test_a_result_takes_the_place_of_one_that_is_gone(dtype: torch.dtype):
    shape = (4, 512, 512)
    address = sl.ops.newton_schulz(given(0, shape, dtype)).data_ptr()
    result = sl.ops.newton_schulz(given(1, shape, dtype))
    assert result.data_ptr() == address
    assert result.is_contiguous()
    assert (result.shape, result.dtype) == (shape, dtype)
    assert not result.requires_grad
    fresh = pool.empty(result.shape, result.dtype, result.device)
    assert fresh.data_ptr() != address


@pytest.mark.parametrize("kept", ["itself", "a view", "an array", "a list's other"])
def test_memory_in_use_is_nobody_elses(kept: str):
    result = sl.ops.newton_schulz(given(0))
    expected = result.clone()
    if kept == "a view":
        result = result[1:, 3:5].mT
        expected = expected[1:, 3:5].mT
    elif kept == "an array":
        result = torch.from_numpy(result.numpy())
    elif kept == "a list's other":
        result = sl.ops.newton_schulz([given(1), given(0)])[1]
    for seed in range(2, 5):
        sl.ops.newton_schulz(given(seed))
        assert torch.equal(result, expected)


def test_results_of_threads_are_their_own():
    inputs = [given(seed) for seed in range(4)]
    expected = [sl.ops.newton_schulz(x).clone() for x in inputs]
    failures: list[int] = []

    def work(k: int) -> None:
        held = sl.ops.newton_schulz(inputs[k])
        for _ in range(10):
            if not torch.equal(sl.ops.newton_schulz(inputs[k]), expected[k]) or not torch.equal(held, expected[k]):
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_no_more_is_kept_than_the_limit():
    """By what the system counts as this process's memory."""
    statm = "/proc/self/statm"
    if not os.path.exists(statm):
        pytest.skip("the system does not say how much memory a process has")

    def resident() -> int:
        with open(statm) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    limit, size = _C.KEPT_TENSOR_BYTES, 16 << 20
    like = torch.empty(size // 4)
    kept = [pool.empty(like.shape, like.dtype, like.device).fill_(1.0) for _ in range(limit // size)]
    before = resident()
    kept += [pool.empty(like.shape, like.dtype, like.device).fill_(1.0) for _ in range(6)]
    assert resident() - before >= 5 * size
    kept.clear()
    assert resident() - before <= size
    # What is larger than all that may be kept is not kept at all.
    pool.empty((limit // 4 + 1,), torch.float32, torch.device("cpu")).fill_(1.0)
    assert resident() - before <= size


def test_what_tensors_are_used_for_works():
    result = sl.ops.newton_schulz(given(0))
    expected = result.clone()
    twin = copy.deepcopy(result)
    result.mul_(2.0)
    assert torch.equal(twin, expected)
    assert torch.equal(result, 2.0 * expected)
    result.resize_(3, 4)  # to fewer elements
    assert torch.equal(result.flatten(), 2.0 * expected.flatten()[:12])
    weight = twin.requires_grad_()
    (weight * 2.0).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full(SHAPE, 2.0))
    shared = sl.ops.newton_schulz(given(0)).share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, expected)


def test_an_unused_capsule_gives_its_memory_back():
    address = pool.from_dlpack(_C.kept_tensor([1 << 20], "float32")).data_ptr()
    for _ in range(3):
        capsule = _C.kept_tensor([1 << 20], "float32")
        del capsule
    assert pool.from_dlpack(_C.kept_tensor([1 << 20], "float32")).data_ptr() == address


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ([2, 3], "float64", "a tensor has the dtype 'float64', expected float32, bfloat16 or float16"),
        ([2, 0], "float32", "a tensor has 0 elements, expected at least 1"),
    ],
)
def test_refusals(shape: list[int], dtype: str, message: str):
    with pytest.raises(_C.Error, match=message):
        _C.kept_tensor(shape, dtype)
