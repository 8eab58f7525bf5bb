"""The emulator runs right kernels right, and says what is wrong with wrong ones."""

from __future__ import annotations

import os
import re
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
    "other_products": 2 * 96,
    "copies": 2 * 2 * 96,
    "matrix_transposes": 2 * 96,
    "exchange": 2 * (2 * 4560 + 96 * 1000),
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
        ("block_that_has_ended", "block 1 of the cluster has ended"),
        ("block_of_no_rank", "the cluster has 2 blocks, and none of rank 2"),
        ("private_of_another_block", "is not in the block's shared memory"),
        ("divergent_cluster_barrier", "block 0 cannot go on: 96 threads wait in a barrier of the cluster"),
        ("divergent_cluster_barrier", "95 threads wait in __syncthreads, 1 threads wait in a barrier of the cluster"),
        ("part_of_a_cluster", "2 blocks are no whole number of clusters of 3"),
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
        "missing_cluster_barrier_before_read",
        "missing_cluster_barrier_before_write",
    ],
)
def test_missing_barriers(racing, kernel):
    output = run(racing, kernel)
    assert output.startswith("error: ")
    assert "race" in output
    assert "no barrier stands between them" in output


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing_first_cluster_barrier", "which need not have begun"),
        ("first_misses_last_cluster_barrier", "which has ended"),
        ("second_misses_last_cluster_barrier", "which may have ended"),
    ],
)
def test_blocks_of_a_cluster_that_are_not_there(racing, kernel, message):
    output = run(racing, kernel)
    assert output.startswith("error: ")
    assert re.search(rf"thread \d+ touches the memory of block \d of its cluster, {message}", output)


def test_missing_wait(plain, racing):
    # The copy is made as late as possible: without the wait nothing is there, and every third line is not zero.
    assert run(plain, "missing_wait") == "result 0\n"
    assert "the copy was not waited for" in run(racing, "missing_wait")


@pytest.mark.parametrize("kernel", ["out_of_bounds", "beyond_global_memory"])
def test_out_of_bounds(sanitized, kernel):
    assert "AddressSanitizer: heap-buffer-overflow" in run(sanitized, kernel)


@pytest.mark.large
@pytest.mark.parametrize("name", ["gpu_on_chip.h", "gpu_on_chip.cu", "gpu_cluster.cu"])
def test_every_barrier_of_a_kernel_is_needed_and_missed(tmp_path, name):
    """The on-chip kernels are right as they are, and race without any one of their barriers."""
    common = [
        COMPILER,
        "-std=c++17",
        "-O1",
        f"-I{tmp_path}",
        f"-I{CSRC}",
        "-DSL_EMULATOR_RACES",
        "-Wno-unknown-pragmas",
    ]
    emulator = [CSRC / "emulator" / name for name in ("emulator.cpp", "fiber.cpp", "races.cpp")]

    def compiled(source: Path, *flags: str) -> Path:
        result = tmp_path / f"{source.stem}.o"
        subprocess.run([*common, *flags, "-x", "c++", "-c", source, "-o", result], check=True)
        return result

    kept = [compiled(source) for source in (*emulator, ROOT / "tests" / "emulator" / "on_chip.cu")]
    folder = tmp_path / "newton_schulz"
    folder.mkdir()
    sources = [folder / source for source in ("gpu_on_chip.cu", "gpu_cluster.cu")]
    for source in sources:
        shutil.copy(CSRC / "newton_schulz" / source.name, source)
    objects: dict[Path, Path] = {}
    parts = re.split(r"(__syncthreads\(\);|gpu::cluster_barrier\(\);)", (CSRC / "newton_schulz" / name).read_text())
    barriers = range(1, len(parts), 2)
    assert len(barriers) >= 2
    for removed in (None, *barriers):
        text = "".join(";" if index == removed else part for index, part in enumerate(parts))
        (folder / name).write_text(text)
        for source in sources:
            if name in (source.name, "gpu_on_chip.h") or source not in objects:
                objects[source] = compiled(source, "-fsanitize=thread")
        program = tmp_path / "program"
        subprocess.run([*common, *objects.values(), *kept, "-o", program], check=True)
        output = subprocess.run([program], capture_output=True, text=True, timeout=300).stdout
        if removed is None:
            assert output == "right\n" * 14
        else:
            # A race, or a block that ends while another of its cluster needs it.
            assert "error: " in output, f"nothing misses barrier {removed // 2} of {len(barriers)}"
