"""Matrices that every rank has a copy of: each is stepped by its owner alone, which sends the result to the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepladder import ranges
from stepladder.distributed.assignment import assign, buckets
from stepladder.distributed.packing import Gathering, Packing, Piece
from stepladder.distributed.peers import Peers

# Buckets that are on their way at a time, each with buffers of its own.
IN_FLIGHT = 2
# What a gradient's dtype is called among ranks; 0 is none at all.
GRADIENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Replicated:
    """Owners of the matrices of one optimizer, and the exchange of their results.

    A matrix is given to a rank when it first has a gradient or a state, and stays there. All ranks take the same
    steps with the same groups, and come to the same owners without asking each other.

    Args:
        peers: The group of ranks.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.owners: dict[Tensor, int] = {}
        self._loads = [0.0] * peers.size
        self._exchange: Exchange | None = None
        self._digest: tuple[object, int] = None, 0

    def is_elsewhere(self, param: Tensor) -> bool:
        """Whether another rank owns a parameter."""
        return self.owners.get(param, self.peers.rank) != self.peers.rank

    def own(self, units: Sequence[Sequence[Tensor]], costs: Sequence[float]) -> None:
        """Give parameters owners that have none.

        Args:
            units: Parameters that stay together.
            costs: Of the work on each unit.
        """
        ranks = assign(costs, self._loads)
        self.owners |= {param: rank for unit, rank in zip(units, ranks, strict=True) for param in unit}

    def agree(self, params: Sequence[Tensor], skip: bool, error: Exception | None) -> tuple[bool, bool]:
        """Find out whether all ranks are about to take the same step; one small all-gather where they are.

        A gradient that some ranks lack is sent to them by the first that has it: gradients of replicated parameters
        are the same wherever they are.

        Args:
            params: All parameters of the optimizer.
            skip: Whether this rank leaves the step out, as its gradients were found not to be finite.
            error: What this rank's checks found, which is raised again once the others know.

        Returns:
            Whether any rank leaves the step out, and whether this rank or another was sent gradients.

        Raises:
            RuntimeError: Another rank refused its step, or has other parameters, states or owners.
        """
        has = bytes(param.grad is not None for param in params)
        here = [int(error is not None), int(skip), self._structure(params), _digest(has)]
        device = self.peers.control_device(params[0].device if params else torch.device("cpu"))
        own = torch.tensor(here, dtype=torch.int64, device=device)
        everyone = own.new_empty(self.peers.size * len(here))
        self.peers.all_gather(everyone, own, "what each rank is about to do").wait()
        said = everyone.view(self.peers.size, len(here)).tolist()
        if error is not None:
            raise error
        if refused := [rank for rank, row in enumerate(said) if row[0]]:
            raise RuntimeError(f"rank {refused[0]} refused its step, and so no rank took it; its own error says why")
        if others := [rank for rank, row in enumerate(said) if row[2] != here[2]]:
            raise RuntimeError(
                f"rank {others[0]} has other parameters than rank {self.peers.rank}, or other owners of them: "
                "expected the same groups, shapes and dtypes on all ranks, and the same checkpoint"
            )
        if any(row[1] for row in said):
            return True, False
        if all(row[3] == here[3] for row in said):
            return False, False
        self._fill(params, device)
        return False, True

    def _structure(self, params: Sequence[Tensor]) -> int:
        """A digest of the parameters and their owners."""
        key = tuple(map(id, params)), len(self.owners)
        if self._digest[0] != key:
            text = "\n".join(f"{tuple(p.shape)} {p.dtype} {self.owners.get(p)}" for p in params)
            self._digest = key, _digest(text.encode())
        return self._digest[1]

    def _fill(self, params: Sequence[Tensor], device: torch.device) -> None:
        """Send gradients to the ranks that lack them."""
        codes = [0 if p.grad is None else GRADIENT_DTYPES.index(p.grad.dtype) + 1 for p in params]
        own = torch.tensor(codes, dtype=torch.uint8, device=device)
        everyone = own.new_empty(self.peers.size * len(codes))
        self.peers.all_gather(everyone, own, "which gradients each rank has").wait()
        table = everyone.view(self.peers.size, len(codes)).tolist()
        sent: dict[int, list[tuple[int, Piece]]] = {}
        for index, column in enumerate(zip(*table, strict=True)):
            if any(column) and not all(column):
                source = next(rank for rank, code in enumerate(column) if code)
                piece = Piece(params[index].shape, GRADIENT_DTYPES[column[source] - 1], source)
                sent.setdefault(source, []).append((index, piece))
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

    def whole(self, states: dict[Tensor, Any], params: Sequence[Tensor]) -> dict[Tensor, Any]:
        """States with those that other ranks own, which they send; every rank must ask for them.

        Args:
            states: This rank's, by parameter.
            params: All parameters of the optimizer.
        """
        kept = [{} if self.is_elsewhere(param) else states.get(param, {}) for param in params]
        mine = [
            {
                name: (value.shape, value.dtype, value.device.type) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }
            if self.owners.get(param) == self.peers.rank
            else {}
            for param, state in zip(params, kept, strict=True)
        ]
        everyone = self.peers.all_gather_objects(mine, "which states each rank has")
        whole = [dict(state) for state in kept]
        pieces: dict[torch.device, list[tuple[int, str, Piece]]] = {}
        for index, param in enumerate(params):
            owner = self.owners.get(param)
            if owner is None:
                continue
            for name, said in everyone[owner][index].items():
                if not isinstance(said, tuple) or len(said) != 3 or not isinstance(said[0], torch.Size):
                    whole[index][name] = said
                    continue
                shape, dtype, kind = said
                device = param.device if kind == param.device.type else torch.device(kind)
                if owner != self.peers.rank:
                    whole[index][name] = torch.empty(shape, dtype=dtype, device=device)
                pieces.setdefault(param.device, []).append((index, name, Piece(shape, dtype, owner)))
        for device, found in pieces.items():
            packing = Packing([piece for _, _, piece in found], self.peers.size)
            sent, received = _buffers(packing.stride, self.peers.size, device)
            gathering = Gathering(packing, self.peers, sent, received)
            tensors = [whole[index][name] for index, name, _ in found]
            gathering.finish(tensors, gathering.begin(tensors, "states"))
        listed = set(params)
        return {p: state for p, state in zip(params, whole, strict=True) if state or p in states} | {
            key: value for key, value in states.items() if key not in listed
        }

    def drop(self, states: dict[Tensor, Any]) -> None:
        """Let go of the states of parameters that other ranks own."""
        for param in self.owners:
            if self.is_elsewhere(param) and states.get(param):
                states[param] = {}


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
        device = params[0].device if params else torch.device("cpu")
        slots = [_buffers(stride, peers.size, device) for _ in range(min(IN_FLIGHT, len(packings)))]
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


def _buffers(stride: int, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a rank sends, and what it receives of all."""
    sent = torch.empty(stride, dtype=torch.uint8, device=device)
    return sent, sent.new_empty(ranks * stride)


def _digest(said: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big", signed=True)
