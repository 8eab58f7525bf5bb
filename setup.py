"""Builds the extension stepladder._C with CMake and ninja; everything else stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds once, then copies the module to where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("STEPLADDER_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            sys.exit(f"STEPLADDER_CUDA={cuda!r} is none of auto, 0 and 1")
        if cuda == "1" and not find_nvcc():
            sys.exit("STEPLADDER_CUDA=1 asks for the CUDA part, but no nvcc was found on PATH or under CUDA_HOME.")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSTEPLADDER_CUDA={cuda}",
        ]
        if ninja := shutil.which("ninja"):
            # Given anew each time: a build environment of pip's is gone when its cached path is next read.
            options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        if architectures := os.environ.get("STEPLADDER_CUDA_ARCHITECTURES"):
            options.append(f"-DSTEPLADDER_CUDA_ARCHITECTURES={architectures}")
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: running processes keep the file that they have mapped.
        fresh = target.with_suffix(".new")
        shutil.copy2(next(build.glob("_C*.so")), fresh)
        fresh.replace(target)


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "")) / "bin"))


setup(ext_modules=[Extension("stepladder._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
