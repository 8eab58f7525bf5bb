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


RIGHT = {"reduction": 2 * 4560, "within_a_warp": 2 * 4560, "collectives": 2 * 96}


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
    ],
)
def test_what_a_device_would_hang_on_or_forbid(plain, kernel, message):
    output = run(plain, kernel)
    assert output.startswith("error: ")
    assert message in output


@pytest.mark.parametrize("kernel", ["missing_barrier", "missing_second_barrier", "barrier_of_a_warp"])
def test_missing_barriers(racing, kernel):
    output = run(racing, kernel)
    assert output.startswith("error: ")
    assert "race" in output
    assert "no barrier stands between them" in output


@pytest.mark.parametrize("kernel", ["out_of_bounds", "beyond_global_memory"])
def test_out_of_bounds(sanitized, kernel):
    assert "AddressSanitizer: heap-buffer-overflow" in run(sanitized, kernel)
