"""What a CPU iteration does where one of its tasks throws, which would end the process if it left the threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_an_exception_in_a_task_reaches_the_caller(tmp_path: Path):
    sources = [
        CSRC / name for name in ("newton_schulz/cpu_iteration.cpp", "newton_schulz/program.cpp", "common/buffer.cpp")
    ]
    test = ROOT / "tests" / "newton_schulz" / "failures.cpp"
    program = tmp_path / "failures"
    flags = ["-std=c++17", "-O1", "-fopenmp", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, test, *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
