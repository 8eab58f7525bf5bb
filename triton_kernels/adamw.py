"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): Adam with decoupled weight decay."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it

from stepladder.triton_kernels.adam import form, scalars
from stepladder.triton_kernels.rule import Rule


@triton.jit
def update(s, w, g, states):
    return form(s, w, g, states, True, False)


@triton.jit
def amsgrad_update(s, w, g, states):
    return form(s, w, g, states, True, True)


ADAMW = Rule(scalars, update)
ADAMW_AMSGRAD = Rule(scalars, amsgrad_update)
