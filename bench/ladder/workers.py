"""Heats run one after another, or by several processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from stepladder.bench.ladder.race import Heat, Run, Setting, StoppedError, run

SECONDS_BETWEEN_REPORTS = 0.1

# Of a worker: how many steps all workers have made, and whether they are to stop.
_progress: Any
_stop: Any


def run_all(
    heats: Sequence[Heat], setting: Setting, jobs: int, report: Callable[[int], None]
) -> Generator[list[Run], None, None]:
    """Each heat's results as soon as they are there; `report` is told how many steps were made since its last call.

    Each heat has one thread, so that no result depends on `jobs`. Where the consumer is interrupted, what has begun is
    called off, and nothing is left running.
    """
    if jobs == 1:
        torch.set_num_threads(1)
        for heat in heats:
            yield run(heat, setting, report)
        return
    # Fresh interpreters: a fork would inherit torch's pool of threads without its threads.
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Value("q", 0), context.Value("b", 0)
    seen = 0
    with (
        _interrupts_at_rest() as check,
        ProcessPoolExecutor(jobs, context, _initialise, (progress, stop)) as pool,
    ):
        try:
            # Ctrl-C goes to all processes of a terminal. The workers, which start here, inherit that they do not get
            # it; this process tells them to stop.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                left: set[Future[list[Run]]] = {pool.submit(_run, heat, setting) for heat in heats}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while left:
                done, left = wait(left, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
                now = progress.value
                report(now - seen)
                seen = now
                for future in done:
                    yield future.result()
                check()
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_at_rest() -> Iterator[Callable[[], None]]:
    """Within, SIGINT raises KeyboardInterrupt nowhere but in what is yielded, once it is called.

    Raised from within the pool's waiting, it would leave a lock taken for which the pool's own thread waits for ever.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # What a shell runs in the background ignores it.
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _initialise(progress: Any, stop: Any) -> None:
    global _progress, _stop
    torch.set_num_threads(1)
    _progress, _stop = progress, stop


def _run(heat: Heat, setting: Setting) -> list[Run]:
    return run(heat, setting, _report)


def _report(count: int) -> None:
    with _progress.get_lock():
        _progress.value += count
    if _stop.value:
        raise StoppedError
