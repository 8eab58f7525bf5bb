"""`make device`: builds for the GPU that is here, tests, sanitizes and measures on it, and says what was reached.

Run from a clone as `python -m bench.device [PART ...]`, before anything is built, so it imports nothing but the
standard library; torch and the package are used in processes of their own. A part that fails is reported, and the next
one runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .targets import root_verdicts, table, verdicts

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "device"
SITE = BUILD / "site"
# Seconds that are kept for each part; what one leaves goes to the next. All together: under ten minutes.
RESERVED = {"build": 130.0, "test": 125.0, "sanitize": 70.0, "bench": 240.0}
# Between asking a process to end, upon which a benchmark writes what it has, and ending it.
GRACE = 15.0
# Of the benchmark's time, for the one that compiles torch's step.
COMPILING = 60.0
# Of it, for Newton-Schulz iterations, and for roots, bases and SOAP; these get what the others leave, too.
MATRICES, ROOTS = 50.0, 60.0
# Tests that run on whatever STEPLADDER_TEST_DEVICE names speak of one of these, and say the backend in their names.
FIXTURES = ("Kernels", "import DEVICE")
BACKENDS = ("cuda", "triton")
# A few sizes of the rules with the most to go wrong: tensor ends, norms, groups, clipping, several dtypes.
SANITIZED = (
    "not amsgrad and ("
    "(cuda and test_sizes and (adamw or lamb) and (float32 or bfloat16)) or (cuda and test_groups and (adamw or lars)) "
    "or test_a_launch_for_each_pair_of_dtypes or (test_clipping_on_the_device and (adamw or lamb)))"
)
MODULES = ("numpy", "click", "rich", "psutil", "setuptools", "pybind11", "pytest", "pytest_timeout")
TOOLS = ("nvcc", "cmake", "ninja")
MOST_WORKERS = 8
# A backend that cannot run fails them all, and its first tests say why.
MOST_FAILURES = 200

_PROBE = """
import importlib.util, json, sys
found = {"torch": None, "missing": [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]}
if importlib.util.find_spec("torch"):
    import torch
    found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    found["xdist"] = importlib.util.find_spec("xdist") is not None
print(json.dumps(found))
"""


class Budget:
    """Shares out the time, so that no part can take what is kept for those after it.

    Args:
        parts: Those that will run, in order.
        reserved: Seconds that are kept for each.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        parts: Sequence[str],
        reserved: Mapping[str, float] = RESERVED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = list(parts)
        self._reserved = reserved
        self._clock = clock
        self._end = clock() + sum(reserved.values())

    def limit(self, part: str) -> float:
        """Seconds that this part may take from now."""
        later = self._parts[self._parts.index(part) + 1 :]
        return self._end - self._clock() - sum(self._reserved[name] for name in later)


@dataclass
class Outcome:
    """How a part went.

    Attributes:
        part: Its name.
        seconds: What it took.
        failures: What failed; empty where nothing did.
    """

    part: str
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Session:
    """What the parts share.

    Args:
        gpu: What the probe found.
        out: Where logs, CSV and JSON go.
        results: Where CSV and JSON go.
    """

    def __init__(self, gpu: dict[str, Any], out: Path, results: Path) -> None:
        self.gpu = gpu
        self.out = out
        self.results = results
        self.rows: list[dict[str, Any]] = []
        self.root_rows: list[dict[str, str]] = []
        name = "-".join("".join(c if c.isalnum() else " " for c in gpu["gpu"].lower()).split())
        self.stem = f"{datetime.now(timezone.utc):%Y-%m-%d}-{name}"

    def build(self, limit: float) -> list[str]:
        """Compile for this GPU alone, into a directory of its own; nothing is downloaded."""
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
        shutil.rmtree(SITE, ignore_errors=True)
        return run(
            [*pip, "--no-build-isolation", "--target", str(SITE), str(ROOT)],
            self.out / "device-build.log",
            limit,
            environment(STEPLADDER_CUDA="1", STEPLADDER_CUDA_ARCHITECTURES=architecture(self.gpu["capability"])),
        )

    def test(self, limit: float) -> list[str]:
        """The parity suite on this GPU, by every backend that runs on it."""
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2)) if self.gpu["xdist"] else 1
        spread = ["-n", str(workers)] if workers > 1 else []
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        begin = time.monotonic()
        failures = []
        # One after the other: Triton's kernels take long to compile, and must not hide CUDA's verdict.
        for backend in BACKENDS:
            left = limit - (time.monotonic() - begin)
            found = run(
                [*pytest_command(), "-k", backend, *spread],
                self.out / f"device-test-{backend}.log",
                left,
                environment(STEPLADDER_TEST_DEVICE="cuda", OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="passive"),
            )
            failures += [f"{backend}: {failure}" for failure in found]
        return failures

    def sanitize(self, limit: float) -> list[str]:
        """Our kernels under memcheck and racecheck, in a few tests."""
        sanitizer = find_sanitizer()
        if sanitizer is None:
            return ["compute-sanitizer was found neither on PATH nor in nvcc's toolkit"]
        begin = time.monotonic()
        failures = []
        for tool in ("memcheck", "racecheck"):
            options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
            command = [sanitizer, *options, "--kernel-regex", "kns=stepladder", *pytest_command(), "-k", SANITIZED]
            left = limit - (time.monotonic() - begin)
            found = run(
                command,
                self.out / f"device-{tool}.log",
                left / 2 if tool == "memcheck" else left,
                # Each tensor an allocation of its own, or an access beyond it would meet its neighbour.
                environment(STEPLADDER_TEST_DEVICE="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
            )
            failures += [f"{tool}: {failure}" for failure in found]
        return failures

    def bench(self, limit: float) -> list[str]:
        """The targets' cases; one against torch's compiled step, which may take its time to compile; the matrices."""
        begin = time.monotonic()
        sets = ("1000x768", "465-groups", "gpt2", "llama-1b")
        kept = COMPILING + MATRICES + ROOTS
        failures = self._bench("", sets, ("adamw", "lion"), ("loop", "foreach", "fused"), limit - kept)
        failures += self._bench("-compiled", ("gpt2",), ("adamw",), ("fused", "compiled"), COMPILING - GRACE)
        failures += self._bench_matrices(limit - (time.monotonic() - begin) - ROOTS)
        return failures + self._bench_roots(limit - (time.monotonic() - begin))

    def _bench_roots(self, limit: float) -> list[str]:
        """Roots, bases, and SOAP's step on one of Llama 1B's layers."""
        file = self.results / f"{self.stem}-roots.csv"
        options = ["--device=cuda", "--seconds=0.3", "--layers=1", f"--csv={file}"]
        failures = self._stepladder(["bench-roots", *options], "device-bench-roots.log", limit)
        if file.exists():
            with file.open(newline="") as rows:
                self.root_rows = list(csv.DictReader(rows))
        return failures

    def _bench_matrices(self, limit: float) -> list[str]:
        """Both forms of Newton-Schulz iterations of several sizes, and Muon's step."""
        sizes = [f"--side={side}" for side in (64, 128, 256, 512, 1024, 2048)]
        sizes += [f"--aspect={aspect}" for aspect in (1, 2, 4)]
        options = ["--device=cuda", "--forms", "--seconds=0.3", f"--csv={self.results / self.stem}-matrices.csv"]
        return self._stepladder(["bench-matrices", *options, *sizes], "device-bench-matrices.log", limit)

    def _stepladder(self, arguments: Sequence[str], log: str, limit: float) -> list[str]:
        """The console script, of which `pip install --target` makes none that is on PATH."""
        main = "from stepladder.cli import main; main(prog_name='stepladder')"
        return run([sys.executable, "-c", main, *arguments], self.out / log, limit, environment())

    def _bench(
        self, suffix: str, sets: Sequence[str], optimizers: Sequence[str], rivals: Sequence[str], limit: float
    ) -> list[str]:
        chosen = [f"--shapes={name}" for name in sets] + [f"--optimizer={name}" for name in optimizers]
        chosen += [f"--rival={name}" for name in rivals]
        files = {kind: self.results / f"{self.stem}{suffix}.{kind}" for kind in ("json", "csv")}
        failures = self._stepladder(
            ["bench", "--device=cuda", "--seconds=1", *chosen] + [f"--{kind}={file}" for kind, file in files.items()],
            f"device-bench{suffix}.log",
            limit,
        )
        if files["json"].exists():
            self.rows += json.loads(files["json"].read_text()).get("results", [])
        return failures


def architecture(capability: Sequence[int]) -> str:
    """What nvcc calls it; on Hopper with the instructions that only Hopper has."""
    name = "".join(map(str, capability))
    return "90a" if name == "90" else name


def pytest_command() -> list[str]:
    """The tests that run on any device, and none that is left over from elsewhere."""
    tests = (ROOT / "tests").glob("test_*.py")
    files = sorted(path for path in tests if any(fixture in path.read_text() for fixture in FIXTURES))
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=short",
        f"--maxfail={MOST_FAILURES}",
        *map(str, files),
    ]


def environment(**variables: str) -> dict[str, str]:
    """Of a child process: what was built comes first; this Python's scripts and the CUDA toolkit are on PATH."""
    inherited = os.environ.get("PYTHONPATH")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), str(toolkit)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SITE), *([inherited] if inherited else [])]),
        "PATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        **variables,
    }


def find_tool(name: str) -> str | None:
    """A program on the PATH that child processes get."""
    return shutil.which(name, path=environment()["PATH"])


def find_sanitizer() -> str | None:
    """compute-sanitizer, which toolkits keep in different places."""
    if found := find_tool("compute-sanitizer"):
        return found
    nvcc = find_tool("nvcc")
    toolkit = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    candidates = (toolkit / "bin" / "compute-sanitizer", toolkit / "compute-sanitizer" / "compute-sanitizer")
    return next((str(path) for path in candidates if path.exists()), None)


def run(command: Sequence[str], log: Path, limit: float, env: Mapping[str, str]) -> list[str]:
    """Run a command, its output on screen and in a log.

    Args:
        command: Program and arguments.
        log: Overwritten.
        limit: Seconds after which it is interrupted, and ended if that does not help.
        env: Its whole environment.

    Returns:
        What failed; empty where nothing did.
    """
    if limit <= 0.0:
        return ["no time was left for it"]
    expired = threading.Event()
    with log.open("w") as copy:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def interrupt() -> None:
            expired.set()
            end(process, signal.SIGINT)

        timers = [threading.Timer(limit, interrupt), threading.Timer(limit + GRACE, end, (process, signal.SIGKILL))]
        for timer in timers:
            timer.daemon = True
            timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                copy.write(line)
            status = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            end(process, signal.SIGKILL)
    if expired.is_set():
        return [f"not done after {limit:.0f} s, {log} has what it printed"]
    return [f"ended with status {status}, {log} has what it printed"] if status else []


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def probe() -> dict[str, Any]:
    """What this Python, its torch and this machine have."""
    command = [sys.executable, "-c", _PROBE, *MODULES]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found["missing"] += [tool for tool in TOOLS if find_tool(tool) is None]
    return found


def refusal(found: Mapping[str, Any]) -> str | None:
    """Why nothing can be done here, in a sentence; None where all is there."""
    if found["torch"] is None:
        return f"make device needs a torch that sees a GPU, and {sys.executable} has no torch."
    if not found["gpu"]:
        built = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "no CUDA"
        return f"make device needs a GPU, and torch {found['torch']} (with {built}) sees none here."
    if found["missing"]:
        return f"make device downloads nothing, and this machine lacks {', '.join(found['missing'])}."
    return None


def carry_out(session: Any, parts: Sequence[str], budget: Budget, clock: Callable[[], float]) -> list[Outcome]:
    """Run the parts in order; one that fails or raises does not keep the next from running, unless it is the build."""
    outcomes = []
    for part in parts:
        outcome = Outcome(part)
        outcomes.append(outcome)
        if part != "build" and outcomes[0].part == "build" and outcomes[0].failures:
            outcome.failures.append("nothing was built")
            continue
        limit = budget.limit(part)
        print(f"\n{part}: up to {limit:.0f} s", flush=True)
        begin = clock()
        try:
            outcome.failures += getattr(session, part)(limit)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            outcome.failures.append(f"{type(error).__name__}: {error}")
        outcome.seconds = clock() - begin
        for failure in outcome.failures:
            print(f"{part} FAILED: {failure}", flush=True)
    return outcomes


def report(
    outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], root_rows: Sequence[dict[str, str]] = ()
) -> str:
    """The closing tables: how the parts went and, where anything was measured, the targets."""
    lines = [[o.part, f"{o.seconds:.0f} s", "; ".join(o.failures) or "ok"] for o in outcomes]
    shown = table(("part", "took", "outcome"), lines)
    if any(o.part == "bench" for o in outcomes):
        found = [[v.target, v.wanted, v.measured or "–", v.word] for v in [*verdicts(rows), *root_verdicts(root_rows)]]
        shown += "\n\n" + table(("target", "wanted", "measured", "verdict"), found)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are named, or all; the build is always made current first."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(RESERVED)} [default: all]")
    wanted = parser.parse_args(arguments).parts or list(RESERVED)
    if unknown := sorted(set(wanted) - set(RESERVED)):
        parser.error(f"unknown parts: {', '.join(unknown)}")
    if not (ROOT / "setup.py").exists():
        print("make device runs in a clone of the repository, and this is an installed package.", file=sys.stderr)
        return 1
    found = probe()
    if reason := refusal(found):
        print(reason, file=sys.stderr)
        return 1
    given = os.environ.get("OUT")
    out, results = (Path(given), Path(given)) if given else (BUILD, ROOT / "bench" / "results")
    for directory in (BUILD, out, results):
        directory.mkdir(parents=True, exist_ok=True)
    # A shell's background job ignores it, and so would the processes that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"{found['gpu']}, torch {found['torch']} with CUDA {found['torch_cuda']}, {sys.executable}", flush=True)
    parts = [part for part in RESERVED if part in wanted or part == "build"]
    session = Session(found, out, results)
    outcomes = carry_out(session, parts, Budget(parts), time.monotonic)
    summary = {"machine": found, "parts": [asdict(o) for o in outcomes]}
    if "bench" in parts:
        every = [*verdicts(session.rows), *root_verdicts(session.root_rows)]
        summary["targets"] = [asdict(v) for v in every]
    (out / "device.json").write_text(json.dumps(summary, indent=2) + "\n")
    with zipfile.ZipFile(out / "device-logs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for log in sorted(out.glob("device-*.log")):
            archive.write(log, log.name)
            log.unlink()
    print(f"\n{report(outcomes, session.rows, session.root_rows)}")
    return 1 if any(o.failures for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
