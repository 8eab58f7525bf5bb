"""Products of many matrices of different shapes at once: on a GPU in one launch, in fp32 by three products of tf32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder import backends, cuda_roots


class Product(NamedTuple):
    """out ← left·right.

    Attributes:
        left: [B, m, k], of fp32 or fp64, as all three of them, and of any strides.
        right: [B, k, n].
        out: [B, m, n], which shares memory with no operand and no other product's result.
    """

    left: Tensor
    right: Tensor
    out: Tensor


@torch.no_grad()
def multiply(products: Sequence[Product], backend: str | None) -> None:
    """Products of matrices on GPUs, those of one device and dtype in one launch, by CUDA or Triton.

    fp32 is multiplied as three products of tf32 (Ootomo & Yokota 2022, arXiv:2203.03341), which is about as accurate
    as fp32 itself, whatever `torch.set_float32_matmul_precision` says; fp64 in fp64.

    Args:
        products: Of any shapes.
        backend: "cuda", "triton", or None to choose by the device.
    """
    together: dict[tuple[str, torch.device, torch.dtype], list[Product]] = {}
    for product in products:
        name = backends.choose(backend, product.out.device.type)
        together.setdefault((name, product.out.device, product.out.dtype), []).append(product)
    for (name, _, _), members in together.items():
        if name == "cuda":
            cuda_roots.multiply(members)
        else:
            from stepladder.triton_kernels import multiply as kernels

            kernels.multiply(members)
