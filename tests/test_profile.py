"""`stepladder profile`: that its parts add up, its traces, what it reads of Nsight Compute, and its refusals."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import stepladder as sl
from stepladder import _C, parallel, ranges
from stepladder.bench import roofline
from stepladder.bench.profile import measure, ncu, report, subjects, trace
from stepladder.bench.profile.clock import Clock, Part, Parts, divide, mean, middle_half
from stepladder.bench.shapes import SETS, elements, gpt2, shapes_of
from stepladder.bench.traffic import bytes_per_element
from stepladder.cli import main
from stepladder.ranges import Work

# As GPT-2 124M has them, but small.
SMALL_GPT2 = gpt2(vocab=700, context=32, width=48, layers=2)
# Sums of up to 512 terms are rounded as often, by 2⁻⁵³ of a sum at most: no part is less than nothing.
EXACT = 512 * 2.0**-53


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(SETS, "gpt2", lambda: SMALL_GPT2)
    monkeypatch.setattr(roofline, "SIDE", 64)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def subject(name: str, shapes: str, dtype: torch.dtype = torch.float32) -> subjects.Subject:
    return subjects.make(name, shapes, dtype, "cpu", None)


def profiled(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["profile", *arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


# The parts of a step

CASES = [
    ("adamw", "gpt2", {"update_adamw_f32_f32"}),
    ("lamb", "3*40x50", {"prepare_lamb_f32_f32", "apply_lamb_f32_f32"}),
    ("muon", "gpt2", {"update_adamw_f32_f32"}),
    ("muonh", "48x64,2*20x30", {"momentum", "newton_schulz", "update"}),
    ("shampoo", "24x32,16x16", {"momentum", "update_gram_", "precondition", "update", "inverse_root"}),
    ("soap", "24x32,16x16", {"project", "update_gram_", "rotate", "orthonormalize", "update"}),
    ("newton_schulz", "40x50", {"newton_schulz"}),
    ("inverse_root", "16x16,24x20", {"check", "inverse_root", "residual"}),
    ("orthonormalize", "2x16x24", {"orthonormalize"}),
    ("update_gram_", "40x50", {"update_gram_"}),
    ("clip_grad_norm_", "40x50,7", {"measure_f32", "scale_f32"}),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "shapes", "kernels"), CASES, ids=[case[0] for case in CASES])
def test_kernels_and_host_add_up_to_the_step(name, shapes, kernels, threads):
    torch.set_num_threads(threads)
    stepped = subject(name, shapes)
    clock = Clock()
    found = set()
    for _ in range(stepped.cycle):
        record = clock.step(stepped.title, stepped.step)
        parts = divide(record)
        own = [part.ns for table in (parts.kernels, parts.host) for part in table.values()]
        assert sum(own) == pytest.approx(record.whole.end - record.whole.begin, rel=EXACT)
        assert parts.elapsed == record.whole.end - record.whole.begin
        assert min(own) >= 0.0
        shares = [share for _, _, threads in record.regions for _, _, shares in threads for share in shares]
        # A span or share takes a product, a quotient and a sum at most.
        assert 3 * (len(record.spans) + len(shares)) + len(own) <= 512
        assert stepped.title in parts.host
        found |= set(parts.kernels)
    assert kernels <= found


def test_time_goes_to_who_spends_it():
    """A sleep takes at least as long as it is told, so that these bounds hold on any machine."""

    def step() -> None:
        with ranges.phase("waits"):
            time.sleep(0.02)
            with ranges.kernel("works", lambda: Work(10.0, 20.0, "fp32")):
                time.sleep(0.04)
        time.sleep(0.01)

    parts = divide(Clock().step("whole", step))
    assert parts.kernels["works"].ns >= 0.04e9
    assert parts.kernels["works"].work == Work(10.0, 20.0, "fp32")
    assert parts.host["waits"].ns >= 0.02e9
    assert parts.host["whole"].ns >= 0.01e9
    assert sum(part.ns for part in (*parts.kernels.values(), *parts.host.values())) == pytest.approx(parts.elapsed)


def test_time_of_other_threads_is_shared_out_by_how_long_they_worked():
    torch.set_num_threads(2)

    def work(seconds: float) -> None:
        with ranges.kernel(f"sleep {seconds}", lambda: Work(bytes=1.0)):
            time.sleep(seconds)

    def step() -> None:
        parallel.over_threads(work, [0.06, 0.06, 0.03], [1.0, 1.0, 1.0])

    parts = divide(Clock().step("whole", step))
    long, short = parts.kernels["sleep 0.06"], parts.kernels["sleep 0.03"]
    assert (long.calls, short.calls) == (2, 1)
    assert long.work.bytes == 2.0
    assert sum(long.busy.values()) >= 0.12e9
    assert long.ns / short.ns == pytest.approx(sum(long.busy.values()) / sum(short.busy.values()))
    # Two threads take half as long as one would.
    assert long.ns + short.ns < sum(long.busy.values()) + sum(short.busy.values())


def test_regions_have_every_element_once():
    stepped = subject("adamw", "gpt2")
    record = Clock().step(stepped.title, stepped.step)
    assert sum(
        share[6] for _, _, threads in record.regions for _, _, shares in threads for share in shares
    ) == elements(SMALL_GPT2)
    (part,) = divide(record).kernels.values()
    assert part.work.bytes == elements(SMALL_GPT2) * bytes_per_element("adamw", 4, 4, 4) == stepped.moved
    for begin, end, threads in record.regions:
        assert record.whole.begin <= begin <= end <= record.whole.end
        for first, last, shares in threads:
            assert begin <= first <= last <= end
            assert sum(share[5] for share in shares) <= last - first


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        # Of each element: p, g read and states changed; then p changed, and what the first pass left read.
        ("lamb", torch.float32, {"prepare_lamb_f32_f32": 4 + 4 + 16, "apply_lamb_f32_f32": 8 + 8}),
        ("lars", torch.float32, {"prepare_lars_f32_f32": 4 + 4, "apply_lars_f32_f32": 8 + 4 + 8}),
        ("clip_grad_norm_", torch.bfloat16, {"measure_bf16": 2, "scale_bf16": 4}),
        ("momentum", torch.float64, {"update_momentum_f64_f64": 16 + 8 + 16}),
    ],
)
def test_bytes_of_each_pass(name, dtype, expected):
    stepped = subject(name, "30x20,5000", dtype)
    parts = divide(Clock().step(stepped.title, stepped.step))
    assert {kernel: part.work.bytes for kernel, part in parts.kernels.items()} == {
        kernel: 5600 * size for kernel, size in expected.items()
    }


def test_nothing_is_recorded_unless_asked():
    _C.take_regions()
    stepped = subject("adamw", "30x20")
    stepped.step()
    assert _C.take_regions() == []
    assert ranges.phase("a") is ranges.kernel("b") is ranges._NOTHING
    with pytest.raises(ZeroDivisionError):
        Clock().step("fails", lambda: 1 / 0)
    stepped.step()
    assert _C.take_regions() == []
    assert ranges.phase("a") is ranges._NOTHING


def test_long_and_short_turns_are_left_out():
    def turn(ns: float) -> list[Parts]:
        return [
            Parts(ns, {"k": Part(ns - 1.0, 1.0, Work(ns), {"thread 0": ns}, {"thread 0": Work(ns)})}, {"h": Part(1.0)})
        ]

    parts = mean(middle_half([turn(ns) for ns in (5.0, 1000.0, 3.0, 7.0)]))
    assert parts.elapsed == 6.0
    assert parts.kernels["k"].ns == 5.0
    assert parts.kernels["k"].work.bytes == parts.kernels["k"].busy["thread 0"] == 6.0
    assert parts.host["h"].ns == 1.0


# The command


def test_adamw_on_gpt2(tmp_path):
    file, traced = tmp_path / "out.json", tmp_path / "trace.json"
    output = profiled("adamw", "--shapes", "gpt2", "--seconds=0", f"--json={file}", f"--trace={traced}")
    written = json.loads(file.read_text())
    assert written["kernel_share"] + written["host_share"] == pytest.approx(1.0, rel=EXACT)
    assert written["kernel_ms"] + written["host_ms"] == pytest.approx(written["step_ms"], rel=EXACT)
    for turn in written["turns"]:
        assert turn["kernel_ms"] + turn["host_ms"] == pytest.approx(turn["step_ms"], rel=EXACT)
    (kernel,) = written["kernels"]
    assert kernel["name"] == "update_adamw_f32_f32"
    moved = elements(SMALL_GPT2) * 28
    assert kernel["gb_per_s"] * kernel["ms"] * 1e6 == pytest.approx(moved)
    assert kernel["ceiling"] == pytest.approx(kernel["gb_per_s"] / written["ceilings"]["memory"])
    assert {row["name"] for row in written["host"]} == {"AdamW.step", "refresh", "run", "release"}
    assert [row["thread"] for row in kernel["threads"]] == [f"thread {i}" for i in range(len(kernel["threads"]))]
    assert not written["interrupted"]
    for shown in ("update_adamw_f32_f32", "AdamW.step", "GB/s", "ceiling", "thread 0", *written["commands"].values()):
        assert shown in output
    assert "stepladder::refresh" in traced.read_text()


@pytest.mark.parametrize("name", ["muon", "newton_schulz"])
def test_products_are_held_against_torchs(name, tmp_path):
    file = tmp_path / "out.json"
    profiled("--optimizer", name, "--shapes=48x64,20x30", "--steps=2", f"--json={file}")
    written = json.loads(file.read_text())
    assert written["samples"] == 2
    rated = [row for row in written["kernels"] if row["tflop_per_s"] is not None]
    flops = sum(row["tflop_per_s"] * row["ms"] * 1e9 for row in rated)
    assert flops == pytest.approx(sum(5 * 2 * (2 * m * m * n + m**3) for m, n in ((48, 64), (20, 30))))
    for row in rated:
        assert row["ceiling"] == pytest.approx(row["tflop_per_s"] / written["ceilings"]["products"][row["precision"]])


def test_refreshes_are_averaged_over_a_cycle(tmp_path):
    file = tmp_path / "out.json"
    profiled("shampoo", "--shapes=24x32", "--steps=1", f"--json={file}")
    written = json.loads(file.read_text())
    assert (written["samples"], written["steps"]) == (1, 10)
    calls = {row["name"]: row["calls"] for row in written["kernels"]}
    assert calls["inverse_root"] == pytest.approx(0.1)
    assert calls["precondition"] == pytest.approx(1.0)


def test_ctrl_c_keeps_the_turns_that_were_done(tmp_path, monkeypatch):
    steps = iter(range(100))

    def interrupted(self, name, step, own=Clock.step):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return own(self, name, step)

    monkeypatch.setattr(Clock, "step", interrupted)
    file, traced = tmp_path / "out.json", tmp_path / "trace.json"
    arguments = ["adamw", "--shapes=10x10", "--steps=20", f"--json={file}", f"--trace={traced}"]
    output = profiled(*arguments, code=1)
    written = json.loads(file.read_text())
    assert written["interrupted"]
    assert written["samples"] == 3
    assert "Interrupted" in output
    assert not traced.exists()


def test_ctrl_c_before_the_first_turn_gives_no_numbers(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "step", interrupted)
    file = tmp_path / "out.json"
    assert "Aborted" in profiled("adamw", "--shapes=10x10", f"--json={file}", code=1)
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamww"], "'adamww' is not one of 'sgd'"),
        ([], "nothing to profile: expected a NAME, one of sgd"),
        (["adamw", "--optimizer=sgd"], "expected one of them"),
        (["adamw", "--shapes=gpt3"], "'gpt3' is no set and no shape, expected 1000x768"),
        (["adamw", "--shapes=3x0"], "'3x0' is no set and no shape"),
        (["adamw", "--shapes="], "'' is no set and no shape"),
        (["adamw", "--shapes=9999999x9999999"], "is more than 1000000 tensors or 68719476736 elements"),
        (["adamw", "--shapes=200000x200000", "--dtype=fp64"], "GiB of memory"),
        (["muon", "--shapes=5000x3,7"], "muon has nothing to do for these shapes"),
        (["newton_schulz", "--shapes=7"], "newton_schulz takes matrices"),
        (["clip", "--backend=cpu"], "clip_grad_norm_ chooses by the device"),
        (["adamw", "--dtype=int8"], "'int8' is not one of"),
        (["adamw", "--backend=gpu"], "'gpu' is not one of"),
        (["adamw", "--bare", "--json=x.json"], "--bare takes steps and says nothing: --json does not go with it"),
        (["adamw", "--steps=0"], "0 is not in the range"),
        (["adamw", "--arch=sm_80"], "--arch goes with --static alone"),
        (["adamw", "--static"], "--static goes with --arch, --kernel, --backend and --json alone, not NAME"),
        (["--static", "--backend=cpu"], "expected cuda or triton"),
        (["adamw", "--ncu=/nonexistent"], "'/nonexistent' does not exist"),
        (["adamw", "--json=/nonexistent/x.json"], "'/nonexistent/x.json' cannot be written: No such file"),
        (["adamw", "--trace=/dev/null/x.json"], "'/dev/null/x.json' cannot be written: Not a directory"),
    ],
)
def test_refusals(arguments, message):
    done = CliRunner().invoke(main, ["profile", *arguments], terminal_width=1000)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_a_gpu_that_is_not_there_is_refused():
    for line in report.commands(report.Case("adamw", "2*3x4", "fp32", "cpu", None, 2)).values():
        # Of nsys and ncu, what they are to run: it must be understood.
        arguments = [argument for argument in shlex.split(line)]
        own = arguments[arguments.index("profile", arguments.index("stepladder")) + 1 :]
        if "--ncu" in own:
            own = own[: own.index("--ncu")]
        assert "torch sees no CUDA device: --device cuda" in profiled(*own, code=1)


def test_files_that_were_there_are_left_where_nothing_is_measured(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("before")
    profiled("muon", "--shapes=7", f"--json={file}", code=1)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_bare_steps_by_the_module():
    line = [sys.executable, "-m", "stepladder", "profile", "adamw", "--shapes=3x4", "--bare", "--steps=2"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == ""


# Traces


def check_lanes(written: dict) -> None:
    """Events of a lane lie within each other or apart, or a viewer shows them wrongly."""
    lanes = defaultdict(list)
    for event in written["traceEvents"]:
        if event.get("ph") == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"]))
    for events in lanes.values():
        ends: list[float] = []
        for begin, negative, name in sorted(events):
            while ends and ends[-1] <= begin:
                ends.pop()
            # Of two ends, each is a sum of times that are rounded themselves: two units in the last place.
            assert not ends or begin - negative <= ends[-1] + 4 * math.ulp(begin), name
            ends.append(begin - negative)


@pytest.mark.parametrize(
    ("name", "shapes", "expected", "lanes"),
    [
        (
            "adamw",
            "gpt2",
            {"AdamW.step", "refresh", "run", "release", "update_adamw_f32_f32 (kernel)"},
            {"stepladder kernel thread 1"},
        ),
        ("muon", "48x64,5", {"Muon.step", "check", "matrices", "update_adamw_f32_f32 (kernel)"}, set()),
        (
            "soap",
            "24x32,16x16",
            {"SOAP.step", "project", "update_gram_", "orthonormalize", "rotate"},
            {"stepladder worker"},
        ),
    ],
)
def test_traces_have_named_ranges(name, shapes, expected, lanes, tmp_path):
    """Threads of kernels, or of Python, stand in lanes of their own."""
    torch.set_num_threads(2)
    file = tmp_path / "trace.json"
    profiled(name, f"--shapes={shapes}", "--steps=1", f"--trace={file}")
    written = json.loads(file.read_text())
    events = [event for event in written["traceEvents"] if event["name"].startswith(ranges.PREFIX)]
    assert {ranges.PREFIX + part for part in expected} <= {event["name"] for event in events}
    assert all(event["ph"] == "X" and event["dur"] >= 0.0 for event in events)
    labels = [event["args"]["name"] for event in written["traceEvents"] if event["name"] == "thread_name"]
    assert {label for label in labels if label.startswith("stepladder ")} == lanes
    check_lanes(written)


def test_ranges_stand_in_a_trace_of_anybodys(tmp_path):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = sl.AdamW([param])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    names = {event.key for event in profiler.key_averages()}
    assert {"stepladder::refresh", "stepladder::bind", "stepladder::run"} <= names


# A GPU


def event(kind: str, name: str, ts: float, dur: float, tid: int = 1, **args: object) -> dict:
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


# As torch.profiler writes it for two steps of Muon, cut to what matters.
DEVICE_TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "python"}},
        *[
            made
            for step in (0.0, 1000.0)
            for made in (
                event("user_annotation", "stepladder::Muon.step", step, 300.0),
                event("user_annotation", "stepladder::newton_schulz", step + 10, 100.0),
                event("gpu_user_annotation", "stepladder::newton_schulz", step + 500, 300.0, tid=7),
                event("cuda_runtime", "cudaLaunchKernelExC", step + 20, 5.0, correlation=step + 1),
                event("cuda_driver", "cuLaunchKernelEx", step + 40, 5.0, correlation=step + 2),
                event("user_annotation", "stepladder::elementwise", step + 150, 100.0),
                event("cuda_runtime", "cudaLaunchKernel", step + 160, 5.0, correlation=step + 3),
                event("cuda_runtime", "cudaMemcpyAsync", step + 280, 5.0, correlation=step + 4),
                event("kernel", "stepladder::symmetric_products(Grid)", step + 500, 200.0, tid=7, correlation=step + 1),
                event("kernel", "void stepladder::multiply<float>(Grid)", step + 700, 100.0, 7, correlation=step + 2),
                event("kernel", "stepladder::update_adamw_f32_f32(Table)", step + 800, 50.0, 7, correlation=step + 3),
                event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", step + 850, 10.0, 7, correlation=step + 4),
            )
        ],
    ]
}  # fmt: skip


def test_kernels_of_a_gpu_are_found_in_the_ranges_that_launched_them():
    found = {(k.range, k.name): (k.launches, k.ms) for k in trace.device_kernels(DEVICE_TRACE)}
    assert found == {
        ("newton_schulz", "symmetric_products"): (2, pytest.approx(0.4)),
        ("newton_schulz", "multiply"): (2, pytest.approx(0.2)),
        ("elementwise", "update_adamw_f32_f32"): (2, pytest.approx(0.1)),
        ("Muon.step", "Memcpy HtoD"): (2, pytest.approx(0.02)),
    }


class FakeGpu:
    """The CPU's clock in place of a GPU's events."""

    device = torch.device("cpu")

    def alone(self, step):
        begin = time.perf_counter_ns()
        step()
        return ((time.perf_counter_ns() - begin) / 1e6,) * 2

    def queued(self, step, host_ms):
        return self.alone(step)[0]


def test_a_profile_on_a_gpu(monkeypatch):
    monkeypatch.setattr(measure, "TRACED_STEPS", 2)
    monkeypatch.setattr(trace, "record", lambda take, on_gpu: take() or DEVICE_TRACE)
    monkeypatch.setattr("stepladder.bench.gpu.COPY_LEAST", 2**20)
    stepped = subject("newton_schulz", "40x50")
    result = measure.on_gpu(FakeGpu(), stepped, 0.0, 3)
    rows = {(row.within, row.name): row for row in result.kernels}
    own = rows[None, "newton_schulz"]
    assert (own.calls, own.ms) == (2.0, pytest.approx(0.3))
    flops = 5 * 2 * (2 * 40 * 40 * 50 + 40**3)
    assert own.tflop_per_s == pytest.approx(flops / 0.3e-3 / 1e12)
    assert own.ceiling == pytest.approx(own.tflop_per_s / result.ceilings.products[own.precision])
    assert rows["newton_schulz", "symmetric_products"].ms == pytest.approx(0.2)
    assert result.kernel_ms == pytest.approx(0.36)
    assert result.host_ms == max(result.step_ms - result.kernel_ms, 0.0)
    assert [list(turn) for turn in result.each] == [["step_ms", "call_ms"]] * 3
    case = report.Case("newton_schulz", "40x50", "fp32", "cuda", None, None)
    measured = {"symmetric_products": ncu.Measured(4, 0.1, 1234.0, 25.0, 80.0, 50.0, 168.0)}
    assert json.loads(json.dumps(report.as_json(case, stepped, result, {}, measured)))["ncu"]
    shown = io.StringIO()
    Console(width=200, file=shown).print(report.tables(case, stepped, result, 2, measured))
    (line,) = [text for text in shown.getvalue().splitlines() if "symmetric_products" in text]
    assert "1234" in line
    assert "80.0%" in line


# Nsight Compute

HEADER = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
HEADER += ',"Device","CC"'
KERNEL = "stepladder::update_adamw_f32_f32(stepladder::Table, stepladder::Scalars<float>)"
LAUNCH = f'"1234","python3.11","gpu-host","{KERNEL}","1","7","(256, 1, 1)","(660, 1, 1)","0","9.0"'
RAW = f"""==PROF== Connected to process 1234 (/usr/bin/python3.11)
==PROF== Profiling "update_adamw_f32_f32" - 0: 0%....50%....100% - 40 passes
==PROF== Disconnected from process 1234
{HEADER},"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread","sm__cycles_elapsed.avg"
"","","","","","","","","","","","Gbyte","Mbyte","usecond","%","%","%","register/thread","cycle"
"0",{LAUNCH},"2.00","1,500.00","1,000.00","91.50","23.10","30.80","86","1,843,201.50"
"1",{LAUNCH},"2.00","1,500.00","1,500.00","90.50","n/a","30.80","86","1,843,201.50"
"""
DETAILS = f"""==PROF== Connected to process 1234 (/usr/bin/python3.11)
{HEADER},"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0",{LAUNCH},"GPU Speed Of Light Throughput","DRAM Frequency","Ghz","2.61","","",""
"0",{LAUNCH},"GPU Speed Of Light Throughput","Duration","ms","1.25","","",""
"0",{LAUNCH},"GPU Speed Of Light Throughput","Memory Throughput","%","91.00","","",""
"0",{LAUNCH},"GPU Speed Of Light Throughput","DRAM Throughput","%","91.00","","",""
"0",{LAUNCH},"GPU Speed Of Light Throughput","Compute (SM) Throughput","%","23.10","","",""
"0",{LAUNCH},"SpeedOfLight","","","","SOLBottleneck","INF","The kernel is utilizing more than 80.0% of ""DRAM"", ..."
"0",{LAUNCH},"Memory Workload Analysis","Memory Throughput","Tbyte/s","2.80","","",""
"0",{LAUNCH},"Launch Statistics","Registers Per Thread","register/thread","86","","",""
"0",{LAUNCH},"Occupancy","Achieved Occupancy","%","30.80","","",""
"""


@pytest.mark.parametrize(("text", "launches"), [(RAW, 2), (DETAILS, 1)], ids=["raw", "details"])
def test_both_pages_of_ncu_are_read(text, launches):
    ((name, found),) = ncu.read(text.splitlines(keepends=True)).items()
    assert name == "update_adamw_f32_f32"
    assert found.launches == launches
    assert found.ms == pytest.approx(1.25)
    assert found.gb_per_s == pytest.approx(2800.0)
    assert found.memory_percent == pytest.approx(91.0)
    assert found.sm_percent == pytest.approx(23.1)
    assert found.occupancy == pytest.approx(30.8)
    assert found.registers == 86.0


def test_ncu_in_base_units():
    text = RAW.replace('"Gbyte","Mbyte","usecond"', '"byte","byte","nsecond"')
    text = text.replace('"2.00","1,500.00","1,000.00"', '"2,000,000,000","1,500,000,000","1,000,000"')
    text = text.replace('"2.00","1,500.00","1,500.00"', '"2000000000","1500000000","1500000"')
    (found,) = ncu.read(text.splitlines()).values()
    assert (found.ms, found.gb_per_s) == (pytest.approx(1.25), pytest.approx(2800.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header with a column 'Kernel Name'"),
        ("a,b\n1,2\n", "no header with a column 'Kernel Name'"),
        (f"{HEADER}\n", "the row of units is missing"),
        (f'{HEADER},"cycles"\n{"," * 10},"cycle"\n"0",{LAUNCH},"5"\n', "none of the metrics in it is known here"),
        (RAW.replace('"86","1,843,201.50"', '"86"'), "a row has 18 columns, expected the 19"),
        (DETAILS.replace('"Metric Unit"', '"Unit"'), "the header lacks 'Metric Unit'"),
    ],
)
def test_what_is_no_file_of_ncus_is_refused(text, message, tmp_path):
    file = tmp_path / "kernels.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        ncu.read(text.splitlines())
    assert f"{file} cannot be read: " in profiled("adamw", "--shapes=3x4", f"--ncu={file}", code=1).replace("\n", "")


def test_ncu_stands_in_the_table(tmp_path):
    file, written = tmp_path / "kernels.csv", tmp_path / "out.json"
    file.write_text(RAW)
    output = profiled("adamw", "--shapes=30x20", "--steps=1", f"--ncu={file}", f"--json={written}")
    (line,) = [
        text for text in output.splitlines() if text.strip().startswith("update_adamw_f32_f32") and "2800" in text
    ]
    assert "91.0%" in line
    assert json.loads(written.read_text())["ncu"]["update_adamw_f32_f32"]["launches"] == 2
    output = profiled("lion", "--shapes=30x20", "--steps=1", f"--ncu={file}")
    assert "update_adamw_f32_f32 (ncu)" in output


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("update_adamw_f32_f32", "update_adamw_f32_f32"),
        ("void a::b<c::d<(int)3>, float>(a::e<float> const&, int (*)(int))", "b"),
        ("(anonymous namespace)::fold(double*)", "fold"),
        ("_Z3foov", "_Z3foov"),
    ],
)
def test_short_names(function, name):
    assert ncu.short_name(function) == name


def test_shapes():
    assert shapes_of(" 2*3x4, 5 ,1*6x7x8") == [(3, 4), (3, 4), (5,), (6, 7, 8)]
    assert subjects.is_hidden((3072, 768))
    assert subjects.is_hidden((512, 512, 3, 3))
    assert not subjects.is_hidden((50257, 768))
    assert not subjects.is_hidden((768,))


def test_every_subject_can_be_made():
    for name in subjects.NAMES:
        stepped = subject(name, "12x16,5" if name in subjects.OPTIMIZERS else "12x16")
        stepped.step()
        assert stepped.touched > 0
