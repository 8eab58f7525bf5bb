"""The frameworks that people train with, imported for a test, or a reason to skip it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


def library(name: str) -> Any:
    """A library of the extra `frameworks`; the test is skipped where it is not installed."""
    # One that is there and cannot be imported is an error.
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name}, of the extra `frameworks`, is not installed; `make test` tries to")
    importable_torchvision()
    return importlib.import_module(name)


def importable_torchvision() -> None:
    """Let torchvision's Python part, all that these libraries import, stand without its compiled one.

    Its published wheels belong to a torch with CUDA. Beside one without, the import ends at operators that were not
    loaded; the module that describes them to torch.compile is the only one that needs them.
    """
    name = "torchvision._meta_registrations"
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for loaded in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        sys.modules[name] = ModuleType(name)
        importlib.import_module("torchvision")
