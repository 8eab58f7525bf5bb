"""The reference itself: against torch in float64, and its building blocks against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import stepladder as sl
from stepladder import _C, reference
from stepladder.reference import arithmetic

TORCH = [
    (sl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    (sl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (sl.Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    (sl.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (sl.Adam, torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (sl.AdamW, torch.optim.AdamW, {"betas": (0.2, 0.9)}),
]


@pytest.mark.parametrize(("ours", "theirs", "hyper"), TORCH, ids=[t.__name__ for t, _, _ in TORCH])
def test_float64_against_torch(ours, theirs, hyper):
    p = torch.nn.Parameter(torch.randn(40, 30, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    a, b = ours([p], backend="reference", **hyper), theirs([q], foreach=False, **hyper)
    for _ in range(20):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def by_hand(rule, w, g, state, **hyper):
    """LARS and LAMB as the papers write them, with norms from NumPy."""
    norm = np.linalg.norm
    if rule == "lars":
        ratio = hyper["trust_coefficient"] * norm(w) / (norm(g) + hyper["weight_decay"] * norm(w) + hyper["eps"])
        v = hyper["momentum"] * state[0] + ratio * (g + hyper["weight_decay"] * w)
        return w - hyper["lr"] * v, [v]
    beta1, beta2 = hyper["betas"]
    m, v = beta1 * state[0] + (1 - beta1) * g, beta2 * state[1] + (1 - beta2) * g * g
    t = hyper["time"]
    r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + hyper["eps"]) + hyper["weight_decay"] * w
    return w - hyper["lr"] * norm(w) / norm(r) * r, [m, v]


@pytest.mark.parametrize(
    ("rule", "make", "hyper"),
    [
        ("lars", sl.LARS, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 1e-2, "eps": 1e-8}),
        ("lamb", sl.LAMB, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    ],
)
def test_norm_based_rules_by_hand(rule, make, hyper):
    p = torch.nn.Parameter(torch.randn(70, 90, dtype=torch.float64))
    w, state = p.detach().numpy().copy(), [np.zeros((70, 90)), np.zeros((70, 90))]
    optimizer = make([p], backend="reference", **hyper)
    for t in range(1, 6):
        p.grad = torch.randn_like(p)
        optimizer.step()
        w, state = by_hand(rule, w, p.grad.numpy(), state, **hyper, time=t)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10)


@pytest.mark.parametrize("make", [sl.LARS, sl.LAMB])
def test_trust_ratio_of_zero_norms_is_one(make):
    zero, still = torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.ones(50))
    zero.grad, still.grad = torch.ones(50), torch.zeros(50)
    make([zero, still], lr=0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((50,), -0.5))
    assert torch.equal(still.detach(), torch.ones(50))


def test_sign_of_zero_and_nan():
    p = torch.nn.Parameter(torch.ones(40))
    p.grad = torch.zeros(40)
    p.grad[1::2] = -0.0
    p.grad[0] = float("nan")
    for make in (sl.SignSGD, sl.Lion):
        before = p.detach().clone()
        make([p], lr=0.1).step()
        assert p[0].isnan()
        assert torch.equal(p[1:], before[1:])


def test_power_is_one_routine():
    generator = np.random.default_rng(0)
    for base, exponent in zip(generator.random(500), generator.integers(0, 10**7, 500), strict=True):
        assert arithmetic.power(base, int(exponent)) == _C.power(base, int(exponent))
    assert math.isclose(arithmetic.power(0.999, 1000), 0.999**1000, rel_tol=1e-12)


def test_sqrt_is_correctly_rounded():
    x = torch.rand(1 << 20)
    exact = np.sqrt(x.numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(arithmetic.sqrt(x).numpy(), exact)
    y = torch.rand(1 << 20, dtype=torch.float64)
    assert np.array_equal(arithmetic.sqrt(y).numpy(), np.sqrt(y.numpy()))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the authors' Random123 distribution.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter, key, expected):
    words = arithmetic.philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in words) == expected


def test_tree_sum_is_the_documented_tree():
    x = torch.randn(3 * 4096 + 200)
    leaves = []
    for start in range(0, x.numel(), 4096):
        leaf = np.zeros(4096, dtype=np.float32)
        part = x[start : start + 4096].numpy()
        leaf[: len(part)] = part
        lanes = np.zeros(128, dtype=np.float32)
        for row in leaf.reshape(32, 128):
            lanes = lanes + row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        leaves.append(lanes[0])
    # Four leaves: halves are (0, 2) and (1, 3).
    expected = (leaves[0] + leaves[2]) + (leaves[1] + leaves[3])
    assert arithmetic.tree_sum(x).item() == expected


def test_reference_optimizers_by_name():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = reference.AdamW([p], lr=0.1)
    assert isinstance(optimizer, sl.AdamW)
    assert optimizer._backend == "reference"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        reference.Nothing  # noqa: B018
