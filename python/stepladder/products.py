"""Products of fp32 matrices: on a CPU by our own kernels where they are the faster ones, else torch's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from stepladder import _C, pool
from stepladder.newton_schulz import matrix_unit

# Multiplications below which a call costs more than is gained.
LEAST = 1 << 23


@functools.cache
def units() -> list[str]:
    """Our kernels that run here, fastest first: "amx", "avx512"."""
    found: list[str] = _C.product_units()
    return found


def unit() -> str:
    """The kernel that multiplies: "amx" where `STEPLADDER_MATRIX_UNIT` leaves it, else "avx512"."""
    return "amx" if matrix_unit() == "amx" and "amx" in units() else "avx512"


def serves(out: Tensor, depth: int) -> bool:
    """Whether our kernel takes a product with this result, [m, n] from m·depth·n multiplications."""
    return (
        out.dtype == torch.float32
        and out.device.type == "cpu"
        and out.ndim == 2
        and out.numel() * depth >= LEAST
        and 1 in out.stride()
        and bool(units())
    )


def mm(a: Tensor, b: Tensor) -> Tensor:
    """ab for [m, k] and [k, n], as torch.mm; fp32 products on a CPU by our kernel."""
    out = pool.empty((a.shape[0], b.shape[1]), a.dtype, a.device)
    if serves(out, a.shape[1]):
        multiply(a, b, out, 1.0, 0.0, symmetric=False)
        return out
    return torch.mm(a, b, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor, alpha: float, beta: float, *, symmetric: bool) -> None:
    """out ← alpha·ab + beta·out by our kernel, which `serves` it.

    Args:
        a: [m, k], fp32, as all of them, of any strides.
        b: [k, n].
        out: [m, n].
        alpha: Of the product.
        beta: Of what `out` held; at 0 that is not looked at.
        symmetric: ab and `out` are symmetric: one half is computed and mirrored.
    """
    left, right, result = ((x.data_ptr(), x.stride(0), x.stride(1)) for x in (a, b, out))
    sizes = a.shape[0], b.shape[1], a.shape[1]
    _C.multiply_matrices(*sizes, left, right, result, alpha, beta, symmetric, unit(), torch.get_num_threads())
