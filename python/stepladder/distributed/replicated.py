"""Matrices that every rank has a copy of: each is stepped by its owner alone, which sends the result to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepladder import ranges
from stepladder.distributed.assignment import buckets
from stepladder.distributed.owners import Owners
from stepladder.distributed.packing import Gathering, Packing, Piece, buffers
from stepladder.distributed.peers import Peers

# Buckets that are on their way at a time, each with buffers of its own.
IN_FLIGHT = 2


class Replicated(Owners):
    """Owners of replicated parameters, whose gradients are the same on all ranks, and the exchange of their results.

    Args:
        peers: The group of ranks.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__(peers)
        self._exchange: Exchange | None = None

    def fill(self, params: Sequence[Tensor], lacking: list[tuple[int, Piece]]) -> None:
        """Send gradients of the first rank that has them to the others, where they are the same."""
        sent: dict[int, list[tuple[int, Piece]]] = {}
        for index, piece in lacking:
            sent.setdefault(piece.owner, []).append((index, piece))
        for source in sorted(sent):
            packing = Packing([piece for _, piece in sent[source]], self.peers.size)
            buffer = torch.empty(packing.stride, dtype=torch.uint8, device=params[sent[source][0][0]].device)
            views = packing.views(buffer, source)
            for position, (index, _) in enumerate(sent[source]):
                grad = params[index].grad
                if self.peers.rank == source and grad is not None:
                    views[position].copy_(grad)
            self.peers.broadcast(buffer, source, "gradients that other ranks lack")
            for position, (index, piece) in enumerate(sent[source]):
                if params[index].grad is None:
                    like = torch.empty_like(params[index], dtype=piece.dtype, requires_grad=False)
                    params[index].grad = like.copy_(views[position])

    def step(self, params: Sequence[Tensor], work: Callable[[list[int]], None]) -> None:
        """Step parameters bucket by bucket; while one travels, the next is worked on.

        Args:
            params: With gradients and owners, the same on all ranks.
            work: Steps those of the parameters that stand at these indices.
        """
        key = [(id(param), self.owners[param]) for param in params]
        if self._exchange is None or self._exchange.key != key:
            self._exchange = Exchange(params, [self.owners[param] for param in params], self.peers, key)
        self._exchange.run(params, work)


class Exchange:
    """The buckets of a step, and the buffers that they travel in.

    Args:
        params: What is exchanged.
        owners: Of each.
        peers: Between whom.
        key: What this was made for.
    """

    def __init__(
        self, params: Sequence[Tensor], owners: Sequence[int], peers: Peers, key: list[tuple[int, int]]
    ) -> None:
        self.key = key
        self._rank = peers.rank
        pieces = [Piece(p.shape, p.dtype, owner) for p, owner in zip(params, owners, strict=True)]
        self._buckets = buckets([piece.nbytes for piece in pieces], owners, peers.size)
        self._own = [[index for index in bucket if owners[index] == peers.rank] for bucket in self._buckets]
        packings = [Packing([pieces[index] for index in bucket], peers.size) for bucket in self._buckets]
        stride = max((packing.stride for packing in packings), default=0)
        devices = {param.device for param in params}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"matrices with a process group lie on {names}, expected one device on each rank")
        device = devices.pop() if devices else torch.device("cpu")
        slots = [buffers(stride, peers.size, device) for _ in range(min(IN_FLIGHT, len(packings)))]
        self._gatherings = [
            Gathering(packing, peers, *slots[number % IN_FLIGHT]) for number, packing in enumerate(packings)
        ]

    def run(self, params: Sequence[Tensor], work: Callable[[list[int]], None]) -> None:
        """Step and exchange; see `Replicated.step`."""
        count = len(self._buckets)
        travelling: list[Callable[[], None]] = []
        for number, (bucket, own, gathering) in enumerate(zip(self._buckets, self._own, self._gatherings, strict=True)):
            if own:
                work(own)
            if len(travelling) == IN_FLIGHT:
                travelling.pop(0)()
            tensors = [params[index] for index in bucket]
            with ranges.kernel("pack"):
                pending = gathering.begin(tensors, f"bucket {number + 1} of {count} of stepped parameters")

            def finish(gathering: Gathering = gathering, tensors: Any = tensors, pending: Any = pending) -> None:
                with ranges.kernel("exchange"):
                    gathering.finish(tensors, pending)

            travelling.append(finish)
        for last in travelling:
            last()
