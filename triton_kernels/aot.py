"""Compiles every kernel for an NVIDIA architecture, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from stepladder import _C
from stepladder.triton_kernels import gram, matrix_root, multiply, newton_schulz, orthonormalize
from stepladder.triton_kernels.specialize import DTYPES, SCALE, Kernel, norm_kernels, rule_kernels


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it.

    Attributes:
        name: Of the kernel, its rule and the dtypes of parameter and states, or its sizes.
        ptx: Its assembly text.
        cubin: Its machine code.
        num_warps: Warps of a program.
        shared: Bytes of shared memory of a program.
    """

    name: str
    ptx: str
    cubin: bytes
    num_warps: int
    shared: int


def pairs() -> list[tuple[str, str]]:
    """(parameter, state) dtypes that a launch may have: states in the parameter's dtype, or in fp32."""
    return [(dtype, dtype) for dtype in DTYPES] + [(dtype, "float32") for dtype in DTYPES if dtype != "float32"]


def specializations(rules: list[str] | None = None) -> list[Kernel | newton_schulz.Kernel]:
    """The kernels of these rules for every pair of dtypes, by default of all, those of gradient norms and matrices."""
    every = _C.rules()
    found: list[Kernel | newton_schulz.Kernel] = []
    for rule in every if rules is None else rules:
        # Without states their dtype makes no difference.
        chosen = [pair for pair in pairs() if every[rule]["states"] or pair[0] == pair[1]]
        found += [kernel for param, state in chosen for kernel in rule_kernels(rule, param, state)]
    if rules is None:
        found += [kernel for kind in range(3) for kernel in norm_kernels(kind)] + [SCALE]
        found += (
            newton_schulz.kernels()
            + matrix_root.kernels()
            + gram.kernels()
            + orthonormalize.kernels()
            + multiply.kernels()
        )
    return found


def compile_kernel(kernel: Kernel | newton_schulz.Kernel, arch: int) -> Compiled:
    """One kernel, with what a launch gives it: memory that an allocator has aligned."""
    names = kernel.function.arg_names
    if isinstance(kernel, newton_schulz.Kernel):
        signature, options = kernel.signature(), kernel.options()
    else:
        signature = {name: "*i64" if name == "table" else "constexpr" for name in names}
        options = kernel.options(nvidia=True)
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs=kernel.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    result: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = result.metadata
    return Compiled(kernel.name, result.asm["ptx"], result.asm["cubin"], metadata.num_warps, metadata.shared)


def compile_all(arch: int, rules: list[str] | None = None) -> Iterator[Compiled]:
    """Every kernel for one architecture, such as 90 for the H100, as each is done.

    Args:
        arch: Compute capability times ten.
        rules: Names in rules.def; None for all, and the kernels of gradient norms and matrices beside them.

    Raises:
        RuntimeError: This process runs Triton's interpreter, and so has nothing to compile.
    """
    for kernel in specializations(rules):
        if isinstance(kernel.function, InterpretedFunction):
            raise RuntimeError("TRITON_INTERPRET is set: compile in a process without it")
        yield compile_kernel(kernel, arch)
