"""Who owns which matrix, from costs and sizes alone."""

from __future__ import annotations

import itertools
import random
from functools import partial
from statistics import fmean
from typing import Any

import pytest
import torch

import stepladder as sl
from stepladder.distributed import assignment
from stepladder.distributed import costs as costs_of
from stepladder.distributed.assignment import assign, buckets
from stepladder.distributed.packing import Packing, Piece

# The matrices of GPT-2 124M's blocks; embeddings and head are AdamW's.
GPT2 = [shape for _ in range(12) for shape in [(2304, 768), (768, 768), (3072, 768), (768, 3072)]]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("split", [None, (768, 768, 768)])
def test_the_matrices_of_gpt2_are_balanced(ranks: int, split: tuple[int, ...] | None):
    params = [torch.empty(shape, device="meta") for shape in GPT2]
    optimizer = sl.Muon([torch.empty(2, 2)])
    groups = [
        optimizer.defaults | ({"split_sizes": split} if p.shape[0] == 2304 and split is not None else {})
        for p in params
    ]
    costs = [sl.Muon.cost(p, group) for p, group in zip(params, groups, strict=True)]
    loads = [0.0] * ranks
    owners = assign(costs, loads)
    for rank, load in enumerate(loads):
        assert load == pytest.approx(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank))
    assert max(loads) / (sum(loads) / ranks) <= 1.15
    # And nothing that they send to each other is padding, but for what one rank owns more than another.
    pieces = [Piece(p.shape, torch.float32, owner) for p, owner in zip(params, owners, strict=True)]
    found = buckets([piece.nbytes for piece in pieces], owners, ranks)
    assert len(found) > 1
    sent = sum(Packing([pieces[index] for index in bucket], ranks).stride for bucket in found)
    assert sent == max(sum(piece.nbytes for piece in pieces if piece.owner == rank) for rank in range(ranks))


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("optimizer", [sl.Shampoo, sl.SOAP, partial(sl.SOAP, variant="kl")])
def test_preconditioned_matrices_of_gpt2_are_balanced(optimizer: Any, ranks: int):
    made = optimizer([torch.empty(2, 2)])
    costs = [made.cost(torch.empty(shape, device="meta"), made.defaults) for shape in GPT2]
    loads = [0.0] * ranks
    assign(costs, loads)
    assert max(loads) / (sum(loads) / ranks) <= 1.15


@pytest.mark.parametrize(
    ("optimizer", "refreshes", "steps"),
    # As docs/scaling.md has them, rounded up.
    [(sl.Shampoo, 1.20, 1.06), (sl.SOAP, 1.33, 1.09), (partial(sl.SOAP, variant="kl"), 1.33, 1.07)],
)
def test_owners_even_out_staggered_refreshes(optimizer: Any, refreshes: float, steps: float):
    params = [torch.empty(shape, device="meta") for shape in GPT2]
    made = optimizer([torch.empty(2, 2)], stagger=True)
    group = made.defaults | {"params": params}
    costs, found = [made.cost(p, group) for p in params], made.refreshes([group])
    due = [found[p] for p in params]
    refreshed = [sum(work / frequency for (frequency, _), work in own.items()) for own in due]

    def waited(owners: list[int], costs: list[float]) -> float:
        return fmean(map(max, costs_of.each_step(costs, due, owners, 4))) / (sum(costs) / 4)

    loads = [0.0] * 4
    owners = assign(costs, loads, due, [{} for _ in range(4)])
    assert max(loads) / (sum(loads) / 4) <= 1.15
    assert waited(owners, costs) <= steps
    assert waited(owners, refreshed) <= refreshes
    # Nothing is given up for it: not the balance of costs, and not that of bytes.
    blind = [0.0] * 4
    without = assign(costs, blind)
    assert loads == pytest.approx(blind, rel=1e-9)
    assert waited(without, costs) > steps
    for given in (owners, without):
        sent = [sum(p.numel() for p, owner in zip(params, given, strict=True) if owner == rank) for rank in range(4)]
        assert len({*sent}) == 1


def test_the_least_busy_of_ranks_that_are_loaded_alike():
    # The second rank has less by a rounding, and something to refresh at the same steps.
    loads = [0.1 + 0.2 + 0.3, 0.6]
    assert loads[0] > loads[1]
    due: list[assignment.Refreshes] = [{(2, 1): 9.0, (3, 0): 9.0}, {(2, 0): 0.5}]
    assert assign([1.0], loads, [{(2, 0): 1.0}], due) == [0]
    # Now it has less by more than that, whatever there is to refresh.
    assert assign([0.5], loads, [{(2, 0): 1.0}], due) == [1]
    assert due == [{(2, 1): 9.0, (3, 0): 9.0, (2, 0): 1.0}, {(2, 0): 1.5}]


def test_what_a_preconditioned_parameter_costs():
    """The formulas of docs/scaling.md, for blocks, a dimension without a factor, and parameters without any."""
    shampoo = sl.Shampoo([torch.empty(2, 2)], max_preconditioner_dim=4, precondition_frequency=5)
    # Blocks of 3×4, 3×3, 2×4 and 2×3 of a 5×7 matrix.
    sides = [(3, 12), (4, 12), (3, 9), (3, 9), (2, 8), (4, 8), (2, 6), (3, 6)]
    expected = 35 + sum(3 * n * e + 11 * n**3 / 5 for n, e in sides)
    assert shampoo.cost(torch.empty(5, 7), shampoo.defaults) == pytest.approx(expected)
    soap = sl.SOAP([torch.empty(2, 2)], max_preconditioner_dim=6, precondition_frequency=4)
    w = torch.empty(5, 7)
    for variant, products in ((None, 5), ("kl", 7)):
        expected = 35 + products * 5 * 35 + (4 * 5 * 35 + 14 / 3 * 5**3) / 4
        assert soap.cost(w, soap.defaults | {"variant": variant}) == pytest.approx(expected)
    for optimizer in (sl.Shampoo([w], precondition_1d=False), soap):
        assert optimizer.cost(torch.empty(9), optimizer.defaults) == 9


def test_the_greatest_load_is_within_grahams_bound():
    random.seed(0)
    for _ in range(20):
        costs = [random.choice([0.0, 1.0, 2.0, 5.0, random.random()]) for _ in range(7)]
        for ranks in (1, 2, 3):
            loads = [0.0] * ranks
            assign(costs, loads)
            best = min(
                max(sum(c for c, r in zip(costs, given, strict=True) if r == rank) for rank in range(ranks))
                for given in itertools.product(range(ranks), repeat=len(costs))
            )
            assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-12


def test_what_was_given_before_counts():
    loads = [3.0, 0.0, 0.0]
    assert assign([1.0, 1.0, 2.0, 1.0], loads) == [2, 2, 1, 1]
    assert loads == [3.0, 3.0, 2.0]
    assert sorted(assign([0.0] * 3, [0.0] * 3)) == [0, 1, 2]
    assert assign([], [0.0]) == []


def test_buckets_hold_all_and_about_as_much_of_each_rank(monkeypatch):
    assert buckets([], [], 4) == []
    assert buckets([8, 4, 8], [0, 1, 0], 2) == [[0, 2, 1]]
    monkeypatch.setattr(assignment, "BUCKET_BYTES", 100)
    sizes, owners = [40, 10] * 30, [0, 1] * 30
    found = buckets(sizes, owners, 2)
    assert len(found) == assignment.MOST_BUCKETS
    assert sorted(index for bucket in found for index in bucket) == list(range(60))
    for rank, whole in ((0, 1200), (1, 300)):
        for bucket in found:
            share = sum(sizes[index] for index in bucket if owners[index] == rank)
            # Off by a piece at either end.
            assert abs(share - whole / len(found)) <= max(
                size for size, o in zip(sizes, owners, strict=True) if o == rank
            )
    # One that is larger than all others together takes more buckets than there are pieces: the empty ones go.
    assert buckets([10_000], [1], 2) == [[0]]
