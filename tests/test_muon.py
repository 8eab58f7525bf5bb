"""sl.Muon against torch.optim.Muon: steps, checkpoints, and all of a torch optimizer but its numbers."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch_cases import assert_unchanged, copy_of, normal, random_gradients, snapshot

import stepladder as sl
from stepladder import reference

SHAPES = ((24, 40), (40, 24), (17, 17), (64, 5))
# Five steps of the iteration, each of three products whose operands are rounded to bf16, relative 2^-9 in the middle
# of the roundings: 15 · 2^-9 = 0.03 of the norm if all add up, for spectra without tiny values, which a step's
# polynomial raises at nearly the rate of their errors. Twice that for two results, neither of them exact.
RELATIVE = 0.06
BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Nothing here is large: on a busy machine, forking torch's threads would cost more than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with singular values between 0.3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape[-2:]
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(*shape[:-2], m, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(*shape[:-2], n, k, generator=generator, dtype=torch.float64))[0]
    s = 0.3 + 0.7 * torch.rand(k, generator=generator, dtype=torch.float64)
    return ((u * s) @ v.mT).to(dtype)


class Pair:
    """The same parameters under sl.Muon and torch.optim.Muon.

    Attributes:
        p, q: The parameters of `ours` and of `theirs`.
    """

    def __init__(self, hyper: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.p = [copy_of(x) for x in normal(SHAPES, dtype, 0)]
        self.q = [copy_of(p) for p in self.p]
        self.ours, self.theirs = sl.Muon(self.p, **hyper, **options), torch.optim.Muon(self.q, **hyper)

    def give(self, seed: int) -> None:
        for i, (p, q) in enumerate(zip(self.p, self.q, strict=True)):
            p.grad = matrix(p.shape, 100 * seed + i, p.dtype)
            q.grad = p.grad.clone()

    def step(self, seed: int) -> None:
        self.give(seed)
        self.ours.step()
        self.theirs.step()

    def run(self, steps: int, seed: int = 1) -> None:
        for step in range(steps):
            self.step(seed + step)
        self.check(steps)

    def check(self, steps: int) -> None:
        """Buffers agree to the rounding, weights to the error of `steps` iterations."""
        group = self.ours.param_groups[0]
        for p, q in zip(self.p, self.q, strict=True):
            assert_buffers_close(self.ours.state[p]["momentum_buffer"], self.theirs.state[q]["momentum_buffer"], steps)
            length = float(group["lr"]) * scale_of(group["adjust_lr_fn"], p.shape) * 1.2 * math.sqrt(min(p.shape))
            bound = steps * (2 * RELATIVE * length + 2 * 2.0**-23 * float(q.detach().norm()))
            assert (p.double() - q.double()).norm().item() <= bound


def scale_of(adjust_lr_fn: Any, shape: tuple[int, ...]) -> float:
    return reference.adjustment(adjust_lr_fn, shape[-2], shape[-1])


def assert_buffers_close(ours: Tensor, theirs: Tensor, steps: int) -> None:
    """Where the machine has a fused multiply-add, torch's lerp uses it: two roundings fewer, of each step."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    ulp = torch.finfo(ours.dtype).eps
    assert bool(((ours - theirs).abs() <= steps * 2 * ulp * float(theirs.abs().max())).all())


VARIANTS: tuple[dict[str, Any], ...] = (
    {"lr": 0.05},
    {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.8, "nesterov": False},
    {"lr": 0.05, "momentum": 0.0, "adjust_lr_fn": "original"},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
    {"lr": 0.05, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 7, "eps": 1e-3},
    {"lr": torch.tensor(0.05)},
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hyper", VARIANTS, ids=str)
def test_steps_are_torchs(hyper: dict[str, Any], backend: str):
    Pair(hyper, backend=backend).run(6)


def test_steps_in_fp64_are_torchs():
    Pair({"lr": 0.05}, torch.float64, backend=None).run(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_one_step_from_torchs_state(dtype: torch.dtype):
    pair = Pair({"lr": 0.05}, dtype)
    for seed in range(3):
        before = [q.detach().double() for q in pair.q]
        pair.step(seed)
        for p, q, w in zip(pair.p, pair.q, before, strict=True):
            ours, theirs = (x["momentum_buffer"].double() for x in (pair.ours.state[p], pair.theirs.state[q]))
            eps = torch.finfo(dtype).eps
            assert bool(((ours - theirs).abs() <= eps * theirs.abs().max()).all())
            length = 0.05 * scale_of(None, p.shape) * 1.2 * math.sqrt(min(p.shape))
            # One rounding here, two there; torch orthogonalises what it has rounded to half precision.
            bound = (2 * RELATIVE + 4 * eps) * length + 2 * eps * float(w.norm())
            assert (p.double() - q.double()).norm().item() <= bound
        with torch.no_grad():
            for p, q in zip(pair.p, pair.q, strict=True):
                p.copy_(q)
        pair.ours.load_state_dict(pair.theirs.state_dict())


# Constructor, groups


def test_the_constructor_takes_what_torchs_takes():
    def positional(cls: type[Any]) -> list[tuple[str, Any]]:
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(sl.Muon) == positional(torch.optim.Muon)


def test_defaults_groups_and_repr_are_torchs():
    pair = Pair({})
    assert pair.ours.defaults == pair.theirs.defaults
    assert list(pair.ours.param_groups[0]) == list(pair.theirs.param_groups[0])
    assert repr(pair.ours) == repr(pair.theirs)
    assert isinstance(pair.ours, torch.optim.Optimizer)


def test_named_parameters_groups_and_generators():
    p = [copy_of(x) for x in normal(SHAPES, torch.float32, 0)]
    for params in (
        (x for x in p),
        [(f"layer.{i}", x) for i, x in enumerate(p)],
        [{"params": p[:1], "lr": 0.5}, {"params": iter(p[1:])}],
        [{"params": p[0]}, {"params": p[1:]}],
        [{"params": p, "param_names": [f"layer.{i}" for i in range(len(p))]}],
    ):
        optimizer = sl.Muon(params)
        assert [x for group in optimizer.param_groups for x in group["params"]] == p
        for x, g in zip(p, random_gradients(p, 0), strict=True):
            x.grad = g
        optimizer.step()
        assert len(optimizer.state) == len(p)


def test_state_keys_and_checkpoint_structure_are_torchs():
    pair = Pair({"lr": 0.05})
    for seed in range(2):
        ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert {k: set(v) for k, v in ours["state"].items()} == {k: set(v) for k, v in theirs["state"].items()}
        pair.give(seed)
        pair.p[1].grad = pair.q[1].grad = None
        pair.ours.step()
        pair.theirs.step()


def test_without_gradients_a_step_does_nothing():
    pair = Pair({})
    before = snapshot(pair.ours)
    assert pair.ours.step() is None
    assert_unchanged(before, snapshot(pair.ours))


# Checkpoints


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["in memory", "weights_only file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_a_run_goes_on_from_a_checkpoint(direction: str, dtype: torch.dtype, carry: Callable[[Any], Any]):
    makers = {"ours": sl.Muon, "torch": torch.optim.Muon}
    source, target = (makers[name] for name in direction.split(" to "))
    p = [copy_of(x) for x in normal(SHAPES, dtype, 0)]
    first = source(p, lr=0.05, momentum=0.9)
    for seed in range(3):
        for i, x in enumerate(p):
            x.grad = matrix(x.shape, 10 * seed + i, dtype)
        first.step()
    q = [copy_of(x) for x in p]
    second = target(q, lr=0.7)
    second.load_state_dict(carry(first.state_dict()))
    assert second.param_groups[0]["lr"] == 0.05
    for x, y in zip(p, q, strict=True):
        ours, loaded = first.state[x], second.state[y]
        assert ours.keys() == loaded.keys() == {"momentum_buffer"}
        assert torch.equal(ours["momentum_buffer"], loaded["momentum_buffer"])
        assert ours["momentum_buffer"].dtype == loaded["momentum_buffer"].dtype
    for x, y in zip(p, q, strict=True):
        x.grad = y.grad = matrix(x.shape, 99, dtype)
    first.step()
    second.step()
    if direction == "ours to ours":
        assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True))


def test_a_torch_checkpoint_leaves_the_options_that_torch_does_not_have():
    (p,) = [copy_of(x) for x in normal([(6, 4)], torch.float32, 0)]
    theirs = torch.optim.Muon([p], lr=0.3)
    ours = sl.Muon([p], variant="normuon", momentum_form="sum", maximize=True)
    p.grad = torch.ones(6, 4)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["variant"], group["momentum_form"], group["maximize"]) == (0.3, "normuon", "sum", True)
    ours.step()
    assert set(ours.state[p]) == {"momentum_buffer", "second_momentum_buffer"}


def test_states_of_half_precision_parameters_in_fp32():
    p = [copy_of(x) for x in normal(SHAPES, torch.bfloat16, 0)]
    optimizer = sl.Muon(p, lr=0.05, state_dtype=torch.float32)
    exact = [torch.zeros(x.shape, dtype=torch.float64) for x in p]
    for seed in range(4):
        for i, x in enumerate(p):
            x.grad = matrix(x.shape, 10 * seed + i, torch.bfloat16)
            exact[i] = 0.95 * exact[i] + 0.05 * x.grad.double()
        optimizer.step()
    for x, u in zip(p, exact, strict=True):
        buffer = optimizer.state[x]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        # Four steps, each with two roundings of numbers below 2.
        torch.testing.assert_close(buffer.double(), u, rtol=0, atol=4 * 2.0**-23)
    twin = sl.Muon([copy_of(x) for x in p], state_dtype=torch.float32)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in twin.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_copies(cls: type[Any], copied: Callable[[Any], Any]):
    p = [copy_of(x) for x in normal(SHAPES, torch.float32, 0)]
    optimizer = cls(p, lr=0.05, max_norm=0.5, backend="reference")
    for seed in range(2):
        q, twin = copied((p, optimizer))
        assert twin.param_groups[0]["params"][0] is q[0]
        for x, y in zip(p, q, strict=True):
            x.grad = matrix(x.shape, seed)
            y.grad = x.grad.clone()
        optimizer.step()
        twin.step()
        assert twin.grad_norm == optimizer.grad_norm
        for x, y in zip(p, q, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(optimizer.state[x]["momentum_buffer"], twin.state[y]["momentum_buffer"])


def test_distributed_checkpointing_takes_and_gives_its_state():
    for cls in (sl.Muon, sl.MuonH):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 4, bias=False)
        optimizer = cls(model.parameters(), lr=0.1)
        model(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        fresh = cls(model.parameters(), lr=0.1)
        weight = model.weight.detach().clone()
        # It makes the state by a step with lr=0 and gradients of zero.
        set_optimizer_state_dict(model, fresh, saved)
        assert torch.equal(model.weight, weight)
        for name, value in optimizer.state[model.weight].items():
            assert torch.equal(fresh.state[model.weight][name], value)


# Rates of zero, gradients of zero, NaN


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", [sl.Muon, sl.MuonH, lambda p, **kw: sl.Muon(p, variant="normuon", **kw)])
def test_a_rate_of_zero_moves_nothing(make: Callable[..., Any], lr: Any, backend: str):
    w = torch.randn(6, 9)
    w[0] = -0.0
    w[1, :3] = 1e-42
    p = torch.nn.Parameter(w.clone())
    optimizer = make([p], lr=lr, backend=backend)
    for _ in range(2):
        p.grad = torch.randn(6, 9)
        optimizer.step()
        assert torch.equal(p.view(torch.int32), w.view(torch.int32))
    p.grad = torch.full((6, 9), math.nan)
    optimizer.step()
    assert torch.equal(p.view(torch.int32), w.view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_gradients_of_zero_leave_the_weights_to_their_decay(cls: type[Any], backend: str):
    w = torch.randn(6, 9)
    p = torch.nn.Parameter(w.clone())
    optimizer = cls([p], lr=0.5, backend=backend)
    p.grad = torch.zeros(6, 9)
    optimizer.step()
    assert torch.equal(p, w * (1 - 0.5 * 0.1) if cls is sl.Muon else w)
    assert not optimizer.state[p]["momentum_buffer"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_a_bad_gradient_spoils_its_own_matrix_alone(cls: type[Any], bad: float, backend: str):
    def run(spoilt: bool) -> tuple[Tensor, Tensor]:
        p = [copy_of(x) for x in normal([(6, 9), (3, 6, 9)], torch.float32, 0)]
        optimizer = cls(p, lr=0.1, backend=backend)
        for x, g in zip(p, random_gradients(p, 0), strict=True):
            x.grad = g
        if spoilt:
            p[1].grad[1, 2, 3] = bad
        optimizer.step()
        return p[0].detach(), p[1].detach()

    sound, found = run(False), run(True)
    assert torch.equal(found[0], sound[0])
    assert torch.equal(found[1][[0, 2]], sound[1][[0, 2]])
    assert found[1][1].isnan().all()


# Hooks, closures, schedulers, GradScaler, autograd


def test_closures_and_hooks():
    pair = Pair({"lr": 0.05})
    log = []
    for optimizer, params in ((pair.ours, pair.p), (pair.theirs, pair.q)):
        seen: list[Any] = []

        def closure(optimizer: Any = optimizer, params: Any = params, seen: Any = seen) -> Tensor:
            seen.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum(((p - 1.0) ** 2).sum() for p in params)
            loss.backward()
            return loss

        optimizer.register_step_pre_hook(lambda opt, args, kwargs, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda opt, args, kwargs, seen=seen: seen.append("post"))
        with torch.no_grad():
            loss = optimizer.step(closure)
        log.append((loss.item(), seen))
    assert log[0] == log[1]
    pair.check(1)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.2, total_steps=9),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str):
    pair = Pair({"lr": 0.05})
    schedulers = [SCHEDULERS[name](opt) for opt in (pair.ours, pair.theirs)]
    for seed in range(8):
        before = [(p.detach().clone(), q.detach().clone()) for p, q in zip(pair.p, pair.q, strict=True)]
        pair.step(seed)
        ours, theirs = (opt.param_groups[0] for opt in (pair.ours, pair.theirs))
        assert (ours["lr"], ours["momentum"]) == (theirs["lr"], theirs["momentum"])
        for p, q, (p0, q0) in zip(pair.p, pair.q, before, strict=True):
            length = ours["lr"] * scale_of(None, p.shape) * 1.2 * math.sqrt(min(p.shape))
            # The decay, too, is of the weights of each.
            apart = float((p0.double() - q0.double()).norm()) + 2 * 2.0**-23 * float(q0.norm())
            assert (p.double() - q.double()).norm().item() <= apart + 2 * RELATIVE * length
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_under_a_grad_scaler(dtype: torch.dtype):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    p = [copy_of(x) for x in normal(SHAPES, dtype, 0)]
    q = [copy_of(x) for x in p]
    ours, plain = sl.Muon(p, lr=0.05), sl.Muon(q, lr=0.05)
    for step in range(4):
        ours.zero_grad()
        gradients = [matrix(x.shape, 10 * step + i, dtype) for i, x in enumerate(p)]
        scaler.scale(torch.zeros(()))
        for x, y, g in zip(p, q, gradients, strict=True):
            x.grad, y.grad = g * scaler.get_scale(), g.clone()
        if step == 1:
            p[2].grad[3, 3] = math.inf
        before = snapshot(ours)
        versions = [x._version for x in p]
        scaler.step(ours)
        scaler.update()
        if step == 1:
            assert_unchanged(before, snapshot(ours))
            assert [x._version for x in p] == versions
            continue
        plain.step()
        for x, y, g in zip(p, q, gradients, strict=True):
            # A power of two: nothing is rounded, and what is written back is the gradient.
            assert torch.equal(x.grad, g)
            assert torch.equal(x, y)
            assert torch.equal(ours.state[x]["momentum_buffer"], plain.state[y]["momentum_buffer"])


def test_maximize_is_the_other_direction():
    p, q = torch.nn.Parameter(torch.ones(5, 7)), torch.nn.Parameter(torch.ones(5, 7))
    up, down = sl.Muon([p], maximize=True), sl.Muon([q])
    for seed in range(3):
        p.grad = matrix((5, 7), seed)
        q.grad = -p.grad
        up.step()
        down.step()
        assert torch.equal(p, q)


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["clipped", "not clipped"])
def test_gradients_are_clipped_as_they_are_read(factor: float):
    p = [copy_of(x) for x in normal(SHAPES, torch.float32, 0)]
    q = [copy_of(x) for x in p]
    grads = [matrix(x.shape, i) for i, x in enumerate(p)]
    norm = float(torch.nn.utils.get_total_norm(grads))
    limit = factor * norm
    ours, plain = sl.Muon(p, max_norm=limit, momentum_form="sum"), sl.Muon(q, momentum_form="sum")
    for x, y, g in zip(p, q, grads, strict=True):
        x.grad, y.grad = g, g.clone()
    ours.step()
    sl.ops.clip_grad_norm_(q, limit)
    plain.step()
    assert ours.grad_norm == pytest.approx(norm, rel=1e-6)
    for x, y, g in zip(p, q, grads, strict=True):
        assert torch.equal(x.grad, g)
        assert torch.equal(ours.state[x]["momentum_buffer"], plain.state[y]["momentum_buffer"])


def test_a_step_raises_the_version_of_what_it_wrote():
    pair = Pair({})
    pair.give(0)
    pair.p[1].grad = None
    before = [p._version for p in pair.p]
    pair.ours.step()
    assert [p._version > old for p, old in zip(pair.p, before, strict=True)] == [True, False, True, True]
    assert all(p.grad is None or p.grad._version == 0 for p in pair.p)
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = sl.Muon([p])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_carry_a_graph_and_frozen_parameters():
    p = torch.nn.Parameter(torch.eye(3))
    frozen = torch.nn.Parameter(torch.eye(3), requires_grad=False)
    optimizer = sl.Muon([p, frozen])
    (p**3).sum().backward(create_graph=True)
    assert p.grad is not None
    assert p.grad.requires_grad
    optimizer.step()
    assert torch.equal(frozen, torch.eye(3))
    assert frozen not in optimizer.state
    assert not optimizer.state[p]["momentum_buffer"].requires_grad
    optimizer.zero_grad()


def test_lazy_modules():
    model = torch.nn.LazyLinear(3, bias=False)
    optimizer = sl.Muon(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["momentum_buffer"].shape == (3, 4)


def test_training_a_network():
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    y = x.sin().sum(dim=1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = sl.Muon([{"params": matrices, "lr": 0.02}, {"params": others, "algorithm": "adamw", "lr": 0.01}])
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]
