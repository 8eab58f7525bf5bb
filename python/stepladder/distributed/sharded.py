"""Matrices of which every rank has a shard: their owners get whole ones, step them, and send the shards back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepladder import ranges
from stepladder.distributed.assignment import buckets
from stepladder.distributed.owners import Owners
from stepladder.distributed.packing import Piece, aligned
from stepladder.distributed.peers import Peers, Pending
from stepladder.optim.sharding import local


def sharded_dim(param: Any, where: str) -> int:
    """The mesh dimension over which a distributed matrix is sharded; on others, it is replicated.

    Raises:
        ValueError: There is none or more than one, or it is no plain `Shard`; names the placements.
    """
    from torch.distributed.tensor import Shard

    dims = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    if len(dims) != 1 or type(param.placements[dims[0]]) is not Shard:
        raise ValueError(
            f"{where} has placements {tuple(param.placements)} on {param.device_mesh}, expected Shard on one mesh "
            "dimension and Replicate on the others, as fully_shard makes them: no rank would see whole matrices"
        )
    return dims[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a matrix is cut into shards, as torch.chunk does it.

    Attributes:
        shape: Of the whole.
        dim: That is cut.
        ranks: How many shards there are; some may be empty.
    """

    shape: torch.Size
    dim: int
    ranks: int

    def part(self, rank: int) -> tuple[int, int]:
        """Where a rank's shard begins, and how much of the dimension it has."""
        size = self.shape[self.dim]
        step = -(-size // self.ranks)
        begin = min(rank * step, size)
        return begin, min(step, size - begin)

    def shape_of(self, rank: int) -> torch.Size:
        """The shape of a rank's shard."""
        return torch.Size((*self.shape[: self.dim], self.part(rank)[1], *self.shape[self.dim + 1 :]))

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's shard, as a view of the whole."""
        return whole.narrow(self.dim, *self.part(rank))


class Travel:
    """Tensors on their way from each rank to each other, in one all-to-all of bytes.

    Args:
        peers: Between whom.
        sent: What this rank sends: tensors, and pieces with the destination as owner.
        received: What it receives, with the source as owner; of each source in the order in which that sends.
        device: Of all of them.
        what: For errors.

    Attributes:
        arrived: Views of the buffer that is received, valid after `wait`.
    """

    def __init__(
        self,
        peers: Peers,
        sent: Sequence[tuple[Piece, Tensor]],
        received: Sequence[Piece],
        device: torch.device,
        what: str,
    ) -> None:
        outgoing, views, to_each = laid([piece for piece, _ in sent], peers.size, device)
        if views:
            torch._foreach_copy_(views, [tensor for _, tensor in sent])
        incoming, self.arrived, of_each = laid(received, peers.size, device)
        self._pending: Pending = peers.all_to_all(incoming, outgoing, of_each, to_each, what)

    def wait(self) -> list[Tensor]:
        """What has arrived, in the order of `received`."""
        self._pending.wait()
        return self.arrived


def laid(pieces: Sequence[Piece], ranks: int, device: torch.device) -> tuple[Tensor, list[Tensor], list[int]]:
    """A buffer for tensors to or from all ranks: its bytes, a view for each, and the bytes for each rank."""
    offsets = [0] * len(pieces)
    sizes = []
    end = 0
    # Wider dtypes first, so that each tensor begins at a multiple of its dtype's size.
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].owner, -pieces[i].dtype.itemsize))
    position = 0
    for rank in range(ranks):
        begin = end
        while position < len(order) and pieces[order[position]].owner == rank:
            offsets[order[position]] = end
            end += pieces[order[position]].nbytes
            position += 1
        end = aligned(end)
        sizes.append(end - begin)
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    views = [
        buffer[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape)
        for piece, offset in zip(pieces, offsets, strict=True)
    ]
    return buffer, views, sizes


class Sharded(Owners):
    """Owners of parameters of which each rank has a shard.

    A step sends the shards of gradients and parameters to the owners, who step whole matrices with the states that
    they have, and send the shards of the results back; in buckets, so that the next one comes and the last one goes
    while one is worked on. On a mesh of several dimensions each group of ranks that has all shards does this for
    itself.

    Args:
        peers: The ranks that have all shards.
        mesh: Of the parameters.
        mesh_dim: Over which they are sharded.
    """

    def __init__(self, peers: Peers, mesh: Any, mesh_dim: int) -> None:
        super().__init__(peers)
        self.mesh = mesh
        self.mesh_dim = mesh_dim

    def fill(self, params: Sequence[Tensor], lacking: list[tuple[int, Piece]]) -> None:
        """Zeros for shards that others have something to add to."""
        for index, piece in lacking:
            if params[index].grad is None:
                params[index].grad = torch.zeros_like(params[index], dtype=piece.dtype, requires_grad=False)

    def step(self, params: Sequence[Tensor], work: Callable[[dict[int, Tensor]], None]) -> None:
        """Step parameters bucket by bucket.

        Args:
            params: With gradients that lie as they do, and owners; the same on all ranks.
            work: Steps whole parameters, by their index; they have whole gradients.
        """
        parts = self._buckets(params)
        ahead = [self._gather(params, bucket, number, len(parts)) for number, bucket in enumerate(parts[:1])]
        returning: list[Callable[[], None]] = []
        for number, bucket in enumerate(parts):
            if number + 1 < len(parts):
                ahead.append(self._gather(params, parts[number + 1], number + 1, len(parts)))
            with ranges.kernel("exchange"):
                whole = ahead.pop(0)()
            if whole:
                work(whole)
            if returning:
                returning.pop(0)()
            returning.append(self._scatter(params, bucket, whole, number, len(parts)))
        for last in returning:
            last()

    def gathered(self, params: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Bucket by bucket, what this rank owns of parameters as `step` takes them: whole, by index.

        All ranks have to go to the end.
        """
        parts = self._buckets(params)
        for number, bucket in enumerate(parts):
            yield self._gather(params, bucket, number, len(parts))()

    def _buckets(self, params: Sequence[Tensor]) -> list[list[int]]:
        owners = [self.owners[param] for param in params]
        return buckets([param.numel() * param.element_size() for param in params], owners, self.peers.size)

    def _cut(self, param: Any) -> Cut:
        return Cut(param.shape, param.placements[self.mesh_dim].dim, self.peers.size)

    def _gather(
        self, params: Sequence[Any], bucket: Sequence[int], number: int, count: int
    ) -> Callable[[], dict[int, Tensor]]:
        """Send shards of gradients and parameters to owners; what this returns waits for whole ones."""
        sent: list[tuple[Piece, Tensor]] = []
        received: list[Piece] = []
        own: list[int] = []
        for index in bucket:
            param, owner, cut = params[index], self.owners[params[index]], self._cut(params[index])
            shards = local(param.grad), local(param).detach()
            sent += [(Piece(shard.shape, shard.dtype, owner), shard) for shard in shards]
            if owner == self.peers.rank:
                own.append(index)
                for rank in range(self.peers.size):
                    received += [Piece(cut.shape_of(rank), shard.dtype, rank) for shard in shards]
        device = params[bucket[0]].device
        what = f"bucket {number + 1} of {count} of gradients and parameters"
        travel = Travel(self.peers, sent, received, device, what)

        def wait() -> dict[int, Tensor]:
            arrived = iter(travel.wait())
            whole: dict[int, Tensor] = {}
            targets: list[Tensor] = []
            for index in own:
                param, cut = params[index], self._cut(params[index])
                value = torch.empty(param.shape, dtype=param.dtype, device=device)
                if param.grad.dtype != param.dtype:
                    value.grad_dtype = None  # as the parameter's
                value.grad = torch.empty(param.shape, dtype=param.grad.dtype, device=device)
                for rank in range(self.peers.size):
                    targets += [cut.shard(value.grad, rank), cut.shard(value, rank)]
                whole[index] = value
            if targets:
                torch._foreach_copy_(targets, list(arrived))
            return whole

        return wait

    def _scatter(
        self, params: Sequence[Any], bucket: Sequence[int], whole: dict[int, Tensor], number: int, count: int
    ) -> Callable[[], None]:
        """Send shards of stepped parameters back; what this returns waits for them and writes them."""
        sent: list[tuple[Piece, Tensor]] = []
        for index, value in whole.items():
            cut = self._cut(params[index])
            for rank in range(self.peers.size):
                sent.append((Piece(cut.shape_of(rank), value.dtype, rank), cut.shard(value, rank)))
        targets = [local(params[index]).detach() for index in bucket]
        received = [
            Piece(target.shape, target.dtype, self.owners[params[index]])
            for index, target in zip(bucket, targets, strict=True)
        ]
        what = f"bucket {number + 1} of {count} of stepped parameters"
        travel = Travel(self.peers, sent, received, params[bucket[0]].device, what)

        def finish() -> None:
            with ranges.kernel("exchange"):
                torch._foreach_copy_(targets, travel.wait())
                torch._C._increment_version([params[index] for index in bucket])

        return finish
