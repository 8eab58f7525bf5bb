"""Every refusal of the optimizers: what it says, and that nothing has changed when it says it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import CLASSES, Case, assert_unchanged, copy_of, has_grad_dtype, normal, random_gradients, snapshot

import stepladder as sl
from stepladder import backends

ALL = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "SignSGD", "Lion", "LARS", "LAMB")
# Those that refuse stochastic rounding are not among them.
PRECONDITIONED = ("Shampoo", "SOAP")
EVERY = (*ALL, *PRECONDITIONED)
WITH_BETAS = ("Adam", "AdamW", "Lion", "LAMB", *PRECONDITIONED)
WITH_EPS = ("Adagrad", "RMSprop", "Adam", "AdamW", "LARS", "LAMB", *PRECONDITIONED)
WITH_MOMENTUM = ("SGD", "RMSprop", "SignSGD", "LARS")


def parameters() -> list[torch.nn.Parameter]:
    return [copy_of(x) for x in normal([(3,), (4, 6)], torch.float32, 0)]


# Optimizers, arguments, what is raised, and what it says.
Row = tuple[tuple[str, ...], dict[str, Any], type[Exception], str]
HYPER_PARAMETERS: tuple[Row, ...] = (
    (EVERY, {"lr": -0.1}, ValueError, r"Invalid learning rate: -0.1 \(lr must be in \[0, inf\)\)"),
    (EVERY, {"lr": math.nan}, ValueError, r"Invalid learning rate: nan"),
    (EVERY, {"lr": math.inf}, ValueError, r"Invalid learning rate: inf"),
    (EVERY, {"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element, got shape \(2,\)"),
    (EVERY, {"lr": torch.tensor(-2.0)}, ValueError, r"Invalid learning rate: -2.0"),
    (EVERY, {"lr": "fast"}, TypeError, r"lr must be a number or a 1-element tensor, got 'fast'"),
    (EVERY, {"lr": None}, TypeError, r"lr must be a number or a 1-element tensor, got None"),
    (EVERY, {"lr": True}, TypeError, r"lr must be a number or a 1-element tensor, got True"),
    (
        EVERY,
        {"weight_decay": -1},
        ValueError,
        r"Invalid weight_decay value: -1.0 \(weight_decay must be in \[0, inf\)\)",
    ),
    (EVERY, {"weight_decay": [0.1]}, TypeError, r"weight_decay must be a number .*got \[0.1\]"),
    (WITH_EPS, {"eps": -1e-8}, ValueError, r"Invalid epsilon value: -1e-08 \(eps must be in \[0, inf\)\)"),
    (WITH_EPS, {"eps": math.nan}, ValueError, r"Invalid epsilon value: nan"),
    (
        WITH_BETAS,
        {"betas": (1.0, 0.9)},
        ValueError,
        r"Invalid beta parameter at index 0: 1.0 \(betas must be in \[0, 1\)",
    ),
    (WITH_BETAS, {"betas": (0.9, -0.1)}, ValueError, r"Invalid beta parameter at index 1: -0.1"),
    (WITH_BETAS, {"betas": (0.9, math.nan)}, ValueError, r"Invalid beta parameter at index 1: nan"),
    (WITH_BETAS, {"betas": 0.9}, ValueError, r"Invalid betas: 0.9 \(betas must be a pair of numbers in \[0, 1\)\)"),
    (WITH_BETAS, {"betas": (0.9,)}, ValueError, r"Invalid betas: \(0.9,\)"),
    (WITH_BETAS, {"betas": (0.9, "x")}, TypeError, r"betas must be a number or a 1-element tensor, got 'x'"),
    (WITH_BETAS, {"betas": (0.9, torch.ones(2))}, ValueError, r"Tensor betas must be 1-element, got shape \(2,\)"),
    (WITH_MOMENTUM, {"momentum": -0.9}, ValueError, r"Invalid momentum value: -0.9 \(momentum must be in \[0, "),
    (WITH_MOMENTUM, {"momentum": math.nan}, ValueError, r"Invalid momentum value: nan"),
    (("SGD",), {"dampening": "much"}, TypeError, r"dampening must be a number .*got 'much'"),
    (
        ("SGD",),
        {"nesterov": True},
        ValueError,
        r"Nesterov momentum requires a momentum and zero dampening: got momentum=0, dampening=0",
    ),
    (("SGD",), {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, ValueError, r"momentum=0.9, dampening=0.5"),
    (("Adagrad",), {"lr_decay": -1}, ValueError, r"Invalid lr_decay value: -1.0"),
    (
        ("Adagrad",),
        {"initial_accumulator_value": -1},
        ValueError,
        r"Invalid initial_accumulator_value value: -1.0 \(initial_accumulator_value must be in \[0, inf\)\)",
    ),
    (("RMSprop",), {"alpha": -0.5}, ValueError, r"Invalid alpha value: -0.5 \(alpha must be in \[0, inf\)\)"),
    (("SignSGD",), {"momentum": 1.0}, ValueError, r"Invalid momentum value: 1.0 \(momentum must be in \[0, 1"),
    (("LARS",), {"trust_coefficient": -1e-3}, ValueError, r"Invalid trust_coefficient value: -0.001"),
    (
        EVERY,
        {"differentiable": True},
        RuntimeError,
        r"differentiable=True is not supported: the step runs outside autograd",
    ),
    (EVERY, {"foreach": True, "fused": True}, RuntimeError, r"`fused` and `foreach` cannot be `True` together"),
    (
        EVERY,
        {"state_dtype": torch.float16},
        ValueError,
        r"state_dtype=torch.float16 is unknown, expected None or torch.float32",
    ),
    (EVERY, {"state_dtype": "fp32"}, ValueError, r"state_dtype=.*fp32.* is unknown"),
    (ALL, {"seed": -1, "stochastic_rounding": True}, ValueError, r"seed=-1 is out of range, expected an integer in"),
    (ALL, {"seed": 2**64, "stochastic_rounding": True}, ValueError, r"seed=18446744073709551616 is out of range"),
    (ALL, {"seed": 1.5, "stochastic_rounding": True}, ValueError, r"seed=1.5 is out of range"),
)
# What only the constructor takes.
ARGUMENTS: tuple[Row, ...] = (
    (EVERY, {"max_norm": 0}, ValueError, r"max_norm=0 is out of range, expected None or a finite number above 0"),
    (EVERY, {"max_norm": -1.0}, ValueError, r"max_norm=-1.0 is out of range"),
    (EVERY, {"max_norm": math.inf}, ValueError, r"max_norm=inf is out of range"),
    (EVERY, {"max_norm": math.nan}, ValueError, r"max_norm=nan is out of range"),
    (
        EVERY,
        {"backend": "gpu"},
        ValueError,
        r"backend='gpu' is unknown, expected None or one of 'cuda', 'triton', 'cpu'",
    ),
    (EVERY, {"lerning_rate": 1.0}, TypeError, r"got unexpected keyword arguments \['lerning_rate'\]"),
)


def named(row: tuple[Any, ...], *marks: Any) -> Any:
    """A pytest parameter called as the function that stands first."""
    return pytest.param(*row, id=row[0].__name__, marks=marks)


def each(rows: tuple[Row, ...]) -> list[Any]:
    """One pytest parameter for each row and optimizer."""
    return [
        pytest.param(name, arguments, error, message, id=f"{name}-{','.join(f'{k}={v}' for k, v in arguments.items())}")
        for names, arguments, error, message in rows
        for name in names
    ]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), each(HYPER_PARAMETERS + ARGUMENTS))
def test_constructors(name: str, arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        getattr(sl, name)(parameters(), **arguments)


@pytest.mark.parametrize(("name", "arguments", "error", "message"), each(HYPER_PARAMETERS))
def test_groups(name: str, arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        getattr(sl, name)([{"params": parameters()}, {"params": parameters(), **arguments}])
    optimizer = getattr(sl, name)(parameters())
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters(), **arguments})
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("name", EVERY)
def test_what_torchs_base_class_refuses(name: str):
    cls = getattr(sl, name)
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        cls(p)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        cls([p * 2.0])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        cls([3.0])
    optimizer = cls([p])
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([p])


def test_a_required_lr_is_nobodys():
    # As torch: every optimizer has a default for everything but the parameters.
    for name in EVERY:
        getattr(sl, name)(parameters())
        with pytest.raises(TypeError, match="params"):
            getattr(sl, name)()


# Backends


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(name: str):
    reason = next(backend for backend in backends.TABLE if backend.name == name).missing()
    if reason is None:
        pytest.skip(f"backend={name!r} can run here")
    for make in (
        lambda: sl.AdamW(parameters(), backend=name),
        lambda: sl.accelerate(torch.optim.AdamW(parameters()), backend=name),
    ):
        with pytest.raises(RuntimeError) as caught:
            make()
        assert str(caught.value) == f"backend={name!r} cannot run: {reason}; backend=None chooses one that can"


def test_a_backend_that_does_not_serve_the_parameters_device():
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"backend='cpu' serves parameters on cpu, got a parameter on meta"):
        sl.SGD([p], backend="cpu").step()


# Tensors, at the first step. Each row makes a second parameter with its gradient; the first one is sound.


def with_grad(p: Tensor, grad: Tensor) -> Tensor:
    p.grad = grad
    return p


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x


def sparse_gradient() -> Tensor:
    grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    return with_grad(leaf(torch.ones(5, 2)), grad)


def expanded_parameter() -> Tensor:
    return with_grad(leaf(torch.ones(3).expand(4, 3)), torch.ones(4, 3))


def overlapping_parameter() -> Tensor:
    return with_grad(leaf(torch.ones(10).as_strided((4, 3), (2, 1))), torch.ones(4, 3))


def sparse_parameter() -> Tensor:
    p = leaf(torch.eye(3).to_sparse())
    return with_grad(p, torch.eye(3).to_sparse())


def conjugated_parameter() -> Tensor:
    p = leaf(torch.ones(3, dtype=torch.complex64).conj())
    return with_grad(p, torch.ones(3, dtype=torch.complex64))


def gradient_of_another_shape() -> Tensor:
    p = with_grad(leaf(torch.ones(4, 3)), torch.ones(4, 3))
    p.data = torch.ones(3, 4)
    return p


def float8_parameter() -> Tensor:
    return with_grad(leaf(torch.ones(3).to(torch.float8_e4m3fn)), torch.ones(3).to(torch.float8_e4m3fn))


def half_complex_parameter() -> Tensor:
    return with_grad(leaf(torch.ones(3, dtype=torch.complex32)), torch.ones(3, dtype=torch.complex32))


def wrapped_parameter() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return with_grad(leaf(TwoTensor(torch.ones(3), torch.ones(3))), TwoTensor(torch.ones(3), torch.ones(3)))


def wrapped_gradient() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return with_grad(leaf(torch.ones(3)), TwoTensor(torch.ones(3), torch.ones(3)))


def float8_gradient() -> Tensor:
    p = leaf(torch.ones(3))
    p.grad_dtype = torch.float8_e4m3fn
    return with_grad(p, torch.ones(3).to(torch.float8_e4m3fn))


def complex_gradient() -> Tensor:
    p = leaf(torch.ones(3))
    p.grad_dtype = torch.complex64
    return with_grad(p, torch.ones(3, dtype=torch.complex64))


TENSORS: tuple[tuple[Callable[[], Tensor], type[Exception], str], ...] = (
    (sparse_gradient, RuntimeError, r"{name} does not support sparse gradients, got torch.sparse_coo for parameter 1"),
    (
        expanded_parameter,
        RuntimeError,
        r"unsupported operation: more than one element of parameter 1 .*shape \(4, 3\), strides \(0, 1\).*Please clone",
    ),
    (overlapping_parameter, RuntimeError, r"more than one element of parameter 1 .*strides \(2, 1\)"),
    (sparse_parameter, TypeError, r"parameter 1 has layout torch.sparse_coo, expected torch.strided"),
    (conjugated_parameter, TypeError, r"parameter 1 is a lazily conjugated .*use .resolve_conj\(\)"),
    (
        gradient_of_another_shape,
        ValueError,
        r"the gradient of parameter 1 has shape \(4, 3\), expected the parameter's \(3, 4\)",
    ),
    (
        float8_parameter,
        TypeError,
        r"parameter 1 has dtype torch.float8_e4m3fn, {name} takes torch.float64, torch.float32",
    ),
    (half_complex_parameter, TypeError, r"parameter 1 has dtype torch.complex32, {name} takes torch.float64"),
    (wrapped_parameter, TypeError, r"parameter 1 is a TwoTensor, expected a plain tensor"),
    (wrapped_gradient, TypeError, r"the gradient of parameter 1 is a TwoTensor, expected a plain tensor"),
)
TENSORS_WITH_GRAD_DTYPE = (
    (float8_gradient, TypeError, r"the gradient of parameter 1 has dtype torch.float8_e4m3fn, which does not fit"),
    (
        complex_gradient,
        TypeError,
        r"the gradient of parameter 1 has dtype torch.complex64, which does not fit its torch.f",
    ),
)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [*map(named, TENSORS), *(named(row, has_grad_dtype) for row in TENSORS_WITH_GRAD_DTYPE)],
)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "Shampoo"])
def test_tensors(name: str, make: Callable[[], Tensor], error: type[Exception], message: str, backend: str | None):
    if make is conjugated_parameter and name in ("Lion", "Shampoo"):
        message = r"parameter 1 has dtype torch.complex64, {name} takes"
    sound = with_grad(torch.nn.Parameter(torch.ones(3)), torch.ones(3))
    optimizer = getattr(sl, name)([sound, make()], backend=backend)
    for _ in range(2):
        with pytest.raises(error, match=message.format(name=name)):
            optimizer.step()
        assert torch.equal(sound, torch.ones(3))
        assert sound._version == 0
        assert not optimizer.state
    # Without the culprit the step is taken.
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert not torch.equal(sound, torch.ones(3))


def test_a_refused_parameter_is_called_by_its_name():
    sound = with_grad(torch.nn.Parameter(torch.ones(3)), torch.ones(3))
    optimizer = sl.AdamW([("body.weight", sound), ("head.weight", expanded_parameter())])
    with pytest.raises(RuntimeError, match=r"parameter 1 \(head.weight\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["SignSGD", "Lion", "LARS", "LAMB", *PRECONDITIONED])
def test_complex_parameters_where_signs_or_norms_are_taken(name: str):
    p = with_grad(leaf(torch.ones(3, dtype=torch.complex64)), torch.ones(3, dtype=torch.complex64))
    optimizer = getattr(sl, name)([p])
    with pytest.raises(TypeError, match=rf"parameter 0 has dtype torch.complex64, {name} takes torch.float64"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize("name", ALL)
def test_options_that_do_not_go_with_a_parameter(name: str):
    p = with_grad(torch.nn.Parameter(torch.ones(3, dtype=torch.float16)), torch.ones(3, dtype=torch.float16))
    with pytest.raises(
        ValueError, match=r"stochastic_rounding=True rounds to bfloat16, parameter 0 has dtype .*float16"
    ):
        getattr(sl, name)([p], stochastic_rounding=True).step()
    with pytest.raises(ValueError, match=r"capturable=True needs parameters on a GPU, parameter 0 is on cpu"):
        getattr(sl, name)([p], capturable=True).step()
    assert torch.equal(p, torch.ones(3, dtype=torch.float16))


def test_a_sparse_gradient_is_refused_in_mid_run_too():
    p = torch.nn.Parameter(torch.ones(5, 2))
    optimizer = sl.Adagrad([p])
    p.grad = torch.ones(5, 2)
    optimizer.step()
    before = snapshot(optimizer)
    p.grad = sparse_gradient().grad
    with pytest.raises(RuntimeError, match="Adagrad does not support sparse gradients"):
        optimizer.step()
    p.grad = torch.ones(5, 2)
    assert_unchanged(before[:3], snapshot(optimizer)[:3])
    assert_unchanged(before[4], snapshot(optimizer)[4])


# States and options meddled with by hand, at the next step. Each function gets the state of the second parameter.


def drop_a_state(state: dict[str, Any], group: dict[str, Any]) -> None:
    del state["exp_avg_sq"]


def drop_the_step(state: dict[str, Any], group: dict[str, Any]) -> None:
    del state["step"]


def state_of_another_shape(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(6, 4)


def state_of_integers(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4, 6, dtype=torch.int64)


def complex_state(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4, 6, dtype=torch.complex64)


def state_that_is_a_number(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = 0.0


def sparse_state(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4, 6).to_sparse()


def overlapping_state(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(6).expand(4, 6)


def state_elsewhere(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4, 6, device="meta")


def two_steps(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["step"] = torch.ones(2)


def negative_step(state: dict[str, Any], group: dict[str, Any]) -> None:
    state["step"] = torch.tensor(-3.0)


def amsgrad_on(state: dict[str, Any], group: dict[str, Any]) -> None:
    group["amsgrad"] = True


def lr_in_words(state: dict[str, Any], group: dict[str, Any]) -> None:
    group["lr"] = "fast"


def three_betas(state: dict[str, Any], group: dict[str, Any]) -> None:
    group["betas"] = (0.9, 0.9, 0.9)


def no_eps(state: dict[str, Any], group: dict[str, Any]) -> None:
    del group["eps"]


SPOILED: tuple[tuple[Callable[[dict[str, Any], dict[str, Any]], None], type[Exception], str], ...] = (
    (drop_a_state, ValueError, r"the state of parameter 1 lacks 'exp_avg_sq'"),
    (drop_the_step, ValueError, r"the state of parameter 1 lacks 'step'"),
    (state_of_another_shape, ValueError, r"'exp_avg' of parameter 1 has shape \(6, 4\), expected .*\(4, 6\)"),
    (state_of_integers, TypeError, r"'exp_avg' of parameter 1 has dtype torch.int64, expected a floating-point one"),
    (complex_state, TypeError, r"'exp_avg' of parameter 1 has dtype torch.complex64"),
    (state_that_is_a_number, TypeError, r"'exp_avg' of parameter 1 is a float, expected a tensor"),
    (sparse_state, TypeError, r"'exp_avg' of parameter 1 has layout torch.sparse_coo"),
    (overlapping_state, RuntimeError, r"elements of the state 'exp_avg' of parameter 1 share memory"),
    (state_elsewhere, ValueError, r"the state 'exp_avg' of parameter 1 is on meta, not cpu"),
    (two_steps, TypeError, r"'step' of parameter 1 is tensor\(\[1., 1.\]\), expected a number or a tensor of one"),
    (negative_step, ValueError, r"'step' of parameter 1 is -3.0, expected a finite count of at least 0"),
    (amsgrad_on, ValueError, r"the state of parameter 0 lacks 'max_exp_avg_sq'"),
    (lr_in_words, TypeError, r"lr must be a number or a 1-element tensor, got 'fast'"),
    (three_betas, ValueError, r"Invalid betas: \(0.9, 0.9, 0.9\)"),
    (no_eps, KeyError, r"eps"),
)


@pytest.mark.parametrize("accelerated", [False, True], ids=["ours", "accelerated"])
@pytest.mark.parametrize(("spoil", "error", "message"), list(map(named, SPOILED)))
def test_states_and_groups_spoiled_by_hand(spoil: Any, error: type[Exception], message: str, accelerated: bool):
    params = parameters()
    optimizer = sl.accelerate(torch.optim.AdamW(params)) if accelerated else sl.AdamW(params)
    for step in range(2):
        for p, g in zip(params, random_gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    spoil(optimizer.state[params[1]], optimizer.param_groups[0])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


STATEFUL_OPTIONS = (
    (Case("RMSprop"), "momentum", 0.9, r"lacks 'momentum_buffer'"),
    (Case("RMSprop"), "centered", True, r"lacks 'grad_avg'"),
    (Case("Adam"), "amsgrad", True, r"lacks 'max_exp_avg_sq'"),
)


@pytest.mark.parametrize(
    ("case", "option", "value", "message"), STATEFUL_OPTIONS, ids=["momentum", "centered", "amsgrad"]
)
def test_an_option_that_needs_a_state_cannot_be_turned_on_in_mid_run(case: Case, option: str, value: Any, message: str):
    # torch raises a KeyError of the state's name, in the middle of the step.
    params = parameters()
    optimizer = case.ours(params)
    for p, g in zip(params, random_gradients(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    optimizer.param_groups[0][option] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))
    optimizer.param_groups[0][option] = type(value)(0)
    optimizer.step()


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_refused_first_step_creates_no_state(case: Case):
    sound, culprit = parameters()
    optimizer = case.ours([sound, culprit])
    before = snapshot(optimizer)
    sound.grad, culprit.grad = torch.ones(3), torch.ones(4, 6)
    culprit.data = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"has shape"):
        optimizer.step()
    culprit.data = torch.ones(4, 6)
    assert len(before[4]) == len(optimizer.state)
    assert torch.equal(sound, before[2][0][3])
