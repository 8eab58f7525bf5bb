"""SOAP against a plain transcription with m in the space of the weights, and step by step against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import copy_of, normal

import stepladder as sl
from stepladder.optim import soap as module

DOUBLE = torch.float64
# Rounding of small orthogonal matrices, which 1/√v of the least v and the gaps between eigenvalues amplify.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
# One gradient leaves a null space of one dimension at most: a basis of more would be nobody's choice.
SHAPES = ((6, 5), (5, 6), (2, 3, 4), (4, 3, 2, 2), (2,), (), (1, 2))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradient(shape: Any, t: int) -> Tensor:
    """Of directions that gain and lose weight, so that the order of eigenvalues changes."""
    g = normal([shape], DOUBLE, 100 + t)[0]
    for dim in range(g.ndim):
        n = g.shape[dim]
        weights = 1.0 + 2.0 * torch.cos(torch.arange(n, dtype=DOUBLE) + 0.7 * t)
        g = g * weights.reshape([-1 if d == dim else 1 for d in range(g.ndim)])
    return g


def along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """matrix·X along a dimension."""
    moved = x.transpose(0, dim)
    return (matrix @ moved.reshape(moved.shape[0], -1)).reshape(matrix.shape[0], *moved.shape[1:]).transpose(0, dim)


class Plain:
    """The paper's algorithm for one parameter; `forget` leaves v or m as they are when bases are refreshed."""

    def __init__(self, w: Tensor, sides: list[bool], forget: str = "", **hyper: Any) -> None:
        self.w, self.sides, self.forget, self.h = w, sides, forget, hyper
        self.t, self.reordered, self.kept = -1, 0, 0
        self.m, self.v = torch.zeros_like(w), torch.zeros_like(w)

    def project(self, x: Tensor, bases: list[Any], back: bool = False) -> Tensor:
        for d, q in enumerate(bases):
            if q is not None:
                x = along(x, q if back else q.T, d)
        return x

    def spectrum(self, d: int) -> Tensor:
        values = (self.q[d].T @ self.sums[d] @ self.q[d]).diagonal().clamp(min=0.0)
        return values + 1e-6 * values.max()

    def square(self, g: Tensor, d: int) -> Tensor:
        rows = g.transpose(0, d).reshape(g.shape[d], -1)
        if self.h["variant"] != "kl":
            return rows @ rows.T
        x = g
        for other in range(g.ndim):
            if other != d and self.t >= 0 and self.sides[other]:
                q = self.q[other]
                x = along(x, q @ torch.diag(1.0 / self.spectrum(other)) @ q.T, other)
        return rows @ x.transpose(0, d).reshape(rows.shape).T / rows.shape[1]

    def step(self, g: Tensor) -> None:
        h = self.h
        (b1, b2), b3 = h["betas"], h["shampoo_beta"] or h["betas"][1]
        dims = [d for d in range(g.ndim) if self.sides[d]]
        if self.t < 0:
            self.sums = {d: self.square(g, d) for d in dims}
            self.q = [torch.linalg.eigh(self.sums[d])[1].flip(-1) if d in dims else None for d in range(g.ndim)]
            self.t = 0
            return
        self.t += 1
        projected = self.project(g, self.q)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * projected**2
        size = h["lr"] * (math.sqrt(1 - b2**self.t) / (1 - b1**self.t) if h["bias_correction"] else 1.0)
        update = self.project(self.project(self.m, self.q) / (self.v.sqrt() + h["eps"]), self.q, back=True)
        self.w = (self.w - size * update) * (1 - h["lr"] * h["weight_decay"])
        new = {d: b3 * self.sums[d] + (1 - b3) * self.square(g, d) for d in dims}
        self.sums = new
        if self.t % h["precondition_frequency"] == 0:
            self.refresh(dims)

    def refresh(self, dims: list[int]) -> None:
        before = list(self.q)
        for d in dims:
            b = self.q[d].T @ self.sums[d] @ self.q[d]
            off = (b - torch.diag(b.diagonal())).norm() / b.norm()
            if off <= self.h["refresh_tolerance"] and self.h["refresh_tolerance"] > 0:
                self.kept += 1
                continue
            order = b.diagonal().argsort(descending=True)
            self.reordered += not torch.equal(order, torch.arange(len(order)))
            if self.forget != "v":
                self.v = self.v.index_select(d, order)
            self.q[d] = torch.linalg.qr(self.sums[d] @ self.q[d][:, order]).Q
        if self.forget == "m":
            # What was in the old bases is taken for what is in the new ones.
            self.m = self.project(self.project(self.m, before), self.q, back=True)


HYPER: dict[str, Any] = {
    "lr": 0.03,
    "betas": (0.8, 0.9),
    "shampoo_beta": None,
    "eps": 1e-4,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "bias_correction": True,
    "refresh_tolerance": 0.0,
    "variant": None,
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"shampoo_beta": 0.7},
    {"bias_correction": False},
    {"precondition_frequency": 1},
    {"refresh_tolerance": 0.15},
    {"variant": "kl"},
    {"variant": "kl", "precondition_frequency": 1, "shampoo_beta": 0.8},
    {"max_preconditioner_dim": 5},
    {"variant": "kl", "max_preconditioner_dim": 5},
    {"precondition_1d": True},
    {"betas": (0.0, 0.9)},
)


def sides(shape: tuple[int, ...], options: dict[str, Any]) -> list[bool]:
    if len(shape) < 2 and not (options.get("precondition_1d") and shape):
        return [options.get("precondition_1d", False)] * max(1, len(shape))
    return [n <= options.get("max_preconditioner_dim", 10000) for n in shape]


def run(options: dict[str, Any], forget: str = "", steps: int = 20, backend: str = "cpu") -> tuple[Any, list[Plain]]:
    hyper = HYPER | options
    params = [copy_of(x) for x in normal(SHAPES, DOUBLE, 0)]
    optimizer = sl.SOAP(params, backend=backend, **hyper)
    plain = [
        Plain(p.detach().clone().reshape(p.shape or (1,)), sides(p.shape, options), forget, **hyper) for p in params
    ]
    for t in range(steps):
        for p, own in zip(params, plain, strict=True):
            p.grad = gradient(p.shape, t)
            own.step(p.grad.reshape(p.shape or (1,)))
        optimizer.step()
    return optimizer, plain


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formulas(options: dict[str, Any], backend: str):
    optimizer, plain = run(options, steps=14, backend=backend)
    params = optimizer.param_groups[0]["params"]
    # Bases do change their order, or nothing would be shown of it.
    assert sum(own.reordered for own in plain) > 1
    if options.get("refresh_tolerance"):
        assert sum(own.kept for own in plain) > 3
    for p, own in zip(params, plain, strict=True):
        state = optimizer.state[p]
        view = own.w.shape
        torch.testing.assert_close(p.detach().reshape(view), own.w, **CLOSE)
        # Squares: the signs of eigenvectors are nobody's choice.
        torch.testing.assert_close(state["exp_avg_sq"].reshape(view), own.v, **CLOSE)
        expected = [own.sums[d].flatten() for d in own.sums]
        torch.testing.assert_close(state["factors"], torch.cat([torch.zeros(0, dtype=DOUBLE), *expected]), **CLOSE)
        layout = module.SOAP.layout(p, optimizer.param_groups[0])
        bases = layout.views(state["bases"])
        for ours, theirs in zip(bases, own.q, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                torch.testing.assert_close((ours.T @ theirs).abs(), torch.eye(len(ours), dtype=DOUBLE), **CLOSE)
        torch.testing.assert_close(own.project(state["exp_avg"].reshape(view), bases, back=True), own.m, **CLOSE)
        if options.get("variant"):
            values = [(own.q[d].T @ own.sums[d] @ own.q[d]).diagonal() for d in own.sums]
            torch.testing.assert_close(
                state["eigenvalues"], torch.cat([torch.zeros(0, dtype=DOUBLE), *values]), **CLOSE
            )
        assert float(state["failed_bases"]) == 0.0
        assert float(state["step"]) == 14.0


@pytest.mark.parametrize("forgotten", ["v", "m"])
def test_moments_go_with_their_bases(forgotten: str):
    # The comparison above sees a moment that stays behind when its basis is permuted.
    optimizer, plain = run({}, forget=forgotten)
    apart = [
        float((p.detach() - own.w.reshape(p.shape)).abs().max())
        for p, own in zip(optimizer.param_groups[0]["params"], plain, strict=True)
        if own.reordered
    ]
    assert len(apart) >= 4
    assert min(apart) > 1e-4


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"stagger": True, "packed": True}, {"merge_dims": True, "max_preconditioner_dim": 6}], ids=str
)
def test_the_reference_step_by_step(options: dict[str, Any]):
    hyper = HYPER | options
    p, q = ([copy_of(x) for x in normal(SHAPES, DOUBLE, 0)] for _ in range(2))
    ours, slow = sl.SOAP(p, backend="cpu", **hyper), sl.reference.SOAP(q, **hyper)
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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_diagonal_factors_are_reordered_too(backend: str):
    # Without a tolerance no basis counts as good enough, not even an exact one.
    p = copy_of(torch.zeros(3, 3, dtype=DOUBLE))
    optimizer = sl.SOAP([p], precondition_frequency=1, backend=backend)
    for values in ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], *([0.0, 0.0, 9.0],) * 4):
        p.grad = torch.diag(torch.tensor(values, dtype=DOUBLE))
        optimizer.step()
    for basis in module.SOAP.layout(p, optimizer.param_groups[0]).views(optimizer.state[p]["bases"]):
        assert basis is not None
        assert basis[:, 0].abs().tolist() == [0.0, 0.0, 1.0]


# First steps


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_first_gradient_makes_the_bases_and_moves_nothing(backend: str):
    p = [copy_of(x) for x in normal(SHAPES, DOUBLE, 0)]
    before = [x.detach().clone() for x in p]
    optimizer = sl.SOAP(p, backend=backend)
    for expected in (0.0, 0.0, 1.0):
        for x in p:
            x.grad = gradient(x.shape, 0) if expected else torch.zeros_like(x)
        optimizer.step()
        for x, w in zip(p, before, strict=True):
            assert torch.equal(x, w)
            state = optimizer.state[x]
            assert float(state["step"]) == expected
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
            assert bool(state["factors"].any()) == (expected == 1.0 and state["factors"].numel() > 0)
    optimizer.step()
    assert not any(torch.equal(x, w) for x, w in zip(p, before, strict=True))


@pytest.mark.parametrize("variant", [None, "kl"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_first_gradient_that_is_not_finite_is_none(bad: float, backend: str, variant: str | None):
    # Of 1e30 the square is not finite in fp32.
    p, q = ([copy_of(x) for x in normal([(6, 5), (4, 4)], torch.float32, 0)] for _ in range(2))
    optimizer, sound = (sl.SOAP(x, backend=backend, variant=variant, precondition_frequency=2) for x in (p, q))
    for t in range(-1, 6):
        for x, y in zip(p, q, strict=True):
            x.grad, y.grad = (gradient(x.shape, t).float() for _ in range(2))
        if t < 0:
            p[0].grad[1, 2] = bad
            q[0].grad = None
        optimizer.step()
        sound.step()
    for x, y in zip(p, q, strict=True):
        assert torch.equal(x, y)
    assert float(optimizer.state[p[0]]["failed_bases"]) == 2.0
    assert float(sound.state[q[0]]["failed_bases"]) == 0.0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kl_soap_outlives_gradients_of_zeros(backend: str):
    # With this beta, factors go from 1 to the subnormal numbers within 150 steps, and to zero after 170.
    p = copy_of(normal([(6, 5)], torch.float32, 0)[0])
    optimizer = sl.SOAP([p], variant="kl", backend=backend, shampoo_beta=0.5, precondition_frequency=1)
    for t in range(200):
        p.grad = gradient(p.shape, t).float() if t < 3 else torch.zeros_like(p)
        optimizer.step()
    state = optimizer.state[p]
    assert float(state["failed_bases"]) == 0.0
    assert all(bool(state[name].isfinite().all()) for name in ("factors", "eigenvalues", "bases"))
    before = p.detach().clone()
    p.grad = gradient(p.shape, 0).float()
    optimizer.step()
    assert p.isfinite().all()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("cls", [sl.SOAP, sl.Shampoo])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_outlive_a_gradient_whose_square_is_infinite(cls: type, backend: str):
    # In fp32; later second moments are infinite, and the element rests.
    p = copy_of(normal([(6, 5)], torch.float32, 0)[0])
    optimizer = cls([p], backend=backend)
    for t in range(6):
        p.grad = gradient(p.shape, t).float()
        if t == 3:
            p.grad[1, 2] = 1e25
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_basis_that_cannot_be_refreshed_stays_and_is_counted(backend: str):
    p, q = ([copy_of(x) for x in normal([(6, 5), (4, 4)], DOUBLE, 0)] for _ in range(2))
    optimizer, sound = (sl.SOAP(x, backend=backend, precondition_frequency=3) for x in (p, q))
    for t in range(8):
        for x, y in zip(p, q, strict=True):
            x.grad, y.grad = (gradient(x.shape, t) for _ in range(2))
        if t == 4:
            p[0].grad[1, 2] = math.nan
            bases = optimizer.state[p[0]]["bases"].clone()
        optimizer.step()
        sound.step()
    # Both sides, at step 6.
    assert float(optimizer.state[p[0]]["failed_bases"]) == 2.0
    assert torch.equal(optimizer.state[p[0]]["bases"], bases)
    assert p[0].isnan().all()
    assert torch.equal(p[1], q[1])


# When bases are refreshed


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("f", [2, 4, 7])
def test_staggered_refreshes_are_spread(f: int, apart: bool, monkeypatch: pytest.MonkeyPatch):
    done: list[list[int]] = []
    fresh_bases = module.fresh_bases

    def recorded(given: Any, backend: Any) -> Any:
        done[-1] += map(len, given)
        return fresh_bases(given, backend)

    monkeypatch.setattr(module, "fresh_bases", recorded)
    params = [copy_of(x) for x in normal([(8, 8), (5, 9), (3,), (8, 2), *((6, 6),) * 8], torch.float32, 0)]
    groups = [{"params": [p]} for p in params] if apart else params
    optimizer = sl.SOAP(groups, precondition_frequency=f, stagger=True)
    for t in range(3 * f + 1):
        done.append([])
        for p in params:
            p.grad = normal([p.shape], torch.float32, t)[0]
        optimizer.step()
    every = sorted(n for p in params if p.ndim > 1 for n in p.shape)
    assert done[0] == []
    for first in range(1, 2 * f + 1):
        assert sorted(itertools.chain(*done[first : first + f])) == every
    cost = [sum(n**3 for n in sizes) for sizes in done[1:]]
    dearest = max(sum(n**3 for n in p.shape) for p in params if p.ndim > 1)
    assert max(cost) <= sum(n**3 for n in every) / f + dearest


def test_a_tolerance_spares_refreshes(monkeypatch: pytest.MonkeyPatch):
    done: list[Tensor] = []
    fresh_bases = module.fresh_bases
    monkeypatch.setattr(module, "fresh_bases", lambda given, name: done.extend(given) or fresh_bases(given, name))
    counts = {}
    for tolerance in (0.0, 0.05, 1.0):
        p = copy_of(normal([(6, 6)], DOUBLE, 0)[0])
        optimizer = sl.SOAP([p], precondition_frequency=1, refresh_tolerance=tolerance)
        done.clear()
        for _ in range(10):
            # Always the same: its bases are right soon.
            p.grad = normal([(6, 6)], DOUBLE, 1)[0]
            optimizer.step()
        counts[tolerance] = len(done)
    assert counts == {0.0: 18, 0.05: 0, 1.0: 0}
