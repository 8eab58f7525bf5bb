"""Runs the Triton kernels on the CPU, by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepladder import backends, ops
from stepladder.optim import engine


def use_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="triton"` steps CPU tensors through the Triton kernels."""
    triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels run there, and not in the interpreter")
    table = tuple(
        backends.Backend("triton", ("cpu",), lambda: None) if backend.name == "triton" else backend
        for backend in backends.TABLE
    )
    monkeypatch.setattr(backends, "TABLE", table)
    monkeypatch.setattr(engine, "is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(ops, "_plans", type(ops._plans)())
    _patch_once(monkeypatch)


def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the interpreter's time go into patching Triton's language anew for every nested call.

    Our functions see the modules that the launch itself has patched.
    """
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("stepladder."):
            return self.rewrite()(*args, **kwargs)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)
