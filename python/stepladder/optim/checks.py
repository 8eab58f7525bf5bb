"""Checks of hyper-parameters; messages begin as those of torch.optim do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch

Group = Mapping[str, Any]


def number(group: Group, name: str) -> float:
    """A hyper-parameter as a float; refuses what is no single number."""
    value = group[name]
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 1-element tensor, got {value!r}")
    return float(value)


def at_least_zero(group: Group, name: str, label: str, below: float = math.inf) -> None:
    """Refuse a hyper-parameter outside [0, below)."""
    value = number(group, name)
    if not 0.0 <= value < below:
        raise ValueError(f"Invalid {label}: {value} ({name} must be in [0, {below}))")


def learning_rate(group: Group) -> None:
    at_least_zero(group, "lr", "learning rate")


def weight_decay(group: Group) -> None:
    at_least_zero(group, "weight_decay", "weight_decay value")


def epsilon(group: Group) -> None:
    at_least_zero(group, "eps", "epsilon value")


def betas(group: Group) -> None:
    """Refuse anything but two numbers in [0, 1)."""
    pair = group["betas"]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"Invalid betas: {pair!r} (betas must be a pair of numbers in [0, 1))")
    for index, beta in enumerate(pair):
        value = number({"betas": beta}, "betas")
        if not 0.0 <= value < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {value} (betas must be in [0, 1))")


def options(group: Group) -> None:
    """Refuse values of the options that every optimizer shares."""
    if group.get("differentiable"):
        raise RuntimeError("differentiable=True is not supported: the step runs outside autograd")
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group.get("state_dtype") not in (None, torch.float32):
        raise ValueError(f"state_dtype={group['state_dtype']} is unknown, expected None or torch.float32")
    seed = group.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} is out of range, expected an integer in [0, 2**64)")
