"""Orthonormal bases of the columns of matrices: shifted Cholesky-QR in three passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("auto", "cholesky", "householder")
# Added to the first Gram matrix, relative to its trace: what is below it becomes noise of full rank, which the second
# pass then orthogonalises like anything else.
SHIFT = 1e-14
# ‖QᵀQ - I‖F beyond which a member is done over by Householder reflections; rounding Q to fp32 leaves 2e-6 for n = 2048.
LIMIT = 1e-5


class BasisInfo(NamedTuple):
    """What is known of each basis; both are of the shape of the batch.

    Attributes:
        fallback: bool, whether Cholesky's method failed and Householder's was taken.
        finite: bool, whether the matrix is finite; the basis of one that is not is NaN.
    """

    fallback: Tensor
    finite: Tensor


@torch.no_grad()
def orthonormalize(X: Tensor, method: str = "auto") -> tuple[Tensor, BasisInfo]:
    """The bases of `stepladder.ops.orthonormalize`, computed in fp64 and rounded to X's dtype; "auto" is "cholesky".

    Args:
        X: Matrices [..., m, n] with m ≥ n.
        method: "cholesky", "householder" or "auto".

    Returns:
        The bases, like X, and what is known of each.

    Paper: Fukaya et al. 2020, Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1).
    """
    stack = X.reshape(X.shape[:-2].numel(), *X.shape[-2:])
    finite = stack.isfinite().all(-1).all(-1)
    wide = torch.where(finite[:, None, None], stack, 0.0).double()
    fallback = torch.zeros_like(finite)
    if method == "householder":
        q = torch.linalg.qr(wide).Q
    else:
        q, failed = cholesky_bases(wide)
        fallback = failed & finite
        if bool(fallback.any()):
            q[fallback] = torch.linalg.qr(wide[fallback]).Q
    q = torch.where(finite[:, None, None], q.to(X.dtype), torch.nan)
    return q.reshape(X.shape), BasisInfo(*(value.reshape(X.shape[:-2]) for value in (fallback, finite)))


def cholesky_bases(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q = XR⁻¹ with R from the Gram matrix, three times, the first time shifted. x: [B, m, n], fp64

    The first pass leaves a condition of up to 1e7, the second squares it into the error, the third ends.

    Returns:
        The bases, and which of them are none.
    """
    failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if x.numel() == 0:
        return x, failed
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for shift in (SHIFT, 0.0, 0.0):
        gram = x.mT @ x
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        lower, info = torch.linalg.cholesky_ex(gram + shift * trace * eye)
        failed |= info != 0
        x = torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
    error = (x.mT @ x - eye).flatten(1).norm(dim=1)
    return x, failed | ~(error <= LIMIT)
