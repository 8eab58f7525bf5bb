"""Ranks of torch.distributed for the tests: one group of gloo processes for each size, started once a session.

A test names a function of its module, which every rank calls with the same arguments:

    def total() -> float:
        value = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(value)
        return value.item()

    def test_the_sum_reaches_all(pools):
        assert pools(3).run(total) == [3.0, 3.0, 3.0]
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# A collective that waits longer ends with an error that names it, before the call is given up.
COLLECTIVE_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0
# What the others have, once a rank has failed, to fail too.
GRACE_S = 2.0

# Of the ranks. Gloo would else ask for the address of the host's name, which not every machine has.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


PRELOADED = [
    "stepladder",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
    "torch.testing",
]


class RankError(AssertionError):
    """Some ranks raised, died, or did not answer.

    Attributes:
        failures: By rank, its traceback or what became of it.
        results: By rank, what the others returned.
    """

    def __init__(self, what: str, size: int, failures: dict[int, str], results: dict[int, Any]) -> None:
        texts = (f"rank {rank} of {size} {text}" for rank, text in sorted(failures.items()))
        super().__init__("\n".join((f"{what} failed", *texts)))
        self.failures = failures
        self.results = results


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """Be a rank until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which ends its ranks
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(store).as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # without waiting for the others, who may be gone
        torch.manual_seed(0)
        try:
            function, arguments = pickle.loads(message)
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException:
            answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
        connection.send_bytes(answer)


class ProcessPool:
    """The ranks of one world, started at the first call and again after a failure.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = CALL_TIMEOUT_S) -> list[Any]:
        """Call a function on every rank.

        Args:
            function: At the top of its module; it and what it returns are pickled, tensors by value.
            arguments: The same for every rank.
            timeout: Seconds until the ranks that have not answered are killed.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: A rank raised, died or did not answer; the next call then starts new processes.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, arguments))
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # its rank has died, which is found below
                connection.send_bytes(message)
        return self._collect(getattr(function, "__name__", repr(function)), timeout)

    def close(self) -> None:
        """End all processes at once."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._connections, self._directory = [], [], None

    def _start(self) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:  # the ranks share what is imported once
            context.set_forkserver_preload(PRELOADED)
        self._directory = tempfile.TemporaryDirectory()  # where new groups meet too
        store = str(Path(self._directory.name) / "store")
        with mock.patch.dict(os.environ, ENVIRONMENT):
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the death of the rank ends the connection
                self._processes.append(process)
                self._connections.append(ours)
        self._collect("the start", START_TIMEOUT_S)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                rank = pending.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(GRACE_S)
                    succeeded, value = False, f"died with exit code {self._processes[rank].exitcode}"
                (results if succeeded else failures)[rank] = value
                if failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if pending or failures:
            first = f"within {timeout:g} s" if not failures else "after another rank had failed"
            failures |= dict.fromkeys(pending.values(), f"did not answer {first}")
            self.close()
            raise RankError(what, self.size, failures, results)
        return [results[rank] for rank in range(self.size)]


class ProcessPools:
    """The pools of a session, by size."""

    def __init__(self) -> None:
        self._pools: dict[int, ProcessPool] = {}

    def __call__(self, size: int) -> ProcessPool:
        return self._pools.setdefault(size, ProcessPool(size))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
