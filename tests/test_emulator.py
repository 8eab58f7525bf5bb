"""The emulator runs right kernels right, and says what is wrong with wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def build(directory: Path, *flags: str) -> Path:
    """The test kernels and the emulator as a program, compiled with `flags`."""
    program = directory / "kernels"
    common = [COMPILER, "-std=c++17", "-O1", "-g", f"-I{CSRC}"]
    kernels = directory / "kernels.o"
    subprocess.run(
        [*common, *flags, "-x", "c++", "-c", ROOT / "tests" / "emulator" / "kernels.cu", "-o", kernels], check=True
    )
    # The emulator itself is no kernel: its own accesses are not to be watched.
    rest = [flag for flag in flags if flag != "-fsanitize=thread"]
    sources = [CSRC / "emulator" / name for name in ("emulator.cpp", "fiber.cpp", "races.cpp")]
    subprocess.run([*common, *rest, kernels, *sources, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def racing(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("races"), "-DSL_EMULATOR_RACES", "-fsanitize=thread")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("asan"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError:
        pytest.skip("this compiler has no AddressSanitizer")


def run(program: Path, kernel: str) -> str:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, kernel], capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout + done.stderr


RIGHT = {
    "reduction": 2 * 4560,
    "within_a_warp": 2 * 4560,
    "collectives": 2 * 96,
    "matrix_loads": 2 * 96,
    "matrix_products": 2 * 96,
    "copies": 2 * 2 * 96,
}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels(plain, racing, sanitized, kernel):
    for program in (plain, racing, sanitized):
        assert run(program, kernel) == f"result {RIGHT[kernel]}\n"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("misaligned", r"an access of 16 bytes"),
        ("divergent_barrier", "cannot go on: 48 threads wait in __syncthreads"),
        ("lane_that_has_ended", "a shuffle: lane 5 is in the mask and has ended"),
        ("lane_outside_of_mask", "a shuffle: the mask leaves out lane 16"),
        ("misaligned_matrix_load", "is not aligned to 16 bytes"),
        ("matrix_load_beyond_shared_memory", "are not in shared memory"),
        ("misaligned_copy", "cp.async: the source"),
        ("copy_beyond_shared_memory", "cp.async: 16 bytes at"),
        ("no_dynamic_shared_memory", "the launch gave no dynamic shared memory"),
        ("divergent_product", "93 threads wait in mma"),
    ],
)
def test_what_a_device_would_hang_on_or_forbid(plain, kernel, message):
    output = run(plain, kernel)
    assert output.startswith("error: ")
    assert message in output


@pytest.mark.parametrize(
    "kernel",
    [
        "missing_barrier",
        "missing_second_barrier",
        "barrier_of_a_warp",
        "missing_barrier_after_wait",
        "missing_barrier_before_copy",
        "missing_barrier_before_matrix_load",
    ],
)
def test_missing_barriers(racing, kernel):
    output = run(racing, kernel)
    assert output.startswith("error: ")
    assert "race" in output
    assert "no barrier stands between them" in output


def test_missing_wait(plain, racing):
    # The copy is made as late as possible: without the wait nothing is there, and every third line is not zero.
    assert run(plain, "missing_wait") == "result 0\n"
    assert "the copy was not waited for" in run(racing, "missing_wait")


@pytest.mark.parametrize("kernel", ["out_of_bounds", "beyond_global_memory"])
def test_out_of_bounds(sanitized, kernel):
    assert "AddressSanitizer: heap-buffer-overflow" in run(sanitized, kernel)


@pytest.mark.large
def test_every_barrier_of_a_kernel_is_needed_and_missed(tmp_path):
    """The on-chip kernels are right as they are, and race without any one of their barriers."""
    common = [COMPILER, "-std=c++17", "-O1", f"-I{CSRC}", "-DSL_EMULATOR_RACES", "-Wno-unknown-pragmas"]
    kept = [CSRC / "emulator" / name for name in ("emulator.cpp", "fiber.cpp", "races.cpp")]
    objects = []
    for source in (*kept, ROOT / "tests" / "emulator" / "on_chip.cu"):
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([*common, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    barrier = "__syncthreads();"
    parts = (CSRC / "newton_schulz" / "gpu_on_chip.cu").read_text().split(barrier)
    assert len(parts) > 10
    for removed in range(len(parts)):
        kernels = tmp_path / "kernels.cu"
        text = parts[0]
        for index, part in enumerate(parts[1:], 1):
            text += (";" if index == removed else barrier) + part
        kernels.write_text(text)
        program = tmp_path / "program"
        build = [*common, "-fsanitize=thread", "-x", "c++", "-c", kernels, "-o", tmp_path / "kernels.o"]
        subprocess.run(build, check=True)
        subprocess.run([*common, tmp_path / "kernels.o", *objects, "-o", program], check=True)
        output = subprocess.run([program], capture_output=True, text=True, timeout=300).stdout
        if removed == 0:
            assert output == "right\n" * 8
        else:
            assert "race" in output, f"nothing misses barrier {removed} of {len(parts) - 1}"
