"""What a step of matrices with owners costs: collectives, bytes and time, from shapes and owners alone.

docs/scaling.md has the formulas, and the tests hold instrumented steps to what is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepladder.distributed.assignment import Refreshes, buckets
from stepladder.distributed.packing import Packing, Piece, aligned
from stepladder.distributed.sharded import Cut

# What each rank tells the others before a step.
CONTROL_BYTES = 32
# Of each parameter whose rule takes norms, two sums of squares in fp64.
NORM_BYTES = 2 * 8


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one step exchanges.

    Attributes:
        collectives: Of each rank, the agreement among them.
        received: Bytes that each rank receives from others.
        buckets: In how many parts the work is done and exchanged.
    """

    collectives: int
    received: list[int]
    buckets: int


def replicated(sizes: Sequence[int], owners: Sequence[int], ranks: int) -> Traffic:
    """Of matrices that every rank has a copy of.

    Args:
        sizes: Bytes of each.
        owners: Rank of each.
        ranks: How many there are.
    """
    pieces = [Piece(torch.Size([size]), torch.uint8, owner) for size, owner in zip(sizes, owners, strict=True)]
    found = buckets(sizes, owners, ranks)
    strides = [Packing([pieces[index] for index in bucket], ranks).stride for bucket in found]
    # Nothing is sent where nobody has any bytes.
    collectives = 1 + sum(stride > 0 for stride in strides)
    return Traffic(collectives, [(ranks - 1) * (CONTROL_BYTES + sum(strides))] * ranks, len(found))


def sharded(shapes: Sequence[torch.Size], itemsize: int, owners: Sequence[int], ranks: int) -> Traffic:
    """Of matrices whose first dimension is divided over the ranks, with gradients in their own dtype.

    Args:
        shapes: Of whole matrices.
        itemsize: Bytes of an element.
        owners: Rank of each.
        ranks: How many there are.
    """
    found = buckets([shape.numel() * itemsize for shape in shapes], owners, ranks)
    received = [(ranks - 1) * CONTROL_BYTES] * ranks
    for bucket in found:
        for rank in range(ranks):
            # Of this rank's shards, by the owners of the matrices.
            shards = dict.fromkeys((owners[index] for index in bucket), 0)
            for index in bucket:
                shards[owners[index]] += Cut(shapes[index], 0, ranks).shape_of(rank).numel() * itemsize
            for owner, nbytes in shards.items():
                if owner != rank:
                    received[owner] += aligned(2 * nbytes)
                    received[rank] += aligned(nbytes)
    return Traffic(1 + 2 * len(found), received, len(found))


def norms(count: int, ranks: int) -> Traffic:
    """Of parameters that are stepped in their shards by a rule that takes norms: one all-reduce of sums of squares.

    An all-reduce counts as a reduce-scatter and an all-gather of what it sums.

    Args:
        count: Of the parameters.
        ranks: How many there are.
    """
    part = -(-count * NORM_BYTES // (8 * ranks)) * 8
    return Traffic(1, [2 * (ranks - 1) * part] * ranks, 1)


def each_step(
    costs: Sequence[float], refreshes: Sequence[Refreshes], owners: Sequence[int], ranks: int
) -> list[list[float]]:
    """Operations of each rank in each of the steps after which all refreshes come again.

    Args:
        costs: Of each piece of work, in the mean over steps.
        refreshes: What of it falls on some steps alone.
        owners: Rank of each piece.
        ranks: How many there are.
    """
    period = math.lcm(*(frequency for due in refreshes for frequency, _ in due))
    every = [0.0] * ranks
    for cost, due, owner in zip(costs, refreshes, owners, strict=True):
        every[owner] += cost - sum(work / frequency for (frequency, _), work in due.items())
    steps = [list(every) for _ in range(period)]
    for due, owner in zip(refreshes, owners, strict=True):
        for (frequency, phase), work in due.items():
            for step in steps[phase::frequency]:
                step[owner] += work
    return steps


def seconds(
    operations: Sequence[float], traffic: Traffic, flops: float, bandwidth: float, latency: float
) -> tuple[float, float]:
    """A step's time, where work and exchange take turns, and where each bucket's exchange hides behind others' work.

    The slowest rank is waited for, and buckets are taken to be alike: of the exchange, one bucket's cannot hide, as
    the first comes before any work or the last goes after all of it; and likewise of the work.

    Args:
        operations: Of each rank.
        traffic: Of the step.
        flops: Operations a second of one rank.
        bandwidth: Bytes a second that one rank receives.
        latency: Seconds that each collective takes beside its bytes.
    """
    work = max(operations) / flops
    exchange = (traffic.collectives - 1) * latency + max(traffic.received) / bandwidth
    parts = max(traffic.buckets, 1)
    overlapped = max(work + exchange / parts, exchange + work / parts)
    return latency + work + exchange, latency + overlapped
