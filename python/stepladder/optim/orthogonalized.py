"""What Muon and MuonH share: parameters as matrices, momentum, the settings of the iteration, the step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepladder.coefficients import Triple, resolve
from stepladder.newton_schulz import gpu_iteration, matrix_unit
from stepladder.optim import checks
from stepladder.optim.base import Group
from stepladder.optim.matrix import (
    MatrixLayout,
    MuonJob,
    MuonSettings,
    are_stored,
    memory_order,
    muon_step,
    reads_rate,
)
from stepladder.optim.memory import waves_of
from stepladder.optim.mixed import Mixed, Task, unscaled
from stepladder.reference.newton_schulz import METHODS

FORMS = ("ema", "sum")
# Keys that a group has only where they were given, and what they mean where not: all others are torch.optim.Muon's.
EXTRAS: Group = {
    "maximize": False,
    "momentum_form": "ema",
    "ns_method": "auto",
    "variant": None,
    "beta2": 0.95,
    "cautious_weight_decay": False,
    "split_sizes": None,
    "num_heads": None,
    "flatten": None,
    "fan_in_fan_out": False,
}


def given(extras: Group) -> Group:
    """Those of the extra keys that say something."""
    return {key: value for key, value in extras.items() if value is not EXTRAS[key] and value != EXTRAS[key]}


def not_negative(group: Group, name: str, label: str) -> None:
    """Refuse what is negative or not finite; the message begins as torch.optim.Muon's does."""
    value = checks.number(group, name)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{label} should be >= 0 but is: {value} ({name} must be in [0, inf))")


def choice(group: Group, name: str, allowed: Sequence[Any]) -> None:
    """Refuse what is not among the allowed values."""
    if not any(type(group[name]) is type(value) and group[name] == value for value in allowed):
        raise ValueError(f"{name}={group[name]!r} is unknown, expected one of {', '.join(map(repr, allowed))}")


def is_triple(coefficients: Any) -> bool:
    """Whether coefficients are one (a, b, c) for all steps."""
    return isinstance(coefficients[0], numbers.Real)


def check_iteration(group: Group) -> None:
    """Refuse coefficients and steps that make no iteration.

    Raises:
        ValueError: Out of range, or fewer steps than the coefficients given have triples.
        TypeError: A wrong type.
    """
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    try:
        resolve(coefficients, steps)
    except (TypeError, ValueError) as error:
        way_out = "; ns_steps=None takes as many as the set has" if "too few" in str(error) else ""
        what = f"ns_coefficients={coefficients!r} with ns_steps={steps!r}"
        raise type(error)(f"{what}: {error}{way_out}") from None
    if coefficients is None or isinstance(coefficients, str) or is_triple(coefficients):
        return
    if steps is not None and steps < len(coefficients):
        raise ValueError(
            f"ns_steps={steps} leaves out some of the {len(coefficients)} triples in ns_coefficients, expected at "
            "least as many steps; ns_steps=None takes all of them"
        )


def comparable(coefficients: Any) -> str | Triple | tuple[Triple, ...]:
    """Checked coefficients in a form that can be hashed."""
    if coefficients is None or isinstance(coefficients, str):
        return coefficients or "jordan"
    rows = [coefficients] if is_triple(coefficients) else coefficients
    triples = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    return triples[0] if is_triple(coefficients) else triples


def counts(value: Any) -> bool:
    """Whether this is a sequence of integers of at least 1."""
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(is_count(n) for n in value)


def is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def layout_of(param: Tensor, group: Group, where: str, optimizer: str) -> MatrixLayout:
    """How a parameter is made of matrices.

    Raises:
        TypeError: A key of the group has the wrong type.
        ValueError: The parameter has fewer than two dimensions, or its rows are not what the group says.
    """
    flatten, sizes, heads = (group.get(key) for key in ("flatten", "split_sizes", "num_heads"))
    transposed = group.get("fan_in_fan_out", False)
    if flatten not in (None, True, False):
        raise TypeError(f"flatten must be True, False or None, got {flatten!r}")
    if transposed not in (True, False):
        raise TypeError(f"fan_in_fan_out must be True or False, got {transposed!r}")
    if param.ndim < 2:
        raise ValueError(
            f"{optimizer} only supports parameters of 2 or more dimensions whereas we found {where} with size "
            f"{tuple(param.shape)}: give it to a group with another algorithm, such as 'adamw'"
        )
    flat = param.ndim > 3 if flatten is None else flatten and param.ndim > 2
    order = None
    if flat:
        # Statistics of columns are kept in the order of the dimensions, whatever the memory format.
        order = tuple(range(param.ndim)) if group.get("variant") == "normuon" else memory_order(param)
    if flat and transposed:
        raise ValueError(
            f"fan_in_fan_out=True does not go with {where} of size {tuple(param.shape)}, which is flattened: expected "
            "two dimensions, or a batch of matrices with flatten=False"
        )
    rows = param.shape[0] if flat else param.shape[-1 if transposed else -2]
    lines = "columns" if transposed else "rows"
    if sizes is not None:
        if not counts(sizes):
            raise TypeError(f"split_sizes must be a sequence of integers of at least 1, got {sizes!r}")
        if sum(sizes) != rows:
            raise ValueError(
                f"split_sizes={sizes!r} add up to {sum(sizes)}, expected the {rows} {lines} of {where} of size "
                f"{tuple(param.shape)}"
            )
    parts = (rows,) if sizes is None else tuple(sizes)
    if heads is not None:
        if not is_count(heads) and not counts(heads):
            raise TypeError(f"num_heads must be an integer of at least 1, or one for each part, got {heads!r}")
        each = (heads,) * len(parts) if is_count(heads) else tuple(heads)
        if len(each) != len(parts):
            raise ValueError(f"num_heads={heads!r} has {len(each)} numbers, expected one for each part of {parts}")
        for part, count in zip(parts, each, strict=True):
            if part % count:
                raise ValueError(
                    f"num_heads={heads!r} does not divide the {part} {lines} of {where} of size {tuple(param.shape)}"
                )
        heads = each
    return MatrixLayout(order, None if sizes is None else parts, heads, transposed)


def shape_of_parts(shapes: Sequence[torch.Size]) -> torch.Size:
    """The shape of a state that has something for each part: that of the only one, else all in a row."""
    return shapes[0] if len(shapes) == 1 else torch.Size([sum(shape.numel() for shape in shapes)])


def parts_of(state: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of such a state, one for each part."""
    if len(shapes) == 1:
        return [state]
    pieces = torch.split(state, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def neurons(shape: torch.Size) -> torch.Size:
    """Of one number for each index of the longer dimension."""
    m, n = shape[-2:]
    return torch.Size((*shape[:-2], m, 1) if m >= n else (*shape[:-2], 1, n))


class Orthogonalized(Mixed):
    """An optimizer whose matrices move by the orthogonalised momentum of their gradients."""

    late_keys = frozenset(EXTRAS)
    # What torch.optim.Muon has too.
    keys: ClassVar[frozenset[str]]
    # Whether a step may be captured into a CUDA graph: it must be one call of the kernels.
    can_be_captured: ClassVar[bool] = False

    @classmethod
    def check_matrices(cls, group: Group) -> None:
        """Refuse values of the keys that all members have; `group` has all of EXTRAS."""
        not_negative(group, "lr", "Learning rate")
        not_negative(group, "momentum", "momentum")
        checks.epsilon(group)
        choice(group, "momentum_form", FORMS)
        choice(group, "ns_method", METHODS)
        check_iteration(group)
        for option in ("stochastic_rounding", "capturable"):
            if group.get(option) and not (option == "capturable" and cls.can_be_captured):
                raise ValueError(
                    f"{option}=True is not supported for the matrices of {cls.__name__}, expected False: give it to "
                    "the groups with another algorithm"
                )

    @classmethod
    def hyper_keys(cls) -> set[str]:
        return {*cls.keys, *EXTRAS}

    @classmethod
    def check_shape(cls, param: Tensor, group: Group, where: str) -> None:
        layout_of(param, group, where, cls.__name__)

    @classmethod
    def check_backends(cls, chosen: set[tuple[str, torch.device]]) -> None:
        for backend, device in chosen:
            if backend == "cpu":
                matrix_unit()
            elif backend == "cuda":
                gpu_iteration(device)

    @classmethod
    def cost(cls, param: Tensor, group: Group) -> float:
        """Operations of the iteration in its standard form, of symmetric products half: 3m²n + m³ for each step."""
        steps = len(resolve(group["ns_coefficients"], group["ns_steps"]).steps)
        total = 0.0
        for shape in layout_of(param, group, "", cls.__name__).shapes(param):
            m, n = sorted(shape[-2:])
            total += shape[:-2].numel() * steps * (3.0 * m * m * n + float(m) ** 3)
        return total

    @classmethod
    def scale(cls, group: Group, shape: torch.Size) -> float:
        """What the learning rate of a matrix is multiplied by."""
        return 1.0

    @classmethod
    def shapes_of_state(cls, name: str, param: Tensor, group: Group) -> list[torch.Size] | None:
        """What a state has for each part of a parameter; None where it is like the parameter."""
        return None

    @classmethod
    def state_shape(cls, name: str, param: Tensor, group: Group) -> torch.Size:
        shapes = cls.shapes_of_state(name, param, group)
        return param.shape if shapes is None else shape_of_parts(shapes)

    @classmethod
    def check_capture(cls, param: Tensor, group: Group, state: dict[str, Any], backend: str, where: str) -> None:
        if state.get("momentum_buffer") is None:
            raise RuntimeError(
                f"the state of {where} is still to be made, and a step that makes it cannot be captured into a CUDA "
                "graph: take at least one step with the same tensors before the capture"
            )
        assert param.grad is not None
        tensors, lr = (param, param.grad, state["momentum_buffer"]), group["lr"]
        if backend != "cuda" or not are_stored(tensors):
            dtypes = ", ".join(str(x.dtype) for x in tensors)
            raise RuntimeError(
                f"the matrices of {where} are stepped by backend {backend!r} with dtypes {dtypes}, which cannot be "
                "captured into a CUDA graph: expected 'cuda', and float32, bfloat16 or float16"
            )
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and not reads_rate(lr, tensors, backend):
            raise RuntimeError(
                f"lr of {where} is a {lr.dtype} on {lr.device}, expected float32 or float64 on {param.device}, where "
                "a captured step can read it"
            )
        if not reads_rate(lr, tensors, backend) and float(lr) == 0.0:
            raise RuntimeError(f"lr=0 of {where} would be captured into a CUDA graph, expected a tensor on the GPU")

    @classmethod
    def settings(cls, group: Group, rate: Tensor | None = None) -> MuonSettings:
        """What a checked group says; `rate`: its learning rate, where that is left to the kernels."""
        group = EXTRAS | {"weight_decay": 0.0} | group
        return MuonSettings(
            lr=checks.number(group, "lr") if rate is None else math.nan,
            rate=rate,
            weight_decay=checks.number(group, "weight_decay"),
            momentum=checks.number(group, "momentum"),
            nesterov=bool(group["nesterov"]),
            momentum_form=group["momentum_form"],
            ns_coefficients=comparable(group["ns_coefficients"]),
            ns_steps=group["ns_steps"],
            eps=checks.number(group, "eps"),
            ns_method=group["ns_method"],
            variant=group["variant"],
            beta2=checks.number(group, "beta2"),
            cautious_weight_decay=bool(group["cautious_weight_decay"]),
            sign=-1.0 if group["maximize"] else 1.0,
        )

    @classmethod
    def step_matrices(
        cls,
        tasks: list[Task],
        groups: list[Group],
        states: dict[Tensor, Any],
        backend: str | None,
        inverse_scale: float | None,
        factor: float,
    ) -> None:
        # Parameters that share memory are stepped one after another, as the elementwise plan does it.
        for wave in waves_of([param for param, *_ in tasks]):
            cls._step_wave([tasks[i] for i in wave], states, backend, inverse_scale, factor)

    @classmethod
    def _step_wave(
        cls,
        tasks: list[Task],
        states: dict[Tensor, Any],
        backend: str | None,
        inverse_scale: float | None,
        factor: float,
    ) -> None:
        """Step matrices that share no memory."""
        said: dict[tuple[int, bool], MuonSettings] = {}
        jobs: list[MuonJob] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for param, group, chosen, _ in tasks:
            grad = param.grad if inverse_scale is None else unscaled(param, inverse_scale)
            assert grad is not None
            if param.numel() == 0:
                continue
            layout = layout_of(param, group, "", cls.__name__)

            def parts(x: Tensor, layout: MatrixLayout = layout) -> list[Tensor]:
                """What is written to."""
                found, copied = layout.matrices(x)
                if copied is not None:
                    copies.append(copied)
                return found

            state = states[param]
            rate: Tensor | None = None
            if group.get("capturable") and reads_rate(group["lr"], (param, grad, state["momentum_buffer"]), chosen):
                rate = group["lr"]
            key = id(group), rate is None
            if key not in said:
                said[key] = cls.settings(group, rate)
            columns = [parts(param), layout.matrices(grad)[0], parts(state["momentum_buffer"])]
            for name in ("second_momentum_buffer", "radius"):
                shapes = cls.shapes_of_state(name, param, group)
                if name not in cls.states(group):
                    columns.append([None] * len(columns[0]))  # type: ignore[list-item]
                else:
                    columns.append(parts(state[name]) if shapes is None else parts_of(state[name], shapes))
            for w, g, u, second, radius in zip(*columns, strict=True):
                scale = cls.scale(group, w.shape)
                jobs.append(MuonJob(w, g, u, said[key], scale, chosen, second, radius))
        muon_step(jobs, backend, factor)
        for flat, x in copies:
            x.copy_(flat.view(x.shape))
