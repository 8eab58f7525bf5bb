"""Where the machine code of the package's GPU kernels comes from, on a machine that needs no GPU.

CUDA kernels are read out of the built extension where it holds the architecture: that is the code which runs, and
nothing is compiled. Where it does not, or is older than its sources, they are compiled from `csrc` with the flags of
CMakeLists.txt, which takes a source tree and nvcc: wheels hold no sources. Triton kernels are compiled by Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from stepladder import _C

# Storage dtypes of the parameter and of the states; csrc/gpu_sources.cmake has the same list.
PAIRS = ("f64_f64", "f32_f32", "bf16_bf16", "f16_f16", "f64_f32", "bf16_f32", "f16_f32")
TYPES = {"f64": "double", "f32": "float", "bf16": "bf16", "f16": "f16"}
NORM_KERNELS = ("measure", "fold", "scale")
# Those of Newton-Schulz iterations, and the shared memory that a launch adds for each of their blocks; of those on
# chip the least, with one panel.
GROUPED_KERNELS = {
    "measure_matrices": 0,
    "pack_matrices": 9216,
    "divide_rows": 0,
    "symmetric_products": 81920,
    "multiply_iterates": 75776,
}
ON_CHIP_KERNELS = {
    f"{kind}_{side}": planes * 4 * side * (side + 8) + 256 + 8 * side
    for side, planes in ((32, 2), (64, 1), (128, 1))
    for kind in ("resident", "streamed")
}
# Of a cluster's blocks, each with a panel of so many columns.
CLUSTER_KERNELS = {
    f"{kind}_256": 2 * 256 * (256 + 8 + width + 8) + 256 + 8 * 256
    for kind, width in (("resident", 64), ("streamed", 32))
}
MATRIX_KERNELS = GROUPED_KERNELS | ON_CHIP_KERNELS | CLUSTER_KERNELS
# Likewise those of inverse roots, of orthonormal bases, of Gram matrices, and of products.
GROUPED_ROOT_KERNELS = {
    "begin_roots": 0,
    "find_top": 0,
    "load_roots_f32": 0,
    "load_roots_f64": 0,
    "root_products_f32": 81920,
    "root_products_f64": 81920,
    "write_roots_f32": 0,
    "write_roots_f64": 0,
}
ON_CHIP_ROOT_KERNELS = {
    f"roots_{side}_f{8 * size}": 3 * side * (side + 4) * size + 256
    for side, size in ((32, 4), (64, 4), (128, 4), (32, 8), (64, 8))
}
BASIS_KERNELS = {
    "begin_bases": 0,
    "load_bases": 0,
    "gram_products": 81920,
    "factor_blocks": 81920,
    "eliminate_blocks": 81920,
    "solve_rows": 81920,
    "judge_bases": 0,
    "reflect_bases": 0,
    "write_bases": 0,
}
GRAM_KERNELS = {"average_grams": 0}
PRODUCT_KERNELS = {"multiply_f32": 81920, "multiply_f64": 81920}
ROOT_KERNELS = GROUPED_ROOT_KERNELS | ON_CHIP_ROOT_KERNELS | BASIS_KERNELS | GRAM_KERNELS | PRODUCT_KERNELS
# What a launch adds to the shared memory of a block, by the kernel's name.
ADDED_SHARED = MATRIX_KERNELS | ROOT_KERNELS
FLAGS = ("-std=c++17", "-O3", "-fmad=false")
# Compiles and disassemblies under way at once.
WORKERS = 2

A = TypeVar("A")
B = TypeVar("B")


class MissingError(RuntimeError):
    """A backend's kernels cannot be had here; the message says why."""


@dataclass
class Cubin:
    """Machine code of some kernels.

    Attributes:
        path: The file.
        readable: Makes a kernel's name of its symbol.
        threads: Of a block, where the machine code does not say.
        dynamic_shared: Bytes of shared memory that a launch adds for each block.
    """

    path: Path
    readable: Callable[[str], str]
    threads: int | None = None
    dynamic_shared: int = 0

    def added_shared(self, name: str) -> int:
        """Of a kernel by its readable name."""
        return self.dynamic_shared + ADDED_SHARED.get(name, 0)


def in_parallel(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a tool prints.

    Raises:
        RuntimeError: It failed; the message has what it said.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def find_nvcc() -> str | None:
    """On PATH or under CUDA_HOME, as the build looks for it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def find_cuobjdump() -> str:
    """The CUDA toolkit's, or the one in Triton's package.

    Raises:
        MissingError: There is neither.
    """
    folders = [Path(nvcc).resolve().parent] if (nvcc := find_nvcc()) else []
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        folders += [Path(folder) / "backends/nvidia/bin" for folder in spec.submodule_search_locations or ()]
    for folder in (None, *folders):
        if found := shutil.which("cuobjdump", path=folder and str(folder)):
            return found
    raise MissingError("cuobjdump, which reads machine code, is in neither a CUDA toolkit nor an installed Triton")


def source_tree() -> Path | None:
    """The folder csrc, where the package is used from a source tree."""
    sources = Path(_C.__file__).resolve().parents[2] / "csrc"
    return sources if (sources / "gpu_sources.cmake").exists() else None


def why_not_from_extension(arch: str) -> str | None:
    """Why the built extension does not serve an architecture; None where it does."""
    if not _C.cuda_version:
        return "the extension was built without CUDA"
    extension, sources = Path(_C.__file__), source_tree()
    built = extension.stat().st_mtime
    if sources is not None and any(f.stat().st_mtime > built for f in sources.rglob("*") if f.suffix in (".cu", ".h")):
        return "the extension is older than csrc"
    if f".{arch}.cubin" not in run(find_cuobjdump(), "-lelf", extension):
        return f"the extension holds no machine code for {arch}"
    return None


def compile_source(source: Path, output: Path, arch: str, *options: str, kind: str = "-cubin") -> Path:
    """Compiles a CUDA source with the flags of the build, to a cubin or, as `kind` asks, to PTX."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise MissingError("nvcc is neither on PATH nor under CUDA_HOME")
    number = arch.removeprefix("sm_")
    target = f"-gencode=arch=compute_{number},code={'sm' if kind == '-cubin' else 'compute'}_{number}"
    run(nvcc, *FLAGS, target, *options, kind, "-o", output, source)
    return output


def pair_options(sources: Path, pair: str) -> list[str]:
    """Options that choose a pair of storage dtypes in gpu_kernels.cu."""
    param, state = (TYPES[dtype] for dtype in pair.split("_"))
    return [f"-I{sources}", f"-DSL_PARAM={param}", f"-DSL_STATE={state}", f"-DSL_PAIR={pair}"]


def names_of_pair(pair: str) -> list[str]:
    """The kernels that gpu_kernels.cu has for a pair of storage dtypes."""
    param, state = pair.split("_")
    names = []
    for rule, facts in _C.rules().items():
        if facts["norms"]:
            names += [f"{kernel}_{rule}_{pair}" for kernel in ("prepare", "ratio", "apply")]
        elif facts["states"] or param == state:
            names.append(f"update_{rule}_{pair}")
    return names


@cache
def rules_by_type() -> dict[str, str]:
    """Names of the rules by the mangled names of their C++ types, which are what symbols are made of.

    Only rules.def knows which belong together, so a compiler is asked. Without one, or without the sources, it is
    empty, and kernels are called by their types.
    """
    sources = source_tree()
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if sources is None or compiler is None:
        return {}
    program = """
        #include <cstdio>
        #include <typeinfo>
        #include "rules/rules.h"
        using namespace stepladder;
        int main() {
        #define SL_RULE(rule, ...) std::printf("%s %s\\n", typeid(__VA_ARGS__).name(), #rule);
        #define SL_NORM_RULE SL_RULE
        #include "rules/rules.def"
        }
    """
    with tempfile.TemporaryDirectory() as directory:
        source, binary = Path(directory, "rules.cpp"), Path(directory, "rules")
        source.write_text(program)
        run(compiler, "-std=c++17", f"-I{sources}", "-o", binary, source)
        return dict(line.split() for line in run(binary).splitlines())


def cuda_name(rules: dict[str, str], symbol: str) -> str:
    """`update_lion_f32_f32` for the symbol of update<Lion> in the namespace f32_f32.

    Args:
        rules: Names by mangled type; a type that is not among them is spelled out.
        symbol: Mangled name of a kernel. One that is not of the package is given back.
    """
    words, rest = [], symbol.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        words.append(rest[length.end() : end])
        rest = rest[end:]
    if words[:1] != ["stepladder"]:
        return symbol
    rule = re.match(r"INS_(.*)EEEv", rest)
    if rule is None:
        return words[-1]
    pair, kernel = words[1:]
    spelled = re.sub(r"^\d+", "", rule[1]).replace("ILb", "<").replace("ELb", ",").replace("EE", ">")
    return f"{kernel}_{rules.get(f'N10stepladder{rule[1]}E', spelled)}_{pair}"


def cuda_cubins(arch: str, directory: Path, wanted: str = "") -> tuple[list[Cubin], str]:
    """Cubins of the CUDA kernels for an architecture, and how they were had.

    Args:
        arch: Such as sm_90a.
        directory: Where to put them.
        wanted: What the names of the kernels asked for contain; other files need not be compiled.

    Raises:
        MissingError: They are neither in the extension, nor can they be compiled.
        RuntimeError: A tool failed.
    """
    tool, reason = find_cuobjdump(), why_not_from_extension(arch)
    name = partial(cuda_name, rules_by_type())
    if reason is None:
        run(tool, "-xelf", f".{arch}.cubin", Path(_C.__file__).resolve(), cwd=directory)
        files = sorted(directory.glob(f"*.{arch}.cubin"))
        return [Cubin(file, name) for file in files], "from the built extension"
    sources, nvcc = source_tree(), find_nvcc()
    if sources is None:
        raise MissingError(f"{reason}, and the sources are not here: they are in a source tree only")
    if nvcc is None:
        raise MissingError(f"{reason}, and nvcc is neither on PATH nor under CUDA_HOME")
    kernels, norms = sources / "multi_tensor/gpu_kernels.cu", sources / "multi_tensor/gpu_norms.cu"
    jobs = [
        (pair, kernels, pair_options(sources, pair))
        for pair in PAIRS
        if any(wanted in name for name in names_of_pair(pair))
    ]
    if any(wanted in name for name in NORM_KERNELS):
        jobs.append(("norms", norms, [f"-I{sources}"]))
    for part, names in (
        ("newton_schulz/gpu_grouped", GROUPED_KERNELS),
        ("newton_schulz/gpu_on_chip", ON_CHIP_KERNELS),
        ("newton_schulz/gpu_cluster", CLUSTER_KERNELS),
        ("matrix_root/gpu_grouped", GROUPED_ROOT_KERNELS),
        ("matrix_root/gpu_on_chip", ON_CHIP_ROOT_KERNELS),
        ("matrix_root/gpu_bases", BASIS_KERNELS),
        ("matrix_root/gpu_grams", GRAM_KERNELS),
        ("matrix_root/gpu_multiply", PRODUCT_KERNELS),
    ):
        if any(wanted in name for name in names):
            jobs.append((part.replace("/", "_"), sources / f"{part}.cu", [f"-I{sources}"]))
    files = in_parallel(lambda job: compile_source(job[1], directory / f"{job[0]}.cubin", arch, *job[2]), jobs)
    version = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    return [Cubin(file, name) for file in files], f"compiled by nvcc {version[1] if version else ''}".rstrip()


def triton_cubins(arch: str, directory: Path, wanted: str = "") -> tuple[list[Cubin], str]:
    """Cubins of the Triton kernels for an architecture, and how they were had.

    Args:
        arch: Such as sm_90a; Triton knows it by its number.
        directory: Where to put them.
        wanted: What the names of the kernels asked for contain.

    Raises:
        MissingError: Triton or its kernels are not here.
        RuntimeError: A tool failed.
    """
    try:
        import triton

        from stepladder.triton_kernels import aot
    except ImportError as error:
        raise MissingError(f"the Triton kernels cannot be compiled: {error}") from error
    if triton.knobs.runtime.interpret:
        raise MissingError("TRITON_INTERPRET is set, and what is interpreted is not compiled")
    find_cuobjdump()
    cubins = []
    for kernel in aot.specializations():
        name = kernel.name.replace("float", "f")  # dtypes as the CUDA kernels have them
        if wanted in name:
            compiled = aot.compile_kernel(kernel, int(re.sub(r"\D", "", arch)))
            path = directory / f"{name}.cubin"
            path.write_bytes(compiled.cubin)
            cubins.append(Cubin(path, partial(_given, name), 32 * compiled.num_warps, compiled.shared))
    return cubins, f"compiled by Triton {triton.__version__}"


def _given(name: str, symbol: str) -> str:
    """Triton's symbols say nothing of what a kernel was specialized for; its own name does."""
    return name
