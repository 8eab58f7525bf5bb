"""What `stepladder bench` does between its options and its output: which cases, in which processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepladder.bench import base, gpu, gpu_report
from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.files import Run
from stepladder.bench.matrices import OnGpu
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import Measurement
from stepladder.bench.processes import Ended, Spec, in_turns, machine_of, measure
from stepladder.bench.shapes import SETS, shapes_of
from stepladder.bench.subjects import SUBJECTS, Subject

NOW, BASE = "this build", "the base"
OPTIMIZERS = ("adamw", "lion", "momentum")
MATRICES = ("muon", "newton_schulz", "inverse_root")
DTYPE_NAMES = ("fp32", "bf16")
SHAPES = ("1000x768", "400x4096", "48x1M", "gpt2")
QUICK_SHAPES = ("1000x768", "400x4096")
# Those that fill a GPU, beside those that keep its host busy.
GPU_SHAPES = ("1000x768", "465-groups", "48x1M", "gpt2", "llama-1b")
# How many measure by default, and where two runs are compared.
PROCESSES, COMPARED = 5, 8


@dataclass(frozen=True)
class Chosen:
    """What was asked for; nothing of a kind means the default.

    Attributes:
        subjects: Optimizers and kernels.
        shapes: What `--shapes` takes.
        dtypes: fp32 and so on.
        rivals: Whom to measure beside ours.
        backends: Ours on a GPU; none on a CPU.
        everything: Where nothing is named, everything.
        quick: Where nothing is named, small sets.
        fresh_grads: Gradients are reallocated before each step.
    """

    subjects: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    rivals: tuple[str, ...]
    backends: tuple[str, ...] = ()
    everything: bool = False
    quick: bool = False
    fresh_grads: bool = False

    def specs(self) -> tuple[list[Spec], list[str]]:
        """The cases to be measured, shape set by shape set, and what is left out and why.

        Raises:
            ValueError: Something was named and nothing of it can be measured.
        """
        matrices = () if self.quick or self.backends else MATRICES
        subjects = self.subjects or (tuple(SUBJECTS) if self.everything else (*OPTIMIZERS, *matrices))
        specs: list[Spec] = []
        left_out: list[str] = []
        for name in subjects:
            found, reasons = self._of(SUBJECTS[name])
            if not found and self.subjects:
                raise ValueError(f"{name} cannot be measured so: {'; '.join(reasons)}")
            specs += found
            left_out += [f"{name} is left out: {reason}" for reason in reasons]
        if not specs:
            raise ValueError(f"nothing can be measured so: {'; '.join(left_out)}")
        order = {shapes: i for i, shapes in enumerate(dict.fromkeys((*SETS, *(spec.shapes for spec in specs))))}
        return sorted(specs, key=lambda spec: order[spec.shapes]), left_out

    def _of(self, subject: Subject) -> tuple[list[Spec], list[str]]:
        reasons: list[str] = []
        if self.backends and subject.cpu_only:
            return [], ["it is measured on a CPU alone"]
        if self.fresh_grads and subject.name not in CASES:
            return [], ["--fresh-grads is for the element-wise optimizers"]
        allowed = subject.dtypes
        wanted = self.dtypes or (tuple(DTYPES) if self.everything else DTYPE_NAMES)
        dtypes = [dtype for dtype in wanted if dtype in allowed]
        if self.dtypes and len(dtypes) < len(wanted):
            reasons.append(f"it is measured in {', '.join(allowed)} alone")
        names = self.shapes or self._default_shapes(subject)
        fitting = []
        for name in names:
            if reason := subject.misfit(shapes_of(name)):
                reasons.append(f"{name}: {reason}")
            else:
                fitting.append(name)
        specs = [
            Spec(subject.name, shapes, dtype, self.rivals, self.backends) for shapes, dtype in product(fitting, dtypes)
        ]
        return specs, reasons

    def _default_shapes(self, subject: Subject) -> tuple[str, ...]:
        if self.everything:
            return subject.sets
        if subject.name not in CASES:
            return subject.sets[:1]
        return QUICK_SHAPES if self.quick else GPU_SHAPES if self.backends else SHAPES


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        now: What this build was measured to do.
        base: What it is compared with; None where nothing is.
        details: Of a GPU, what the common form does not hold.
        stopped: Why it ended early.
    """

    now: Run
    base: list[Measurement] | None = None
    details: list[gpu.GpuResult] = field(default_factory=list)
    stopped: str | None = None

    @property
    def detailed(self) -> bool:
        """Whether there are details of all that was measured."""
        return bool(self.details) and len(self.details) == len(self.now.cases)

    def add(self, name: str, measurement: Measurement) -> None:
        """Take in a case of one process of a build."""
        cases = self.now.cases if name == NOW else self.base
        assert cases is not None
        for known in cases:
            if known.key == measurement.key:
                known.add(measurement)
                return
        cases.append(measurement)


def run(
    outcome: Outcome,
    specs: Sequence[Spec],
    settings: Settings,
    processes: int,
    threads: int,
    commit: str | None,
) -> None:
    """Measure all cases into `outcome`; Ctrl-C ends it early.

    Args:
        outcome: What is measured is added to it.
        specs: The cases.
        settings: How long, for each case and process.
        processes: How many; one is this one, but where a base is built.
        threads: Of each process.
        commit: Whose build is measured beside this one.

    Raises:
        base.Failure: The commit cannot be built.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    try:
        with ExitStack() as stack:
            builds: dict[str, Path | None] = {NOW: None}
            if commit:
                outcome.base = []
                console.print(f"building {commit[:12]}", highlight=False)
                builds = {BASE: stack.enter_context(base.built(commit, Path.cwd())), NOW: None}
            stack.enter_context(progress)
            task = progress.add_task("", total=len(specs) * processes * len(builds))

            def begun(spec: Spec) -> None:
                progress.update(task, description=spec.label)

            if processes == 1 and not commit:
                _here(outcome, specs, settings, begun, lambda: progress.advance(task))
                return
            turns = stack.enter_context(closing(in_turns(specs, settings, processes, threads, builds, begun)))
            for name, measurement in turns:
                outcome.add(name, measurement)
                progress.advance(task)
    except KeyboardInterrupt:
        outcome.stopped = "interrupted"
    except Ended as error:
        outcome.stopped = str(error)


def _here(
    outcome: Outcome,
    specs: Sequence[Spec],
    settings: Settings,
    begun: Callable[[Spec], None],
    done: Callable[[], None],
) -> None:
    """Measure in this process."""
    for spec in specs:
        begun(spec)
        machine = machine_of(spec.backends)
        if isinstance(machine, OnGpu) and spec.subject in CASES:
            case = CASES[spec.subject]
            detail = gpu.run(machine.clock, case, spec.shapes, spec.dtype, spec.rivals, settings, spec.backends)
            outcome.details.append(detail)
            outcome.add(NOW, gpu_report.measurement(detail))
        else:
            outcome.add(NOW, measure(spec, settings))
        done()
