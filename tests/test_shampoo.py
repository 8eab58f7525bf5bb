"""Shampoo against a plain transcription of its formulas, and step by step against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import copy_of, normal

import stepladder as sl
from stepladder.optim import shampoo as module
from stepladder.reference.kronecker import blocks, even_parts, merged_shape, refresh_due

DOUBLE = torch.float64
# With damping of 1e-4·λmax and more, a root is off by 1e4·n·2^-53 relative, n ≤ 4: 4e-12 a step, in 20 steps.
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradient(shape: Any, t: int) -> Tensor:
    return normal([shape], DOUBLE, 100 + t)[0] * (1.0 + 0.3 * t)


def root(factor: Tensor, p: float, eps: float, relative_eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp(min=0.0)
    return vectors @ torch.diag((values + eps + relative_eps * values.max()) ** (-1.0 / p)) @ vectors.T


class Plain:
    """FORMULAS as they stand, for one parameter that is seen as `view` and cut into `parts` along each dimension."""

    def __init__(self, w: Tensor, view: tuple[int, ...], parts: list[list[int]], p: float, **hyper: Any) -> None:
        self.w, self.view, self.p, self.hyper = w, view, p, hyper
        self.m, self.v, self.t = torch.zeros_like(w), torch.zeros_like(w), 0
        ends = [list(itertools.accumulate(sizes, initial=0)) for sizes in parts]
        pairs = [list(itertools.pairwise(one)) for one in ends]
        self.slices = [tuple(slice(*ab) for ab in corner) for corner in itertools.product(*pairs)]
        self.sums: dict[Any, Any] = {}
        self.roots: dict[Any, Any] = {}

    def step(self, g: Tensor) -> None:
        h = self.hyper
        (b1, b2), b3, graft = h["betas"], h["grafting_beta2"], h["grafting"]
        self.t += 1
        t = self.t
        unbiased = h["bias_correction"]
        self.m = b1 * self.m + (1 - b1) * g
        smooth = self.m / (1 - b1**t) if unbiased else self.m
        step = smooth
        if graft == "adagrad":
            self.v = self.v + g * g
            step = smooth / (self.v.sqrt() + h["grafting_eps"])
        elif graft in ("rmsprop", "adam"):
            self.v = b3 * self.v + (1 - b3) * g * g
            corrected = self.v / (1 - b3**t) if graft == "adam" and unbiased else self.v
            step = smooth / (corrected.sqrt() + h["grafting_eps"])
        update = step.clone().reshape(self.view)
        for at in self.slices if self.p else ():
            block = g.reshape(self.view)[at]
            u = smooth.reshape(self.view)[at]
            for d in range(len(self.view)):
                rows = block.transpose(0, d).reshape(block.shape[d], -1)
                square = rows @ rows.T
                key = (str(at), d)
                old = self.sums.get(key, torch.zeros_like(square))
                self.sums[key] = old + square if b2 == 1.0 else b2 * old + (1 - b2) * square
                f, start = h["precondition_frequency"], h["start"]
                if t >= start and (t - start) % f == 0:
                    unbiased_sum = self.sums[key] / (1 - b2**t if unbiased and b2 < 1.0 else 1.0)
                    self.roots[key] = root(unbiased_sum, self.p, h["eps"], h["relative_eps"])
                if t >= start:
                    moved = u.transpose(0, d)
                    u = (self.roots[key] @ moved.reshape(len(moved), -1)).reshape(moved.shape).transpose(0, d)
            if t >= h["start"]:
                if graft != "none":
                    u = u * (step.reshape(self.view)[at].norm() / u.norm())
                update[at] = u
        self.w = self.w * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * update.reshape(self.w.shape)


HYPER = {
    "lr": 0.03,
    "betas": (0.8, 0.9),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "relative_eps": 1e-4,
    "max_preconditioner_dim": 4,
    "precondition_frequency": 3,
    "grafting": "adam",
    "grafting_beta2": 0.95,
    "grafting_eps": 1e-6,
    "bias_correction": True,
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"grafting": "none"},
    {"grafting": "sgd", "eps": 0.0},
    {"grafting": "adagrad", "relative_eps": 0.0},
    {"grafting": "rmsprop"},
    {"betas": (0.0, 0.9)},
    {"betas": (0.8, 1.0)},
    {"bias_correction": False},
    {"precondition_frequency": 1},
    {"start_preconditioning_step": 1},
    {"start_preconditioning_step": 7},
    {"exponent_override": 2},
    {"exponent_override": 1, "grafting": "none"},
)
# A parameter's shape, what it is seen as where sides are at most 4, and how each side is cut.
VIEWS: tuple[tuple[tuple[int, ...], tuple[int, ...], list[list[int]]], ...] = (
    ((6, 5), (6, 5), [[3, 3], [3, 2]]),
    ((9,), (9,), [[3, 3, 3]]),
    ((), (1,), [[1]]),
    ((2, 2, 3), (4, 3), [[4], [3]]),
    ((5, 1, 3), (5, 3), [[3, 2], [3]]),
    ((1, 3, 1), (3,), [[3]]),
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formulas(options: dict[str, Any], backend: str):
    hyper = HYPER | options
    params = [copy_of(x) for x in normal([shape for shape, _, _ in VIEWS], DOUBLE, 0)]
    optimizer = sl.Shampoo(params, backend=backend, **hyper)
    plain = []
    for p, (_, view, parts) in zip(params, VIEWS, strict=True):
        exponent = hyper.get("exponent_override") or 2 * len(view)
        start = hyper.get("start_preconditioning_step") or hyper["precondition_frequency"]
        plain.append(Plain(p.detach().clone(), view, parts, exponent, start=start, **hyper))
    for t in range(13):
        for p, own in zip(params, plain, strict=True):
            p.grad = gradient(p.shape, t)
            own.step(p.grad)
        optimizer.step()
        for p, own in zip(params, plain, strict=True):
            torch.testing.assert_close(p.detach(), own.w, **CLOSE)
    for p, own in zip(params, plain, strict=True):
        state = optimizer.state[p]
        expected = torch.cat([x.flatten() for x in own.sums.values()])
        torch.testing.assert_close(state["factors"], expected, **CLOSE)
        torch.testing.assert_close(state["roots"], torch.cat([x.flatten() for x in own.roots.values()]), **CLOSE)
        assert float(state["failed_roots"]) == 0.0


def test_vectors_by_the_grafted_method_alone():
    p = copy_of(normal([(9,)], DOUBLE, 0)[0])
    optimizer = sl.Shampoo([p], precondition_1d=False, **HYPER)
    plain = Plain(p.detach().clone(), (9,), [[3, 3, 3]], 0.0, start=3, **HYPER)
    for t in range(8):
        p.grad = gradient((9,), t)
        plain.step(p.grad)
        optimizer.step()
    torch.testing.assert_close(p.detach(), plain.w, **CLOSE)
    assert optimizer.state[p]["factors"].numel() == 0


@pytest.mark.parametrize("root_method", ["eigh", "newton"])
@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"stagger": True, "packed": True}, {"merge_dims": False}])
def test_the_reference_step_by_step(options: dict[str, Any], root_method: str):
    shapes = [shape for shape, _, _ in VIEWS]
    hyper = HYPER | options | {"root_method": root_method}
    p, q = ([copy_of(x) for x in normal(shapes, DOUBLE, 0)] for _ in range(2))
    ours, slow = sl.Shampoo(p, backend="cpu", **hyper), sl.reference.Shampoo(q, **hyper)
    assert slow._backend == "reference"
    for t in range(20):
        for k, (x, y) in enumerate(zip(p, q, strict=True)):
            x.grad = None if (t + k) % 5 == 0 else gradient(x.shape, t)
            y.grad = None if x.grad is None else x.grad.clone()
        ours.step()
        slow.step()
        for x, y in zip(p, q, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
            assert ours.state[x].keys() == slow.state[y].keys()
            for name, value in ours.state[x].items():
                torch.testing.assert_close(value, slow.state[y][name], **CLOSE)


# How parameters are cut


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((), 4, (1,)),
        ((1, 1), 4, (1,)),
        ((1, 5), 4, (5,)),
        ((5, 1), 4, (5,)),
        ((1, 5), 0, (5,)),
        ((2, 2, 3), 4, (4, 3)),
        ((2, 3, 4), 0, (2, 3, 4)),
        ((64, 3, 7, 7), 1024, (192, 49)),
        ((0, 5), 4, (0,)),
        ((5, 0), 4, (0,)),
    ],
    ids=str,
)
def test_merged_shapes(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]):
    assert merged_shape(shape, limit) == merged
    assert math.prod(merged) == math.prod(shape)


def test_even_parts_and_blocks():
    for size in range(1, 40):
        for limit in range(1, 12):
            parts = even_parts(size, limit)
            assert sum(parts) == size
            assert max(parts) <= limit
            assert max(parts) - min(parts) <= 1
            assert len(parts) == math.ceil(size / limit)
    x = torch.arange(30).view(6, 5)
    assert [b.tolist()[0][0] for b in blocks(x, 3)] == [0, 3, 15, 18]
    assert sum(b.numel() for b in blocks(x, 4)) == 30


def test_every_phase_is_due_once_in_f_steps_and_in_time():
    for f in range(1, 7):
        for start in range(1, 15):
            for phase in range(f):
                due = [t for t in range(1, 60) if refresh_due(t, start, f, phase)]
                # Before the first use, but not a whole round before it.
                assert max(1, start - f + 1) <= due[0] <= start
                assert {b - a for a, b in itertools.pairwise(t for t in due if t > start)} <= {f}
                assert all(b - a <= f for a, b in itertools.pairwise(due))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("f", [2, 4, 7])
def test_staggered_roots_are_spread(f: int, apart: bool, monkeypatch: pytest.MonkeyPatch):
    computed: list[list[int]] = []
    roots = module.roots

    def recorded(stacks: Any, *rest: Any) -> Any:
        computed[-1] += [a.shape[-1] for a in stacks for _ in a]
        return roots(stacks, *rest)

    monkeypatch.setattr(module, "roots", recorded)
    params = [copy_of(x) for x in normal([(8, 8), (5, 9), (3,), (8, 2), (16, 16)], torch.float32, 0)]
    groups = [{"params": [p]} for p in params] if apart else params
    optimizer = sl.Shampoo(groups, max_preconditioner_dim=8, merge_dims=False, precondition_frequency=f, stagger=True)
    for t in range(3 * f):
        computed.append([])
        for p in params:
            p.grad = normal([p.shape], torch.float32, t)[0]
        optimizer.step()
    every = sorted(n for p in params for n in module.Shampoo.layout(p, optimizer.param_groups[0]).sides)
    for first in range(1, 2 * f + 1):
        assert sorted(itertools.chain(*computed[first : first + f])) == every
    cost = [sum(n**3 for n in sizes) for sizes in computed[f:]]
    assert max(cost) <= sum(n**3 for n in every) / f + max(every) ** 3


def test_the_roots_of_a_parameter_fall_on_many_steps():
    # Four blocks each, with two roots.
    params = [torch.empty(16, 16) for _ in range(3)]
    group = sl.Shampoo(params, max_preconditioner_dim=8, merge_dims=False, stagger=True).defaults | {"params": params}
    found = sl.Shampoo.spread([group | {"precondition_frequency": 4}])
    assert [found[p] for p in params] == [[0, 1, 2, 3] * 2] * 3
    # Where there are more steps than roots, these are as far apart as they can be.
    found = sl.Shampoo.spread([group | {"precondition_frequency": 24 * 10**9}])
    assert list(itertools.chain(*found.values())) == list(range(0, 24 * 10**9, 10**9))


# Roots that fail


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_failed_root_is_counted_and_leaves_the_previous_one(backend: str):
    p = [copy_of(x) for x in normal([(6, 5), (4, 4)], DOUBLE, 0)]
    q = [copy_of(x) for x in p]
    optimizer, sound = (sl.Shampoo(x, backend=backend, **HYPER) for x in (p, q))
    for t in range(9):
        for x, y in zip(p, q, strict=True):
            x.grad, y.grad = gradient(x.shape, t), gradient(y.shape, t)
        if t == 4:
            # Of the blocks of 3 and 3 rows, and 3 and 2 columns, the first.
            p[0].grad[1, 1] = math.nan
        optimizer.step()
        sound.step()
        if t == 2:
            before = optimizer.state[p[0]]["roots"].clone()
    state, other = optimizer.state[p[0]], sound.state[q[0]]
    # Its two factors, at the steps 6 and 9.
    assert float(state["failed_roots"]) == 4.0
    assert torch.equal(state["roots"][:18], before[:18])
    torch.testing.assert_close(state["roots"][18:], other["roots"][18:], **CLOSE)
    assert p[0][:3, :3].isnan().any()
    assert torch.equal(p[1], q[1])
    assert float(optimizer.state[p[1]]["failed_roots"]) == 0.0


def test_without_any_damping_a_singular_factor_fails():
    p = copy_of(torch.zeros(4, 4))
    optimizer = sl.Shampoo([p], eps=0.0, relative_eps=0.0, precondition_frequency=1, merge_dims=False)
    p.grad = torch.zeros(4, 4)
    p.grad[0] = 1.0
    optimizer.step()
    # A rank of one on both sides: the roots are still the identity, and grafting's step is taken.
    assert float(optimizer.state[p]["failed_roots"]) == 2.0
    assert torch.equal(optimizer.state[p]["roots"], torch.eye(4).flatten().repeat(2))
    assert p.isfinite().all()
