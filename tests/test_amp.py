"""GradScaler's protocol: unscaled and written-back gradients, skipped steps, several optimizers, fp16."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import (
    CLASSES,
    FULL,
    HALF,
    SMALL_SHAPES,
    VARIANTS,
    Case,
    Pair,
    assert_unchanged,
    copy_of,
    normal,
    random_gradients,
    snapshot,
)

import stepladder as sl


def new_scaler(scale: float = 1024.0) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    scaler.scale(torch.zeros(()))
    return scaler


class ScaledPair(Pair):
    """Both optimizers under a GradScaler of their own; torch's in its fused form where it has one."""

    def __init__(self, case: Case, tensors: Any, scale: float = 1024.0, accelerated: bool = False) -> None:
        super().__init__(case, tensors)
        if case.name != "RMSprop":
            self.theirs = case.theirs(self.q, fused=True)
        if accelerated:
            self.ours = sl.accelerate(case.theirs(self.p))
        self.scalers = [new_scaler(scale), new_scaler(scale)]

    def backward(self, gradients: list[Tensor]) -> None:
        """Gradients through autograd, as `gradients` times the scale."""
        for optimizer, params, scaler in self._sides():
            optimizer.zero_grad()
            scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()

    def scaled_step(self) -> None:
        for optimizer, _, scaler in self._sides():
            scaler.step(optimizer)
            scaler.update()
        assert self.scalers[0].get_scale() == self.scalers[1].get_scale()

    def _sides(self) -> Any:
        return zip((self.ours, self.theirs), (self.p, self.q), self.scalers, strict=True)


@pytest.mark.parametrize("accelerated", [False, True], ids=["ours", "accelerated"])
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_run_with_skipped_steps(case: Case, dtype: torch.dtype, accelerated: bool):
    pair = ScaledPair(case, normal(SMALL_SHAPES, dtype, 0), accelerated=accelerated)
    scales = set()
    # Two good steps come first: torch's fused SGD takes an unwritten buffer for its own after a skipped first one.
    for step in range(9):
        gradients = random_gradients(pair.p, step)
        if step in (2, 6):
            gradients[1][3, 2] = math.inf if step == 2 else math.nan
        pair.backward(gradients)
        before = snapshot(pair.ours)
        versions = [p._version for p in pair.p]
        pair.scaled_step()
        scales.add(pair.scalers[0].get_scale())
        pair.check()
        if step in (2, 6):
            assert_unchanged(before, snapshot(pair.ours))
            assert [p._version for p in pair.p] == versions
        else:
            for p, q, g in zip(pair.p, pair.q, gradients, strict=True):
                torch.testing.assert_close(p.grad, q.grad)
                torch.testing.assert_close(p.grad, g)
    assert scales == {512.0, 1024.0}
    if case.name != "SGD":
        assert float(pair.ours.state[pair.p[0]]["step"]) == 7


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_skipped_first_step_counts_for_nothing(case: Case):
    pair = Pair(case, normal(SMALL_SHAPES, torch.float32, 0))
    scaler = new_scaler()
    for p in pair.p:
        p.grad = torch.full_like(p, math.inf)
    scaler.step(pair.ours)
    scaler.update()
    for step in range(3):
        gradients = random_gradients(pair.p, step)
        pair.give(gradients)
        for p, g in zip(pair.p, gradients, strict=True):
            p.grad = g * scaler.get_scale()
        scaler.step(pair.ours)
        scaler.update()
        pair.theirs.step()
        pair.check()


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_maximize_leaves_the_sign_of_the_gradient_that_is_written_back(case: Case, scale: float):
    case = Case(case.name, case.hyper | {"maximize": True} | ({"nesterov": False} if case.name == "SGD" else {}))
    pair = ScaledPair(case, normal(SMALL_SHAPES, torch.float32, 0), scale)
    for step in range(2):
        gradients = random_gradients(pair.p, step)
        pair.backward(gradients)
        pair.scaled_step()
        pair.check()
        for p, g in zip(pair.p, gradients, strict=True):
            torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_gradients_unscaled_and_clipped_before_the_step(case: Case):
    pair = ScaledPair(case, normal(SMALL_SHAPES, torch.float32, 0))
    for step in range(3):
        gradients = random_gradients(pair.p, step)
        pair.backward(gradients)
        for optimizer, params, scaler in pair._sides():
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        clipped = [p.grad.clone() for p in pair.p]
        assert float(torch.nn.utils.get_total_norm(clipped)) == pytest.approx(0.5, rel=1e-4)
        pair.scaled_step()
        pair.check()
        assert all(torch.equal(p.grad, g) for p, g in zip(pair.p, clipped, strict=True))


@pytest.mark.parametrize("dtype", [*FULL, *HALF], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_scaling_by_a_power_of_two_changes_no_bit(case: Case, dtype: torch.dtype):
    tensors = normal([(64, 33), (5,)], dtype, 0)
    scaled, plain = [copy_of(x) for x in tensors], [copy_of(x) for x in tensors]
    ours, expected = case.ours(scaled), case.ours(plain)
    scaler = new_scaler(64.0)
    for step in range(4):
        for p, q, g in zip(scaled, plain, random_gradients(plain, step), strict=True):
            # Gradients that no scale of this run makes subnormal.
            g.masked_fill_(g.abs() < 1e-2, 0.5)
            p.grad, q.grad = g * scaler.get_scale(), g
        scaler.step(ours)
        scaler.update()
        expected.step()
        for p, q in zip(scaled, plain, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)
            assert all(torch.equal(value, expected.state[q][name]) for name, value in ours.state.get(p, {}).items())


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_gradients_of_other_layouts_are_written_back_in_place(case: Case):
    tensors = normal([(4, 6), (4, 6), (6, 4)], torch.float32, 0)
    pair = Pair(case, tensors)
    scaler = new_scaler()
    for step in range(3):
        gradients = random_gradients(pair.q, step)
        memory = torch.full((9, 20), 7.0)
        scaled = [g * scaler.get_scale() for g in gradients]
        layouts = [scaled[0].t().contiguous().t(), memory[1::2, 2::3].copy_(scaled[1]), scaled[2]]
        pair.give(gradients)
        for p, g in zip(pair.p, layouts, strict=True):
            p.grad = g
        scaler.step(pair.ours)
        scaler.update()
        pair.theirs.step()
        pair.check()
        for p, g, layout in zip(pair.p, gradients, layouts, strict=True):
            assert p.grad is layout
            torch.testing.assert_close(layout, g)
        assert int((memory != 7.0).sum()) == 24


def test_optimizers_of_one_scaler_skip_each_for_itself():
    (a,), (b,) = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    first, second = sl.AdamW([a]), sl.SGD([b], lr=1.0)
    scaler = new_scaler()
    a.grad, b.grad = torch.tensor([1.0, math.inf, 1.0]), torch.full((3,), 1024.0)
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(a, torch.ones(3))
    assert torch.equal(b, torch.zeros(3))
    assert scaler.get_scale() == 512.0


def test_the_scalers_attributes_are_read_and_gone_afterwards():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sl.SGD([p], lr=1.0)
    p.grad = torch.full((3,), 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(16.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.5))
    assert torch.equal(p.grad, torch.full((3,), 0.5))
    del optimizer.grad_scale, optimizer.found_inf
    scaler = new_scaler()
    scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def accelerated(params: Any, **options: Any) -> torch.optim.Optimizer:
    return sl.accelerate(torch.optim.AdamW(params, **options))


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("cls", [sl.AdamW, sl.Muon, accelerated], ids=lambda cls: cls.__name__)
def test_fused_false_leaves_the_scale_to_the_scaler(cls: Any, fused: bool | None):
    """As torch's unfused optimizers do; copies, pickles and checkpoints change nothing about it."""
    w = torch.nn.Parameter(torch.randn(4, 6))
    optimizer, twin = cls([w], lr=0.1, fused=fused), cls([copy_of(w)], lr=0.1)
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    (v,), (u,) = optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(getattr(optimizer, "grad_scale", None)))
    gradient, scaler = torch.randn(4, 6), new_scaler()
    for skipped in (True, False):
        v.grad = gradient * scaler.get_scale() * (math.inf if skipped else 1.0)
        scaler.step(optimizer)
        scaler.update()
    u.grad = gradient.clone()
    twin.step()
    assert torch.equal(v, u)
    # The scaler itself takes the scale out, and does not call a step that is to be skipped.
    assert [scale is None for scale in calls] == ([True] if fused is False else [False, False])


def test_a_disabled_scaler_is_no_scaler():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sl.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    p.grad = torch.full((3,), 0.25)
    scaler.step(optimizer)
    assert torch.equal(p, torch.full((3,), 0.75))


def test_without_any_gradient_a_scaled_step_does_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sl.AdamW([p])
    scaler = new_scaler()
    scaler.step(optimizer)
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_the_clipped_norm_is_that_of_the_unscaled_gradients():
    p, q = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    scaled, plain = sl.AdamW([p], max_norm=0.5), sl.AdamW([q], max_norm=0.5)
    scaler = new_scaler()
    q.grad = torch.tensor([1.0, -2.0, 3.0, 0.5])
    p.grad = q.grad * 1024.0
    scaler.step(scaled)
    plain.step()
    assert torch.equal(p, q)
    assert scaled.grad_norm == plain.grad_norm == pytest.approx(float(q.grad.norm()))
    # Unscaled, and not clipped.
    assert torch.equal(p.grad, q.grad)


def test_training_under_autocast_gives_torchs_losses():
    def losses(optimizer_of: Any) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        x = torch.randn(32, 6)
        y = x.sin().sum(dim=1, keepdim=True)
        optimizer = optimizer_of(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        history = []
        for _ in range(25):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.item())
        return history

    ours = losses(lambda params: sl.AdamW(params, lr=0.02))
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(losses(lambda params: torch.optim.AdamW(params, lr=0.02, fused=True)), rel=1e-2)
