"""The one ordered table of what can execute a step, and the choice among it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stepladder import _C


@dataclass(frozen=True)
class Backend:
    """One way to execute a step.

    Attributes:
        name: What `backend=` takes.
        device_types: The `torch.device.type`s whose parameters it serves; empty means any.
        missing: Returns why it cannot run here, or None where it can.
    """

    name: str
    device_types: tuple[str, ...]
    missing: Callable[[], str | None]

    def serves(self, device_type: str) -> bool:
        return not self.device_types or device_type in self.device_types


@functools.cache
def _cuda_devices() -> tuple[list[dict[str, Any]], str]:
    return _C.cuda()


def _cuda_missing() -> str | None:
    if not _C.cuda_version:
        return "stepladder was built without nvcc"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices, reason = _cuda_devices()
    return None if devices else f"stepladder's CUDA runtime finds no device: {reason}"


def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"triton {version} is installed, stepladder's kernels need 3.6"
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        return "torch sees no GPU"
    return None


# In the order in which the automatic choice tries them.
TABLE = (
    Backend("cuda", ("cuda",), _cuda_missing),
    Backend("triton", ("cuda", "xpu"), _triton_missing),
    Backend("cpu", ("cpu",), lambda: None),
    Backend("reference", (), lambda: None),
)
# Those whose kernels run on a GPU, and count steps there.
ON_GPU = ("cuda", "triton")
NAMES = tuple(backend.name for backend in TABLE)


def check_available(name: str | None) -> None:
    """Raise where a backend that was asked for by name cannot run.

    Raises:
        ValueError: No backend has this name.
        RuntimeError: It cannot run here; the message says why.
    """
    if name is None:
        return
    backend = next((b for b in TABLE if b.name == name), None)
    if backend is None:
        raise ValueError(f"backend={name!r} is unknown, expected None or one of {', '.join(map(repr, NAMES))}")
    if reason := backend.missing():
        raise RuntimeError(f"backend={name!r} cannot run: {reason}; backend=None chooses one that can")


_warned: set[str] = set()


def choose(name: str | None, device_type: str) -> str:
    """The backend for parameters on this type of device.

    Args:
        name: What the user asked for; None leaves the choice to the table.
        device_type: `torch.device.type` of the parameters.

    Raises:
        ValueError: The backend asked for does not serve this type of device.
    """
    for backend in TABLE:
        if name is not None and backend.name != name:
            continue
        if not backend.serves(device_type):
            if name is not None:
                raise ValueError(
                    f"backend={name!r} serves parameters on {' or '.join(backend.device_types)}, "
                    f"got a parameter on {device_type}"
                )
            continue
        if backend.missing() is None:
            if name is None and backend.name == "reference" and device_type not in _warned:
                _warned.add(device_type)
                warnings.warn(
                    f"no kernels can step parameters on {device_type}: the slow reference is used "
                    "(`stepladder info` says why)",
                    stacklevel=2,
                )
            return backend.name
    raise AssertionError("the reference serves every device")


def current_stream(device: int) -> int:
    """Handle of the stream that is current on a GPU."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream
