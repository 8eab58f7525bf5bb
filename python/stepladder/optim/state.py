"""What state a parameter has: its dtype, its creation, and the check of state that comes from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepladder import _C, backends
from stepladder.optim.sharding import check_companion

if TYPE_CHECKING:
    from stepladder.optim.base import Group, Optimizer

RULES: dict[str, dict[str, Any]] = _C.rules()

_COMPLEX = {torch.float32: torch.complex64}


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """The dtype of a parameter's states: the parameter's, or what the group's `state_dtype` says."""
    dtype: torch.dtype | None = group.get("state_dtype")
    if dtype is None:
        return param.dtype
    return _COMPLEX[dtype] if param.is_complex() else dtype


def has_step(family: type[Optimizer], group: Group) -> bool:
    """Whether the state counts steps: where the optimizer does, and for stochastic rounding's sake."""
    return family.timed or bool(group.get("stochastic_rounding"))


def new_step(value: float = 0.0, device: torch.device | str = "cpu") -> Tensor:
    """A step count as torch keeps it: a scalar, float32 unless the default dtype is float64."""
    wide = torch.get_default_dtype() == torch.float64
    return torch.full((), value, dtype=torch.float64 if wide else torch.float32, device=device)


def step_device(backend: str, param: Tensor) -> torch.device:
    """Where a parameter's step count lives: with the parameter for kernels on a GPU, which count it."""
    return param.device if backend in backends.ON_GPU else torch.device("cpu")


def missing_states(family: type[Optimizer], state: dict[str, Any], group: Group) -> list[str]:
    """The names of the rule's states that are still to be created."""
    return [name for name in family.states(group) if state.get(name) is None]


def create_state(
    family: type[Optimizer], state: dict[str, Any], param: Tensor, group: Group, device: torch.device
) -> bool:
    """Create what is missing in a parameter's state, its step count on `device`.

    Returns:
        Whether a state tensor was created.
    """
    missing = missing_states(family, state, group)
    if has_step(family, group) and "step" not in state:
        # A state that did not count steps has seen at least one.
        state["step"] = new_step(1.0 if state and not missing else 0.0, device)
    for name in missing:
        state[name] = family.initial_state(name, param, group, family.state_dtype(name, param, group))
    return bool(missing)


def check_complete(family: type[Optimizer], state: dict[str, Any], group: Group, where: str) -> None:
    """Refuse a state that has some of the rule's tensors and lacks others.

    Raises:
        ValueError: Names what is missing.
    """
    if not any(value is not None for value in state.values()):
        return
    missing = [name for name in missing_states(family, state, group) if name not in family.optional_states]
    if family.timed and state.get("step") is None:
        missing.insert(0, "step")
    if missing:
        raise ValueError(f"the state of {where} lacks {', '.join(map(repr, missing))}: it has {sorted(state)}")


def check_tensor(name: str, value: Any, param: Tensor, where: str, shape: torch.Size | None = None) -> None:
    """Refuse a state that cannot be one of this parameter's.

    Raises:
        TypeError: It is no strided floating-point tensor, or is real where the parameter is complex.
        ValueError: Its shape is not `shape`, or the parameter's where that is None.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"the state {name!r} of {where} is a {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"the state {name!r} of {where} has layout {value.layout}, expected torch.strided")
    if value.is_complex() != param.is_complex() or not (value.is_floating_point() or value.is_complex()):
        kind = "complex" if param.is_complex() else "floating-point"
        raise TypeError(f"the state {name!r} of {where} has dtype {value.dtype}, expected a {kind} one")
    shape = param.shape if shape is None else shape
    if value.shape != shape:
        whose = "the parameter's " * (shape == param.shape)
        raise ValueError(
            f"the state {name!r} of {where} has shape {tuple(value.shape)}, expected {whose}{tuple(shape)}"
        )


def check_step(value: Any, where: str) -> None:
    """Refuse what cannot be a step count. One on a GPU is taken as it is, as looking would wait for it.

    Raises:
        TypeError: It is neither a number nor a tensor of one element.
        ValueError: It is negative or not finite.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"the state 'step' of {where} is {value!r}, expected a number or a tensor of one element")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not 0.0 <= float(value) < 2.0**63:
        raise ValueError(f"the state 'step' of {where} is {float(value)}, expected a finite count of at least 0")


def checked_step(value: Any, where: str, device: torch.device) -> Tensor:
    """A step count from a checkpoint as this package keeps it, on `device`.

    Raises:
        TypeError: It is neither a number nor a tensor of one element.
        ValueError: It is negative or not finite.
    """
    check_step(value, where)
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64):
        return value.detach().to(device, copy=True).reshape(())
    return new_step(float(value), device)


def checked_state(
    family: type[Optimizer], index: Any, entry: Any, param: Tensor, group: Group, backend: str
) -> dict[str, Any]:
    """One parameter's entry of a checkpoint, copied, cast and moved to what this optimizer would have.

    Raises:
        TypeError: An entry or a value in it has the wrong type.
        ValueError: A state is missing, unknown or mis-shaped.
    """
    where = f"parameter {index}"
    if not isinstance(entry, dict):
        raise TypeError(f"the state of {where} is a {type(entry).__name__}, expected a dict")
    entry = {name: value for name, value in entry.items() if value is not None}
    known = {"step", *family.all_states()}
    if unknown := sorted(map(str, set(entry) - known)):
        raise ValueError(f"the state of {where} has unknown {', '.join(map(repr, unknown))}: expected {sorted(known)}")
    check_complete(family, entry, group, where)
    result: dict[str, Any] = {}
    for name, value in entry.items():
        if name == "step":
            if has_step(family, group):
                device = torch.device("cpu") if family.counts_on_host else step_device(backend, param)
                result[name] = checked_step(value, where, device)
            continue
        shape = family.state_shape(name, param, group)
        check_tensor(name, value, param, where, shape)
        check_companion(value, param, f"the state {name!r} of {where}")
        like = param if shape == param.shape else param.new_empty(shape)
        dtype = family.state_dtype(name, param, group)
        result[name] = torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(value.detach())
    return result
