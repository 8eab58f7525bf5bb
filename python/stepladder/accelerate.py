"""Steps of existing torch.optim objects through the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from stepladder import backends, optim
from stepladder.optim import checks
from stepladder.optim.base import Optimizer
from stepladder.optim.engine import Engine, WatchedState
from stepladder.optim.mixed import Mixed, MixedEngine

T = TypeVar("T", bound=torch.optim.Optimizer)


class Accelerated(WatchedState, torch.optim.Optimizer):
    """What accelerate() puts in front of a torch.optim class; all but step() stays that class's own."""

    _family: type[Optimizer]
    _backend: str | None = None
    _engine: Engine
    _step_supports_amp_scaling = True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in `.grad`; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.step(self)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _attach_engine(self)


def _attach_engine(optimizer: Accelerated) -> None:
    family, backend = optimizer._family, optimizer._backend
    kind = MixedEngine if issubclass(family, Mixed) else Engine
    optimizer._engine = kind(family, backend, None)  # type: ignore[arg-type]
    # As in the constructors of this package.
    optimizer._step_supports_amp_scaling = optimizer.defaults.get("fused") is not False


class AcceleratedSGD(Accelerated, torch.optim.SGD):
    """torch.optim.SGD with the kernels' step()."""

    _family = optim.SGD


class AcceleratedAdagrad(Accelerated, torch.optim.Adagrad):
    """torch.optim.Adagrad with the kernels' step()."""

    _family = optim.Adagrad


class AcceleratedRMSprop(Accelerated, torch.optim.RMSprop):
    """torch.optim.RMSprop with the kernels' step()."""

    _family = optim.RMSprop


class AcceleratedAdam(Accelerated, torch.optim.Adam):
    """torch.optim.Adam with the kernels' step()."""

    _family = optim.Adam


class AcceleratedAdamW(Accelerated, torch.optim.AdamW):
    """torch.optim.AdamW with the kernels' step()."""

    _family = optim.AdamW


class AcceleratedMuon(Accelerated, torch.optim.Muon):
    """torch.optim.Muon with the kernels' step()."""

    _family = optim.Muon


_CLASSES: dict[type[torch.optim.Optimizer], type[Accelerated]] = {
    torch.optim.SGD: AcceleratedSGD,
    torch.optim.Adagrad: AcceleratedAdagrad,
    torch.optim.RMSprop: AcceleratedRMSprop,
    torch.optim.Adam: AcceleratedAdam,
    torch.optim.AdamW: AcceleratedAdamW,
    torch.optim.Muon: AcceleratedMuon,
}


def accelerate(optimizer: T, *, backend: str | None = None) -> T:
    """Let a constructed torch.optim optimizer step through the kernels from now on.

    It keeps its state, groups, hooks, schedulers and checkpoints, and stays an instance of its class; it is
    changed in place. One that was made with `fused=False` leaves GradScaler's scale to the scaler, and any other
    takes it in its step, as the optimizers of this package do.

    Args:
        optimizer: Exactly a torch.optim.SGD, Adagrad, RMSprop, Adam, AdamW or Muon. One of this package's, or one
            that is accelerated already, is returned as it is.
        backend: As the constructors of this package take it.

    Returns:
        The same object.

    Raises:
        TypeError: Its class, or a step() patched onto the instance, cannot be served.
        RuntimeError: An option cannot be served, or the backend cannot run here.
        ValueError: A hyper-parameter is out of range, or a group asks for another algorithm than its optimizer's.
    """
    if isinstance(optimizer, (Optimizer, Accelerated)):
        return optimizer
    cls = _CLASSES.get(type(optimizer))
    if cls is None:
        names = ", ".join(f"torch.optim.{known.__name__}" for known in _CLASSES)
        raise TypeError(f"cannot accelerate a {type(optimizer).__qualname__}, expected exactly one of {names}")
    backends.check_available(backend)
    for index, group in enumerate(optimizer.param_groups):
        if cls._family.of(group) is not cls._family:
            # torch's does not know the key; a step would not be its own any more.
            raise ValueError(
                f"group {index} of a torch.optim.{cls._family.__name__} has algorithm={group['algorithm']!r}, expected "
                f"none: construct stepladder.{cls._family.__name__} for several algorithms"
            )
        cls._family.check(group)
        checks.options(group)
    patched = optimizer.__dict__.get("step")
    if patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"):
        raise TypeError("cannot accelerate an optimizer whose step() was replaced on the instance")

    optimizer.__class__ = cls  # type: ignore[assignment]
    optimizer._backend = backend  # type: ignore[attr-defined]
    _attach_engine(optimizer)  # type: ignore[arg-type]
    optimizer._patch_step_function()
    if patched is not None:
        _track_calls(optimizer)
    return optimizer


def _track_calls(optimizer: torch.optim.Optimizer) -> None:
    """Replace the wrapper by which a scheduler learns that step() was called; it leads to the old step()."""
    reference = weakref.ref(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        assert target is not None
        target._opt_called = True  # type: ignore[attr-defined]
        return type(target).step(target, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
