"""Tables that kernels are given, and the memory that they work in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepladder.triton_kernels.newton_schulz import _upload


def together(parts: list[np.ndarray[Any, Any]], room: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """One allocation that begins with these arrays, copied there behind the host's back.

    Each begins on a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.

    Args:
        parts: Of int64 or fp64.
        room: How many numbers of 8 bytes there are to be more, which are not set.
        device: Where.

    Returns:
        The arrays, and the room, which begins on a multiple of 512 bytes; as int64.
    """
    begins = np.cumsum([0, *(len(part) + len(part) % 2 for part in parts)]).tolist()
    host = np.zeros(begins[-1], np.int64)
    for part, begin in zip(parts, begins, strict=False):
        host[begin : begin + len(part)] = part.view(np.int64)
    before = -(-len(host) // 64) * 64
    memory = torch.empty(before + room, dtype=torch.int64, device=device)
    _upload(host, memory[: len(host)])
    copies = [memory[begin : begin + len(part)] for part, begin in zip(parts, begins, strict=False)]
    return copies, memory[before:]
