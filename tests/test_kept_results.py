"""Large results of an iteration on the CPU: their memory goes to later ones, and to nobody else's while it is used."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import stepladder as sl
from stepladder import _C, newton_schulz, pool

SHAPE = (2, 512, 512)

CPU = torch.device("cpu")


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ours, all of whose large results are kept."""
    if not _C.matrix_units():
        pytest.skip("no matrix unit runs here")
    monkeypatch.delenv(newton_schulz.UNIT_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def given(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", newton_schulz.KERNEL_DTYPES)
@pytest.mark.usefixtures("unit")
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
    limit, size = _C.KEPT_TENSOR_BYTES, 16 << 20
    tensors = [pool.empty((size // 4,), torch.float32, CPU) for _ in range(limit // size + 2)]
    gone = tensors.pop().data_ptr()
    assert _C.kept_bytes() >= size
    # A smaller one does not take what is larger by more than a quarter; one that is nearly as large does.
    small = pool.empty((size // 8,), torch.float32, CPU)
    assert small.data_ptr() != gone
    near = pool.empty((size * 9 // 40,), torch.float32, CPU)
    assert near.data_ptr() == gone
    del small, near
    tensors.clear()
    assert limit - size <= _C.kept_bytes() <= limit
    # What is larger than all that may be kept is not kept at all, nor does it push out what is.
    before = _C.kept_bytes()
    large = pool.empty((limit // 4 + 1,), torch.float32, CPU)
    del large
    assert _C.kept_bytes() == before


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
        ([2, 0], "float32", "dimension 1 of a tensor is 0, expected 1 or more"),
        ([-1, -4], "float32", "dimension 1 of a tensor is -4, expected 1 or more"),
        ([1 << 62], "float32", "dimension 0 of a tensor is 4611686018427387904, .* up to 67108864 elements in all"),
        ([1 << 20, 1 << 8], "bfloat16", "dimension 0 of a tensor is 1048576, .* up to 134217728 elements in all"),
    ],
)
def test_refusals(shape: list[int], dtype: str, message: str):
    with pytest.raises(_C.Error, match=message):
        _C.kept_tensor(shape, dtype)
