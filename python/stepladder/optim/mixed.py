"""Several algorithms in one optimizer: one for matrices, and elementwise rules for whatever else there is."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepladder import backends, ranges, reference
from stepladder.distributed.replicated import Replicated
from stepladder.newton_schulz import kept_iterations
from stepladder.optim.adamw import AdamW
from stepladder.optim.base import SHARED_OPTIONS, Group, Optimizer
from stepladder.optim.engine import (
    Engine,
    check_gradient,
    check_tensors,
    clip_factor,
    describe_parameter,
    has_internal_overlap,
    is_capturing,
    new_plan,
)
from stepladder.optim.lion import Lion
from stepladder.optim.memory import meeting
from stepladder.optim.sgd import SGD
from stepladder.optim.sharding import is_distributed, local, whole_partials
from stepladder.optim.state import create_state, missing_states

# What a group's `algorithm` may say beside the optimizer's own.
ALGORITHMS: dict[str, type[Optimizer]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD, "momentum": SGD}
MOMENTUM = 0.9

# A parameter to be stepped, its group and the backend for its device.
Task = tuple[Tensor, Group, str]


def unscaled(param: Tensor, inverse_scale: float) -> Tensor:
    """A parameter's gradient times `inverse_scale`, which is written back to it."""
    assert param.grad is not None
    if has_internal_overlap(param.grad):
        param.grad = param.grad.contiguous()
    if param.grad.dtype in (torch.float32, torch.float64):
        return param.grad.mul_(inverse_scale)
    product = param.grad.float() * inverse_scale
    param.grad.copy_(product)
    return product


@functools.cache
def defaults_of(algorithm: str) -> Group:
    """The hyper-parameters of an elementwise algorithm, with its own defaults."""
    # The class knows its defaults; of the optimizer that this makes, nothing else is wanted.
    make: Any = ALGORITHMS[algorithm]
    defaults: Group = make([torch.empty(0)]).defaults
    return defaults | ({"momentum": MOMENTUM} if algorithm == "momentum" else {})


class Mixed(Optimizer):
    """An optimizer of matrices whose groups may follow an elementwise algorithm instead, by their `algorithm`.

    Such a group has that algorithm's hyper-parameters and defaults, and steps as that optimizer of this package
    does, bit for bit. Options that all optimizers share, and `maximize`, hold for every group.
    """

    # What `algorithm` says for the matrices.
    algorithm: ClassVar[str]
    rules = ()
    choosing = ("algorithm",)
    complex_parameters = False
    # Who owns which matrix, where several processes share the work.
    _replicated: Replicated | None = None

    @classmethod
    def of(cls, group: Group) -> type[Optimizer]:
        name = group.get("algorithm", cls.algorithm)
        if name == cls.algorithm:
            return cls
        if not isinstance(name, str) or name not in ALGORITHMS:
            known = ", ".join(map(repr, (cls.algorithm, *ALGORITHMS)))
            raise ValueError(f"algorithm={name!r} is unknown, expected one of {known}")
        return ALGORITHMS[name]

    @classmethod
    def elementwise(cls, groups: list[Group]) -> list[Group]:
        return [group for group in groups if group.get("algorithm", cls.algorithm) != cls.algorithm]

    @staticmethod
    def rule(group: Group) -> str:
        raise AssertionError("matrices follow no rule of rules.def")

    @classmethod
    @abstractmethod
    def hyper_keys(cls) -> set[str]:
        """The keys of a group of matrices that mean something."""

    @classmethod
    @abstractmethod
    def check_shape(cls, param: Tensor, group: Group, where: str) -> None:
        """Raise ValueError or TypeError for a parameter that is no matrix or batch of matrices."""

    @classmethod
    def check_start(cls, param: Tensor, group: Group, where: str) -> None:
        """Raise ValueError for values that a parameter cannot have before its first step."""

    @classmethod
    def cost(cls, param: Tensor, group: Group) -> float:
        """Of stepping a parameter, in the same units for all parameters; from shapes and hyper-parameters alone."""
        raise AssertionError(f"{cls.__name__} has no owners of parameters")

    @classmethod
    def check_backends(cls, chosen: set[tuple[str, torch.device]]) -> None:
        """Raise where one of the backends that matrices were given to could not run on its device."""

    @classmethod
    @abstractmethod
    def check_capture(cls, param: Tensor, group: Group, state: dict[str, Any], backend: str, where: str) -> None:
        """Raise RuntimeError for matrices whose step cannot be captured into a CUDA graph."""

    @classmethod
    @abstractmethod
    def step_matrices(
        cls,
        tasks: list[Task],
        states: dict[Tensor, Any],
        backend: str | None,
        inverse_scale: float | None,
        factor: float,
    ) -> None:
        """Step matrices, whose states exist, all together.

        Args:
            tasks: Checked parameters with gradients.
            states: Of the optimizer.
            backend: As the user asked.
            inverse_scale: Multiplies the gradients first, and the products are written back to them.
            factor: Multiplies the gradients next.
        """

    def _new_engine(self) -> Engine:
        return MixedEngine(type(self), self._backend, self._max_norm, self._replicated)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer, and whole: what other ranks own is gathered from them.

        With `process_group` or `mesh`, every rank has to call this, and each gets the same.

        Raises:
            RuntimeError: Another rank ended, or did not call this within the timeout of the group.
        """
        if self._replicated is None:
            return super().state_dict()
        own = self.__dict__["state"]
        self.__dict__["state"] = self._replicated.whole(own, [p for g in self.param_groups for p in g["params"]])
        try:
            return super().state_dict()
        finally:
            self.__dict__["state"] = own

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer of this package.

        With `process_group` or `mesh`, every rank has to load the same checkpoint, however many ranks and which
        optimizer of the same name it came from; each keeps the states of what it owns.

        Raises:
            ValueError: Groups or states do not fit; nothing has then changed.
            TypeError: A state has the wrong type; nothing has then changed.
        """
        super().load_state_dict(state_dict)
        if self._replicated is not None:
            states = self.__dict__["state"]
            groups = [group for group in self.param_groups if self.of(group) is type(self)]
            kept = [(p, group) for group in groups for p in group["params"] if states.get(p)]
            give_owners(self._replicated, type(self), kept)
            self._replicated.drop(states)

    def __getstate__(self) -> dict[str, Any]:
        if self._replicated is not None:
            raise TypeError(
                f"{type(self).__name__} with a process group cannot be pickled or copied: state_dict() has all that "
                "another one needs"
            )
        return super().__getstate__()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, in mid-run too.

        Raises:
            ValueError: A hyper-parameter is out of range or not this algorithm's, or a shape does not fit; nothing
                has then changed.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            super().add_param_group(param_group)
            return
        family = self.of(self.defaults | param_group)
        own = self.defaults
        filled = own
        if family is not type(self):
            shared = {key: own[key] for key in ("maximize", *SHARED_OPTIONS) if key in own}
            filled = defaults_of(param_group["algorithm"]) | shared
        self._check_keys(param_group, set(filled) if family is not type(self) else self.hyper_keys())
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        if family is type(self):
            family.check(own | param_group)
            family.check_params(own | param_group, sum(len(group["params"]) for group in self.param_groups))
        # What torch fills in is the algorithm's own.
        self.defaults = filled
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = own

    def _check_keys(self, group: Group, taken: set[str]) -> None:
        """Refuse hyper-parameters that another algorithm takes; other keys are the user's own."""
        known = self.hyper_keys().union(*map(defaults_of, ALGORITHMS))
        if foreign := sorted((known & set(group)) - taken - {"maximize", *SHARED_OPTIONS}):
            name = group.get("algorithm", self.algorithm)
            raise ValueError(
                f"a group with algorithm={name!r} has {', '.join(f'{key}={group[key]!r}' for key in foreign)}, "
                f"expected keys out of {', '.join(sorted(taken))}"
            )

    @classmethod
    def check_params(cls, group: Group, first: int) -> None:
        params = group["params"]
        names = dict(enumerate(group.get("param_names") or ()))
        for position, item in enumerate([params] if isinstance(params, Tensor) else params):
            name, param = item if isinstance(item, tuple) and len(item) == 2 else (names.get(position), item)
            # A lazy parameter has no shape yet, and what is no tensor is torch's to refuse.
            if isinstance(param, Tensor) and not torch.nn.parameter.is_lazy(param):
                where = f"parameter {first + position}" + (f" ({name})" if name is not None else "")
                cls.check_shape(param, group, where)

    @classmethod
    def required_keys(cls, group: Group) -> set[str]:
        family = cls.of(group)
        return family.required_keys(group) if family is not cls else cls.hyper_keys() - cls.late_keys


def give_owners(replicated: Replicated, family: type[Mixed], params: Sequence[tuple[Tensor, Group]]) -> None:
    """Have parameters owned that are not yet; those that share memory by one rank."""
    new = [(param, group) for param, group in params if param not in replicated.owners]
    units = meeting([param for param, _ in new])
    costs = [sum(family.cost(*new[index]) for index in unit) for unit in units]
    replicated.own([[new[index][0] for index in unit] for unit in units], costs)


class MixedEngine(Engine):
    """Steps the matrices of an optimizer together, and its other groups by their rules.

    All groups are checked before anything is written. GradScaler's skip and scale, and the norm of `max_norm`, are
    waited for on a GPU, so that neither goes with a capture. Where matrices have owners, a rank creates the states of
    its own alone and steps them alone; other groups are stepped on all ranks alike.
    """

    family: type[Mixed]

    def __init__(
        self, family: type[Mixed], backend: str | None, max_norm: float | None, replicated: Replicated | None = None
    ) -> None:
        # Clipping takes all groups together, so it is not for the elementwise part to do.
        super().__init__(family, backend, None)
        self._limit = max_norm
        self._replicated = replicated
        # What captured graphs point into, beside the plan.
        self._captured: dict[int, object] = {}

    def step(self, optimizer: torch.optim.Optimizer, factor: float | None = None) -> None:
        found_inf: Any = getattr(optimizer, "found_inf", None)
        grad_scale: Any = getattr(optimizer, "grad_scale", None)
        capturing = is_capturing()
        if capturing:
            self._check_capture(optimizer)
            if found_inf is not None or grad_scale is not None or self._limit is not None:
                raise RuntimeError(
                    f"{self.family.__name__}.step() with a GradScaler or max_norm waits for the GPU, and cannot be "
                    f"captured into a CUDA graph: max_norm={self._limit}, grad_scale={grad_scale}"
                )
            if self._replicated is not None:
                raise RuntimeError(
                    f"{self.family.__name__}.step() with a process group waits for the other ranks, and cannot be "
                    "captured into a CUDA graph"
                )
        skip = found_inf is not None and float(found_inf) != 0.0
        with ranges.phase("check"):
            tasks = self._checked(optimizer, capturing, skip)
        if tasks is None:
            return
        inverse_scale = None if grad_scale is None else 1.0 / float(grad_scale)
        if self._limit is not None:
            with ranges.phase("norm"):
                self._grad_norm = self._total_norm(optimizer, 1.0 if inverse_scale is None else inverse_scale)
            factor = clip_factor(self._grad_norm, self._limit)
        if self.family.elementwise(optimizer.param_groups):
            super().step(optimizer, factor)
        if tasks:
            with ranges.phase("matrices"):
                self._step_matrices(optimizer, tasks, inverse_scale, 1.0 if factor is None else factor)
        if capturing:
            self._captured |= {id(iteration): iteration for iteration in kept_iterations()}

    def _hyper_keys(self, group: Group) -> list[str]:
        if self.family.of(group) is not self.family:
            return super()._hyper_keys(group)
        return sorted(self.family.hyper_keys() & group.keys())

    def _checked(self, optimizer: torch.optim.Optimizer, capturing: bool, skip: bool) -> list[Task] | None:
        """The matrices to be stepped, checked by all ranks before any of them goes on; None to leave the step out."""
        if self._replicated is None:
            return None if skip else self._check(optimizer, capturing)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        while True:
            error: Exception | None = None
            tasks: list[Task] = []
            try:
                tasks = [] if skip else self._check(optimizer, capturing)
            except Exception as found:
                error = found
            skip, received = self._replicated.agree(params, skip, error)
            if skip or not received:
                break
        if skip:
            return None
        give_owners(self._replicated, self.family, [(param, group) for param, group, _ in tasks])
        return tasks

    def _check(self, optimizer: torch.optim.Optimizer, capturing: bool) -> list[Task]:
        """Check all groups, and the matrices that have a gradient; returns these."""
        # Not by the property, which would have the states of the other groups looked at again.
        states = optimizer.__dict__["state"]
        tasks: list[Task] = []
        seen: set[Tensor] = set()
        first = 0
        for index, group in enumerate(optimizer.param_groups):
            params = group["params"]
            if not isinstance(params, (list, tuple)):
                raise TypeError(f"params of group {index} are a {type(params).__name__}, expected a list")
            family = self.family.of(group)
            lr = group.get("lr")
            # A rate that the kernels read is not waited for.
            on_device = isinstance(lr, Tensor) and lr.numel() == 1 and lr.device.type != "cpu"
            family.check(group | {"lr": 0.0} if on_device and group.get("capturable") else group)
            for position, param in enumerate(params if family is self.family else ()):
                if param.grad is None:
                    continue
                where = describe_parameter(first + position, group, position)
                if param in seen:
                    raise ValueError(f"{where} stands in the groups more than once")
                seen.add(param)
                state = states.get(param, {})
                self.family.check_shape(param, group, where)
                backend = check_tensors(param, state, self.family, group, self.backend, where)
                if capturing:
                    self.family.check_capture(param, group, state, backend, where)
                elsewhere = self._replicated is not None and self._replicated.is_elsewhere(param)
                if not elsewhere and missing_states(self.family, state, group):
                    self.family.check_start(param, group, where)
                tasks.append((param, group, backend))
            first += len(params)
        self.family.check_backends({(backend, param.device) for param, _, backend in tasks})
        return tasks

    def _total_norm(self, optimizer: torch.optim.Optimizer, inverse_scale: float) -> float:
        """Norm of the gradients of all groups, by the fixed tree."""
        graded = []
        params = [param for group in optimizer.param_groups for param in group["params"]]
        first = 0
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    where = describe_parameter(first + position, group, position)
                    check_gradient(param.grad, param, self.family.of(group).__name__, where)
                    graded.append(param)
            first += len(group["params"])
        plan = new_plan()
        plan.reset([({"params": graded}, "", ())])
        others = plan.bind_gradients([backends.choose(self.backend, p.device.type) for p in graded])
        norm, _ = plan.norm(2.0, inverse_scale, torch.get_num_threads())
        distributed = any(map(is_distributed, params))
        if others or distributed:
            partials = plan.partials()
            for index in others:
                grad = reference.widened(local(graded[index].grad), local(graded[index]))
                partials[index] = reference.partial_norm(inverse_scale * grad, 2.0)
            if distributed:
                parts = dict(zip(map(id, graded), partials, strict=True))
                partials = whole_partials([parts.get(id(p), 0.0) for p in params], params)
            norm = reference.total_norm(partials, 2.0)
        return norm

    @torch.no_grad()
    def _step_matrices(
        self, optimizer: torch.optim.Optimizer, tasks: list[Task], inverse_scale: float | None, factor: float
    ) -> None:
        states = optimizer.__dict__["state"]

        def step(own: list[Task]) -> None:
            for param, group, _ in own:
                if param.grad is not None and param.grad.is_neg():
                    param.grad = param.grad.resolve_neg()
                create_state(self.family, states[param], param, group, torch.device("cpu"))
            self.family.step_matrices(own, states, self.backend, inverse_scale, factor)

        if self._replicated is None:
            step(tasks)
            return
        for param, _, _ in tasks:
            if self._replicated.is_elsewhere(param):
                # Checkpointing takes an optimizer without any entry for one that has not stepped yet.
                states.setdefault(param, {})
                if inverse_scale is not None:
                    unscaled(param, inverse_scale)
        self._replicated.step([param for param, _, _ in tasks], lambda which: step([tasks[i] for i in which]))
