"""Checkpoints: exchanged with torch.optim in both directions, of old make, and refused where they do not fit."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import (
    CLASSES,
    HALF,
    SMALL_SHAPES,
    VARIANTS,
    Case,
    Pair,
    assert_close,
    assert_unchanged,
    copy_of,
    normal,
    random_gradients,
    snapshot,
)

import stepladder as sl

DTYPES = (torch.float32, torch.bfloat16, torch.complex64)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(optimizer: Any, seeds: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        for p, g in zip(params, random_gradients(params, seed), strict=True):
            p.grad = g
        optimizer.step()


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def states_of(optimizer: Any) -> list[dict[str, Any]]:
    return [dict(optimizer.state[p]) if p in optimizer.state else {} for p in params_of(optimizer)]


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["in memory", "weights_only file"])
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_run_goes_on_from_a_checkpoint(case: Case, dtype: torch.dtype, direction: str, carry: Callable[[Any], Any]):
    source, target = (case.ours if name == "ours" else case.theirs for name in direction.split(" to "))
    first = source([copy_of(x) for x in normal(SMALL_SHAPES, dtype, 0)])
    steps(first, range(3))
    second = target([copy_of(p) for p in params_of(first)])
    second.load_state_dict(carry(first.state_dict()))
    for state, loaded in zip(states_of(first), states_of(second), strict=True):
        assert state.keys() == loaded.keys()
        for name, value in state.items():
            assert value.dtype == loaded[name].dtype
            assert torch.equal(value, loaded[name])
    if dtype not in HALF or direction == "ours to ours":
        steps(first, range(3, 6))
        steps(second, range(3, 6))
        assert_close(first, second, **({"rtol": 0, "atol": 0} if direction == "ours to ours" else {}))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_checkpoint_has_torchs_structure(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.ours.add_param_group({"params": [copy_of(torch.ones(2))], "lr": 0.5})
    pair.theirs.add_param_group({"params": [copy_of(torch.ones(2))], "lr": 0.5})
    for _ in range(2):
        ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
        assert list(ours) == list(theirs)
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        assert [set(entry) for entry in ours["state"].values()] == [set(entry) for entry in theirs["state"].values()]
        gradients: list[Any] = random_gradients(pair.p, 1)
        gradients[1] = None
        pair.step(gradients)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_what_was_loaded_is_a_copy(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    state_dict = copy.deepcopy(pair.theirs.state_dict())
    pair.ours.load_state_dict(state_dict)
    before = copy.deepcopy(state_dict)
    pair.run(2)
    assert_unchanged(before, state_dict)
    for entry in state_dict["state"].values():
        for value in entry.values():
            value.fill_(math.nan)
    pair.run(2)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_a_checkpoint_of_torchs_fused_form(name: str):
    case = Case(name, {"lr": 0.05})
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    fused = case.theirs([copy_of(p) for p in pair.p], fused=True)
    steps(fused, range(2))
    with torch.no_grad():
        for p, q, r in zip(pair.p, pair.q, params_of(fused), strict=True):
            p.copy_(r)
            q.copy_(r)
    pair.ours.load_state_dict(fused.state_dict())
    pair.theirs.load_state_dict(fused.state_dict())
    assert pair.ours.param_groups[0]["fused"] is True
    pair.run(3)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_options_of_the_checkpoint_replace_the_optimizers(case: Case):
    first = case.ours([copy_of(x) for x in normal(SMALL_SHAPES, torch.float32, 0)])
    first.param_groups[0] |= {"note": "kept", "initial_lr": 0.7}
    steps(first, range(2))
    plain = Case(case.name)
    pair = Pair(plain, [p.detach() for p in params_of(first)])
    for optimizer in (pair.ours, pair.theirs):
        optimizer.load_state_dict(first.state_dict())
        assert optimizer.param_groups[0]["lr"] == case.hyper["lr"]
        assert optimizer.param_groups[0]["note"] == "kept"
    assert pair.ours.state_dict()["param_groups"] == pair.theirs.state_dict()["param_groups"]
    pair.run(3)


@pytest.mark.parametrize("names", [(True, True), (True, False), (False, True)], ids=str)
def test_parameter_names_in_checkpoints(names: tuple[bool, bool]):
    def groups_after_loading(cls: Any) -> Any:
        def params(named: bool, prefix: str) -> Any:
            tensors = [copy_of(x) for x in normal(SMALL_SHAPES, torch.float32, 0)]
            return [(f"{prefix}.{i}", p) for i, p in enumerate(tensors)] if named else tensors

        saved = cls(params(names[0], "saved")).state_dict()
        optimizer = cls(params(names[1], "own"))
        optimizer.load_state_dict(saved)
        return optimizer.state_dict()["param_groups"]

    assert groups_after_loading(sl.AdamW) == groups_after_loading(torch.optim.AdamW)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_parameter_without_state_is_legal(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    state_dict = copy.deepcopy(pair.theirs.state_dict())
    for index in (1, 2):
        del state_dict["state"][index]
    pair.ours.load_state_dict(state_dict)
    pair.theirs.load_state_dict(state_dict)
    pair.run(3)


def test_state_that_belongs_to_no_parameter_is_kept():
    optimizer = sl.AdamW([torch.nn.Parameter(torch.zeros(2))])
    state_dict = optimizer.state_dict()
    state_dict["state"]["shared"] = {"note": 7}
    optimizer.load_state_dict(state_dict)
    assert optimizer.state["shared"] == {"note": 7}


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_scheduler_goes_on_from_a_checkpoint(case: Case):
    def scheduled(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.2, total_steps=12, cycle_momentum=case.name != "Adagrad"
        )

    def run(optimizer: Any, scheduler: Any, seeds: range) -> None:
        for seed in seeds:
            steps(optimizer, range(seed, seed + 1))
            scheduler.step()

    first = case.ours([copy_of(x) for x in normal(SMALL_SHAPES, torch.float32, 0)])
    first_scheduler = scheduled(first)
    run(first, first_scheduler, range(5))
    second = case.ours([copy_of(p) for p in params_of(first)])
    second_scheduler = scheduled(second)
    second_scheduler.load_state_dict(copy.deepcopy(first_scheduler.state_dict()))
    second.load_state_dict(through_a_file(first.state_dict()))
    run(first, first_scheduler, range(5, 10))
    run(second, second_scheduler, range(5, 10))
    assert_close(first, second, rtol=0, atol=0)


SWITCHED_OFF = (
    (Case("SGD", {"lr": 0.1, "momentum": 0.9}), "momentum", 0),
    (Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}), "momentum", 0),
    (Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}), "centered", False),
    (Case("Adam", {"lr": 0.01, "amsgrad": True}), "amsgrad", False),
)


@pytest.mark.parametrize(("case", "option", "value"), SWITCHED_OFF, ids=str)
def test_a_checkpoint_after_an_option_was_switched_off_loads_again(case: Case, option: str, value: Any):
    # The state that the option needed is still there, and so in the checkpoint, as with torch.
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0][option] = value
    pair.run(1)
    for optimizer in (pair.ours, pair.theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2):
        pair.step(random_gradients(pair.p, step))
        for p, q in zip(pair.p, pair.q, strict=True):
            torch.testing.assert_close(p, q)


# Old makes


@pytest.mark.parametrize("kind", [int, float, lambda x: torch.tensor(int(x))], ids=["int", "float", "int64"])
@pytest.mark.parametrize("case", [case for case in CLASSES if case.name != "SGD"], ids=str)
def test_step_counts_of_old_checkpoints(case: Case, kind: Callable[[float], Any]):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(3)
    modern = copy.deepcopy(pair.theirs.state_dict())
    old = copy.deepcopy(modern)
    for entry in old["state"].values():
        entry["step"] = kind(entry["step"])
    pair.ours.load_state_dict(old)
    pair.theirs.load_state_dict(modern)
    step = pair.ours.state[pair.p[0]]["step"]
    assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    pair.run(2)


def test_momentum_buffers_of_none():
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    old = copy.deepcopy(pair.theirs.state_dict())
    old["state"][1]["momentum_buffer"] = None
    pair.ours.load_state_dict(old)
    pair.theirs.load_state_dict(old)
    pair.run(3)


LATE_KEYS = {
    "SGD": ("nesterov", "maximize", "foreach", "differentiable", "fused"),
    "Adagrad": ("maximize", "foreach", "differentiable", "fused"),
    "RMSprop": ("momentum", "centered", "maximize", "foreach", "differentiable", "capturable"),
    "Adam": ("amsgrad", "maximize", "foreach", "differentiable", "capturable", "fused", "decoupled_weight_decay"),
    "AdamW": ("amsgrad", "maximize", "foreach", "differentiable", "capturable", "fused", "decoupled_weight_decay"),
}


@pytest.mark.parametrize("name", LATE_KEYS)
def test_group_keys_that_old_checkpoints_lack(name: str):
    pair = Pair(Case(name, {"lr": 0.05}), normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    old = copy.deepcopy(pair.theirs.state_dict())
    for key in LATE_KEYS[name]:
        del old["param_groups"][0][key]
    pair.ours.load_state_dict(old)
    assert pair.ours.param_groups[0].keys() == pair.theirs.param_groups[0].keys()
    pair.run(2)


# States in fp32, and stochastic rounding


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["in memory", "weights_only file"])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_fp32_states_of_half_precision_parameters_survive(case: Case, carry: Callable[[Any], Any], dtype: torch.dtype):
    first = case.ours([copy_of(x) for x in normal(SMALL_SHAPES, dtype, 0)], state_dtype=torch.float32)
    steps(first, range(3))
    saved = first.state_dict()
    assert any(not torch.equal(value, value.to(dtype).float()) for value in saved["state"][1].values())
    for options in ({"state_dtype": torch.float32}, {}):
        second = case.ours([copy_of(p) for p in params_of(first)], **options)
        second.load_state_dict(carry(saved))
        for state, loaded in zip(states_of(first), states_of(second), strict=True):
            for name, value in state.items():
                assert loaded[name].dtype == torch.float32
                assert torch.equal(loaded[name], value)
    steps(first, range(3, 6))
    steps(second, range(3, 6))
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_states_are_cast_to_what_this_optimizer_would_have(case: Case):
    params = [copy_of(x) for x in normal(SMALL_SHAPES, torch.bfloat16, 0)]
    theirs = case.theirs(params)
    steps(theirs, range(2))
    wide = case.ours([copy_of(p) for p in params], state_dtype=torch.float32)
    wide.load_state_dict(theirs.state_dict())
    steps(wide, range(2))
    back = case.theirs([copy_of(p) for p in params_of(wide)])
    back.load_state_dict(wide.state_dict())
    narrow = case.ours([copy_of(p) for p in params_of(wide)], state_dtype=None)
    without_option = wide.state_dict()
    del without_option["param_groups"][0]["state_dtype"]
    narrow.load_state_dict(without_option)
    for p, q, r in zip(params_of(wide), params_of(back), params_of(narrow), strict=True):
        for name in set(wide.state[p]) - {"step"}:
            assert wide.state[p][name].dtype == torch.float32
            assert back.state[q][name].dtype == narrow.state[r][name].dtype == torch.bfloat16
            assert torch.equal(back.state[q][name], narrow.state[r][name])


@pytest.mark.parametrize("case", [Case("SGD", {"lr": 0.1}), *CLASSES], ids=str)
def test_the_seed_of_stochastic_rounding_travels(case: Case):
    def optimizer(params: list[Tensor], **options: Any) -> Any:
        return case.ours([copy_of(p) for p in params], stochastic_rounding=True, **options)

    first = optimizer(normal([(64, 33)], torch.bfloat16, 0), seed=5)
    steps(first, range(3))
    second = optimizer(params_of(first), seed=6)
    other = optimizer(params_of(first), seed=6)
    state = first.state_dict()
    second.load_state_dict(through_a_file(state))
    other.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "seed": 6}]})
    assert second.param_groups[0]["seed"] == 5
    for each in (first, second, other):
        steps(each, range(3, 6))
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(params_of(first)[0], params_of(other)[0])


# Checkpoints that do not fit


def set_state(index: int, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["state"][index].update({name: value})


def drop_state(index: int, *names: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: [checkpoint["state"][index].pop(name) for name in names]


def set_group(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["param_groups"][1].update({key: value})


def drop_group_key(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["param_groups"][1].pop(key)


def set_entry(index: Any, entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["state"].update({index: entry})


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint.pop(key)


def add_group(checkpoint: dict[str, Any]) -> None:
    checkpoint["param_groups"].append({**checkpoint["param_groups"][1], "params": []})


# What is done to a checkpoint of Adam with AMSGrad over groups of parameters (0 1 2) and (3, of shape (4, 6)).
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "a state is missing": (drop_state(3, "exp_avg_sq"), ValueError, r"parameter 3 lacks 'exp_avg_sq'"),
    "a state of the option is missing": (drop_state(3, "max_exp_avg_sq"), ValueError, r"lacks 'max_exp_avg_sq'"),
    "the step count is missing": (drop_state(3, "step"), ValueError, r"parameter 3 lacks 'step'"),
    "only the step count is left": (
        drop_state(3, "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        ValueError,
        r"lacks 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'",
    ),
    "a state is None": (set_state(3, "exp_avg", None), ValueError, r"parameter 3 lacks 'exp_avg'"),
    "an unknown state": (set_state(3, "velocity", torch.zeros(4, 6)), ValueError, r"parameter 3 .*unknown 'velocity'"),
    "another shape": (
        set_state(3, "exp_avg", torch.zeros(6, 4)),
        ValueError,
        r"'exp_avg' of parameter 3 has shape \(6, 4\), expected .*\(4, 6\)",
    ),
    "a shape that would broadcast": (set_state(3, "exp_avg", torch.zeros(1, 6)), ValueError, r"has shape \(1, 6\)"),
    "a scalar": (set_state(3, "exp_avg_sq", torch.tensor(1.0)), ValueError, r"has shape \(\)"),
    "a number": (set_state(3, "exp_avg", 0.5), TypeError, r"'exp_avg' of parameter 3 is a float, expected a tensor"),
    "a list": (set_state(3, "exp_avg", [0.5]), TypeError, r"'exp_avg' of parameter 3 is a list, expected a tensor"),
    "integers": (
        set_state(3, "exp_avg", torch.zeros(4, 6, dtype=torch.int32)),
        TypeError,
        r"'exp_avg' of parameter 3 has dtype torch.int32, expected a floating-point one",
    ),
    "complex numbers": (
        set_state(3, "exp_avg", torch.zeros(4, 6, dtype=torch.complex64)),
        TypeError,
        r"has dtype torch.complex64, expected a floating-point one",
    ),
    "a sparse state": (set_state(3, "exp_avg", torch.zeros(4, 6).to_sparse()), TypeError, r"layout torch.sparse_coo"),
    "a step count in words": (set_state(3, "step", "three"), TypeError, r"'step' of parameter 3 is 'three'"),
    "a step count that is true": (set_state(3, "step", True), TypeError, r"'step' of parameter 3 is True"),
    "two step counts": (set_state(3, "step", torch.ones(2)), TypeError, r"expected a number or a tensor of one"),
    "a negative step count": (set_state(3, "step", -1), ValueError, r"'step' of parameter 3 is -1"),
    "a NaN step count": (set_state(3, "step", torch.tensor(math.nan)), ValueError, r"is nan, expected a finite count"),
    "an infinite step count": (set_state(3, "step", math.inf), ValueError, r"is inf, expected a finite count"),
    "an entry that is no dict": (
        set_entry(3, [1, 2]),
        TypeError,
        r"the state of parameter 3 is a list, expected a dict",
    ),
    "state of a parameter that does not exist": (set_entry(9, {}), ValueError, r"state for parameter 9"),
    "a group too many": (add_group, ValueError, r"different number of parameter groups: 3, this optimizer has 2"),
    "a group of another size": (
        set_group("params", [3, 4]),
        ValueError,
        r"doesn't match the size of optimizer's group: group 1 has 2 parameters, the optimizer's has 1",
    ),
    "a group without parameters": (drop_group_key("params"), ValueError, r"group 1 .*lacks 'params'"),
    "a group without lr": (drop_group_key("lr"), ValueError, r"group 1 .*lacks 'lr'"),
    "a group without betas": (drop_group_key("betas"), ValueError, r"group 1 .*lacks 'betas'"),
    "a negative lr": (set_group("lr", -1.0), ValueError, r"Invalid learning rate: -1.0"),
    "an lr in words": (set_group("lr", "fast"), TypeError, r"lr must be a number .*got 'fast'"),
    "a beta of one": (set_group("betas", (0.9, 1.0)), ValueError, r"Invalid beta parameter at index 1: 1.0"),
    "a differentiable group": (
        set_group("differentiable", True),
        RuntimeError,
        r"differentiable=True is not supported",
    ),
    "no state at all": (drop("state"), ValueError, r"loaded state dict has no 'state'"),
    "no groups at all": (drop("param_groups"), ValueError, r"loaded state dict has no 'param_groups'"),
}


def optimizer_with_two_groups(case: Case) -> Any:
    tensors = normal([(3,), (17, 5), (), (4, 6)], torch.float32, 0)
    params = [copy_of(x) for x in tensors]
    return case.ours([{"params": params[:3]}, {"params": params[3:], "lr": 0.02}])


@pytest.mark.parametrize("what", BAD)
def test_a_checkpoint_that_does_not_fit_changes_nothing(what: str):
    spoil, error, message = BAD[what]
    optimizer = optimizer_with_two_groups(VARIANTS[7])
    steps(optimizer, range(2))
    undisturbed = copy.deepcopy(optimizer)
    donor = optimizer_with_two_groups(VARIANTS[7])
    steps(donor, range(5))
    checkpoint = copy.deepcopy(donor.state_dict())
    spoil(checkpoint)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(before, snapshot(optimizer))
    for each in (optimizer, undisturbed):
        steps(each, range(2, 4))
    assert_close(optimizer, undisturbed, rtol=0, atol=0)


STRANGERS = [(a, b) for a in CLASSES for b in CLASSES if a.name != b.name and {a.name, b.name} != {"Adam", "AdamW"}]


@pytest.mark.parametrize(("case", "donor"), STRANGERS, ids=str)
def test_a_checkpoint_of_another_optimizer_changes_nothing(case: Case, donor: Case):
    optimizer, other = optimizer_with_two_groups(case), optimizer_with_two_groups(donor)
    for each in (optimizer, other):
        steps(each, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"lacks|unknown"):
        optimizer.load_state_dict(other.state_dict())
    assert_unchanged(before, snapshot(optimizer))


SPOILED_STATES = (
    (
        Case("SGD", {"momentum": 0.9}),
        set_state(3, "momentum_buffer", torch.zeros(6, 4)),
        r"'momentum_buffer' .*\(6, 4\)",
    ),
    (Case("SGD", {"momentum": 0.9}), set_state(3, "velocity", torch.zeros(4, 6)), r"unknown 'velocity'"),
    (Case("Adagrad"), drop_state(3, "sum"), r"lacks 'sum'"),
    (Case("RMSprop", {"momentum": 0.9}), drop_state(3, "momentum_buffer"), r"lacks 'momentum_buffer'"),
    (Case("RMSprop", {"centered": True}), drop_state(3, "grad_avg"), r"lacks 'grad_avg'"),
    (Case("AdamW"), drop_state(3, "exp_avg"), r"lacks 'exp_avg'"),
)


@pytest.mark.parametrize(("case", "spoil", "message"), SPOILED_STATES, ids=[row[2] for row in SPOILED_STATES])
def test_every_optimizer_checks_its_states(case: Case, spoil: Callable[[dict[str, Any]], Any], message: str):
    optimizer = optimizer_with_two_groups(case)
    steps(optimizer, range(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    spoil(checkpoint)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(before, snapshot(optimizer))


def test_a_real_state_for_a_complex_parameter_is_refused():
    optimizer = sl.Adam([copy_of(normal([(4,)], torch.complex64, 0)[0])])
    steps(optimizer, range(1))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][0]["exp_avg"] = torch.zeros(4)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"has dtype torch.float32, expected a complex one"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(before, snapshot(optimizer))
