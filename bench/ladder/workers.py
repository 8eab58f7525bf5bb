"""Laps run one after another, or by several processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from stepladder.bench.ladder.contenders import PRESETS
from stepladder.bench.ladder.race import Lap, Run, StoppedError, run

SECONDS_BETWEEN_REPORTS = 0.1

# Of a worker: how many steps all workers have made, and whether they are to stop.
_progress: Any
_stop: Any


def run_all(laps: Sequence[Lap], preset: str, steps: int, jobs: int, report: Callable[[int], None]) -> Iterator[Run]:
    """Each lap's result as soon as it is there; `report` is told how many steps were made since its last call.

    Each lap has one thread, so that no result depends on `jobs`. Where the consumer is interrupted, what has begun is
    called off, and nothing is left running.
    """
    if jobs == 1:
        torch.set_num_threads(1)
        for lap in laps:
            yield run(lap, PRESETS[preset], steps, report)
        return
    # Fresh interpreters: a fork would inherit torch's pool of threads without its threads.
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Value("q", 0), context.Value("b", 0)
    seen = 0
    with ProcessPoolExecutor(jobs, context, _initialise, (progress, stop)) as pool:
        try:
            # Ctrl-C goes to all processes of a terminal. The workers, which start here, inherit that they do not get
            # it; it waits until this process does again, and that tells them to stop.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                left: set[Future[Run]] = {pool.submit(_run, lap, preset, steps) for lap in laps}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while left:
                done, left = wait(left, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
                now = progress.value
                report(now - seen)
                seen = now
                for future in done:
                    yield future.result()
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


def _initialise(progress: Any, stop: Any) -> None:
    global _progress, _stop
    torch.set_num_threads(1)
    _progress, _stop = progress, stop


def _run(lap: Lap, preset: str, steps: int) -> Run:
    return run(lap, PRESETS[preset], steps, _report)


def _report(count: int) -> None:
    with _progress.get_lock():
        _progress.value += count
    if _stop.value:
        raise StoppedError
