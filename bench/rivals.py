"""What each optimizer is measured against: torch's forms of it, and other packages where they are installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from stepladder.bench.cases import Case

Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Rival:
    """One contender beside ours.

    Attributes:
        name: What `--rival` takes.
        make: Constructor: parameters, then hyper-parameters by keyword.
        same_rule: It computes what ours computes, and is checked to.
        states: How many state tensors a parameter has.
        shares_states: It steps on the same states as the others of which this is true: torch's forms.
        scratch: Temporary memory of a step, in copies of all parameters.
        foreign: Not one of torch's own forms as they are; what it raises is a reason to leave it out, and it may
            compute its scalars in float32.
        checked_in_full: It is checked on the whole set alone, as it is compiled anew for other shapes.
    """

    name: str
    make: Make
    states: int
    same_rule: bool = True
    shares_states: bool = False
    scratch: int = 0
    foreign: bool = False
    checked_in_full: bool = False


@dataclass(frozen=True)
class Other:
    """An optimizer of another package.

    Attributes:
        rival: What `--rival` takes, the package's name.
        case: Which of our cases it computes.
        where: module:class.
        options: Constructor arguments beyond the case's.
        cpu_only: It steps no parameters on a GPU.
    """

    rival: str
    case: str
    where: str
    options: dict[str, Any] = field(default_factory=dict)
    cpu_only: bool = False


# States in the parameter's dtype, so that the same number of bytes moves.
_DEEPSPEED = {"fp32_optimizer_states": False}

OTHERS = (
    Other("deepspeed", "adagrad", "deepspeed.ops.adagrad:DeepSpeedCPUAdagrad", _DEEPSPEED, True),
    Other("deepspeed", "adam", "deepspeed.ops.adam:DeepSpeedCPUAdam", {"adamw_mode": False, **_DEEPSPEED}, True),
    Other("deepspeed", "adamw", "deepspeed.ops.adam:DeepSpeedCPUAdam", {"adamw_mode": True, **_DEEPSPEED}, True),
    Other("deepspeed", "lion", "deepspeed.ops.lion:DeepSpeedCPULion", _DEEPSPEED, True),
    Other("lion-pytorch", "lion", "lion_pytorch:Lion"),
    Other("pytorch-optimizer", "lion", "pytorch_optimizer:Lion"),
    Other("pytorch-optimizer", "signum", "pytorch_optimizer:SignSGD"),
    Other("timm", "lion", "timm.optim:Lion"),
    Other("timm", "lars", "timm.optim:Lars"),
    Other("timm", "lamb", "timm.optim:Lamb", {"max_grad_norm": None}),
    Other("torch-optimi", "adamw", "optimi:AdamW", {"kahan_sum": False}),
    Other("torch-optimi", "lion", "optimi:Lion", {"kahan_sum": False}),
)

_FORMS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
# The loop's temporaries are one tensor's, foreach's are all tensors'.
_SCRATCH = {"loop": 1, "foreach": 2, "fused": 0}
NOT_INSTALLED = "not installed"
# Of another rule with more state, for the rules that torch.optim lacks.
ADAMW = "adamw-fused"
# torch.compile's form of a step. On a GPU alone.
COMPILED = "compiled"
# Of more tensors than this it takes minutes to compile.
MOST_COMPILED = 200
NAMES = (*_FORMS, COMPILED, ADAMW, *dict.fromkeys(other.rival for other in OTHERS))


def rivals_of(
    case: Case, names: Collection[str] = NAMES, *, gpu: bool = False, tensors: int = 0
) -> tuple[list[Rival], dict[str, str]]:
    """The rivals of a case that can be constructed here, and why the others cannot.

    Args:
        case: The optimizer to be measured.
        names: Which rivals are wanted.
        gpu: The parameters are on a GPU.
        tensors: How many they are.

    Returns:
        The rivals, and the reason for each that is wanted, exists for this case and is absent.
    """
    found, absent = _torch_rivals(case)
    if gpu:
        # There the fused form keeps its step counts on the GPU, where the other two would wait for each of them.
        found = [replace(rival, shares_states=rival.shares_states and rival.name != "fused") for rival in found]
        if tensors > MOST_COMPILED:
            absent[COMPILED] = (
                f"compiling the step of {tensors} tensors takes minutes, it is tried up to {MOST_COMPILED}"
            )
        elif case.norms:
            absent[COMPILED] = "the foreach form of this rule waits for its norms"
        else:
            found.append(_compiled_rival(case))
    for other in OTHERS:
        if other.case != case.name or other.rival not in names or (gpu and other.cpu_only):
            continue
        module, _, cls = other.where.partition(":")
        # Any failure of a foreign import, and there are many kinds, is a reason and no error of ours.
        try:
            make = partial(getattr(import_module(module), cls), **other.options)
        except ModuleNotFoundError as error:
            missing = error.name or module
            absent[other.rival] = (
                NOT_INSTALLED if missing == module.partition(".")[0] else f"needs {missing}, which is not installed"
            )
        except Exception as error:
            absent[other.rival] = f"{type(error).__name__}: {error}"
        else:
            found.append(Rival(other.rival, make, len(case.states), scratch=2, foreign=True))
    return [rival for rival in found if rival.name in names], {k: v for k, v in absent.items() if k in names}


def names_of(case: Case) -> list[str]:
    """The rivals that a case has, whether they can be constructed here or not."""
    found, absent = _torch_rivals(case)
    others = (other.rival for other in OTHERS if other.case == case.name)
    return [name for name in NAMES if name in {*(rival.name for rival in found), *absent, *others}]


def standard(case: Case) -> Rival:
    """Torch's plainest form of the case's rule: for-loop where torch.optim has the rule, else ours in foreach."""
    return _torch_rivals(case)[0][0]


def _torch_rivals(case: Case) -> tuple[list[Rival], dict[str, str]]:
    if case.torch is None:
        assert case.foreach is not None
        return [
            Rival("foreach", case.foreach, len(case.states), scratch=2),
            Rival(ADAMW, _fused_adamw, 2, same_rule=False),
        ], {}
    found: list[Rival] = []
    absent: dict[str, str] = {}
    accepted = inspect.signature(case.torch).parameters
    for name, flags in _FORMS.items():
        if name not in ("loop", *accepted):
            absent[name] = f"torch.optim.{case.torch.__name__} has no {name} form"
            continue
        options: dict[str, Any] = {flag: value for flag, value in flags.items() if flag in accepted}
        make: Make = partial(case.torch, **options)
        found.append(Rival(name, make, len(case.states), shares_states=True, scratch=_SCRATCH[name]))
    return found, absent


def _compiled_rival(case: Case) -> Rival:
    """Torch's foreach form, compiled; with its step counts on the GPU where it has them."""
    options: dict[str, Any] = {}
    if case.torch is not None:
        accepted = inspect.signature(case.torch).parameters
        options = {flag: True for flag in ("foreach", "capturable") if flag in accepted}
    make = partial(_compiled, case.torch or case.foreach, **options)
    return Rival(COMPILED, make, len(case.states), scratch=2, foreign=True, checked_in_full=True)


def _compiled(make: Make, params: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = make(params, **options)
    if options.get("capturable"):
        # As torch's documentation has it: a rate that is a number would be compiled in.
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    eager = optimizer.step
    # Every optimizer passes through the code object below, and after a few torch would give up on it.
    torch.compiler.reset()

    @torch.compile(fullgraph=False)
    def step() -> None:
        eager()

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def _fused_adamw(params: Any, lr: float, **_options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)
