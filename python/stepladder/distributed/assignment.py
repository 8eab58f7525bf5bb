"""Who owns which matrix, and in which bucket it travels: from numbers alone, so that all ranks find the same."""

from __future__ import annotations

from collections.abc import Sequence

# Operations that come every so many steps, at the one of them that has this number: by (frequency, phase).
Refreshes = dict[tuple[int, int], float]

# Loads that differ by less, of themselves, may be sums of the same costs in another order.
ALIKE = 1e-9
# Of a rank's results, below which a bucket is not divided further.
BUCKET_BYTES = 16 << 20
# Buckets of a step, however much there is to exchange.
MOST_BUCKETS = 4


def assign(
    costs: Sequence[float],
    loads: list[float],
    refreshes: Sequence[Refreshes] = (),
    due: Sequence[Refreshes] = (),
) -> list[int]:
    """A rank for each piece of work, longest processing time first: the largest left goes to the least loaded.

    Among ranks that are loaded alike, it is the one that has least to do when the piece is refreshed.

    Args:
        costs: Of each piece, at least 0, in the mean over steps.
        loads: Of each rank, what it has to do already; what it is given is added.
        refreshes: Of each piece, what of it falls on some steps alone; empty where nothing does.
        due: Of each rank, the same of what it has to do already; likewise added to.

    Returns:
        A rank in [0, len(loads)) for each piece. The greatest load is at most 4/3 − 1/(3·ranks) times the least
        possible one, where loads began at 0.

    Source: Graham 1969, Bounds on multiprocessing timing anomalies.
    """
    owners = [0] * len(costs)
    pieces = [0] * len(loads)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        own = refreshes[index] if refreshes else {}
        least = min(loads)
        alike = [rank for rank, load in enumerate(loads) if load - least <= ALIKE * load]

        def meets(rank: int, own: Refreshes = own) -> float:
            return sum(work * due[rank].get(when, 0.0) for when, work in own.items())

        # Where nothing is refreshed, the one with fewer pieces: those that cost nothing are dealt out too.
        rank = min(alike, key=lambda rank: (meets(rank), pieces[rank], rank))
        owners[index] = rank
        loads[rank] += costs[index]
        pieces[rank] += 1
        for when, work in own.items():
            due[rank][when] = due[rank].get(when, 0.0) + work
    return owners


def bucket_count(sizes: Sequence[int]) -> int:
    """How many buckets results travel in, by the bytes that each rank has to send."""
    return max(1, min(MOST_BUCKETS, max(sizes, default=0) // BUCKET_BYTES))


def buckets(sizes: Sequence[int], owners: Sequence[int], ranks: int) -> list[list[int]]:
    """Pieces in the order in which they are worked on and sent: of each rank about the same bytes in each bucket.

    Args:
        sizes: Bytes of each piece.
        owners: Rank of each piece.
        ranks: How many there are.

    Returns:
        Indices of pieces, without empty buckets.
    """
    sent = [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        sent[owner] += size
    count = bucket_count(sent)
    found: list[list[int]] = [[] for _ in range(count)]
    begun = [0] * ranks
    # The largest first, so that what ranks send at the same time is alike.
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size, owner = sizes[index], owners[index]
        # A piece stands where its middle lies on a line of all that its rank sends.
        middle = begun[owner] + size / 2
        found[min(count - 1, int(count * middle / max(sent[owner], 1)))].append(index)
        begun[owner] += size
    return [bucket for bucket in found if bucket]
