"""`stepladder profile --static`, and what it says of the CUDA kernels: no spills, and 16 bytes at a time.

The kernels are compiled once for each architecture; that needs nvcc and cuobjdump, but no GPU.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepladder import _C
from stepladder.cli import cubins, main, static
from stepladder.cli.profile import Report, collect

ROOT = Path(__file__).parents[1]
ARCHS = ["sm_90a", pytest.param("sm_80", marks=pytest.mark.large), pytest.param("sm_100", marks=pytest.mark.large)]

VECTOR = 8  # consecutive elements of one thread (kVector)
SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}  # also of gradients, whose dtype a kernel looks up at run time
# States that the first pass of a norm-based rule changes (kNumPrepared).
PREPARED = {"lamb": 2, "lars": 0}
# A compiler may read a 64-bit word of the table in halves, or one byte of it. A column that is no longer read or
# written by 16 bytes adds 4 accesses or more.
SLACK = 3


@cache
def report(arch: str) -> Report:
    return collect("cuda", arch)


@pytest.fixture(params=ARCHS)
def kernels(request) -> list[static.Kernel]:
    """All CUDA kernels as compiled for one architecture."""
    found = report(request.param)
    if found.reason is not None:
        pytest.skip(f"no CUDA kernels for {request.param}: {found.reason}")
    return found.kernels


def need_nvcc() -> None:
    if cubins.find_nvcc() is None:
        pytest.skip("nvcc is neither on PATH nor under CUDA_HOME")
    try:
        cubins.find_cuobjdump()
    except cubins.MissingError as error:
        pytest.skip(str(error))


# What a kernel may do


def storage_faults(kernel: static.Kernel) -> list[str]:
    counts = {"stack bytes": kernel.stack, "local loads": kernel.local_loads, "local stores": kernel.local_stores}
    return [f"{kernel.name}: {count} {what}" for what, count in counts.items() if count]


def wide(dtype: str) -> int:
    """Accesses of 16 bytes that a thread's elements of one column take."""
    return VECTOR * SIZES[dtype] // 16


def bounds(name: str) -> tuple[int, int, Counter[int], Counter[int]]:
    """What the source makes of a kernel.

    Returns:
        The loads, then the stores, of 16 bytes that there must be at least; the narrower loads, then stores, that
        there may be at most, by width. None of the latter belongs to the vector path.
    """
    gradients = Counter(SIZES.values())  # one access of an element for each dtype
    if name == "scale":
        # Both types of arithmetic have their code for each dtype, but may share the accesses of the vector path.
        stores = gradients + gradients
        return sum(map(wide, SIZES)), sum(map(wide, SIZES)), Counter({width: 99 for width in SIZES.values()}), stores
    kind, rule, param, state = re.fullmatch(r"([a-z]+)_(\w+)_(\w+?)_(\w+?)", name).groups()  # type: ignore[union-attr]
    facts = _C.rules()[rule]
    states = [state] * len(facts["states"])
    if kind == "prepare":
        # An element each is loaded and stored in an unrolled loop over the vector's elements; the two sums in the end.
        prepared = states[: PREPARED[rule]]
        stores = Counter({SIZES[s]: VECTOR * len(prepared) for s in prepared})
        stores[8 if param == "f64" else 4] += 2
        many = Counter({width: 999 for width in (8, 4, 2, 1)})
        least = sum(map(wide, [param, *prepared, *SIZES]))
        return least, sum(map(wide, prepared)), many, stores
    columns = [param, *states]
    # Gradients of each dtype have accesses of their own. They are stored where they are unscaled in place.
    least = sum(map(wide, [*columns, *SIZES]))
    element = Counter(SIZES[dtype] for dtype in columns) + gradients

    # The loop that counts steps is there twice where the compiler peels it.
    stores = element.copy()
    stores[8] += 2 * 1  # the step count as a double
    stores[4] += 2 * (1 + 1) + 1  # as a float; the clock; then the ticket
    stores[2] += param == "bf16"  # the parameter once more, rounded stochastically

    loads = element.copy()
    # found_inf, the gradient's scale, the learning rate; step or clock, for the scalars, for the seed and, both, where
    # they are counted. In halves: the tensor's layout, and the number of dimensions of each column and the gradient.
    loads[4] += 1 + 1 + 1 + 1 + 1 + 2 * 2 + 1 + (len(columns) + 1) + SLACK
    loads[2] += SLACK
    loads[1] += 2 * 1 + SLACK  # the flags, where the steps are counted
    # The clip factor, the learning rate, step counts, the ratio.
    loads[8] += 1 + 1 + 2 + 2 * 1 + (kind == "apply")
    # Words of the table: one in the search; the tensor's columns, size, chunk and flags; addresses of clock and step
    # for the scalars, of the step for the seed; hyper-parameters, two words of the learning rate and the seed; size and
    # stride of each column; flags, step, clock and step again where they are counted.
    loads[8] += 1 + (len(columns) + 1 + 3) + 3 + (len(facts["hyper"]) + 2 + 1) + 2 * (len(columns) + 1) + 2 * 4 + SLACK
    return least, least, loads, stores


def access_faults(kernel: static.Kernel) -> list[str]:
    least_loads, least_stores, narrow_loads, narrow_stores = bounds(kernel.name)
    faults = []
    for what, found, least, most in (
        ("loads", kernel.loads, least_loads, narrow_loads),
        ("stores", kernel.stores, least_stores, narrow_stores),
    ):
        if found[32] * 2 + found[16] < least:
            faults.append(f"{kernel.name}: {found[16]} {what} of 16 bytes, expected at least {least}")
        faults += [
            f"{kernel.name}: {found[width]} {what} of {width} bytes, expected at most {most[width]}"
            for width in (8, 4, 2, 1)
            if found[width] > most[width]
        ]
    return faults


def arithmetic_faults(ptx: str) -> list[str]:
    """Floating-point instructions that are not IEEE's, rounded to nearest, with subnormal numbers."""
    instructions = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][a-z0-9.]*\.f(?:32|64))\s", ptx, re.M)
    assert instructions
    faults = []
    for instruction in set(instructions):
        operation, *suffixes = instruction.split(".")
        rounds = operation in ("add", "sub", "mul", "div", "rcp", "sqrt")
        known = rounds or operation in ("abs", "cvt", "ld", "max", "min", "mov", "neg", "selp", "setp", "st")
        if not known or (rounds and "rn" not in suffixes) or {"ftz", "approx", "full"} & set(suffixes):
            faults.append(instruction)
    return faults


# The kernels


def test_every_kernel_is_there_by_its_name(kernels):
    expected = [name for pair in cubins.PAIRS for name in cubins.names_of_pair(pair)]
    expected += [*cubins.NORM_KERNELS, *cubins.MATRIX_KERNELS, *cubins.ROOT_KERNELS]
    assert [kernel.name for kernel in kernels] == sorted(expected)


def test_no_kernel_spills(kernels):
    assert [fault for kernel in kernels for fault in storage_faults(kernel)] == []


def test_elementwise_kernels_move_16_bytes_at_a_time(kernels):
    elementwise = [kernel for kernel in kernels if kernel.name.startswith(("update_", "apply_"))]
    assert [fault for kernel in elementwise for fault in access_faults(kernel)] == []


def test_other_kernels_that_store_elements_do_so_too(kernels):
    others = [kernel for kernel in kernels if kernel.name.startswith(("prepare_", "scale"))]
    assert [fault for kernel in others for fault in access_faults(kernel)] == []


def test_every_multiprocessor_has_room_for_two_blocks(kernels):
    """Else nothing is in flight while a block looks up its next tensor.

    But for one, which keeps two tiles of sums in registers, and copies its next panel in the meantime; for one that
    fills the shared memory with three matrices, and reads nothing else; and for clusters, whose blocks each take a
    multiprocessor's shared memory.
    """
    alone = [kernel.name for kernel in kernels if kernel.occupancy.blocks < 2]
    assert alone == ["resident_256", "roots_128_f32", "streamed_128", "streamed_256"]


@pytest.mark.parametrize(
    "pair", [pair if pair == "f32_f32" else pytest.param(pair, marks=pytest.mark.large) for pair in cubins.PAIRS]
)
def test_arithmetic_is_rounded_to_nearest_and_never_fused(tmp_path, pair):
    # fp32 kernels have fp64 arithmetic too, for their scalars.
    need_nvcc()
    sources = cubins.source_tree()
    options = cubins.pair_options(sources, pair)
    source = sources / "multi_tensor/gpu_kernels.cu"
    ptx = cubins.compile_source(source, tmp_path / "kernels.ptx", "sm_90a", *options, kind="-ptx").read_text()
    assert re.search(r"\bdiv\.rn\.f64\b", ptx)
    assert arithmetic_faults(ptx) == []


# That the checks can fail


def test_a_kernel_that_uses_the_stack_and_moves_single_elements_is_found(tmp_path):
    need_nvcc()
    source = tmp_path / "bad.cu"
    source.write_text(
        """
        extern "C" __global__ void __launch_bounds__(128) update_sgd_f32_f32(float* data, const int* order) {
          data += 64 * (blockIdx.x * 128 + threadIdx.x);
          float values[64];
        #pragma unroll
          for (int k = 0; k < 64; ++k) values[k] = data[k];
          for (int k = 0; k < 64; ++k) values[order[k]] += values[k];  // so it cannot be kept in registers
        #pragma unroll
          for (int k = 0; k < 64; ++k) data[k] = values[k];
        }
        """
    )
    cubin = cubins.compile_source(source, tmp_path / "bad.cubin", "sm_90a")
    (kernel,) = static.inspect(cubins.Cubin(cubin, str), "sm_90a")
    assert kernel.threads == 128
    assert [re.sub(r": \d+", ":", fault) for fault in storage_faults(kernel)] == [
        "update_sgd_f32_f32: stack bytes",
        "update_sgd_f32_f32: local loads",
        "update_sgd_f32_f32: local stores",
    ]
    assert [re.sub(r" \d+ (loads|stores)|,.*", r" \1", fault) for fault in access_faults(kernel)] == [
        "update_sgd_f32_f32: loads of 16 bytes ",
        "update_sgd_f32_f32: loads of 4 bytes ",
        "update_sgd_f32_f32: stores of 16 bytes ",
        "update_sgd_f32_f32: stores of 4 bytes ",
    ]


@pytest.mark.parametrize(
    "instruction", ["fma.rn.f32", "add.f32", "div.full.f32", "sqrt.approx.ftz.f32", "mul.rn.ftz.f32", "ex2.approx.f32"]
)
def test_arithmetic_that_breaks_the_contract_is_found(instruction):
    assert arithmetic_faults(f"\tadd.rn.f32 %f1, %f2, %f3;\n\t@%p1 {instruction} %f1, %f2, %f3;\n") == [instruction]


def test_widths_are_told_apart():
    lines = [
        "LDG.E.128.CONSTANT R4",
        "@!P0 LD.E.64 R2",
        "@UP1 LDG.E.LTC128B R2",
        "LDG.E.U16 R1",
        "LDL R1",
        "LDS.128 R4",
    ]
    lines += ["STG.E.ENL2.256 R8", "ST.E.U8 R1", "STL.64 R2", "LDC R1"]
    found = static.accesses(
        "".join(f"        /*{i:04x}*/    {line}, [R6] ;  /* 0x1 */\n" for i, line in enumerate(lines))
    )
    assert found == {
        "load": {16: 1, 8: 1, 4: 1, 2: 1},
        "store": {32: 1, 1: 1},
        "local_load": {4: 1},
        "local_store": {8: 1},
    }


# The numbers and the command


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limited_by"),
    [
        # As cudaOccMaxActiveBlocksPerMultiprocessor of cuda_occupancy.h has them.
        ("sm_90a", 128, 96, 30, 5, "registers"),
        ("sm_90a", 128, 32, 30, 16, "warps"),
        ("sm_90", 32, 32, 0, 32, "blocks"),
        ("sm_80", 128, 32, 40000, 4, "shared memory"),
        ("sm_86", 32, 32, 0, 16, "blocks"),
        ("sm_89", 32, 32, 0, 24, "blocks"),
        ("sm_100f", 256, 129, 0, 1, "registers"),
        ("sm_120", 128, 40, 0, 12, "warps"),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, limited_by):
    found = static.occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * threads // 32
    assert found.percent == pytest.approx(100 * found.warps / static.multiprocessor(arch).warps)


def test_the_build_has_the_same_flags_and_pairs():
    listed = re.findall(r"foreach\(dtype ([\w ]+)\)\s+add_gpu_pair\(\$\{target\} \$\{dtype\} (\S+) ", cmake_sources())
    pairs = [f"{d}_{state.replace('${dtype}', d)}" for dtypes, state in listed for d in dtypes.split()]
    assert tuple(pairs) == cubins.PAIRS
    build = (ROOT / "CMakeLists.txt").read_text()
    assert re.findall(r"COMPILE_LANGUAGE:CUDA>:(\S+?)>", build) == ["-fmad=false"]
    assert "set(CMAKE_CXX_STANDARD 17)" in build
    assert {"-fmad=false", "-std=c++17"} <= set(cubins.FLAGS)


def cmake_sources() -> str:
    return (ROOT / "csrc/gpu_sources.cmake").read_text()


def profile(*arguments: str):
    return CliRunner().invoke(main, ["profile", *arguments])


def test_profile_prints_and_writes_the_same(tmp_path):
    need_nvcc()
    file = tmp_path / "static.json"
    result = profile("--static", "--backend", "cuda", "--kernel", "scale", "--json", str(file))
    assert result.exit_code == 0, result.output
    (found,) = json.loads(file.read_text())["reports"]
    (kernel,) = found["kernels"]
    assert (found["backend"], found["arch"], kernel["name"]) == ("cuda", "sm_90a", "scale")
    row = next(line for line in result.output.splitlines() if "scale" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[0] == "scale"
    assert cells[1] == str(kernel["registers"])
    assert cells[5] == "/".join(str(kernel["loads"][width]) for width in ("16", "8", "4", "2", "1"))
    assert cells[8] == str(kernel["occupancy"]["blocks"])


def test_profile_refuses_an_unknown_architecture():
    result = profile("--static", "--arch", "sm_12")
    assert result.exit_code == 2
    assert "'sm_12' is unknown, expected one of sm_80" in " ".join(result.output.split())


def test_profile_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(cubins, "why_not_from_extension", lambda arch: "the extension was built without CUDA")
    monkeypatch.setattr(cubins, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(cubins, "find_nvcc", lambda: None)
    result = profile("--static", "--backend", "cuda")
    assert result.exit_code == 1
    assert result.output == (
        "Error: no kernels of cuda for sm_90a: the extension was built without CUDA, and nvcc is neither on PATH nor "
        "under CUDA_HOME\n"
    )
