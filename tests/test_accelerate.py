"""sl.accelerate: torch's own optimizer objects step through the kernels and stay what they are."""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from typing import Any

import pytest
import torch
from test_muon import VARIANTS as MUONS
from test_muon import Pair as MuonPair
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


class AcceleratedPair(Pair):
    """`ours` is torch's optimizer, accelerated."""

    def __init__(self, case: Case, tensors: Any, **options: Any) -> None:
        super().__init__(case, tensors, **options)
        self.ours = sl.accelerate(case.theirs(self.p, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_it_gives_torchs_numbers_and_state(case: Case, dtype: torch.dtype):
    pair = AcceleratedPair(case, normal(SMALL_SHAPES, dtype, 0))
    pair.run(5)
    for p, q in zip(pair.p, pair.q, strict=True):
        for name, value in pair.theirs.state.get(q, {}).items():
            assert pair.ours.state[p][name].dtype == value.dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_it_takes_the_steps_that_our_optimizer_takes(case: Case, dtype: torch.dtype):
    # Bit for bit: that the kernels, and not torch, do the work.
    pair = AcceleratedPair(case, normal([(64, 33), (5,)], dtype, 0))
    pair.theirs = case.ours(pair.q)
    for step in range(4):
        pair.step(random_gradients(pair.p, step))
    pair.check(rtol=0, atol=0)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_it_is_the_same_object_of_the_same_class(case: Case):
    params = [copy_of(x) for x in normal(SMALL_SHAPES, torch.float32, 0)]
    optimizer = case.theirs(params)
    cls, groups, state = type(optimizer), optimizer.param_groups, optimizer.state
    assert sl.accelerate(optimizer) is optimizer
    assert isinstance(optimizer, cls)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert sl.accelerate(optimizer) is optimizer
    # The class itself is left alone: others of its kind step as before.
    assert type(case.theirs(params)) is cls
    assert cls.step.__module__.startswith("torch.")


def test_our_own_optimizers_pass_through():
    optimizer = sl.Lion([torch.nn.Parameter(torch.zeros(3))])
    assert sl.accelerate(optimizer) is optimizer


FORMS = [
    (case, {form: True})
    for case in CLASSES
    for form in ("foreach", "fused")
    if (case.name, form) != ("RMSprop", "fused")
]


@pytest.mark.parametrize(("case", "options"), [*((case, {}) for case in CLASSES), *FORMS], ids=str)
def test_state_from_before_is_kept(case: Case, options: dict[str, Any]):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0), **options)
    pair.ours = case.theirs(pair.p, **options)
    pair.run(3)
    states = {id(p): dict(pair.ours.state[p]) for p in pair.p}
    sl.accelerate(pair.ours)
    pair.run(3)
    for p in pair.p:
        assert all(pair.ours.state[p][name] is value for name, value in states[id(p)].items())


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_hooks_from_before_and_after(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.ours = case.theirs(pair.p)
    log: list[Any] = []
    pair.ours.register_step_pre_hook(lambda opt, args, kwargs: log.append(("pre", opt is pair.ours, len(args))))
    pair.ours.register_state_dict_post_hook(lambda opt, state_dict: state_dict | {"mark": 1})
    sl.accelerate(pair.ours)
    pair.ours.register_step_post_hook(lambda opt, args, kwargs: log.append(("post", opt is pair.ours, len(args))))
    pair.run(2)
    assert log == [("pre", True, 1), ("post", True, 1)] * 2
    assert pair.ours.state_dict()["mark"] == 1


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_schedulers_from_before_and_after(case: Case, when: str):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.ours = case.theirs(pair.p)
    schedulers: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def add_scheduler() -> None:
        schedulers["ours"].append(torch.optim.lr_scheduler.ExponentialLR(pair.ours, 0.9))
        schedulers["theirs"].append(torch.optim.lr_scheduler.ExponentialLR(pair.theirs, 0.9))

    with warnings.catch_warnings():
        # A scheduler that loses sight of the optimizer's steps warns.
        warnings.simplefilter("error")
        if when != "after":
            add_scheduler()
        sl.accelerate(pair.ours)
        if when != "before":
            add_scheduler()
        for step in range(4):
            pair.step(random_gradients(pair.p, step))
            for scheduler in (*schedulers["ours"], *schedulers["theirs"]):
                scheduler.step()
    assert pair.ours.param_groups[0]["lr"] == pair.theirs.param_groups[0]["lr"] < case.hyper["lr"]
    pair.check()


def test_a_scheduler_from_before_still_warns_of_a_forgotten_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sl.accelerate(optimizer)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_closures(case: Case):
    pair = AcceleratedPair(case, normal(SMALL_SHAPES, torch.float32, 0))

    def closure(params: list[Tensor]) -> Tensor:
        loss = torch.stack([(p**2).sum() for p in params]).sum()
        for p in params:
            p.grad = None
        loss.backward()
        return loss

    for _ in range(3):
        loss = pair.ours.step(lambda: closure(pair.p))
        torch.testing.assert_close(loss, pair.theirs.step(lambda: closure(pair.q)))
    pair.check()


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_checkpoints_go_both_ways(case: Case):
    pair = AcceleratedPair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(3)
    assert pair.ours.state_dict()["param_groups"] == pair.theirs.state_dict()["param_groups"]
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    pair.theirs.load_state_dict(torch.load(file, weights_only=True))
    pair.ours.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    pair.run(3)
    ours = case.ours([copy_of(p) for p in pair.p])
    ours.load_state_dict(pair.ours.state_dict())
    assert_close(ours, pair.ours, rtol=0, atol=0)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_copies_are_accelerated_too(case: Case):
    pair = AcceleratedPair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(twin.ours) is type(pair.ours)
        assert isinstance(twin.ours, getattr(torch.optim, case.name))
        before = snapshot(pair.ours)
        twin.run(3)
        assert_unchanged(before, snapshot(pair.ours))


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_groups_may_be_added(case: Case):
    pair = AcceleratedPair(case, normal(SMALL_SHAPES, torch.float32, 0))
    pair.run(2)
    for optimizer, params in ((pair.ours, pair.p), (pair.theirs, pair.q)):
        params.append(copy_of(normal([(6, 7)], torch.float32, 5)[0]))
        optimizer.add_param_group({"params": [params[-1]], "lr": 0.2, "weight_decay": 0.1})
    pair.run(3)


def test_the_backend_is_the_one_asked_for():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sl.accelerate(torch.optim.AdamW([p]), backend="reference")
    q = torch.nn.Parameter(torch.ones(3))
    expected = sl.AdamW([q], backend="reference")
    for step in range(3):
        p.grad, q.grad = random_gradients([p], step) * 2
        optimizer.step()
        expected.step()
    assert torch.equal(p, q)
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.param_groups[0]["params"][0].grad = torch.ones(3)
    twin.step()
    assert twin._engine.backend == "reference"


# Muon, whose parameters are matrices, and whose numbers are near torch's as far as products in bf16 allow.


class AcceleratedMuons(MuonPair):
    """`ours` is torch's Muon, accelerated."""

    def __init__(self, hyper: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(hyper, dtype)
        self.ours = sl.accelerate(torch.optim.Muon(self.p, **hyper), **options)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("hyper", MUONS, ids=str)
def test_muons_numbers_are_torchs(hyper: dict[str, Any], backend: str | None):
    AcceleratedMuons(hyper, backend=backend).run(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_muon_takes_the_steps_that_ours_takes(dtype: torch.dtype):
    # Bit for bit: that the kernels, and not torch, do the work.
    pair = AcceleratedMuons({"lr": 0.05}, dtype)
    pair.theirs = sl.Muon(pair.q, lr=0.05)
    for seed in range(3):
        pair.step(seed)
    for p, q in zip(pair.p, pair.q, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(pair.ours.state[p]["momentum_buffer"], pair.theirs.state[q]["momentum_buffer"])


def test_muon_stays_torchs_object():
    pair = AcceleratedMuons({"lr": 0.05})
    plain = torch.optim.Muon(pair.q, lr=0.05)
    for q in pair.q:
        q.grad = torch.ones_like(q)
    plain.step()
    groups, state, log = plain.param_groups, plain.state, []
    buffers = [plain.state[q]["momentum_buffer"] for q in pair.q]
    plain.register_step_post_hook(lambda *args: log.append(1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(plain, 0.5)
    assert sl.accelerate(plain) is sl.accelerate(plain) is plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.step(lambda: 7.0) == 7.0
        scheduler.step()
    assert isinstance(plain, torch.optim.Muon)
    assert plain.param_groups is groups
    assert plain.state is state
    assert all(plain.state[q]["momentum_buffer"] is u for q, u in zip(pair.q, buffers, strict=True))
    assert groups[0]["lr"] == 0.025
    assert log == [1]
    assert type(torch.optim.Muon(pair.q)) is torch.optim.Muon


def test_muons_checkpoints_go_both_ways():
    pair = AcceleratedMuons({"lr": 0.05})
    pair.run(2)
    assert pair.ours.state_dict()["param_groups"] == pair.theirs.state_dict()["param_groups"]
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    pair.theirs.load_state_dict(torch.load(file, weights_only=True))
    pair.ours.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    ours = sl.Muon([copy_of(p) for p in pair.p])
    ours.load_state_dict(pair.ours.state_dict())
    for p, q in zip(pair.p, ours.param_groups[0]["params"], strict=True):
        assert torch.equal(pair.ours.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(twin.ours) is type(pair.ours)
        before = snapshot(pair.ours)
        twin.step(5)
        assert_unchanged(before, snapshot(pair.ours))
        assert not torch.equal(twin.p[0], pair.p[0])


def test_muon_under_a_gradscalers_scale():
    pair = AcceleratedMuons({"lr": 0.05})
    pair.give(1)
    for p in pair.p:
        p.grad *= 4.0
    before = [p.detach().clone() for p in pair.p]
    pair.ours.grad_scale, pair.ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    pair.ours.step()
    assert all(torch.equal(p, w) for p, w in zip(pair.p, before, strict=True))
    pair.ours.found_inf = torch.tensor(0.0)
    pair.ours.step()
    pair.theirs.step()
    pair.check(1)


# Refusals: the optimizer stays as it was, and goes on as torch's.


class Subclass(torch.optim.AdamW):
    pass


def with_patched_step(params: Any) -> Any:
    optimizer = torch.optim.AdamW(params)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)
    return optimizer


def with_differentiable_group(params: Any) -> Any:
    optimizer = torch.optim.AdamW(params)
    optimizer.param_groups[0]["differentiable"] = True
    return optimizer


def with_lr_of_nan(params: Any) -> Any:
    optimizer = torch.optim.AdamW(params)
    optimizer.param_groups[0]["lr"] = float("nan")
    return optimizer


def with_another_algorithm(params: Any) -> Any:
    return torch.optim.Muon([{"params": [torch.nn.Parameter(torch.ones(3, 3))], "algorithm": "adamw"}])


EXACTLY = r"expected exactly one of torch.optim.SGD, .*torch.optim.AdamW, torch.optim.Muon"
REFUSED = (
    (Subclass, {}, TypeError, rf"cannot accelerate a Subclass, {EXACTLY}"),
    (torch.optim.NAdam, {}, TypeError, rf"cannot accelerate a NAdam, {EXACTLY}"),
    (torch.optim.LBFGS, {}, TypeError, rf"cannot accelerate a LBFGS, {EXACTLY}"),
    (list, {}, TypeError, rf"cannot accelerate a list, {EXACTLY}"),
    (with_patched_step, {}, TypeError, r"step\(\) was replaced on the instance"),
    (with_differentiable_group, {}, RuntimeError, r"differentiable=True is not supported"),
    (with_another_algorithm, {}, ValueError, r"group 0 of a torch.optim.Muon has algorithm='adamw', expected none"),
    (with_lr_of_nan, {}, ValueError, r"Invalid learning rate: nan"),
    (torch.optim.AdamW, {"backend": "gpu"}, ValueError, r"backend='gpu' is unknown, expected None or one of 'cuda'"),
)


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_refusals(make: Any, options: dict[str, Any], error: type[Exception], message: str):
    optimizer = make([torch.nn.Parameter(torch.ones(3))])
    cls, attributes = type(optimizer), dict(getattr(optimizer, "__dict__", {}))
    with pytest.raises(error, match=message):
        sl.accelerate(optimizer, **options)
    assert type(optimizer) is cls
    assert getattr(optimizer, "__dict__", {}) == attributes


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_are_refused_at_the_step(name: str):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(5, 2))
    optimizer = sl.accelerate(getattr(torch.optim, name)([p, q]))
    p.grad = torch.ones(2)
    q.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))


def test_a_checkpoint_of_the_wrong_shape_is_refused_at_the_step():
    # load_state_dict() is torch's own and takes anything.
    pair = AcceleratedPair(Case("AdamW"), normal([(3,), (4, 6)], torch.float32, 0))
    pair.run(1)
    checkpoint = copy.deepcopy(pair.ours.state_dict())
    checkpoint["state"][1]["exp_avg"] = torch.zeros(6, 4)
    pair.ours.load_state_dict(checkpoint)
    before = snapshot(pair.ours)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 has shape \(6, 4\), expected .*\(4, 6\)"):
        pair.ours.step()
    assert_unchanged(before, snapshot(pair.ours))
