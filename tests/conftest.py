from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from browser import browser as browser
from browser import chromium as chromium
from cases import Kernels
from process_pool import ProcessPools

from stepladder import backends, cuda_roots, newton_schulz, ops
from stepladder.optim import engine, mixed

ROOT = Path(__file__).parents[1]

# Triton's decorator looks here, and what imports Triton may be any test's module, as torch's own optimizers do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test starts from one seed, and leaves torch's global settings as it found them."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    torch.set_num_threads(threads)


def load_emulated(build: Path, *options: str) -> ModuleType:
    """The extension with the emulator in place of a GPU, built where it is not current."""
    import pybind11

    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    assert cmake is not None, "the emulator's tests need cmake: pip install 'stepladder[test]'"
    configure = [cmake, "-S", ROOT / "csrc" / "emulator", "-B", build, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    subprocess.run([*configure, python, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", build, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    path = build / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated_module():
    """Compiled with what `make sanitize` asks for."""
    sanitize = os.environ.get("STEPLADDER_SANITIZE", "")
    name = "-".join(["emulator", *filter(None, sanitize.split(","))])
    return load_emulated(ROOT / "build" / name, f"-DSTEPLADDER_SANITIZE={sanitize}")


class Device:
    """What the host asks of the emulated device."""

    module: ModuleType
    capturing = False

    def __init__(self) -> None:
        # What a graph's pool would keep for its replays.
        self.pool: list[torch.Tensor] = []

    def workspace(self, size: int, device: torch.device) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        if self.capturing:
            self.pool.append(memory)
        return memory


@pytest.fixture
def emulated(emulated_module, monkeypatch):
    """`backend="cuda"` steps CPU tensors through the CUDA kernels, run by the emulator."""
    device = Device()
    device.module = emulated_module
    table = tuple(
        backends.Backend("cuda", ("cpu",), lambda: None) if backend.name == "cuda" else backend
        for backend in backends.TABLE
    )
    monkeypatch.setattr(backends, "TABLE", table)
    for module in (cuda_roots, engine, newton_schulz):
        monkeypatch.setattr(module, "_C", emulated_module)
        monkeypatch.setattr(module, "current_stream", lambda index: int(device.capturing))
    for module in (cuda_roots, newton_schulz):
        monkeypatch.setattr(module, "_kept", threading.local())
    monkeypatch.setattr(newton_schulz, "workspace", device.workspace)
    for module in (engine, mixed):
        monkeypatch.setattr(module, "is_capturing", lambda: device.capturing)
    monkeypatch.setattr(engine, "is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(ops, "_plans", type(ops._plans)())
    return device


# On a machine with a GPU, `STEPLADDER_TEST_DEVICE=cuda` runs on it what is emulated elsewhere.
DEVICE = os.environ.get("STEPLADDER_TEST_DEVICE", "cpu")


@pytest.fixture(params=["cpu", "cuda"] if DEVICE == "cpu" else ["cuda", "triton"])
def kernels(request) -> Kernels:
    """Each backend whose kernels have the reference's bits."""
    if DEVICE != "cpu":
        return Kernels(request.param, DEVICE)
    if request.param == "cuda":
        request.getfixturevalue("emulated")
        return Kernels("cuda", largest=20_011)
    return Kernels("cpu")


@pytest.fixture(scope="session")
def pools():
    """`pools(size).run(function, *arguments)` calls a function on that many ranks of torch.distributed."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no torch.distributed with gloo")
    processes = ProcessPools()
    yield processes
    processes.close()
