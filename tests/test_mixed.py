"""Several algorithms in one optimizer: each group as under an optimizer of its own, bit for bit."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits
from test_muon import matrix
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch_cases import assert_unchanged, copy_of, normal, random_gradients, snapshot

import stepladder as sl

SHAPES = ((12, 7), (5,), (3, 4, 4), (7, 3), (), (6, 2, 2, 2))
# What each parameter is given to.
ALGORITHMS = ("muon", "adamw", "muon", "lion", "sgd", "muon")
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.05},
    "adamw": {"lr": 0.02, "weight_decay": 0.3},
    "lion": {"lr": 0.01, "betas": (0.8, 0.9)},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}
OWN: dict[str, type[Any]] = {"muon": sl.Muon, "adamw": sl.AdamW, "lion": sl.Lion, "sgd": sl.SGD}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [copy_of(x) for x in normal(SHAPES, dtype, 0)]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """A group for each algorithm, those of the matrices neither all first nor all last."""
    order = ("adamw", "muon", "lion", "sgd")
    return [
        {
            "params": [p for p, algorithm in zip(params, ALGORITHMS, strict=True) if algorithm == name],
            "algorithm": name,
            **OPTIONS[name],
        }
        for name in order
    ]


class Both:
    """One mixed optimizer, and one of its own for each algorithm."""

    def __init__(self, cls: type[Any] = sl.Muon, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.p, self.q = tensors(dtype), tensors(dtype)
        groups, own = groups_of(self.p), groups_of(self.q)
        if cls is sl.MuonH:
            groups[1]["algorithm"] = "muonh"
        self.mixed = cls(groups, **options)
        # Options that all groups share.
        self.own = []
        for group in own:
            family = OWN[group.pop("algorithm")]
            self.own.append((cls if family is sl.Muon else family)([group], **options))

    def give(self, seed: int) -> None:
        for p, q, g in zip(self.p, self.q, random_gradients(self.p, seed), strict=True):
            p.grad, q.grad = g, g.clone()

    def step(self, seed: int) -> None:
        self.give(seed)
        self.mixed.step()
        for optimizer in self.own:
            optimizer.step()

    def check(self) -> None:
        states = {q: state for optimizer in self.own for q, state in optimizer.state.items()}
        for p, q in zip(self.p, self.q, strict=True):
            assert same_bits(p, q)
            state, other = self.mixed.state[p], states[q]
            assert state.keys() == other.keys()
            assert all(same_bits(state[name], other[name]) for name in state)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_groups_step_as_under_optimizers_of_their_own(cls: type[Any], dtype: torch.dtype, backend: str | None):
    both = Both(cls, dtype, backend=backend)
    for seed in range(5):
        both.step(seed)
    both.check()


@pytest.mark.parametrize("options", [{"maximize": True}, {"state_dtype": torch.float32}], ids=str)
def test_shared_options_hold_for_every_group(options: dict[str, Any]):
    both = Both(dtype=torch.bfloat16, **options)
    for seed in range(3):
        both.step(seed)
    both.check()
    wide = {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    if "state_dtype" in options:
        dtypes = {x.dtype for state in both.mixed.state.values() for name, x in state.items() if name in wide}
        assert dtypes == {torch.float32}


def test_a_group_has_its_algorithms_keys_and_defaults():
    groups = sl.Muon([{"params": [p], "algorithm": a} for p, a in zip(tensors(), ALGORITHMS, strict=True)]).param_groups
    for group, name in zip(groups, ALGORITHMS, strict=True):
        own = OWN[name]([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0] | {"algorithm": name}
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in own.items() if k != "params"}
    (group,) = sl.Muon([{"params": tensors()[:1], "algorithm": "momentum"}]).param_groups
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, False, 1e-3)


def test_an_optimizer_without_any_matrix():
    (p,), (q,) = tensors()[1:2], tensors()[1:2]
    mixed, own = sl.Muon([{"params": [p], "algorithm": "adamw"}]), sl.AdamW([q])
    for seed in range(2):
        p.grad, q.grad = (normal([(5,)], torch.float32, seed)[0] for _ in range(2))
        mixed.step()
        own.step()
    assert same_bits(p, q)


def test_an_algorithm_of_one_group_of_muon():
    # AMSGrad, Signum: options choose the rule within an algorithm too.
    p, q = tensors(), tensors()
    mixed = sl.Muon([{"params": p[:1]}, {"params": p[1:], "algorithm": "adamw", "amsgrad": True}])
    muon, own = sl.Muon(q[:1]), sl.AdamW(q[1:], amsgrad=True)
    for seed in range(3):
        for x, y, g in zip(p, q, random_gradients(p, seed), strict=True):
            x.grad, y.grad = g, g.clone()
        for optimizer in (mixed, muon, own):
            optimizer.step()
    assert all(same_bits(x, y) for x, y in zip(p, q, strict=True))
    assert "max_exp_avg_sq" in mixed.state[p[1]]


# Copies and checkpoints


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_copies(cls: type[Any], copied: Callable[[Any], Any]):
    both = Both(cls)
    both.step(0)
    before = snapshot(both.mixed)
    twin = copied(both)
    twin.step(1)
    twin.check()
    assert_unchanged(before, snapshot(both.mixed))
    both.step(1)
    assert all(same_bits(p, r) for p, r in zip(both.p, twin.p, strict=True))


@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH, sl.Shampoo, sl.SOAP])
def test_a_copy_takes_new_parameters(cls: type[Any]):
    twin = copy.deepcopy(cls([torch.nn.Parameter(matrix((4, 3), 1))]))
    added = torch.nn.Parameter(matrix((5, 2), 2))
    twin.add_param_group({"params": [added]})
    before = added.detach().clone()
    for seed in range(2):  # SOAP's first step moves nothing
        added.grad = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
        twin.step()
    assert not torch.equal(added, before)


@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_a_run_goes_on_from_a_checkpoint(cls: type[Any]):
    both, other = Both(cls), Both(cls)
    for seed in range(3):
        both.step(seed)
    file = io.BytesIO()
    torch.save(both.mixed.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p, r in zip(both.p, other.p, strict=True):
            r.copy_(p)
    other.mixed.param_groups[0]["lr"] = 0.5
    other.mixed.load_state_dict(torch.load(file, weights_only=True))
    assert other.mixed.state_dict()["param_groups"] == both.mixed.state_dict()["param_groups"]
    both.step(3)
    other.give(3)
    other.mixed.step()
    assert all(same_bits(p, r) for p, r in zip(both.p, other.p, strict=True))


def test_checkpoints_that_do_not_fit():
    both = Both()
    both.step(0)
    good = both.mixed.state_dict()
    before = snapshot(both.mixed)

    def changed(**group: Any) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        bad["param_groups"][0] |= group
        return bad

    with pytest.raises(
        ValueError, match=r"algorithm='adam' is unknown, expected one of 'muon', 'adamw', 'lion', 'sgd'"
    ):
        both.mixed.load_state_dict(changed(algorithm="adam"))
    with pytest.raises(ValueError, match=r"group 0 of the loaded state dict lacks 'adjust_lr_fn'"):
        both.mixed.load_state_dict(changed(algorithm="muon"))
    with pytest.raises(ValueError, match=r"the state of parameter 0 has unknown 'exp_avg_sq': expected \['exp_avg', "):
        both.mixed.load_state_dict(changed(algorithm="lion"))
    keys = {key: value for key, value in good["param_groups"][1].items() if key not in ("params", "algorithm")}
    with pytest.raises(
        ValueError, match=r"only supports parameters of 2 or more dimensions whereas we found parameter 0"
    ):
        both.mixed.load_state_dict(changed(algorithm="muon", **keys))
    split = copy.deepcopy(good)
    split["param_groups"][1]["split_sizes"] = (3, 4)
    with pytest.raises(ValueError, match=r"split_sizes=\(3, 4\) add up to 7, expected the 12 rows of parameter 1"):
        both.mixed.load_state_dict(split)
    lacking = copy.deepcopy(good)
    del lacking["param_groups"][0]["betas"]
    with pytest.raises(ValueError, match=r"group 0 of the loaded state dict lacks 'betas'"):
        both.mixed.load_state_dict(lacking)
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 2.0"):
        both.mixed.load_state_dict(changed(betas=(2.0, 0.9)))
    assert_unchanged(before, snapshot(both.mixed))
    both.step(1)
    both.check()


# In mid-run


def test_groups_added_and_algorithms_changed_in_mid_run():
    both = Both()
    both.step(0)
    new = torch.nn.Parameter(torch.ones(4))
    both.mixed.add_param_group({"params": [new], "algorithm": "lion"})
    assert both.mixed.param_groups[-1]["lr"] == 1e-4
    new.grad = torch.ones(4)
    both.step(1)
    both.check()
    assert new.detach().tolist() == pytest.approx([1 - 1e-4] * 4)
    # A state that another algorithm left is not one that this can go on with.
    before = snapshot(both.mixed)
    both.mixed.param_groups[-1]["algorithm"] = "adamw"
    with pytest.raises(KeyError, match="eps"):
        both.mixed.step()
    both.mixed.param_groups[-1]["algorithm"] = "adagrad"
    with pytest.raises(ValueError, match="algorithm='adagrad' is unknown"):
        both.mixed.step()
    both.mixed.param_groups[-1]["algorithm"] = "lion"
    assert_unchanged(before, snapshot(both.mixed))
    both.mixed.step()


def test_a_group_that_is_taken_out_or_changes_its_parameters():
    both = Both()
    both.step(0)
    group = both.mixed.param_groups.pop(0)
    kept = [p.detach().clone() for p in group["params"]]
    both.mixed.step()
    assert all(torch.equal(p, x) for p, x in zip(group["params"], kept, strict=True))
    both.mixed.param_groups.append(group)
    both.mixed.step()
    assert not any(torch.equal(p, x) for p, x in zip(group["params"], kept, strict=True))


def test_schedulers_reach_every_group():
    both = Both()
    make = [
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
        lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    ]
    for cls in make:
        schedulers = [cls(optimizer) for optimizer in (both.mixed, *both.own)]
        for seed in range(3):
            both.step(seed)
            for scheduler in schedulers:
                scheduler.step()
            rates = [group["lr"] for group in both.mixed.param_groups]
            assert rates == [optimizer.param_groups[0]["lr"] for optimizer in both.own]
    both.check()


def test_a_scheduler_that_cycles_the_momentum():
    both = Both()
    scheduler = lr_scheduler.OneCycleLR(both.mixed, max_lr=[0.1, 0.2, 0.01, 0.1], total_steps=6)
    seen = []
    for seed in range(5):
        both.give(seed)
        both.mixed.step()
        scheduler.step()
        muon, sgd = both.mixed.param_groups[1], both.mixed.param_groups[3]
        assert muon["momentum"] == sgd["momentum"]
        seen.append(muon["momentum"])
    assert min(seen) < 0.86
    assert max(seen) > 0.94


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_under_a_grad_scaler(dtype: torch.dtype):
    both = Both(dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(()))
    skipped = 0
    for seed in range(5):
        both.give(seed)
        gradients = [p.grad.clone() for p in both.p]
        for p in both.p:
            p.grad.mul_(scaler.get_scale())
        if seed in (0, 2):
            both.p[0 if seed else 1].grad.view(-1)[2] = math.inf if seed else math.nan
        before = snapshot(both.mixed)
        scaler.step(both.mixed)
        scaler.update()
        if seed in (0, 2):
            assert_unchanged(before, snapshot(both.mixed))
            skipped += 1
            continue
        assert all(same_bits(p.grad, g) for p, g in zip(both.p, gradients, strict=True))
        for optimizer in both.own:
            optimizer.step()
        both.check()
    assert skipped == 2
    assert float(both.mixed.state[both.p[1]]["step"]) == 3


@pytest.mark.parametrize("backend", [None, "reference"])
def test_clipping_takes_all_groups_together(backend: str | None):
    both = Both(backend=backend)
    clipping = Both(backend=backend, max_norm=0.5)
    for seed in range(3):
        clipping.give(seed)
        both.give(seed)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in both.p]))
        sl.ops.clip_grad_norm_(both.p, 0.5)
        gradients = [p.grad.clone() for p in clipping.p]
        clipping.mixed.step()
        both.mixed.step()
        assert clipping.mixed.grad_norm == pytest.approx(norm, rel=1e-6)
        assert all(torch.equal(p.grad, g) for p, g in zip(clipping.p, gradients, strict=True))
        for p, q in zip(clipping.p, both.p, strict=True):
            assert same_bits(p, q)


def test_clipping_and_scaling_in_one_step():
    both, plain = Both(max_norm=0.5), Both(max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(()))
    both.give(0)
    plain.give(0)
    for p in both.p:
        p.grad.mul_(256.0)
    scaler.step(both.mixed)
    plain.mixed.step()
    assert both.mixed.grad_norm == plain.mixed.grad_norm
    assert all(same_bits(p, q) for p, q in zip(both.p, plain.p, strict=True))


def test_closures_hooks_and_zero_grad():
    both = Both()
    seen: list[Any] = []

    def closure() -> Tensor:
        both.mixed.zero_grad()
        assert all(p.grad is None for p in both.p)
        loss = sum(((p - 1.0) ** 2).sum() for p in both.p)
        loss.backward()
        seen.append("closure")
        return loss

    both.mixed.register_step_pre_hook(lambda *args: seen.append("pre"))
    both.mixed.register_step_post_hook(lambda *args: seen.append("post"))
    losses = [both.mixed.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert seen == ["pre", "closure", "post"] * 30


def test_parameters_without_gradients_sit_a_step_out():
    both = Both()
    for seed in range(6):
        both.give(seed)
        for i in range(len(both.p)):
            if (seed + i) % 3 == 0:
                both.p[i].grad = both.q[i].grad = None
        both.mixed.step()
        for optimizer in both.own:
            optimizer.step()
    both.check()


def test_after_the_first_step_the_states_of_elementwise_groups_are_trusted():
    both = Both()
    for seed in range(4):
        both.give(seed)
        both.mixed.step()
    assert both.mixed._engine.plan.trusts_states
    both.mixed.state[both.p[1]]["exp_avg"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"the state 'exp_avg' of parameter 0 has shape \(6,\)"):
        both.mixed.step()


# Refusals

FOREIGN: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("adamw", {"momentum": 0.9}, r"algorithm='adamw' has momentum=0.9, expected keys out of amsgrad, betas"),
    ("adamw", {"split_sizes": (2, 3)}, r"algorithm='adamw' has split_sizes=\(2, 3\)"),
    ("lion", {"eps": 1e-8, "amsgrad": True}, r"algorithm='lion' has amsgrad=True, eps=1e-08, expected"),
    ("muon", {"betas": (0.9, 0.95)}, r"algorithm='muon' has betas=\(0.9, 0.95\), expected keys out of adjust_lr_fn"),
)


@pytest.mark.parametrize(("algorithm", "keys", "message"), FOREIGN, ids=str)
def test_hyper_parameters_of_another_algorithm(algorithm: str, keys: dict[str, Any], message: str):
    p = torch.nn.Parameter(torch.ones(5, 5))
    with pytest.raises(ValueError, match=message):
        sl.Muon([{"params": [p], "algorithm": algorithm, **keys}])
    optimizer = sl.Muon([torch.nn.Parameter(torch.ones(5, 5))])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], "algorithm": algorithm, **keys})
    assert_unchanged(before, snapshot(optimizer))
    # A user's own keys are nobody's business.
    optimizer.add_param_group({"params": [p], "algorithm": algorithm, "note": 7})
    assert optimizer.param_groups[1]["note"] == 7


@pytest.mark.parametrize("name", ["adam", "shampoo", "muonh", None, 3, ["adamw"]], ids=str)
def test_unknown_algorithms(name: Any):
    optimizer = sl.Muon([torch.nn.Parameter(torch.ones(5, 5))])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"algorithm=.* is unknown, expected one of 'muon', 'adamw', 'lion', 'sgd', "):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5, 5))], "algorithm": name})
    assert_unchanged(before, snapshot(optimizer))


def test_nothing_is_done_where_any_group_is_refused():
    both = Both()
    both.step(0)
    both.give(1)
    lion = both.mixed.param_groups[2]
    spoilt: list[tuple[Callable[[], None], Callable[[], None], str]] = [
        (lambda: lion.update(lr=math.nan), lambda: lion.update(lr=0.01), "Invalid learning rate: nan"),
        (
            lambda: both.mixed.param_groups[1].update(momentum=-1.0),
            lambda: both.mixed.param_groups[1].update(momentum=0.95),
            "momentum should be >= 0 but is: -1.0",
        ),
    ]
    for spoil, mend, message in spoilt:
        before = snapshot(both.mixed)
        versions = [p._version for p in both.p]
        spoil()
        with pytest.raises(ValueError, match=message):
            both.mixed.step()
        mend()
        assert_unchanged(before, snapshot(both.mixed))
        assert [p._version for p in both.p] == versions
    # A gradient, of either kind of group.
    for i, name in ((1, "AdamW"), (2, "Muon")):
        grad = both.p[i].grad
        both.p[i].grad = grad.to_sparse()
        before = snapshot(both.mixed)
        with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients, got torch.sparse_coo"):
            both.mixed.step()
        assert_unchanged(before, snapshot(both.mixed))
        both.p[i].grad = grad
    both.mixed.step()
    for optimizer in both.own:
        optimizer.step()
    both.check()


def test_nothing_is_done_where_the_matrices_could_not_be(monkeypatch):
    both = Both()
    both.step(0)
    both.give(1)
    before = snapshot(both.mixed)
    with monkeypatch.context() as patch:
        patch.setenv("STEPLADDER_MATRIX_UNIT", "abacus")
        with pytest.raises(ValueError, match="STEPLADDER_MATRIX_UNIT='abacus' is unknown"):
            both.mixed.step()
    assert_unchanged(before, snapshot(both.mixed))
    both.mixed.step()


def test_messages_count_parameters_through_all_groups():
    p = tensors()
    matrices = [("weight", p[0]), ("stack", p[2])]
    optimizer = sl.Muon([{"params": matrices}, {"params": [("bias", p[1])], "algorithm": "adamw"}])
    for x, g in zip(p, random_gradients(p, 0), strict=True):
        x.grad = g
    p[1].grad = p[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"for parameter 2 \(bias\)"):
        optimizer.step()


def test_a_network_of_many_kinds():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = sl.MuonH([{"params": matrices, "lr": 0.02}, {"params": vectors, "algorithm": "adamw", "lr": 0.01}])
    norms = [p.detach().norm() for p in matrices]
    x = matrix((32, 16), 0).view(32, 1, 4, 4)
    y = torch.randn(32, 8)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close([p.detach().norm() for p in matrices], norms)


def test_a_lazy_parameter_and_an_option_of_one_group():
    model = torch.nn.LazyLinear(4, dtype=torch.bfloat16)
    optimizer = sl.Muon(
        [
            {"params": [model.weight]},
            {"params": [model.bias], "algorithm": "adamw", "stochastic_rounding": True, "seed": 3},
        ],
        max_norm=1.0,
    )
    # Nothing has a gradient yet.
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.weight]) == {"momentum_buffer"}
    assert set(optimizer.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_distributed_checkpointing_takes_and_gives_its_state(cls: type[Any]):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)

    def make() -> Any:
        return cls([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "algorithm": "adamw", "lr": 0.2}])

    def backward() -> None:
        model.zero_grad()
        model(torch.ones(1, 5)).square().sum().backward()

    optimizer = make()
    backward()
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    fresh = make()
    for group in fresh.param_groups:
        group["lr"] = 7.0
    set_optimizer_state_dict(model, fresh, saved)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.2]
    for p in model.parameters():
        assert optimizer.state[p].keys() == fresh.state[p].keys()
        assert all(torch.equal(value, fresh.state[p][name]) for name, value in optimizer.state[p].items())
    backward()
    optimizer.step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    fresh.step()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
