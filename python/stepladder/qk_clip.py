"""QK-Clip: weights of queries and keys scaled down where attention logits have grown too large."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from stepladder.optim.engine import DTYPES, has_internal_overlap


@torch.no_grad()
def qk_clip_(
    query: Tensor,
    key: Tensor,
    max_logits: Tensor,
    tau: float = 100.0,
    *,
    rope_dim: int = 0,
    value_dim: int = 0,
) -> Tensor:
    """Scale query and key weights in place, so that no head's attention logits pass `tau`; called after a step.

    γ = min(1, τ/S_max) for each head; its rows of both weights are multiplied by √γ, and its logits, bilinear in
    them, by γ. Where several query heads share a key head, the largest S_max of them counts for all. Under multi-head
    latent attention each query head ends in `rope_dim` rows that meet one rotary key for all heads: these take γ, and
    that key, which is no argument, stays as it is.

    Args:
        query: Weight or bias of the queries, H heads of d + rope_dim rows each: [H·(d + rope_dim), ...]. May be a
            view, as of a fused weight.
        key: Of the keys, K heads of d + value_dim rows each: [K·(d + value_dim), ...]; K divides H.
        max_logits: S_max, the largest logit (after division by √d) of each query head over a batch: [H], finite.
        tau: τ.
        rope_dim: Rows at the end of each query head that take γ.
        value_dim: Rows at the end of each key head that are left as they are, as values in a joint weight.

    Returns:
        γ of each query head, [H], fp32 or wider.

    Raises:
        TypeError: A tensor is not real floating-point.
        ValueError: Shapes do not fit, `tau` is not a finite number above 0, or an S_max is not finite, which on a GPU
            is waited for; nothing has then changed.

    Paper: Kimi K2, arXiv:2507.20534.
    """
    if isinstance(tau, bool) or not isinstance(tau, numbers.Real) or not 0.0 < tau < math.inf:
        raise ValueError(f"tau={tau!r} is out of range, expected a finite number above 0")
    for name, rows in (("rope_dim", rope_dim), ("value_dim", value_dim)):
        if isinstance(rows, bool) or not isinstance(rows, numbers.Integral) or rows < 0:
            raise ValueError(f"{name}={rows!r} is out of range, expected an integer of at least 0")
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.layout != torch.strided:
            what = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {what}, expected a strided tensor of {', '.join(map(str, DTYPES))}")
        if x.ndim == 0:
            raise ValueError(f"{name} has no dimensions, expected its heads' rows first")
        if has_internal_overlap(x):
            raise ValueError(f"elements of {name}, of strides {x.stride()}, share memory")
    if not isinstance(max_logits, Tensor) or not max_logits.is_floating_point():
        what = max_logits.dtype if isinstance(max_logits, Tensor) else type(max_logits).__name__
        raise TypeError(f"max_logits is {what}, expected a floating-point tensor")
    if max_logits.ndim != 1 or len(max_logits) == 0:
        raise ValueError(f"max_logits has shape {tuple(max_logits.shape)}, expected one number for each query head")
    heads = len(max_logits)
    head_rows, left_over = divmod(query.shape[0], heads)
    content = head_rows - rope_dim
    if left_over or content < 1:
        raise ValueError(
            f"query has {query.shape[0]} rows, expected {heads} heads of equal size, of more than rope_dim={rope_dim} "
            "rows each"
        )
    key_heads, left_over = divmod(key.shape[0], content + value_dim)
    if left_over or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"key has {key.shape[0]} rows, expected heads of {content} + value_dim={value_dim} rows, in a number that "
            f"divides the {heads} query heads"
        )
    if not bool(max_logits.isfinite().all()):
        raise ValueError(f"max_logits must be finite, got {max_logits.tolist()}")

    wide = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    largest = max_logits.detach().to(query.device, wide).view(key_heads, -1).amax(1)
    gamma = torch.where(largest > tau, tau / largest, 1.0)  # [K]
    root = gamma.sqrt()
    of_key = torch.ones(key_heads, content + value_dim, dtype=wide, device=query.device)
    of_key[:, :content] = root[:, None]
    of_query = gamma[:, None, None].repeat(1, heads // key_heads, head_rows)  # [K, H/K, head_rows]
    of_query[..., :content] = root[:, None, None]
    for x, factors in ((query, of_query), (key, of_key)):
        x.mul_(factors.view(-1, *[1] * (x.ndim - 1)).to(x.device))
    return gamma.repeat_interleave(heads // key_heads)
