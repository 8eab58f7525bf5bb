"""What Shampoo and SOAP share: layouts, packing, checkpoints, mixed groups, scaling, zeros, refusals."""

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
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch_cases import assert_unchanged, copy_of, normal, random_gradients, snapshot

import stepladder as sl

CLASSES = (sl.Shampoo, sl.SOAP)
BACKENDS = ("cpu", "reference")
SHAPES = ((6, 5), (4, 3, 2, 2), (7,), (2, 3, 4), (), (8, 9))
# Work in each step, blocks of Shampoo, bases of all of SOAP's dimensions.
HYPER: dict[Any, dict[str, Any]] = {
    sl.Shampoo: {"lr": 0.05, "max_preconditioner_dim": 4, "precondition_frequency": 4, "weight_decay": 0.1},
    sl.SOAP: {"lr": 0.05, "precondition_frequency": 4, "weight_decay": 0.1},
}
FLAT = {sl.Shampoo: ("factors", "roots"), sl.SOAP: ("factors", "bases")}

each_class = pytest.mark.parametrize("cls", CLASSES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@each_class
def test_nothing_is_done_where_products_could_not_be(cls: Any, monkeypatch: pytest.MonkeyPatch):
    params = tensors()
    optimizer = make(cls, params)
    run(optimizer, range(2))
    give(params, 2)
    before = snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setenv("STEPLADDER_MATRIX_UNIT", "abacus")
        with pytest.raises(ValueError, match="STEPLADDER_MATRIX_UNIT='abacus' is unknown"):
            optimizer.step()
    assert_unchanged(before, snapshot(optimizer))
    optimizer.step()


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [copy_of(x) for x in normal(SHAPES, dtype, 0)]


def make(cls: Any, params: Any, **options: Any) -> Any:
    return cls(params, **(HYPER[cls] | options))


def give(params: list[Any], seed: int, sparse: bool = False) -> None:
    """Gradients; with `sparse` every third parameter has none, another one at each step."""
    for k, (p, g) in enumerate(zip(params, random_gradients(params, seed), strict=True)):
        p.grad = None if sparse and (seed + k) % 3 == 0 else g


def run(optimizer: Any, seeds: range, sparse: bool = False) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        give(params, seed, sparse)
        optimizer.step()


def assert_same(ours: Any, other: Any) -> None:
    for group, twin in zip(ours.param_groups, other.param_groups, strict=True):
        for k, (p, q) in enumerate(zip(group["params"], twin["params"], strict=True)):
            assert same_bits(p, q), f"parameter {k}"
            state, theirs = ours.state[p], other.state[q]
            assert state.keys() == theirs.keys()
            assert all(same_bits(state[name], theirs[name]) for name in state), f"parameter {k}"


# Checkpoints and copies


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_class
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [3, 6])
def test_a_staggered_run_goes_on_from_a_checkpoint(cls: Any, options: Any, dtype: torch.dtype, after: int):
    # Neither 3 nor 6 steps are a multiple of 4: some of what is refreshed was, some was not.
    first = make(cls, tensors(dtype), stagger=True, **options)
    run(first, range(after), sparse=True)
    second = make(cls, [copy_of(p) for p in first.param_groups[0]["params"]], lr=7.0, **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0]["stagger"]
    assert_same(first, second)
    run(first, range(after, 13), sparse=True)
    run(second, range(after, 13), sparse=True)
    assert_same(first, second)


@each_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(cls: Any, copied: Callable[[Any], Any]):
    optimizer = make(cls, tensors(), stagger=True, max_norm=1.0)
    run(optimizer, range(3), sparse=True)
    twin = copied(optimizer)
    run(optimizer, range(3, 9), sparse=True)
    run(twin, range(3, 9), sparse=True)
    assert_same(optimizer, twin)


@each_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_factors_are_in_the_dtype_of_the_arithmetic_and_stay_so(cls: Any, dtype: torch.dtype):
    optimizer = make(cls, tensors(dtype))
    run(optimizer, range(6))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    twin = make(cls, [copy_of(p) for p in optimizer.param_groups[0]["params"]])
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in (optimizer, twin):
        for p, state in each.state.items():
            assert [state[name].dtype for name in FLAT[cls]] == [wide, wide]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == p.dtype == dtype
            assert state["step"].dtype == torch.float32
    assert_same(optimizer, twin)
    # What fp32 holds of them is more than the parameter's dtype would.
    factors = optimizer.state[optimizer.param_groups[0]["params"][0]]["factors"]
    assert torch.equal(factors, factors.to(dtype).to(wide)) == (dtype == torch.float64)


@each_class
def test_checkpoints_that_do_not_fit(cls: Any):
    optimizer = make(cls, tensors())
    run(optimizer, range(2))
    before = snapshot(optimizer)
    good = optimizer.state_dict()
    size = tuple(good["state"][0]["factors"].shape)

    def spoilt(**changes: Any) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        bad["state"][0] = {k: v for k, v in (bad["state"][0] | changes).items() if v != ""}
        return bad

    other = FLAT[cls][1]
    rows: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        (
            spoilt(factors=torch.zeros(3)),
            ValueError,
            rf"'factors' of parameter 0 has shape \(3,\), expected \({size[0]},\)",
        ),
        (spoilt(**{other: torch.zeros(6, 5)}), ValueError, rf"'{other}' of parameter 0 has shape \(6, 5\)"),
        (spoilt(**{other: ""}), ValueError, rf"the state of parameter 0 lacks '{other}'"),
        (spoilt(step=""), ValueError, r"the state of parameter 0 lacks 'step'"),
        (spoilt(velocity=torch.zeros(6, 5)), ValueError, r"unknown 'velocity'"),
        (spoilt(factors=torch.zeros(size, dtype=torch.int32)), TypeError, r"dtype torch.int32, expected a floating-p"),
    )
    for bad, error, message in rows:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(bad)
    for changes, message in (
        ({"packed": True}, r"'factors' of parameter 0 has shape"),
        ({"precondition_frequency": 0}, r"precondition_frequency=0 is out of range"),
    ):
        bad = copy.deepcopy(good)
        bad["param_groups"][0] |= changes
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    del (bad := copy.deepcopy(good))["param_groups"][0]["stagger"]
    with pytest.raises(ValueError, match="group 0 of the loaded state dict lacks 'stagger'"):
        optimizer.load_state_dict(bad)
    assert_unchanged(before, snapshot(optimizer))


@each_class
def test_distributed_checkpointing_takes_and_gives_its_state(cls: Any):
    model = torch.nn.Linear(5, 4)
    optimizer, fresh = (make(cls, model.parameters()) for _ in range(2))
    for _ in range(5):
        model.zero_grad()
        model(torch.randn(3, 5)).square().sum().backward()
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    # It makes the state by a step with lr=0 and gradients of zero.
    set_optimizer_state_dict(model, fresh, saved)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert_same(optimizer, fresh)


@each_class
@pytest.mark.parametrize("stagger", [False, True])
def test_what_makes_states_for_a_checkpoint_is_no_step(cls: Any, stagger: bool):
    """A new optimizer is stepped with lr=0 and gradients of zero; training then begins as without."""
    models = [torch.nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(cls, model.parameters(), stagger=stagger) for model in models]
    states = get_optimizer_state_dict(models[0], optimizers[0])["state"]
    assert [float(state["step"]) for state in states.values()] == [0.0, 0.0]
    for seed in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            for index, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + index))
            optimizer.step()
    assert_same(*optimizers)


# Packing, and what states take


@each_class
@each_backend
@pytest.mark.parametrize("options", [{}, {"variant": "kl"}, {"merge_dims": False}], ids=str)
def test_packed_factors_change_no_bit_and_take_half(cls: Any, options: dict[str, Any], backend: str):
    if "variant" in options and cls is sl.Shampoo:
        pytest.skip("variants are SOAP's")
    plain, packed = (make(cls, tensors(), stagger=True, packed=x, backend=backend, **options) for x in (False, True))
    for seed in range(9):
        run(plain, range(seed, seed + 1))
        run(packed, range(seed, seed + 1))
        for p, q in zip(plain.param_groups[0]["params"], packed.param_groups[0]["params"], strict=True):
            assert same_bits(p, q)
    symmetric = FLAT[cls] if cls is sl.Shampoo else ("factors",)
    for p, q in zip(plain.param_groups[0]["params"], packed.param_groups[0]["params"], strict=True):
        layout = cls.layout(p, plain.param_groups[0])
        for name in symmetric:
            whole = [x for x in layout.views(plain.state[p][name]) if x is not None]
            triangles = [x[torch.tril(torch.ones_like(x)).bool()] for x in whole]
            assert same_bits(packed.state[q][name], torch.cat([*triangles, torch.zeros(0)]))
    sides = [n for p in plain.param_groups[0]["params"] for n in cls.layout(p, plain.param_groups[0]).sides if n]
    saved = 4 * len(symmetric) * sum(n * (n - 1) // 2 for n in sides)
    assert saved > 0
    assert plain.state_bytes() - packed.state_bytes() == saved


BYTES: tuple[tuple[str, dict[str, Any], int], ...] = (
    # For parameters of 6×5 and of 7 in fp32: 37 elements; step counts of 4 bytes.
    ("SGD", {}, 0),
    ("SGD", {"momentum": 0.9}, 4 * 37),
    ("Adagrad", {}, 4 * 37 + 8),
    ("RMSprop", {"momentum": 0.9, "centered": True}, 12 * 37 + 8),
    ("Adam", {"amsgrad": True}, 12 * 37 + 8),
    ("AdamW", {}, 8 * 37 + 8),
    ("SignSGD", {"momentum": 0.9}, 4 * 37),
    ("Lion", {}, 4 * 37),
    ("LARS", {}, 4 * 37),
    ("LAMB", {}, 8 * 37 + 8),
    ("Muon", {}, 4 * 30),
    ("MuonH", {}, 4 * 30 + 4),
    # Moments, a step, a count of failures; factors and roots of 6, 5 and 7.
    ("Shampoo", {"merge_dims": False}, 8 * 37 + 16 + 2 * 4 * (36 + 25 + 49)),
    ("Shampoo", {"merge_dims": False, "packed": True}, 8 * 37 + 16 + 2 * 4 * (21 + 15 + 28)),
    ("Shampoo", {"grafting": "sgd", "precondition_1d": False, "merge_dims": False}, 4 * 37 + 16 + 2 * 4 * (36 + 25)),
    ("SOAP", {}, 8 * 37 + 16 + 2 * 4 * (36 + 25)),
    ("SOAP", {"packed": True}, 8 * 37 + 16 + 4 * (36 + 25) + 4 * (21 + 15)),
    ("SOAP", {"variant": "kl"}, 8 * 37 + 16 + 2 * 4 * (36 + 25) + 4 * (6 + 5)),
)


@pytest.mark.parametrize(("name", "options", "expected"), BYTES, ids=str)
def test_state_bytes(name: str, options: dict[str, Any], expected: int):
    params = [copy_of(x) for x in normal([(6, 5), (7,)], torch.float32, 0)]
    optimizer = getattr(sl, name)(params[:1] if name.startswith("Muon") else params, **options)
    if name != "Adagrad":
        assert optimizer.state_bytes() == 0
    for seed in range(2):
        for p in params:
            p.grad = torch.ones_like(p) * (seed + 1)
        optimizer.step()
    assert optimizer.state_bytes() == expected
    assert type(optimizer.state_bytes()) is int


def test_state_bytes_counts_memory_once_and_by_its_dtype():
    p = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2)]
    for options, each in (({}, 2 * 2), ({"state_dtype": torch.float32}, 2 * 4)):
        optimizer = sl.AdamW(p, **options)
        for x in p:
            x.grad = torch.ones_like(x)
        optimizer.step()
        assert optimizer.state_bytes() == 2 * (8 * each + 4)
    shared = torch.zeros(16)
    optimizer.state[p[0]]["exp_avg"], optimizer.state[p[1]]["exp_avg"] = shared[:8], shared[8:]
    assert optimizer.state_bytes() == 2 * (8 * each + 4)


# Zeros, layouts


@each_class
@each_backend
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_rate_of_zero_moves_nothing(cls: Any, lr: Any, backend: str):
    w = torch.randn(6, 9)
    w[0], w[1, :3] = -0.0, 1e-42
    p = torch.nn.Parameter(w.clone())
    optimizer = make(cls, [p], lr=lr, precondition_frequency=1, backend=backend)
    for seed in range(3):
        p.grad = torch.randn(6, 9) if seed < 2 else torch.full((6, 9), math.nan)
        optimizer.step()
        assert same_bits(p, w)


@each_class
@each_backend
def test_gradients_of_zero_leave_the_weights_to_their_decay(cls: Any, backend: str):
    p = torch.nn.Parameter(torch.randn(6, 9))
    w = p.detach().clone()
    optimizer = make(cls, [p], precondition_frequency=1, backend=backend)
    for _ in range(3):
        p.grad = torch.zeros(6, 9)
        optimizer.step()
    # SOAP waits for a gradient.
    decay = 1.0 if cls is sl.SOAP else (1.0 - 0.05 * 0.1) ** 3
    torch.testing.assert_close(p.detach(), w * decay, rtol=6 * 2.0**-24, atol=0)
    assert not optimizer.state[p]["exp_avg"].any()
    assert not optimizer.state[p]["factors"].any()


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((4, 3, 2, 2), lambda x: x.to(memory_format=torch.channels_last)),
    "transposed": ((6, 5), lambda x: x.T.contiguous().T),
    "every other column": ((6, 5), lambda x: torch.stack([x, x], -1).flatten(-2)[:, ::2]),
    "permuted": ((2, 3, 4), lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
}


@each_class
@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [False, True], ids=["contiguous gradient", "gradient likewise"])
def test_layouts_are_nobodys_business(cls: Any, layout: str, gradient: bool, backend: str):
    shape, arrange = LAYOUTS[layout]
    p = copy_of(normal([shape], torch.float64, 0)[0])
    q = torch.nn.Parameter(arrange(p.detach().clone()))
    assert q.stride() != p.stride()
    ours, plain = make(cls, [q], backend=backend), make(cls, [p], backend=backend)
    for seed in range(9):
        g = normal([shape], torch.float64, 10 + seed)[0]
        p.grad, q.grad = g, arrange(g.clone()) if gradient else g.clone()
        ours.step()
        plain.step()
    # Sums in another order, in fp64.
    torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-9, atol=1e-11)
    for name, value in plain.state[p].items():
        torch.testing.assert_close(ours.state[q][name], value, rtol=1e-9, atol=1e-11)


@each_class
@each_backend
def test_empty_parameters(cls: Any, backend: str):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0,), (0, 4), (3, 0, 2), (2, 2))]
    optimizer = make(cls, params, backend=backend, stagger=True)
    run(optimizer, range(6))
    assert params[3].abs().min() > 0.0
    twin = make(cls, [copy_of(p) for p in params], backend=backend)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    run(twin, range(6, 8))


@each_class
def test_parameters_that_share_memory_step_one_after_another(cls: Any):
    memory = torch.randn(6, 5)
    p = [torch.nn.Parameter(memory), torch.nn.Parameter(memory[:4])]
    copies = [copy_of(x) for x in p]
    together, alone = make(cls, p), [make(cls, [x]) for x in copies]
    for seed in range(6):
        for x, y, g in zip(p, copies, random_gradients(p, seed), strict=True):
            x.grad, y.grad = g, g.clone()
        together.step()
        alone[0].step()
        with torch.no_grad():
            copies[1].copy_(copies[0][:4])
        alone[1].step()
        with torch.no_grad():
            copies[0][:4] = copies[1]
        assert torch.equal(p[0], copies[0])


@each_class
def test_the_number_of_threads_changes_little_and_harms_nothing(cls: Any):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        optimizer = make(cls, tensors(torch.float64), stagger=True)
        run(optimizer, range(9))
        found.append(optimizer.param_groups[0]["params"])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# Mixed groups


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    vectors = [p for p in params if p.ndim < 2]
    return [{"params": vectors, "algorithm": "adamw", "lr": 0.02}, {"params": [p for p in params if p.ndim > 1]}]


@each_class
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"maximize": True}], ids=str)
def test_groups_step_as_under_optimizers_of_their_own(cls: Any, options: dict[str, Any]):
    p, q = tensors(), tensors()
    mixed = make(cls, groups_of(p), **options)
    adamw, own = (groups_of(q)[0] | {"algorithm": "adamw"}), groups_of(q)[1]
    del adamw["algorithm"]
    others = [sl.AdamW([adamw], **options), make(cls, [own], **options)]
    for seed in range(9):
        give(p, seed)
        give(q, seed)
        mixed.step()
        for other in others:
            other.step()
    states = {x: state for other in others for x, state in other.state.items()}
    for x, y in zip(p, q, strict=True):
        assert same_bits(x, y)
        assert mixed.state[x].keys() == states[y].keys()
        assert all(same_bits(mixed.state[x][name], states[y][name]) for name in states[y])


@each_class
def test_routing(cls: Any):
    model = torch.nn.Sequential(
        torch.nn.Embedding(9, 6),
        torch.nn.Linear(6, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 8),
        torch.nn.Linear(8, 9),
    )
    name = cls.algorithm
    groups = sl.param_groups(model, algorithm=name, **{name: {"precondition_frequency": 2}})
    optimizer = cls(groups, lr=0.01)
    by_name = {route.name: route.algorithm for route in groups.routes}
    assert [n for n, algorithm in by_name.items() if algorithm == name] == ["1.weight", "3.weight"]
    assert {algorithm for n, algorithm in by_name.items() if n not in ("1.weight", "3.weight")} == {"adamw"}
    assert optimizer.param_groups[0]["precondition_frequency"] == 2
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(9)).logsumexp(-1).sum().backward()
        optimizer.step()
    assert not any(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    # Convolutions and fused projections have nothing to be told of.
    other = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3), torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8))
    cls(sl.param_groups(other, algorithm=name, rules={"*": name}))
    with pytest.raises(ValueError, match=r"split\['\*in_proj_weight'\] decides for no parameter"):
        sl.param_groups(other, algorithm=name, split={"*in_proj_weight": 3})
    with pytest.raises(ValueError, match=r"sets 'momentum', expected keys out of"):
        sl.param_groups(other, algorithm=name, **{name: {"momentum": 0.9}})


# GradScaler, clipping, closures, schedulers


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_under_a_grad_scaler(cls: Any, dtype: torch.dtype):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(()))
    p, q = tensors(dtype), tensors(dtype)
    ours, plain = make(cls, p), make(cls, q)
    for seed in range(9):
        give(p, seed)
        give(q, seed)
        for x in p:
            x.grad.mul_(scaler.get_scale())
        if seed in (0, 5):
            p[0].grad[2, 2] = math.inf if seed else math.nan
        before = snapshot(ours)
        scaler.step(ours)
        scaler.update()
        if seed in (0, 5):
            assert_unchanged(before, snapshot(ours))
            continue
        plain.step()
        assert all(same_bits(x.grad, y.grad) for x, y in zip(p, q, strict=True))
    assert_same(ours, plain)


@each_class
@each_backend
@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["clipped", "not clipped"])
def test_gradients_are_clipped_as_they_are_read(cls: Any, factor: float, backend: str):
    p, q = tensors(), tensors()
    give(p, 1)
    norm = float(torch.nn.utils.get_total_norm([x.grad for x in p]))
    limit = factor * norm
    ours, plain = make(cls, p, max_norm=limit, backend=backend), make(cls, q, backend=backend)
    for seed in (1, 1, 1, 1, 1, 1):
        give(p, seed)
        give(q, seed)
        gradients = [x.grad.clone() for x in p]
        ours.step()
        sl.ops.clip_grad_norm_(q, limit)
        plain.step()
        assert all(torch.equal(x.grad, g) for x, g in zip(p, gradients, strict=True))
    assert ours.grad_norm == pytest.approx(norm, rel=1e-6)
    assert_same(ours, plain)


@each_class
def test_maximize_is_the_other_direction(cls: Any):
    p, q = tensors(), tensors()
    up, down = make(cls, p, maximize=True), make(cls, q)
    for seed in range(6):
        give(p, seed)
        give(q, seed)
        for y in q:
            y.grad.neg_()
        up.step()
        down.step()
    assert_same(up, down)


@each_class
def test_closures_hooks_versions_and_schedulers(cls: Any):
    p, q = tensors(torch.float64), tensors(torch.float64)
    ours, other = make(cls, p), make(cls, q)
    scheduler = lr_scheduler.LambdaLR(ours, lambda t: 0.9**t)
    seen: list[str] = []
    ours.register_step_pre_hook(lambda *args: seen.append("pre"))
    ours.register_step_post_hook(lambda *args: seen.append("post"))

    def closure() -> Tensor:
        ours.zero_grad()
        loss = sum(((x - 1.0) ** 2).sum() for x in p)
        loss.backward()
        seen.append("closure")
        return loss

    losses = []
    for t in range(30):
        versions = [x._version for x in p]
        losses.append(ours.step(closure).item())
        assert all(x._version > version for x, version in zip(p, versions, strict=True))
        other.param_groups[0]["lr"] = 0.05 * 0.9**t
        for x in q:
            x.grad = 2 * (x.detach() - 1.0)
        other.step()
        scheduler.step()
    assert seen == ["pre", "closure", "post"] * 30
    assert losses[-1] < 0.8 * losses[0]
    for x, y in zip(p, q, strict=True):
        torch.testing.assert_close(x, y)


@each_class
def test_a_step_that_nobody_has_a_gradient_for(cls: Any):
    optimizer = make(cls, tensors())
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert_unchanged(before, snapshot(optimizer))


@each_class
def test_gradients_are_left_alone(cls: Any):
    for options in ({"betas": (0.0, 0.9)}, {"betas": (0.0, 0.9), "weight_decay": 0.0, "maximize": True}):
        extra = {"grafting": "sgd"} if cls is sl.Shampoo else {}
        p = tensors()
        optimizer = make(cls, p, **options, **extra)
        for seed in range(5):
            give(p, seed)
            before = [x.grad.clone() for x in p]
            optimizer.step()
            assert all(torch.equal(x.grad, g) for x, g in zip(p, before, strict=True))


# Refusals

COMMON: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"precondition_frequency": 0}, ValueError, r"precondition_frequency=0 is out of range, expected an integer of at"),
    ({"precondition_frequency": 2.0}, ValueError, r"precondition_frequency=2.0 is out of range"),
    ({"precondition_frequency": True}, ValueError, r"precondition_frequency=True is out of range"),
    ({"max_preconditioner_dim": 0}, ValueError, r"max_preconditioner_dim=0 is out of range"),
    ({"max_preconditioner_dim": 2.5}, ValueError, r"max_preconditioner_dim=2.5 is out of range"),
    *(
        ({name: 1}, TypeError, rf"{name} must be True or False, got 1")
        for name in ("stagger", "packed", "bias_correction", "precondition_1d", "merge_dims")
    ),
    ({"stochastic_rounding": True}, ValueError, r"stochastic_rounding=True is not supported by {name}, expected False"),
    ({"capturable": True}, ValueError, r"capturable=True is not supported by {name}, expected False"),
)
OWN: dict[Any, tuple[tuple[dict[str, Any], type[Exception], str], ...]] = {
    sl.Shampoo: (
        ({"betas": (0.9, 1.5)}, ValueError, r"Invalid beta parameter at index 1: 1.5"),
        ({"betas": (1.0, 1.0)}, ValueError, r"Invalid beta parameter at index 0: 1.0"),
        ({"relative_eps": -1.0}, ValueError, r"Invalid relative epsilon: -1.0 \(relative_eps must be in \[0, inf\)\)"),
        ({"relative_eps": math.nan}, ValueError, r"Invalid relative epsilon: nan"),
        ({"grafting_eps": -1e-8}, ValueError, r"Invalid grafting epsilon: -1e-08"),
        ({"grafting_beta2": 1.0}, ValueError, r"Invalid grafting beta2: 1.0 \(grafting_beta2 must be in \[0, 1"),
        ({"grafting": "adamw"}, ValueError, r"grafting='adamw' is unknown, expected one of 'none', 'sgd', 'adagrad'"),
        ({"grafting": None}, ValueError, r"grafting=None is unknown"),
        ({"root_method": "svd"}, ValueError, r"root_method='svd' is unknown, expected one of 'auto', 'eigh', 'newton'"),
        ({"exponent_override": 3}, ValueError, r"exponent_override=3 is unknown, expected one of None, 1, 2, 4"),
        ({"exponent_override": True}, ValueError, r"exponent_override=True is unknown"),
        ({"exponent_override": 2.0}, ValueError, r"exponent_override=2.0 is unknown"),
        ({"start_preconditioning_step": 0}, ValueError, r"start_preconditioning_step=0 is out of range"),
        ({"momentum": 0.9}, TypeError, r"unexpected keyword arguments \['momentum'\]"),
    ),
    sl.SOAP: (
        ({"betas": (0.9, 1.0)}, ValueError, r"Invalid beta parameter at index 1: 1.0"),
        ({"shampoo_beta": 1.0}, ValueError, r"Invalid shampoo_beta value: 1.0 \(shampoo_beta must be in \[0, 1"),
        ({"shampoo_beta": "0.9"}, TypeError, r"shampoo_beta must be a number .*got '0.9'"),
        ({"refresh_tolerance": -0.1}, ValueError, r"Invalid refresh tolerance: -0.1"),
        ({"refresh_tolerance": math.nan}, ValueError, r"Invalid refresh tolerance: nan"),
        ({"variant": "KL"}, ValueError, r"variant='KL' is unknown, expected one of None, 'kl'"),
        ({"grafting": "adam"}, TypeError, r"unexpected keyword arguments \['grafting'\]"),
    ),
}
ROWS = [(cls, *row) for cls in CLASSES for row in (*COMMON, *OWN[cls])]


@pytest.mark.parametrize(("cls", "arguments", "error", "message"), ROWS, ids=lambda x: str(x)[:60])
def test_hyper_parameters(cls: Any, arguments: dict[str, Any], error: type[Exception], message: str):
    message = message.format(name=cls.__name__) if "{name}" in message else message
    with pytest.raises(error, match=message):
        cls(tensors(), **arguments)
    if error is TypeError and "unexpected" in message:
        return
    optimizer = cls(tensors())
    run(optimizer, range(1))
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": tensors(), **arguments})
    optimizer.param_groups[0] |= arguments
    with pytest.raises(error, match=message):
        optimizer.step()
    for key in arguments:
        if key in optimizer.defaults:
            optimizer.param_groups[0][key] = optimizer.defaults[key]
        else:
            del optimizer.param_groups[0][key]
    assert_unchanged(before, snapshot(optimizer))
    optimizer.step()


@each_class
def test_complex_parameters_and_other_groups_keys(cls: Any):
    p = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
    p.grad = torch.ones(3, 3, dtype=torch.complex64)
    sound = torch.nn.Parameter(torch.ones(3, 3))
    sound.grad = torch.ones(3, 3)
    optimizer = cls([sound, p])
    with pytest.raises(TypeError, match=rf"parameter 1 has dtype torch.complex64, {cls.__name__} takes torch.float64"):
        optimizer.step()
    assert torch.equal(sound, torch.ones(3, 3))
    assert not optimizer.state
    with pytest.raises(ValueError, match=rf"algorithm='{cls.algorithm}' has momentum=0.9, expected keys out of"):
        cls([{"params": [sound], "momentum": 0.9}])
    with pytest.raises(ValueError, match=rf"algorithm='muon' is unknown, expected one of '{cls.algorithm}', 'adamw'"):
        cls([{"params": [sound], "algorithm": "muon"}])
