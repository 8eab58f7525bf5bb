"""Memory for results on the CPU that goes from one that is gone to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from stepladder import _C

DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Of a tensor whose memory is kept: smaller ones were as fast from malloc, which keeps most of them itself.
LEAST_BYTES = 1 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; on a CPU a large tensor lies in memory that stays with the process, up to 256 MB of it.

    New pages can take longer than what is computed in them. Such a tensor cannot be resized to more than it has.
    """
    result = None
    if device.type == "cpu" and dtype in DTYPE_NAMES:
        size = dtype.itemsize
        for length in shape:
            size *= length
        if LEAST_BYTES <= size <= _C.KEPT_TENSOR_BYTES:
            result = from_dlpack(_C.kept_tensor(shape, DTYPE_NAMES[dtype]))
    return torch.empty(shape, dtype=dtype, device=device) if result is None else result
