"""Measures cases in processes of their own, one after another, or two builds in turns.

Two runs of one build differ by more than the rounds of either: where memory lies, which pages are large, what else
the machine does. So each case is measured in several processes, far apart in time, and how they differ is the noise to
which a difference between two runs is held.

Such a process runs `serve`: it reads requests, a line of JSON each, and answers each with a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import torch

from stepladder.bench import gpu
from stepladder.bench.matrices import Cpu, Machine, OnGpu
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import Measurement, from_dict
from stepladder.bench.subjects import SUBJECTS

# Of the last words of a process that ended, in characters.
LONGEST_REASON = 400


class Ended(Exception):
    """A measuring process is no more."""


@dataclass(frozen=True)
class Spec:
    """A case that is to be measured.

    Attributes:
        subject: The name of an optimizer or a kernel.
        shapes: What `--shapes` takes.
        dtype: fp32 and so on.
        rivals: Whom to measure beside ours.
        backends: Those of ours on a GPU; none on a CPU.
    """

    subject: str
    shapes: str
    dtype: str
    rivals: tuple[str, ...]
    backends: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.subject} {self.dtype} {self.shapes}"


def measure(spec: Spec, settings: Settings, known: Measurement | None = None) -> Measurement:
    """Measure a case in this process."""
    machine = machine_of(spec.backends)
    return SUBJECTS[spec.subject].measure(machine, spec.shapes, spec.dtype, spec.rivals, settings, known)


@cache
def machine_of(names: tuple[str, ...]) -> Machine:
    """Who measures: the CPU, or a GPU with these backends of ours."""
    return OnGpu(gpu.Gpu(), names) if names else Cpu()


class Worker:
    """A process that measures.

    Args:
        threads: Of torch and of our kernels.
        site: A directory with another build of stepladder, which it imports in place of this one.
    """

    def __init__(self, threads: int, site: Path | None = None) -> None:
        path = [str(site)] if site else []
        path += map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        # No pipe, which would fill up: nobody reads it before the process ends.
        self._errors = TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            # Isolated from the current directory, which may hold a stepladder, too.
            [sys.executable, "-c", f"from {__name__} import serve; serve({threads})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=site or Path(sys.prefix),
            text=True,
            # Ctrl-C is for the one who asks: a process that is left is ended by `close`.
            start_new_session=True,
        )

    def measure(self, spec: Spec, settings: Settings, known: Measurement | None = None) -> Measurement:
        """Have a case measured there.

        Raises:
            Ended: The process ended, by itself or by the system.
        """
        assert self._process.stdin
        assert self._process.stdout
        request = {"spec": asdict(spec), "settings": asdict(settings), "known": known and known.as_dict()}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Ended(self._last_words())
        return from_dict(json.loads(answer))

    def _last_words(self) -> str:
        self._process.communicate()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = [line for line in self._errors if line.strip()]
        return f"{how}: {lines[-1].strip()[:LONGEST_REASON]}" if lines else how

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(threads: int) -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(threads)
    # What is printed otherwise must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        spec = Spec(**{name: tuple(v) if isinstance(v, list) else v for name, v in request["spec"].items()})
        settings = Settings(**request["settings"] | {"rounds": tuple(request["settings"]["rounds"])})
        known = from_dict(request["known"]) if request["known"] else None
        print(json.dumps(measure(spec, settings, known).as_dict()), file=answers, flush=True)


def in_turns(
    specs: Sequence[Spec],
    settings: Settings,
    processes: int,
    threads: int,
    builds: Mapping[str, Path | None],
    begun: Callable[[Spec], None],
) -> Iterator[tuple[str, Measurement]]:
    """Measure all cases in each of so many processes of each build.

    Of two builds, one measures a case while the other waits, and which is first changes from case to case. A case whose
    check was red or that was skipped is not measured again.

    Args:
        specs: The cases.
        settings: How long, for each case and process.
        processes: How many, of each build.
        threads: Of each process.
        builds: By name, a directory with the build, or None for this one.
        begun: Called before each measurement.

    Yields:
        The name of the build, and what one of its processes has measured.

    Raises:
        Ended: A process ended.
    """
    known: dict[tuple[str, Spec], Measurement] = {}
    names = list(builds)
    for number in range(processes):
        with ExitStack() as stack:
            workers = {}
            for name, site in builds.items():
                workers[name] = Worker(threads, site)
                stack.callback(workers[name].close)
            for index, spec in enumerate(specs):
                for name in names if (index + number) % 2 == 0 else names[::-1]:
                    before = known.get((name, spec))
                    if before and before.red_or_skipped:
                        continue
                    begun(spec)
                    try:
                        measured = workers[name].measure(spec, settings, before and replace(before, contenders={}))
                    except Ended as error:
                        raise Ended(f"{spec.label}: the process of {name} ended with {error}") from None
                    known.setdefault((name, spec), measured)
                    yield name, measured
