"""Independent calls of torch over the threads of a CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from stepladder import ranges

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _forget() -> None:
    """A child process has none of its parent's threads, and nobody to give a lock back."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def over_threads(function: Callable[[Item], Result], items: Sequence[Item], costs: Sequence[float]) -> list[Result]:
    """function(item) for every item, as many at a time as torch has threads, each with a single one.

    LAPACK uses several threads poorly, and torch takes the matrices of a batch one after another. A single item is
    computed in the calling thread, with all threads.

    Args:
        function: Calls torch, which lets go of Python's lock.
        items: What to call it with.
        costs: Of each item, in any unit: dear ones are begun first.

    Raises:
        Exception: Of the first item whose call raised one, when all calls have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) <= 1:
        return [function(item) for item in items]
    order = sorted(range(len(items)), key=lambda i: -costs[i])
    pool = _pool(threads)
    with ranges.workers() as carried:
        waiting = {i: pool.submit(_quietly, carried(function), items[i]) for i in order}
        wait(waiting.values())
    return [waiting[i].result() for i in range(len(items))]


def _quietly(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():
        return function(item)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, "stepladder")
            all_begun = threading.Barrier(threads + 1)
            for _ in range(threads):
                pool.submit(_begin, all_begun)
            all_begun.wait()
            # What a thread sets for itself is also what torch gives to threads that are yet to come.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _begin(all_begun: threading.Barrier) -> None:
    # A thread that torch has not seen yet would take the number for all at its first operation.
    torch.get_num_threads()
    torch.set_num_threads(1)
    all_begun.wait()
