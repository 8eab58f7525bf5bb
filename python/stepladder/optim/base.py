"""What every optimizer shares: step(), groups, state and checkpoints."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from stepladder import backends
from stepladder.optim import checks
from stepladder.optim.engine import Engine, WatchedState
from stepladder.optim.sharding import local
from stepladder.optim.state import RULES, checked_state, state_dtype

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes beside its own.

    Attributes:
        backend: "cpu", "cuda", "triton", "reference", or None to choose by the parameters' device.
        state_dtype: torch.float32 keeps the states of half-precision parameters in fp32; None keeps them
            in the parameter's dtype, as torch does.
        stochastic_rounding: Round bf16 parameters stochastically when they are stored.
        seed: Of the stochastic rounding; None takes torch.initial_seed(). Travels in checkpoints.
        max_norm: Clip the norm of all gradients to this before they are used, without writing them back.
        foreach: Accepted for compatibility, without effect.
        fused: False leaves GradScaler's scale to the scaler, as torch's unfused optimizers do: then it can be clipped
            by others between `unscale_` and the step. Otherwise without effect.
        differentiable: Accepted for compatibility; True is refused.
        capturable: Steps inside CUDA graphs.
    """

    backend: str | None
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    seed: int | None
    max_norm: float | None
    foreach: bool | None
    fused: bool | None
    differentiable: bool
    capturable: bool


# Options that live in the groups; a group has the key only where the option was given.
SHARED_OPTIONS = ("state_dtype", "stochastic_rounding", "seed", "foreach", "fused", "differentiable", "capturable")


class Optimizer(WatchedState, torch.optim.Optimizer):
    """A torch optimizer whose step is one call into the kernels, for all groups together.

    A subclass says which rule of csrc/rules/rules.def a group follows and which of its hyper-parameters
    choose it; everything else is here.
    """

    # The names in rules.def of the rules that a group may follow.
    rules: ClassVar[tuple[str, ...]]
    # Group keys whose values choose among them.
    choosing: ClassVar[tuple[str, ...]] = ()
    # Whether the state has a step count, as torch's optimizer of that name has.
    timed: ClassVar[bool] = False
    # The count stays on the host, also where kernels on a GPU step a parameter.
    counts_on_host: ClassVar[bool] = False
    # States that may be missing beside others, and are then started afresh.
    optional_states: ClassVar[frozenset[str]] = frozenset()
    complex_parameters: ClassVar[bool] = True
    # Hyper-parameters that old checkpoints may lack; they are then left as they are.
    late_keys: ClassVar[frozenset[str]] = frozenset()

    _step_supports_amp_scaling = True

    def __init__(self, params: Params, defaults: Group, **options: Unpack[Options]) -> None:
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            raise TypeError(f"{type(self).__name__} got unexpected keyword arguments {sorted(unknown)}")
        backend, max_norm = options.get("backend"), options.get("max_norm")
        backends.check_available(backend)
        if max_norm is not None and not 0.0 < float(max_norm) < math.inf:
            raise ValueError(f"max_norm={max_norm} is out of range, expected None or a finite number above 0")
        for key, value in options.items():
            if key in SHARED_OPTIONS and (key in defaults or (value is not None and value is not False)):
                defaults[key] = value
        if defaults.get("stochastic_rounding") and "seed" not in defaults:
            defaults["seed"] = torch.initial_seed() % 2**64
        self.of(defaults).check(defaults)
        checks.options(defaults)
        self._backend = backend
        self._max_norm = None if max_norm is None else float(max_norm)
        self._step_supports_amp_scaling = options.get("fused") is not False
        self._engine = self._new_engine()
        super().__init__(params, defaults)

    def _new_engine(self) -> Engine:
        return Engine(type(self), self._backend, self._max_norm)

    @classmethod
    def of(cls, group: Group) -> type[Optimizer]:
        """The class that says which rule a group follows, checks it, and has its states."""
        return cls

    @classmethod
    def elementwise(cls, groups: list[Group]) -> list[Group]:
        """Those of the groups that follow a rule of rules.def."""
        return groups

    @staticmethod
    @abstractmethod
    def rule(group: Group) -> str:
        """The name in rules.def of the rule that a group follows."""

    @staticmethod
    @abstractmethod
    def check(group: Group) -> None:
        """Raise ValueError or TypeError for hyper-parameters that the rule cannot take."""

    @classmethod
    def states(cls, group: Group) -> Sequence[str]:
        """The names of a group's states, the step count apart."""
        names: list[str] = RULES[cls.rule(group)]["states"]
        return names

    @classmethod
    def all_states(cls) -> set[str]:
        """The names of the states that any group may have."""
        return {name for rule in cls.rules for name in RULES[rule]["states"]}

    @classmethod
    def check_params(cls, group: Group, first: int) -> None:
        """Raise ValueError or TypeError for parameters that a checked group cannot have.

        Args:
            group: Its `params` may be named, as (name, tensor).
            first: The number of its first parameter through all groups.
        """

    @classmethod
    def required_keys(cls, group: Group) -> set[str]:
        """The hyper-parameters that a group of a checkpoint must have."""
        return set(RULES[cls.rule(group)]["hyper"]) - cls.late_keys

    @classmethod
    def state_shape(cls, name: str, param: Tensor, group: Group) -> torch.Size:
        """The shape of a parameter's state `name`."""
        return param.shape

    @classmethod
    def state_dtype(cls, name: str, param: Tensor, group: Group) -> torch.dtype:
        """The dtype of a parameter's state `name`."""
        return state_dtype(param, group)

    @staticmethod
    def initial_state(name: str, param: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        """The state `name` before a parameter's first step: zeros of the parameter's shape and layout."""
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def _state_like(self, param: Tensor, group: Group) -> Tensor:
        """What a parameter's states are laid out like."""
        return param

    def _expect_states(self, params: Sequence[tuple[Tensor, Group]], groups: Sequence[Group]) -> None:
        """Called before the states of a checkpoint are checked and copied.

        Args:
            params: That have some, with their groups.
            groups: All, as they will be.
        """

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients before clipping, as of the last step with `max_norm`; None before it."""
        return self._engine.grad_norm

    def state_bytes(self) -> int:
        """The memory that the states of all parameters take, in bytes; none before the first step.

        Memory that several tensors share is counted once, of shards what this rank has. Step counts are scalars of
        4 bytes.
        """
        storages = {
            (value.device, storage.data_ptr()): storage.nbytes()
            for state in self.__dict__["state"].values()
            for value in (state.values() if isinstance(state, dict) else ())
            if isinstance(value, Tensor)
            for storage in (local(value).untyped_storage(),)
        }
        return sum(storages.values())

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, in mid-run too.

        Raises:
            ValueError: A hyper-parameter is out of range; nothing has then changed.
        """
        if isinstance(param_group, dict):
            merged = self.defaults | param_group
            self.of(merged).check(merged)
            checks.options(merged)
            if merged.get("stochastic_rounding") and "seed" not in merged:
                param_group["seed"] = torch.initial_seed() % 2**64
        super().add_param_group(param_group)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in `.grad`.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter overlaps itself in memory.
            TypeError: A dtype or tensor type is not supported.
            ValueError: A gradient does not fit its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.step(self)
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of the torch.optim optimizer of the same name.

        States are cast to the dtype and moved to the device that this optimizer would have given them.

        Raises:
            ValueError: Groups or states do not fit; nothing has then changed.
            TypeError: A state has the wrong type; nothing has then changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"loaded state dict has no {key!r}: it has {sorted(map(str, state_dict))}")

        groups, saved_groups = self.param_groups, deepcopy(state_dict["param_groups"])
        if len(groups) != len(saved_groups):
            raise ValueError(
                "loaded state dict has a different number of parameter groups: "
                f"{len(saved_groups)}, this optimizer has {len(groups)}"
            )
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            if not isinstance(saved, dict) or "params" not in saved:
                raise ValueError(f"group {index} of the loaded state dict lacks 'params': {saved!r}")
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                    f"group {index} has {len(saved['params'])} parameters, the optimizer's has {len(group['params'])}"
                )

        new_groups: list[Group] = []
        owners: dict[Any, tuple[Tensor, Group]] = {}
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            ids = saved["params"]
            new = group | saved | {"params": group["params"]}
            family = self.of(new)
            if lacking := sorted(family.required_keys(new) - set(saved)):
                raise ValueError(f"group {index} of the loaded state dict lacks {', '.join(map(repr, lacking))}")
            family.check(new)
            checks.options(new)
            family.check_params(new, sum(len(group["params"]) for group in new_groups))
            new_groups.append(new)
            owners |= {saved_id: (p, new) for saved_id, p in zip(ids, group["params"], strict=True)}

        self._expect_states([own for key, own in owners.items() if state_dict["state"].get(key)], new_groups)
        new_state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key in owners:
                param, group = owners[key]
                backend = backends.choose(self._backend, param.device.type)
                like = self._state_like(param, group)
                new_state[param] = checked_state(self.of(group), key, entry, like, group, backend)
            elif isinstance(key, int):
                raise ValueError(f"loaded state dict has state for parameter {key}, which is in none of its groups")
            else:
                new_state[key] = entry
        self.__setstate__({"state": new_state, "param_groups": new_groups})

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_backend", "_max_norm", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = self._new_engine()
