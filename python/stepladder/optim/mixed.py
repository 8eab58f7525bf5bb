"""Several algorithms in one optimizer: one for matrices, and elementwise rules for whatever else there is."""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from stepladder import backends, ranges, reference
from stepladder.distributed.assignment import Refreshes
from stepladder.distributed.owners import Owners
from stepladder.distributed.peers import Peers, check_places, collective, group_of, world_size
from stepladder.distributed.replicated import Replicated
from stepladder.distributed.sharded import Sharded, sharded_dim
from stepladder.newton_schulz import kept_iterations
from stepladder.optim.adamw import AdamW
from stepladder.optim.base import SHARED_OPTIONS, Group, Optimizer, Options, Params
from stepladder.optim.engine import (
    Engine,
    check_gradient,
    check_parameter,
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
from stepladder.optim.sharding import is_distributed, local, settled, whole_partials
from stepladder.optim.state import check_complete, check_tensor, create_state, missing_states

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# What a group's `algorithm` may say beside the optimizer's own.
ALGORITHMS: dict[str, type[Optimizer]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD, "momentum": SGD}
MOMENTUM = 0.9

# A parameter to be stepped, its group, the backend for its device, and what stands for it in the group: itself, or the
# DTensor that it is the whole of.
Task = tuple[Tensor, Group, str, Tensor]


def unscaled(param: Tensor, inverse_scale: float) -> Tensor:
    """A parameter's gradient times `inverse_scale`, which is written back to it."""
    assert param.grad is not None
    if has_internal_overlap(param.grad):
        param.grad = param.grad.contiguous()
    return unscale(param.grad, inverse_scale)


def unscale(grad: Tensor, inverse_scale: float) -> Tensor:
    """A gradient times `inverse_scale`, in fp32 at least; it is written back."""
    if grad.dtype in (torch.float32, torch.float64):
        return grad.mul_(inverse_scale)
    product = grad.float() * inverse_scale
    grad.copy_(product)
    return product


@functools.cache
def defaults_of(algorithm: str) -> Group:
    """The hyper-parameters of an elementwise algorithm, with its own defaults."""
    # The class knows its defaults; of the optimizer that this makes, nothing else is wanted.
    make: Any = ALGORITHMS[algorithm]
    defaults: Group = make([torch.empty(0)]).defaults
    return defaults | ({"momentum": MOMENTUM} if algorithm == "momentum" else {})


class MatrixOptions(Options, total=False):
    """What optimizers of matrices take beside the options of all.

    Attributes:
        process_group: Of ranks with the same parameters and gradients, as under DistributedDataParallel: each matrix
            is stepped by one of them, which alone has its state, and sent to the others. Groups with an elementwise
            algorithm are stepped by all. See docs/scaling.md. None, which `dist.group.WORLD` is before
            init_process_group(), is as if it had not been given, but for a warning at the first step on several ranks.
        mesh: Of one dimension, in place of its process group. DTensors, as `fully_shard` makes them, need neither: they
            are divided over their ranks likewise, and `mesh` is then checked to be theirs.
    """

    process_group: ProcessGroup | None
    mesh: DeviceMesh | None


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
    _owners: Owners | None = None
    # The ranks that were asked for.
    _asked: tuple[ProcessGroup | None, DeviceMesh | None] = None, None
    # Whether process_group=None was given and is still to be warned of: dist.group.WORLD is None before there is one.
    _named_no_group = False

    def __init__(self, params: Params, defaults: Group, **options: Unpack[MatrixOptions]) -> None:
        self._named_no_group = options.get("process_group", self) is None
        self._asked = options.pop("process_group", None), options.pop("mesh", None)
        check_places(*self._asked)
        super().__init__(params, defaults, **cast("Options", options))

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

    # Whether `check_start` looks at anything.
    checks_start: ClassVar[bool] = False

    @classmethod
    def check_start(cls, param: Tensor, group: Group, where: str) -> None:
        """Raise ValueError for values that a parameter cannot have before its first step."""

    @classmethod
    @abstractmethod
    def cost(cls, param: Tensor, group: Group) -> float:
        """Of stepping a parameter, in the same units for all parameters; from shapes and hyper-parameters alone."""

    @classmethod
    def refreshes(cls, groups: Sequence[Group]) -> dict[Tensor, Refreshes]:
        """Of the parameters of all groups of matrices, what of their work falls on some steps alone."""
        return {}

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
        groups: list[Group],
        states: dict[Tensor, Any],
        backend: str | None,
        inverse_scale: float | None,
        factor: float,
    ) -> None:
        """Step matrices, whose states exist, all together.

        Args:
            tasks: Checked parameters with gradients.
            groups: All that hold matrices, with gradients or without.
            states: Of the optimizer.
            backend: As the user asked.
            inverse_scale: Multiplies the gradients first, and the products are written back to them.
            factor: Multiplies the gradients next.
        """

    def _new_engine(self) -> Engine:
        return MixedEngine(type(self), self._backend, self._max_norm)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer, and whole: what other ranks own is gathered from them.

        With `process_group` or `mesh`, every rank has to call this, and each gets the same.

        Raises:
            RuntimeError: Another rank ended, or did not call this within the timeout of the group.
        """
        if self._owners is None:
            return super().state_dict()
        own = self.__dict__["state"]
        self.__dict__["state"] = self._owners.whole(own, [p for g in self.param_groups for p in g["params"]])
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
        owners = self._owners
        if owners is None:
            super().load_state_dict(state_dict)
            return
        if isinstance(owners, Sharded):
            state_dict = self._with_whole_states(state_dict)
        with owners.undone_by_errors():
            super().load_state_dict(state_dict)
        owners.drop(self.__dict__["state"])

    def _expect_states(self, params: Sequence[tuple[Tensor, Group]], groups: Sequence[Group]) -> None:
        if self._owners is not None:
            matrices = [(param, group) for param, group in params if self.of(group) is type(self)]
            give_owners(self._owners, type(self), matrices, [group for group in groups if self.of(group) is type(self)])

    def _with_whole_states(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint in which states of matrices are whole, in place of shards that other ranks have parts of."""
        states = dict(state_dict.get("state", {}))
        for group, saved in zip(self.param_groups, state_dict.get("param_groups", ()), strict=False):
            for key in saved["params"] if self.of(group) is type(self) else ():
                entry = states.get(key, {})
                with collective(f"{type(self).__name__}'s all-gather of loaded states"):
                    states[key] = {name: x.full_tensor() if is_distributed(x) else x for name, x in entry.items()}
        return state_dict | {"state": states}

    def _state_like(self, param: Tensor, group: Group) -> Tensor:
        elsewhere = self._owners is not None and self._owners.is_elsewhere(param)
        if self.of(group) is not type(self) or not (elsewhere or is_distributed(param)):
            return param
        # The shape and layout of a whole parameter without its memory, and for another rank's states without any.
        device = torch.device("meta") if elsewhere else param.device
        return torch.empty((), dtype=param.dtype, device=device).expand(param.shape)

    def __getstate__(self) -> dict[str, Any]:
        if self._owners is not None:
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
        owners = self._owners
        if family is type(self):
            owners = self._owners_with(param_group)
        # What torch fills in is the algorithm's own.
        self.defaults = filled
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = own
        self._owners = owners

    def _owners_with(self, group: Group) -> Owners | None:
        """Who steps matrices, with those of a new group.

        Raises:
            ValueError: They lie otherwise than those that are there, or as no owner could be sent them.
        """
        name, owners = type(self).__name__, self._owners
        process_group, mesh = self._asked
        first = sum(len(known["params"]) for known in self.param_groups)
        known = [p for own in self.param_groups if self.of(own) is type(self) for p in own["params"]]
        plain = any(not is_distributed(param) for param in known)
        for position, (label, param) in enumerate(named(group)):
            where = place(first + position, label)
            if not is_distributed(param):
                if isinstance(owners, Sharded):
                    raise ValueError(f"{where} is a plain tensor beside DTensors, expected matrices of one kind")
                plain = True
                if owners is None and (process_group is not None or mesh is not None):
                    owners = Replicated(Peers(group_of(process_group, mesh), name))
                continue
            dim = sharded_dim(param, where)
            if isinstance(owners, Replicated) or process_group is not None:
                raise ValueError(f"{where} is a DTensor, which knows its ranks: expected no process_group beside it")
            if plain:
                raise ValueError(f"{where} is a DTensor beside plain tensors, expected matrices of one kind")
            if owners is None:
                if mesh is not None and mesh != param.device_mesh:
                    raise ValueError(f"{where} is on {param.device_mesh}, expected the mesh that was given, {mesh}")
                owners = Sharded(Peers(param.device_mesh.get_group(dim), name), param.device_mesh, dim)
            assert isinstance(owners, Sharded)
            if (param.device_mesh, dim) != (owners.mesh, owners.mesh_dim):
                raise ValueError(
                    f"{where} is sharded over dimension {dim} of {param.device_mesh}, others over {owners.mesh_dim} "
                    f"of {owners.mesh}: expected the same for all matrices of one optimizer"
                )
        return owners

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
        for position, (name, param) in enumerate(named(group)):
            # A lazy parameter has no shape yet, and what is no tensor is torch's to refuse.
            if isinstance(param, Tensor) and not torch.nn.parameter.is_lazy(param):
                where = place(first + position, name)
                cls.check_shape(param, group, where)

    @classmethod
    def required_keys(cls, group: Group) -> set[str]:
        family = cls.of(group)
        return family.required_keys(group) if family is not cls else cls.hyper_keys() - cls.late_keys


def give_owners(
    owners: Owners, family: type[Mixed], params: Sequence[tuple[Tensor, Group]], groups: Sequence[Group]
) -> None:
    """Have parameters owned that are not yet; those that share memory by one rank.

    Args:
        owners: Of the optimizer.
        family: Its class.
        params: With their groups.
        groups: All groups of matrices, by which refreshes are due.
    """
    new = [(param, group) for param, group in params if param not in owners.owners]
    if not new:
        return
    # Shards that share memory are not stepped in place, and may do so on one rank alone.
    alone = isinstance(owners, Sharded)
    units = [[index] for index in range(len(new))] if alone else meeting([param for param, _ in new])
    costs = [sum(family.cost(*new[index]) for index in unit) for unit in units]
    due = family.refreshes(groups)
    refreshes: list[Refreshes] = [{} for _ in units]
    for unit, together in zip(units, refreshes, strict=True):
        for index in unit:
            for when, work in due.get(new[index][0], {}).items():
                together[when] = together.get(when, 0.0) + work
    owners.own([[new[index][0] for index in unit] for unit in units], costs, refreshes)


def place(index: int, name: str | None) -> str:
    """How messages name a parameter that is being added."""
    return f"parameter {index}" + (f" ({name})" if name is not None else "")


def named(group: Group) -> list[tuple[str | None, Any]]:
    """Names and tensors of a group's parameters, which may be given as (name, tensor)."""
    params = group["params"]
    names = dict(enumerate(group.get("param_names") or ()))
    items = enumerate([params] if isinstance(params, Tensor) else params)
    return [item if isinstance(item, tuple) and len(item) == 2 else (names.get(i), item) for i, item in items]


class MixedEngine(Engine):
    """Steps the matrices of an optimizer together, and its other groups by their rules.

    All groups are checked before anything is written. GradScaler's skip and scale, and the norm of `max_norm`, are
    waited for on a GPU, so that neither goes with a capture. Where matrices have owners, a rank creates the states of
    its own alone and steps them alone; other groups are stepped on all ranks alike.
    """

    family: type[Mixed]

    def __init__(self, family: type[Mixed], backend: str | None, max_norm: float | None) -> None:
        # Clipping takes all groups together, so it is not for the elementwise part to do.
        super().__init__(family, backend, None)
        self._limit = max_norm
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
            if owners_of(optimizer) is not None:
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
        owners = owners_of(optimizer)
        if owners is None:
            if getattr(optimizer, "_named_no_group", False) and world_size() > 1:
                optimizer._named_no_group = False  # type: ignore[attr-defined]
                warnings.warn(
                    f"{self.family.__name__} was given process_group=None: each of {world_size()} ranks steps all "
                    "matrices by itself. dist.group.WORLD is None before init_process_group(): to divide them, take it "
                    "after that; if they are not to be divided, leave process_group out",
                    stacklevel=2,
                )
            return None if skip else self._check(optimizer, capturing)
        # What is sharded elementwise goes its own way: a rank without a gradient need not know of others'.
        groups = [g for g in optimizer.param_groups if self.family.of(g) is self.family or type(owners) is Replicated]
        params = [param for group in groups for param in group["params"]]
        while True:
            error: Exception | None = None
            tasks: list[Task] = []
            structure = 0
            try:
                if not skip:
                    tasks = self._check(optimizer, capturing)
                    fates = functools.partial(self._fates, optimizer, owners)
                    structure = owners.structure(groups, fates, f"max_norm={self._limit}")
            except Exception as found:
                error = found
            skip, received = owners.agree(params, structure, skip, error)
            if skip or not received:
                break
        if skip:
            return None
        new = [task for task in tasks if task[0] not in owners.owners]
        if new:
            matrices = [group for group in optimizer.param_groups if self.family.of(group) is self.family]
            with owners.undone_by_errors():
                give_owners(owners, self.family, [(param, group) for param, group, *_ in new], matrices)
                if self.family.checks_start and isinstance(owners, Sharded):
                    owners.agree(params, structure, False, self._refusal(optimizer, owners, new))
        return tasks

    def _refusal(self, optimizer: torch.optim.Optimizer, owners: Sharded, new: list[Task]) -> ValueError | None:
        """What is wrong with whole matrices that this rank is about to step first, and no other can tell."""
        names: dict[Tensor, str] = {}
        for group in optimizer.param_groups:
            first = len(names)
            names |= {p: describe_parameter(first + i, group, i) for i, p in enumerate(group["params"])}
        for param, *_ in new:
            param.grad = settled(param.grad, param)
        refusal: ValueError | None = None
        for whole in owners.gathered([param for param, *_ in new]):
            for index, value in whole.items():
                param, group, *_ = new[index]
                try:
                    self.family.check_start(value, group, names[param])
                except ValueError as error:
                    # The others take part in what is still to be gathered.
                    refusal = refusal or error
        return refusal

    def _fates(self, optimizer: torch.optim.Optimizer, owners: Owners) -> dict[Tensor, object]:
        """Of matrices without an owner, all that one is chosen by."""
        groups = [group for group in optimizer.param_groups if self.family.of(group) is self.family]
        new = [(p, group) for group in groups for p in group["params"] if p not in owners.owners]
        due = self.family.refreshes(groups) if new else {}
        return {param: (self.family.cost(param, group), due.get(param)) for param, group in new}

    def _check(self, optimizer: torch.optim.Optimizer, capturing: bool) -> list[Task]:
        """Check all groups, and the matrices that have a gradient; returns these."""
        # Not by the property, which would have the states of the other groups looked at again.
        states, owners = optimizer.__dict__["state"], owners_of(optimizer)
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
                check = check_shard if is_distributed(param) else check_tensors
                backend = check(param, state, self.family, group, self.backend, where)
                if capturing:
                    self.family.check_capture(param, group, state, backend, where)
                elsewhere = owners is not None and owners.is_elsewhere(param)
                if not elsewhere and not is_distributed(param) and missing_states(self.family, state, group):
                    self.family.check_start(param, group, where)
                tasks.append((param, group, backend, param))
            first += len(params)
        self.family.check_backends({(backend, param.device) for param, _, backend, _ in tasks})
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
                    if is_distributed(param):
                        param.grad = settled(param.grad, param)
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
        states, owners = optimizer.__dict__["state"], owners_of(optimizer)
        groups = [group for group in optimizer.param_groups if self.family.of(group) is self.family]

        def step(own: list[Task], states: dict[Tensor, Any]) -> None:
            for param, group, *_ in own:
                if param.grad is not None and param.grad.is_neg():
                    param.grad = param.grad.resolve_neg()
                create_state(self.family, states[param], param, group, torch.device("cpu"))
            self.family.step_matrices(own, groups, states, self.backend, inverse_scale, factor)

        if owners is None:
            step(tasks, states)
            return
        params = [param for param, *_ in tasks]
        for param in params:
            # Checkpointing takes an optimizer without any entry for one that has not stepped yet.
            states.setdefault(param, {})
        if isinstance(owners, Replicated):
            owners.step(params, lambda which: step([tasks[i] for i in which], states))
            if inverse_scale is not None:
                for param in filter(owners.is_elsewhere, params):
                    unscaled(param, inverse_scale)
            return
        assert isinstance(owners, Sharded)
        for param in params:
            param.grad = settled(param.grad, param)

        def step_whole(whole: dict[int, Tensor]) -> None:
            own = [(value, *tasks[i][1:]) for i, value in whole.items()]
            step(own, {value: states[params[i]] for i, value in whole.items()})

        owners.step(params, step_whole)
        if inverse_scale is not None:
            for param in params:
                assert param.grad is not None
                unscale(local(param.grad), inverse_scale)


def owners_of(optimizer: torch.optim.Optimizer) -> Owners | None:
    """Who steps its matrices; an accelerated optimizer has none."""
    return getattr(optimizer, "_owners", None)


def check_shard(
    param: Tensor, state: dict[str, Any], family: type[Optimizer], group: Group, backend: str | None, where: str
) -> str:
    """Check a shard, its gradient, and the states of the whole parameter; returns the backend that steps this.

    Raises:
        As `check_tensors`.
    """
    check_parameter(local(param), family, group, where)
    assert param.grad is not None
    check_gradient(param.grad, param, family.__name__, where)
    check_complete(family, state, group, where)
    for name in family.states(group):
        if state.get(name) is not None:
            check_tensor(name, state[name], param, where, family.state_shape(name, param, group))
    return backends.choose(backend, param.device.type)
