"""Which constants specialise the kernels for a rule and its dtypes: the same for a launch and ahead of time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from stepladder import _C
from stepladder.triton_kernels import kernels, norms
from stepladder.triton_kernels.rules import RULES
from stepladder.triton_kernels.sums import LEAF

TILE = 1024  # elements that a program takes at a time: 8 for each thread
LEAVES = 8  # that a program sums at a time: the same number of elements in each row
SUM_TILE = LEAVES * LEAF.value
FOLD = 256
# `enable_fp_fusion` would contract a * b + c.
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

DTYPES = {"float64": tl.float64, "float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


@dataclass(frozen=True)
class Kernel:
    """A Triton function and the constants that its launches pass.

    Attributes:
        name: Of the kernel, its rule and dtypes, as the CUDA kernels are named.
        function: Of Triton, whose other argument is the table.
        constants: By the names of its parameters.
        per_tensor: Whether a launch has a program for each tensor, else for each chunk.
        registers: Of a thread, at most. Left alone, the assembler spills for the sake of more programs at once.
    """

    name: str
    function: Any
    constants: dict[str, Any]
    per_tensor: bool = False
    registers: int = 128

    def options(self, nvidia: bool) -> dict[str, Any]:
        """Of the compiler; the cap on registers is one of NVIDIA's alone."""
        return _OPTIONS | ({"maxnreg": self.registers} if nvidia else {})

    def launch(self, tensors: int, chunks: int, table: Any) -> None:
        programs = tensors if self.per_tensor else max(chunks, 1)  # one program counts the steps of empty tensors
        self.function[(programs,)](table, **self.constants, **self.options(torch.version.cuda is not None))


def rule_kernels(rule: str, param: str, state: str) -> list[Kernel]:
    """The kernels of a step in the order of their launches: one, or for a norm-based rule three.

    Args:
        rule: A name in rules.def.
        param: Dtype of the parameters, "float64", "float32", "bfloat16" or "float16".
        state: That of the states.
    """
    functions, info = RULES[rule], _C.rules()[rule]
    T = tl.float64 if param == "float64" else tl.float32
    types = {"P": DTYPES[param], "S": DTYPES[state], "T": T}
    scalars = {"SCALARS": functions.scalars}
    change = scalars | types | {"STATES": len(info["states"]), "TILE": TILE}
    registers = 255 if param == "float64" else 128
    suffix = f"_{rule}_{param}_{state}"
    if not info["norms"]:
        constants = change | {"CHANGE": functions.update, "NORMS": False}
        return [Kernel("update" + suffix, kernels.step, constants, registers=registers)]
    parts = {"PREPARE": functions.prepare, "MEASURE": functions.measure, "PREPARED": functions.prepared}
    fold = scalars | {"RATIO": functions.ratio, "T": T, "BLOCK": FOLD}
    constants = change | {"CHANGE": functions.apply, "NORMS": True}
    first = scalars | types | parts | {"LEAVES": LEAVES}
    return [
        Kernel("prepare" + suffix, kernels.prepare, first, registers=registers),
        Kernel("ratio" + suffix, kernels.ratio, fold, per_tensor=True),
        Kernel("apply" + suffix, kernels.step, constants, registers=registers),
    ]


@functools.cache
def norm_kernels(kind: int) -> list[Kernel]:
    """Measuring and folding for a Norm of csrc/multi_tensor/tensor.h."""
    return [
        Kernel(f"measure_{kind}", norms.measure, {"KIND": kind, "LEAVES": LEAVES}, registers=255),
        Kernel(f"fold_{kind}", norms.fold, {"KIND": kind, "BLOCK": FOLD}, per_tensor=True),
    ]


SCALE = Kernel("scale", norms.scale, {"TILE": TILE, "SUM_TILE": SUM_TILE}, registers=255)
