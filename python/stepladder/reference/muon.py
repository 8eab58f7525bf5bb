"""Muon, its variants, MuonH and QK-Clip, step by step and in the dtype of what they are given.

Every matrix argument has shape [..., m, n]: leading dimensions are a batch of matrices, each on its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepladder.coefficients import Coefficients
from stepladder.reference.arithmetic import lerp
from stepladder.reference.newton_schulz import newton_schulz

ADJUSTMENTS = ("original", "match_rms_adamw", "spectral", "essay")
# Below the mean square of any row or column of an orthogonal matrix that is not one of zeros.
NORMUON_FLOOR = 1e-10
ADAMUON_EPS = 1e-8
ADAMUON_RMS = 0.2


def adjustment(adjust_lr_fn: str | float | None, rows: int, columns: int) -> float:
    """What the learning rate of an update of this shape is multiplied by.

    Args:
        adjust_lr_fn: None or "original" √max(1, m/n), "match_rms_adamw" 0.2√max(m, n), "spectral" √(m/n), "essay"
            √(max/min), or a number.
        rows: The outputs m.
        columns: The inputs n.

    Sources: Jordan et al. 2024; Liu et al., arXiv:2502.16982.
    """
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / columns))
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral":
        return math.sqrt(rows / columns)
    if adjust_lr_fn == "essay":
        return math.sqrt(max(rows, columns) / min(rows, columns))
    return float(adjust_lr_fn)


def momentum_update(g: Tensor, u: Tensor, momentum: float, nesterov: bool, momentum_form: str) -> tuple[Tensor, Tensor]:
    """What is orthogonalised, and the new buffer.

    "ema": u ← μu + (1 − μ)g, Nesterov (1 − μ)g + μu; "sum": u ← μu + g, Nesterov g + μu.
    """
    if momentum_form == "sum":
        u = momentum * u + g
        return (g + momentum * u if nesterov else u), u
    u = lerp(u, g, 1.0 - momentum)
    return (lerp(g, u, momentum) if nesterov else u), u


def decayed(w: Tensor, update: Tensor, lr: float, weight_decay: float, cautious: bool) -> Tensor:
    """(1 − ηλ)w; where `cautious`, only of the elements that the update moves towards zero, or leaves."""
    factor = 1.0 - lr * weight_decay
    return torch.where(update * w >= 0, factor * w, w) if cautious else factor * w


def per_neuron(x: Tensor) -> Tensor:
    """Mean square along the shorter dimension, one for each index of the longer: [..., m, 1] or [..., 1, n]."""
    return x.square().mean(-1 if x.shape[-2] >= x.shape[-1] else -2, keepdim=True)


def frobenius(x: Tensor) -> Tensor:
    """Norm of each matrix, summed in fp64. [..., 1, 1]"""
    return x.double().square().sum((-2, -1), keepdim=True).sqrt()


def normuon_update(o: Tensor, v: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """V ← β₂v + (1 − β₂)·mean of O² for each neuron; O/√v, rescaled to ‖O‖F. A matrix of zeros stays one."""
    v = lerp(v, per_neuron(o), 1.0 - beta2)
    scaled = o / v.clamp(min=NORMUON_FLOOR).sqrt()
    norm = frobenius(scaled)
    return scaled * torch.where(norm == 0, 1.0, frobenius(o) / norm).to(o.dtype), v


def adamuon_update(o: Tensor, v: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """V ← β₂v + (1 − β₂)O²; O/(√v + ε), rescaled to the norm 0.2√(mn). A matrix of zeros stays one."""
    v = lerp(v, o.square(), 1.0 - beta2)
    scaled = o / (v.sqrt() + ADAMUON_EPS)
    norm = frobenius(scaled)
    target = ADAMUON_RMS * math.sqrt(o.shape[-2] * o.shape[-1])
    return scaled * torch.where(norm == 0, 1.0, target / norm).to(o.dtype), v


def turned(fan_in_fan_out: bool, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Matrices with their outputs as rows, from such as are stored as (in, out), or back."""
    return tuple(x.mT for x in matrices) if fan_in_fan_out else matrices


def muon(
    w: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    momentum_form: str = "ema",
    ns_coefficients: Coefficients | None = "jordan",
    ns_steps: int | None = 5,
    eps: float = 1e-7,
    ns_method: str = "auto",
    adjust_lr_fn: str | float | None = None,
    cautious_weight_decay: bool = False,
    fan_in_fan_out: bool = False,
) -> tuple[Tensor, ...]:
    """One step of Muon: w ← (1 − ηλ)w − ηs·NS(u).

    Args:
        w: Weights, [..., m, n], of any floating-point dtype, in which everything is computed.
        g: Gradient, like w.
        u: Momentum buffer, like w.
        lr: η.
        weight_decay: λ.
        momentum: μ.
        nesterov: Take Nesterov's form.
        momentum_form: "ema" or "sum".
        ns_coefficients: As `stepladder.ops.newton_schulz` takes them.
        ns_steps: Likewise.
        eps: Likewise.
        ns_method: Likewise.
        adjust_lr_fn: Of `adjustment`, which gives s.
        cautious_weight_decay: Decay only where the update does not move away from zero.
        fan_in_fan_out: Everything is stored as (in, out): [..., n, m].

    Returns:
        The new weights and buffer.

    Papers: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982.
    """
    w, g, u = turned(fan_in_fan_out, w, g, u)
    update, u = momentum_update(g, u, momentum, nesterov, momentum_form)
    o = newton_schulz(update, ns_coefficients, ns_steps, ns_method, eps)
    scale = adjustment(adjust_lr_fn, w.shape[-2], w.shape[-1])
    return turned(fan_in_fan_out, decayed(w, o, lr, weight_decay, cautious_weight_decay) - lr * scale * o, u)


def normuon(
    w: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    momentum_form: str = "ema",
    ns_coefficients: Coefficients | None = "jordan",
    ns_steps: int | None = 5,
    eps: float = 1e-7,
    ns_method: str = "auto",
    adjust_lr_fn: str | float | None = None,
    beta2: float = 0.95,
    cautious_weight_decay: bool = False,
    fan_in_fan_out: bool = False,
) -> tuple[Tensor, ...]:
    """One step of NorMuon (Li et al. 2025, arXiv:2510.05491); arguments as `muon`, with the neurons' v and its β₂.

    Returns:
        The new weights, buffer and v, of shape [..., m, 1] where m ≥ n, else [..., 1, n], with m outputs and n inputs.
    """
    w, g, u = turned(fan_in_fan_out, w, g, u)
    update, u = momentum_update(g, u, momentum, nesterov, momentum_form)
    o, v = normuon_update(newton_schulz(update, ns_coefficients, ns_steps, ns_method, eps), v, beta2)
    scale = adjustment(adjust_lr_fn, w.shape[-2], w.shape[-1])
    w = decayed(w, o, lr, weight_decay, cautious_weight_decay) - lr * scale * o
    return *turned(fan_in_fan_out, w, u), v


def adamuon(
    w: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    momentum_form: str = "ema",
    ns_coefficients: Coefficients | None = "jordan",
    ns_steps: int | None = 5,
    eps: float = 1e-7,
    ns_method: str = "auto",
    beta2: float = 0.95,
    cautious_weight_decay: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdaMuon (Si, Zhang & Shen 2025, arXiv:2507.11005); arguments as `muon`, with v like w and its β₂.

    v needs no bias correction: the update's norm is set afterwards.

    Returns:
        The new weights, buffer and v.
    """
    update, u = momentum_update(g, u, momentum, nesterov, momentum_form)
    o, v = adamuon_update(newton_schulz(update, ns_coefficients, ns_steps, ns_method, eps), v, beta2)
    return decayed(w, o, lr, weight_decay, cautious_weight_decay) - lr * o, u, v


def muonh(
    w: Tensor,
    g: Tensor,
    u: Tensor,
    radius: Tensor,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    momentum_form: str = "ema",
    ns_coefficients: Coefficients | None = "jordan",
    ns_steps: int | None = 5,
    eps: float = 1e-7,
    ns_method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of MuonH (arXiv:2606.16899): w ← R·(w + U)/‖w + U‖F with U = −ηR·O/‖O‖F, O = NS(u).

    Arguments as `muon`, with R, the norm that each matrix keeps, in `radius` [...]. A matrix that has nothing to move
    by, at η = 0 or with O = 0, is left as it is.

    Returns:
        The new weights and buffer.
    """
    update, u = momentum_update(g, u, momentum, nesterov, momentum_form)
    if lr == 0.0:
        return w, u
    o = newton_schulz(update, ns_coefficients, ns_steps, ns_method, eps)
    r = radius.double()[..., None, None]
    norm = frobenius(o)
    moved = w - (lr * r / norm).to(w.dtype) * o
    return torch.where(norm == 0, w, moved * (r / frobenius(moved)).to(w.dtype)), u


def qk_clip(
    query: Tensor,
    key: Tensor,
    max_logits: Tensor,
    tau: float = 100.0,
    *,
    rope_dim: int = 0,
    value_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """Query and key weights after QK-Clip, head by head; arguments as `stepladder.qk_clip_`.

    Returns:
        New weights of the queries and of the keys.

    Paper: Kimi K2, arXiv:2507.20534.
    """
    heads = len(max_logits)
    content = query.shape[0] // heads - rope_dim
    key_heads = key.shape[0] // (content + value_dim)
    shared = heads // key_heads
    query, key = query.clone(), key.clone()
    for k in range(key_heads):
        largest = max(float(s) for s in max_logits[k * shared : (k + 1) * shared])
        gamma = min(1.0, tau / largest) if largest > 0.0 else 1.0
        first = k * (content + value_dim)
        key[first : first + content] *= math.sqrt(gamma)
        for h in range(k * shared, (k + 1) * shared):
            first = h * (content + rope_dim)
            query[first : first + content] *= math.sqrt(gamma)
            query[first + content : first + content + rope_dim] *= gamma
    return query, key
