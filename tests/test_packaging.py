"""The sdist and the wheel: built as a user would, without nvcc, and complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "python/stepladder": "stepladder",
    "triton_kernels": "stepladder/triton_kernels",
    "bench": "stepladder/bench",
}


def without_nvcc() -> dict[str, str]:
    """This environment, with the directories that hold nvcc taken off PATH."""
    path = [d for d in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvcc", path=d)]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_HOME" and not k.startswith("STEPLADDER_")}
    return environment | {"PATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Directory with the sdist, and the wheel that was built from it."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not run from a source tree")
    out = tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "stepladder"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, env=without_nvcc(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out


def test_sdist_has_every_source(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "python/stepladder", "triton_kernels", "bench", "tests", "docs", "examples"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".h", ".cpp", ".cu", ".def", ".py", ".pyi", ".md", ".typed", ".csv", ".html"):
                assert file.relative_to(ROOT).as_posix() in names
    assert {"CMakeLists.txt", "Makefile", "LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names


def test_wheel_works(built, tmp_path):
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    for folder, package in (
        ("python/stepladder", "stepladder"),
        ("triton_kernels", "stepladder/triton_kernels"),
        ("bench", "stepladder/bench"),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert {"stepladder/py.typed", "stepladder/choices.csv", "stepladder/bench/page.html"} <= names
    assert "stepladder/bench/ladder/page.html" in names
    code = (
        "import torch, stepladder as sl, stepladder.bench, stepladder.triton_kernels\n"
        "from stepladder import _C\n"
        f"assert sl.__file__.startswith({str(tmp_path)!r}), sl.__file__\n"
        "assert _C.cuda() == ([], 'built without nvcc')\n"
        "p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9)\n"
        "sl.SGD([p], lr=0.5).step()\n"
        "assert p[8] == 0.5\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


def test_cuda_without_nvcc_fails_with_one_sentence(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    result = subprocess.run(command, env=without_nvcc() | {"STEPLADDER_CUDA": "1"}, capture_output=True, text=True)
    assert result.returncode != 0
    sentence = "STEPLADDER_CUDA=1 asks for the CUDA part, but no nvcc was found on PATH or under CUDA_HOME."
    assert sentence in result.stdout + result.stderr
    assert "Traceback" not in result.stdout


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_wheel_for_all_architectures_is_small(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEPLADDER_")}
    subprocess.run(command, env=environment | {"STEPLADDER_CUDA": "1"}, check=True, timeout=3000)
    assert next(tmp_path.glob("*.whl")).stat().st_size <= 40 * 2**20
