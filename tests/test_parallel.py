"""Independent calls over threads: their order, what they raise, threads and processes around them."""

from __future__ import annotations

import multiprocessing
import threading
import time
from typing import Any

import pytest
import torch

import stepladder as sl
from stepladder.parallel import over_threads


def test_results_are_in_the_order_of_the_items_whatever_the_costs():
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert over_threads(lambda x: x * x, range(20), [20 - x for x in range(20)]) == [x * x for x in range(20)]
        assert over_threads(lambda x: x, [], []) == []


def test_several_run_at_a_time_each_with_one_thread():
    torch.set_num_threads(2)
    together = threading.Barrier(2)

    def call(_: int) -> tuple[int, bool]:
        together.wait(timeout=60)
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert over_threads(call, [0, 1], [1, 1]) == [(1, False), (1, False)]
    # A single one has all of them, and is called where one is.
    assert over_threads(lambda _: (torch.get_num_threads(), threading.current_thread()), [0], [1]) == [
        (2, threading.current_thread())
    ]


def test_what_a_call_raises_comes_when_all_have_ended():
    torch.set_num_threads(2)
    ended = []

    def call(x: int) -> None:
        if x == 0:
            raise KeyError("first")
        time.sleep(0.2)
        ended.append(x)
        if x == 2:
            raise ValueError("second")

    with pytest.raises(KeyError, match="first"):
        over_threads(call, range(4), [4, 3, 2, 1])
    assert sorted(ended) == [1, 2, 3]
    assert over_threads(lambda x: x, range(4), [1] * 4) == [0, 1, 2, 3]


def test_calls_within_calls():
    torch.set_num_threads(2)

    def outer(x: int) -> list[int]:
        return over_threads(lambda y: x + y, range(5), [1] * 5)

    assert over_threads(outer, range(8), [1] * 8) == [[x + y for y in range(5)] for x in range(8)]


@pytest.mark.parametrize("cls", [sl.Shampoo, sl.SOAP])
def test_optimizers_that_step_within_calls(cls: Any):
    torch.set_num_threads(2)

    def train(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        params = [torch.nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64)) for _ in range(3)]
        optimizer = cls(params, lr=0.1, precondition_frequency=2)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
            optimizer.step()
        return [p.detach() for p in params]

    for seed, found in enumerate(over_threads(train, range(4), [1] * 4)):
        torch.testing.assert_close(found, train(seed))


def test_threads_that_are_yet_to_come_have_what_torch_gives_them():
    torch.set_num_threads(3)
    over_threads(lambda x: x, range(5), [1] * 5)
    seen: list[Any] = []
    other = threading.Thread(target=lambda: seen.append((torch.get_num_threads(), over_threads(str, [1, 2], [1, 1]))))
    other.start()
    other.join()
    assert seen == [(3, ["1", "2"])]
    assert torch.get_num_threads() == 3


def test_callers_in_several_threads():
    torch.set_num_threads(2)
    results: dict[int, list[int]] = {}

    def call(k: int) -> None:
        torch.set_num_threads(2)
        results[k] = over_threads(lambda x: k * x, range(30), [1] * 30)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == {k: [k * x for x in range(30)] for k in range(4)}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_process_makes_threads_of_its_own():
    torch.set_num_threads(2)
    over_threads(lambda x: x, range(4), [1] * 4)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(over_threads(lambda x: x + 1, range(4), [1] * 4)))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == [1, 2, 3, 4]
    child.join(60)
    assert child.exitcode == 0
