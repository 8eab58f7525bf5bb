"""The step of one optimizer: binds parameters to a plan, runs it, and falls to the reference where it must.

The plan (csrc/step_plan.h) revalidates every pointer at each step; Python is asked only about parameters
that are new or have changed. All of them are checked before the first state is created or value written.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stepladder import _C, backends, ranges, reference
from stepladder.backends import current_stream
from stepladder.optim import sharding
from stepladder.optim.sharding import is_distributed, local
from stepladder.optim.state import (
    RULES,
    check_complete,
    check_step,
    check_tensor,
    checked_step,
    create_state,
    has_step,
    step_device,
)

if TYPE_CHECKING:
    from stepladder.optim.base import Group, Optimizer

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex128, torch.complex64)
# Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
CLIP_EPS = 1e-6
# How many norms a norm-based rule takes of each parameter.
_NORMS = 2


# DLPack's numbers of devices.
_DEVICE_TYPES = {"cpu": 1, "cuda": 2, "xpu": 14}


def describe(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int, int] | None:
    """What the plan needs of a tensor, for a torch without DLPack's exchange table."""
    if tensor.layout != torch.strided:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    device = _DEVICE_TYPES.get(tensor.device.type, 0), tensor.device.index or 0
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, *device


def _holders(tensor: Tensor) -> tuple[int, int]:
    """References to a tensor's storage object, and to its memory: views, other tensors, that object."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


_SOLE_HOLDERS = _holders(torch.zeros(1))


def shares_memory(tensors: list[Tensor]) -> bool:
    """Whether anything but the tensors themselves holds on to the memory of one of them."""
    return any(_holders(tensor) != _SOLE_HOLDERS for tensor in tensors)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def is_on_gpu(value: Any) -> bool:
    """Whether kernels can read a scalar where it is, without the host waiting for it."""
    return isinstance(value, Tensor) and value.device.type in ("cuda", "xpu")


def triton_executor(device_type: int, index: int) -> Any:
    """What steps parameters on a device by Triton kernels; Triton is loaded here."""
    from stepladder.triton_kernels.executor import Executor

    names = {number: name for name, number in _DEVICE_TYPES.items()}
    return Executor(torch.device(names.get(device_type, "cuda"), index))  # ROCm has a number of its own


def new_plan() -> _C.StepPlan:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return _C.StepPlan(exchange, describe, shares_memory, current_stream, triton_executor)


def clip_factor(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)); NaN stays NaN."""
    factor = max_norm / (norm + CLIP_EPS)
    return 1.0 if factor > 1.0 else factor


def describe_parameter(index: int, group: Group, position: int) -> str:
    """How messages name a parameter."""
    names = group.get("param_names")
    return f"parameter {index} ({names[position]})" if names else f"parameter {index}"


def has_internal_overlap(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if tensor.numel() == 0 or any(stride == 0 for stride, _ in dims):
        return tensor.numel() > 0
    # The strides do not nest, so count: interleaved views are rare and still need not meet.
    offsets = np.zeros(1, dtype=np.int64)
    for stride, size in dims:
        offsets = np.add.outer(offsets, np.arange(size) * stride).reshape(-1)
    return len(np.unique(offsets)) < len(offsets)


def check_gradient(grad: Tensor, param: Tensor, optimizer_name: str, where: str) -> None:
    """Refuse a gradient that cannot be used with its parameter.

    Raises:
        RuntimeError: It is sparse.
        TypeError: Its dtype or type is not supported.
        ValueError: Shape or device differ from the parameter's.
    """
    sharding.check_companion(grad, param, f"the gradient of {where}")
    if grad.layout != torch.strided:
        raise RuntimeError(f"{optimizer_name} does not support sparse gradients, got {grad.layout} for {where}")
    if not sharding.is_under_way(grad):
        check_plain(local(grad), f"the gradient of {where}")
    if grad.dtype not in DTYPES + COMPLEX_DTYPES or grad.is_complex() != param.is_complex():
        raise TypeError(f"the gradient of {where} has dtype {grad.dtype}, which does not fit its {param.dtype}")
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {where} has shape {tuple(grad.shape)}, expected the parameter's {tuple(param.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"the gradient of {where} is on {grad.device}, expected the parameter's {param.device}")


def check_plain(tensor: Tensor, what: str) -> None:
    """Refuse a tensor subclass that has no memory of its own."""
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor) or hasattr(tensor, "_local_tensor"):
        raise TypeError(f"{what} is a {type(tensor).__name__}, expected a plain tensor")


def check_parameter(param: Tensor, family: type[Optimizer], group: Group, where: str) -> None:
    """Refuse a parameter that the kernels cannot step.

    Raises:
        TypeError: Its dtype, layout or type is not supported.
        RuntimeError: Elements share memory.
        ValueError: An option of its group does not go with it.
    """
    if family.rules:
        sharding.check_placements(param, where)
        param = local(param)
    check_plain(param, where)
    if param.layout != torch.strided:
        raise TypeError(f"{where} has layout {param.layout}, expected torch.strided")
    allowed = DTYPES + COMPLEX_DTYPES if family.complex_parameters else DTYPES
    if param.dtype not in allowed:
        raise TypeError(f"{where} has dtype {param.dtype}, {family.__name__} takes {', '.join(map(str, allowed))}")
    if param.is_conj() or param.is_neg():
        raise TypeError(f"{where} is a lazily conjugated or negated view; use .resolve_conj().resolve_neg()")
    if has_internal_overlap(param):
        raise RuntimeError(
            f"unsupported operation: more than one element of {where} refers to a single memory location "
            f"(shape {tuple(param.shape)}, strides {param.stride()}). Please clone() the tensor before optimizing it."
        )
    if group.get("stochastic_rounding") and param.dtype == torch.float16:
        raise ValueError(f"stochastic_rounding=True rounds to bfloat16, {where} has dtype torch.float16")


def check_storage(param: Tensor, group: Group, state: dict[str, Any], family: type[Optimizer], where: str) -> None:
    """Refuse states whose dtype the kernels of a GPU do not store beside this parameter's.

    Raises:
        TypeError: Names the state and the dtypes that are possible.
    """
    allowed = {param.dtype, torch.complex64 if param.is_complex() else torch.float32}
    dtypes = {name: state[name].dtype for name in family.states(group) if state.get(name) is not None}
    for name, dtype in dtypes.items():
        if dtype not in allowed or dtype != next(iter(dtypes.values())):
            raise TypeError(
                f"the state {name!r} of {where} has dtype {dtype}; on a GPU all states of a {param.dtype} parameter "
                f"have one dtype out of {sorted(map(str, allowed))}"
            )


def check_tensors(
    param: Tensor, state: dict[str, Any], family: type[Optimizer], group: Group, backend: str | None, where: str
) -> str:
    """Check a parameter, its gradient and its states; returns the backend that steps it.

    Raises:
        RuntimeError: The gradient is sparse, or elements share memory.
        TypeError: A dtype, layout or type is not supported.
        ValueError: A shape or device does not fit, a state is missing, or the backend does not serve the device.
    """
    check_parameter(param, family, group, where)
    assert param.grad is not None
    check_gradient(param.grad, param, family.__name__, where)
    chosen = backends.choose(backend, param.device.type)
    if group.get("capturable") and chosen not in backends.ON_GPU and param.device.type == "cpu":
        raise ValueError(f"capturable=True needs parameters on a GPU, {where} is on {param.device}")
    check_complete(family, state, group, where)
    for key in family.states(group):
        if state.get(key) is not None:
            check_tensor(key, state[key], param, where, family.state_shape(key, param, group))
            sharding.check_state(state[key], param, f"the state {key!r} of {where}")
            if state[key].device != param.device:
                raise ValueError(f"the state {key!r} of {where} is on {state[key].device}, not {param.device}")
            if has_internal_overlap(local(state[key])):
                raise RuntimeError(f"elements of the state {key!r} of {where} share memory")
    if has_step(family, group) and state.get("step") is not None:
        check_step(state["step"], where)
    return chosen


class WatchedState:
    """Mixed into an optimizer: notes when anyone asks for its state, and so may change it.

    In steady training nobody does between two steps, and the plan need not look at the states.
    """

    _state_touched = True

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states, by parameter."""
        self._state_touched = True
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._state_touched = True
        self.__dict__["state"] = value


def _announce_with_gradients(params: list[Tensor]) -> None:
    """Bump the autograd versions of the parameters, and of the gradients that were unscaled in place."""
    torch._C._increment_version(params)
    torch._C._increment_version([p.grad for p in params if p.grad is not None])


class Engine:
    """Steps all groups of one optimizer.

    Args:
        family: The optimizer class that says which rule a group follows and which states it has.
        backend: As the user asked, or None.
        max_norm: Norm to which gradients are clipped as they are read, or None.
    """

    def __init__(self, family: type[Optimizer], backend: str | None, max_norm: float | None) -> None:
        self.family = family
        self.backend = backend
        self.max_norm = max_norm
        self._grad_norm: float | None = None
        self._norm_on_device = False
        self.plan = new_plan()
        # Where parameter i of the plan stands: its group, its position in it, and its number through all groups.
        self._places: list[tuple[int, int, int]] = []
        # Parameters that the plan leaves to the reference.
        self._referred: set[int] = set()
        # Those among them whose states were just created.
        self._fresh: set[int] = set()
        # On a GPU, by parameter: whether a rule that is not timed has taken its first step, which may have been
        # skipped there without the host's knowledge.
        self._clocks: Any = WeakTensorKeyDictionary()
        # Parameters with a rule that takes their norms, which are to be summed over shards: places as above.
        self._norm_shards: list[tuple[int, Tensor, Group]] = []
        self._begun = False
        # Parameters whose states were created in a step that moved nothing.
        self._unmoved: Any = WeakTensorKeyDictionary()

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients before clipping, as of the last step; on a GPU, this waits for it."""
        # Asked anew each time: a captured step leaves another norm at each replay.
        return self.plan.device_norm() if self._norm_on_device else self._grad_norm

    def step(self, optimizer: torch.optim.Optimizer, factor: float | None = None) -> None:
        """One step; `grad_scale` and `found_inf` on the optimizer are GradScaler's.

        Args:
            optimizer: Whose groups are stepped.
            factor: Multiplies the gradients, in place of what `max_norm` would make of them.
        """
        # Tensors, or the number 0 where GradScaler has seen no gradient.
        found_inf: Any = getattr(optimizer, "found_inf", None)
        grad_scale: Any = getattr(optimizer, "grad_scale", None)
        if found_inf is not None and not is_on_gpu(found_inf) and float(found_inf) != 0.0:
            return
        capturing = is_capturing()
        if capturing:
            self._check_capture(optimizer)
        first, self._begun = not self._begun, True
        new = first and not any(optimizer.__dict__["state"].values())
        plan = self.plan
        try:
            with ranges.phase("refresh"):
                stale = self._refresh(optimizer)
            if capturing and (stale is None or stale or not plan.scheduled):
                raise RuntimeError(
                    "a step cannot be captured into a CUDA graph while parameters, gradients or states are new to "
                    "the optimizer: take at least one step with the same tensors before the capture"
                )
            if stale is None:
                self._reset(optimizer)
                stale = self._refresh(optimizer)
            assert stale is not None, "the groups changed during the step"
            if stale or self._referred:
                with ranges.phase("bind"):
                    self._bind(optimizer, stale)
            if first and not capturing and self._only_initializes(optimizer, new):
                return
            announce = torch._C._increment_version if grad_scale is None else _announce_with_gradients
            device = plan.only_device()
            clips_shards = self.max_norm is not None and any(map(is_distributed, self._parameters(optimizer)))
            on_device = (
                device is not None
                and factor is None
                and not clips_shards
                and not self._norm_shards
                and all(x is None or is_on_gpu(x) for x in (found_inf, grad_scale))
            )
            if capturing and not on_device:
                raise RuntimeError(
                    "a step that needs the host, for parameters on several devices or by the reference, or for a "
                    "gradient scale that is not on the GPU, cannot be captured into a CUDA graph"
                )
            if on_device:
                assert device is not None
                with ranges.kernel("elementwise"):
                    self._run_on_device(device[1], found_inf, grad_scale, announce)
                return
            if found_inf is not None and float(found_inf) != 0.0:
                return
            inverse_scale = None if grad_scale is None else 1.0 / float(grad_scale)
            if factor is None:
                factor = 1.0
                if self.max_norm is not None:
                    with ranges.phase("norm"):
                        factor = clip_factor(self._norm(optimizer, inverse_scale), self.max_norm)
            norms = self._whole_norms(optimizer, inverse_scale, factor)
            with ranges.phase("run"):
                plan.run(inverse_scale, factor, torch.get_num_threads(), announce)
            if self._referred:
                with ranges.kernel("reference"):
                    self._run_reference(optimizer, inverse_scale, factor, norms)
        finally:
            with ranges.phase("release"):
                plan.release()

    def _parameters(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """All that this engine steps, with a gradient or without; the same on every rank."""
        return [optimizer.param_groups[g]["params"][i] for g, i, _ in self._places]

    def _only_initializes(self, optimizer: torch.optim.Optimizer, new: bool) -> bool:
        """Whether this step is there to make states, as torch.distributed.checkpoint asks for them.

        It steps a new optimizer with learning rates and gradients of zero; no parameter, moment or count is to move.
        What decides this is alike on all ranks, and where it is not, they agree.
        """
        groups = self.family.elementwise(optimizer.param_groups)
        if any(float(group["lr"]) != 0.0 for group in groups):
            return False
        params = self._parameters(optimizer)
        moves = not new or any(bool(local(p.grad).any()) for p in params if p.grad is not None)
        if sharding.on_any_rank(moves, params):
            return False
        for param in params:
            self._unmoved[param] = True
        self.plan.reset([])  # binds them as new ones at the next step
        return True

    def _run_on_device(
        self, device: int, found_inf: Tensor | None, grad_scale: Tensor | None, announce: Callable[[list[Tensor]], Any]
    ) -> None:
        """A step of which the host learns nothing: scale, skip and clipping are decided on the GPU."""
        scalars = []
        for value in (grad_scale, found_inf):
            if value is not None and (value.device.index != device or value.dtype != torch.float32):
                value = value.to(device=torch.device(value.device.type, device), dtype=torch.float32)
            scalars.append(value)
        scale, skip = (0 if value is None else value.data_ptr() for value in scalars)
        self.plan.run_on_device(scale, skip, self.max_norm or 0.0, announce)
        self._norm_on_device = self.max_norm is not None

    def _check_capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse to be captured where a replay would not do what a step does."""
        name = self.family.__name__
        for index, group in enumerate(optimizer.param_groups):
            for key in self._hyper_keys(group):
                values = group[key] if isinstance(group[key], (tuple, list)) else (group[key],)
                if key != "lr" and any(is_on_gpu(value) for value in values):
                    raise RuntimeError(
                        f"{name}.step() is being captured into a CUDA graph, but {key!r} of group {index} is a tensor "
                        "on the GPU, which the host would wait for: of the hyper-parameters only lr may be one"
                    )
            if not group.get("capturable"):
                raise RuntimeError(
                    f"{name}.step() is being captured into a CUDA graph, but group {index} has capturable="
                    f"{group.get('capturable', False)}: construct the optimizer with capturable=True"
                )
            for position, param in enumerate(group["params"]):
                if param.requires_grad and param.grad is None:
                    where = describe_parameter(position, group, position)
                    raise RuntimeError(
                        f"{name}.step() is being captured into a CUDA graph, but {where} of group {index} has no "
                        "gradient: a replay could not step it once it has one. Give it a gradient, or freeze it"
                    )

    def _hyper_keys(self, group: Group) -> list[str]:
        """The keys of a group whose values a step reads."""
        keys: list[str] = RULES[self.family.of(group).rule(group)]["hyper"]
        return keys

    def _refresh(self, optimizer: torch.optim.Optimizer) -> list[int] | None:
        touched = optimizer._state_touched  # type: ignore[attr-defined]
        optimizer._state_touched = False  # type: ignore[attr-defined]
        try:
            return self.plan.refresh(self.family.elementwise(optimizer.param_groups), optimizer.__dict__, touched)
        except (TypeError, ValueError, KeyError, RuntimeError):
            # A hyper-parameter that is no number: the checks find it and have the better words.
            optimizer._state_touched = True  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                self.family.of(group).check(group)
            raise

    def _reset(self, optimizer: torch.optim.Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if not isinstance(group["params"], (list, tuple)):
                raise TypeError(f"params of group {index} are a {type(group['params']).__name__}, expected a list")
            self.family.of(group).check(group)
        groups = self.family.elementwise(optimizer.param_groups)
        rows = []
        for group in groups:
            family = self.family.of(group)
            options = ("maximize", "state_dtype", "stochastic_rounding", "seed", "capturable")
            watched = dict.fromkeys((*self.family.choosing, *family.choosing, *options))
            rows.append((group, family.rule(group), tuple(watched)))
        self.plan.reset(rows)
        ours = {id(group) for group in groups}
        self._places = []
        first = 0
        for g, group in enumerate(optimizer.param_groups):
            if id(group) in ours:
                self._places += [(g, i, first + i) for i in range(len(group["params"]))]
            first += len(group["params"])
        self._referred = set()
        self._fresh = set()
        self._norm_shards = [
            (index, optimizer.param_groups[g]["params"][i], optimizer.param_groups[g])
            for index, (g, i, _) in enumerate(self._places)
            if self._sums_over_shards(optimizer.param_groups[g]["params"][i], optimizer.param_groups[g])
        ]

    def _sums_over_shards(self, param: Tensor, group: Group) -> bool:
        """Whether a parameter's rule takes norms of more than this rank holds."""
        return bool(RULES[self.family.of(group).rule(group)]["norms"] and sharding.sharded_dims(param))

    @torch.no_grad()
    def _bind(self, optimizer: torch.optim.Optimizer, stale: list[int]) -> None:
        """Check and bind the parameters that the plan does not know, or knows otherwise."""
        todo = []
        for index in sorted({*stale, *self._referred}):
            g, i, number = self._places[index]
            group = optimizer.param_groups[g]
            param = group["params"][i]
            if param.grad is None:
                continue
            family = self.family.of(group)
            where = describe_parameter(number, group, i)
            state = optimizer.state.get(param, {})
            backend = check_tensors(param, state, family, group, self.backend, where)
            if self._sums_over_shards(param, group):
                backend = "reference"
            if backend in backends.ON_GPU:
                check_storage(param, group, state, family, where)
            begin = 0
            if group.get("stochastic_rounding") and param.dtype == torch.bfloat16:
                begin = sharding.first_element(param, where)
                if begin and backend in backends.ON_GPU:
                    raise ValueError(
                        f"stochastic_rounding=True of shards is the backends' 'cpu' and 'reference' alone, {where} "
                        f"{sharding.layout(param)}"
                    )
            todo.append((index, param, group, backend, where, begin))

        created: set[Tensor] = set()
        for index, param, group, backend, where, begin in todo:
            if is_distributed(param):
                if (settled := sharding.settled(param.grad, param)) is not param.grad:
                    param.grad = settled
            elif param.grad.is_conj() or param.grad.is_neg():
                param.grad = param.grad.resolve_conj().resolve_neg()
            family = self.family.of(group)
            stateful = has_step(family, group) or family.states(group)
            state = optimizer.state[param] if stateful else {}
            # A parameter that is listed twice has two first steps, as in torch.
            device = step_device(backend, param)
            fresh = create_state(family, state, param, group, device) or param in created
            fresh = self._unmoved.pop(param, False) or fresh
            if fresh:
                created.add(param)
            step = state.get("step") if has_step(family, group) else None
            if step is not None and not (
                isinstance(step, Tensor)
                and step.device == device
                and step.dtype in (torch.float32, torch.float64)
                and step.numel() == 1
            ):
                step = state["step"] = checked_step(step, where, device)
            if backend == "reference":
                self._referred.add(index)
                self.plan.skip(index)
                if fresh:
                    self._fresh.add(index)
                continue
            rounds = group.get("stochastic_rounding") and param.dtype == torch.bfloat16
            clock = None
            if backend in backends.ON_GPU and not family.timed and family.states(group):
                clock = self._clocks.get(param)
                if fresh or clock is None or clock.device != param.device:
                    clock = torch.full((), 0.0 if fresh else 1.0, dtype=torch.float32, device=param.device)
                    self._clocks[param] = clock
            self.plan.bind(
                index,
                backend,
                param.grad,
                state,
                step,
                clock,
                timed=family.timed,
                fresh=fresh,
                negate=bool(group.get("maximize")),
                seed=group["seed"] if rounds else None,
                first=begin,
            )

    def _referred_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, Tensor, Group]]:
        """(index, parameter, group) of each parameter with a gradient that is left to the reference."""
        found = []
        for index in sorted(self._referred):
            g, i, _ = self._places[index]
            group = optimizer.param_groups[g]
            if group["params"][i].grad is not None:
                found.append((index, group["params"][i], group))
        return found

    def _norm(self, optimizer: torch.optim.Optimizer, inverse_scale: float | None) -> float:
        inverse = 1.0 if inverse_scale is None else inverse_scale
        norm, _ = self.plan.norm(2.0, inverse, torch.get_num_threads())
        params = self._parameters(optimizer)
        distributed = any(map(is_distributed, params))
        if self._referred or distributed:
            partials = self.plan.partials()
            for index, param, _group in self._referred_parameters(optimizer):
                assert param.grad is not None
                grad = reference.widened(local(param.grad), local(param))
                partials[index] = reference.partial_norm(inverse * grad, 2.0)
            if distributed:
                norm = reference.total_norm(sharding.whole_partials(partials, params), 2.0)
            else:
                norm = reference.total_norm([partials[index] for index in self.plan.active()], 2.0)
        self._grad_norm, self._norm_on_device = norm, False
        return norm

    def _run_reference(
        self,
        optimizer: torch.optim.Optimizer,
        inverse_scale: float | None,
        factor: float,
        norms: dict[int, Tensor],
    ) -> None:
        for index, param, group in self._referred_parameters(optimizer):
            state = optimizer.state.get(param, {})
            rounding, first = None, 0
            if group.get("stochastic_rounding") and param.dtype == torch.bfloat16:
                rounding = (group["seed"], int(state["step"]) + 1, index)
                first = sharding.first_element(param, f"parameter {index}")
            update = self._update(optimizer, index, param, group, inverse_scale, factor)
            reference.step_parameter(**update, rounding=rounding, first=first, norms=norms.get(index))
            if is_distributed(param):
                torch._C._increment_version([param])
            self._fresh.discard(index)
            if has_step(self.family.of(group), group):
                state["step"] += 1

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        index: int,
        param: Tensor,
        group: Group,
        inverse_scale: float | None,
        factor: float,
    ) -> dict[str, Any]:
        """What the reference is told of a parameter's step."""
        assert param.grad is not None
        family = self.family.of(group)
        state = optimizer.state.get(param, {})
        rule = family.rule(group)
        timed = int(state["step"]) + 1 if family.timed else 1 if index in self._fresh else 2
        return {
            "rule": rule,
            "param": local(param),
            "grad": local(param.grad),
            "states": [local(state[name]) for name in RULES[rule]["states"]],
            "hyper": {name: _plain(group[name]) for name in RULES[rule]["hyper"]},
            "time": timed,
            "inverse_scale": inverse_scale,
            "clip_factor": factor,
            "negate": bool(group.get("maximize")),
        }

    def _whole_norms(
        self, optimizer: torch.optim.Optimizer, inverse_scale: float | None, factor: float
    ) -> dict[int, Tensor]:
        """The norms that rules take of parameters of which this rank has shards, by index; each [number of norms]."""
        if not self._norm_shards:
            return {}
        squares = []
        for index, param, group in self._norm_shards:
            if param.grad is not None:
                update = self._update(optimizer, index, param, group, inverse_scale, factor)
                squares.append(reference.norm_squares(**update).double())
            else:
                squares.append(torch.zeros(_NORMS, dtype=torch.float64, device=local(param).device))
        whole = sharding.over_shards(squares, [param for _, param, _ in self._norm_shards])
        return {index: value.sqrt() for (index, _, _), value in zip(self._norm_shards, whole, strict=True)}


def _plain(value: Any) -> Any:
    """A hyper-parameter as Python floats."""
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)
