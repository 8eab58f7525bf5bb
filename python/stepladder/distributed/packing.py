"""Tensors of any dtypes in one buffer of bytes for each rank, and the gathering of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.distributed.peers import Peers, Pending

# Every rank's part of a buffer begins at a multiple of this, which is one of every dtype's size.
ALIGNED = 16


def aligned(nbytes: int) -> int:
    """The least multiple of ALIGNED that is not less."""
    return -(-nbytes // ALIGNED) * ALIGNED


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor that one rank has and all want.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        owner: The rank that has it.
    """

    shape: torch.Size
    dtype: torch.dtype
    owner: int

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Packing:
    """Where pieces lie in what each rank sends.

    Args:
        pieces: What is exchanged, in the same order on all ranks.
        ranks: How many ranks there are.

    Attributes:
        stride: Bytes that each rank sends: the most that any has, aligned.
    """

    def __init__(self, pieces: Sequence[Piece], ranks: int) -> None:
        self.pieces = list(pieces)
        self.offsets = [0] * len(pieces)
        ends = [0] * ranks
        # Wider dtypes first, so that each tensor begins at a multiple of its dtype's size.
        for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].dtype.itemsize):
            piece = pieces[index]
            self.offsets[index] = ends[piece.owner]
            ends[piece.owner] += piece.nbytes
        self.stride = aligned(max(ends))

    def views(self, buffer: Tensor, rank: int) -> dict[int, Tensor]:
        """The pieces of one rank, by their index, as views of the bytes that it sends."""
        return {
            index: buffer[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape)
            for index, (piece, offset) in enumerate(zip(self.pieces, self.offsets, strict=True))
            if piece.owner == rank
        }


class Gathering:
    """Buffers for a packing, and the views of them that tensors are copied to and from.

    Args:
        packing: What lies where.
        peers: Between whom.
        sent: Bytes, at least `packing.stride`.
        received: Bytes, at least that for each rank.
    """

    def __init__(self, packing: Packing, peers: Peers, sent: Tensor, received: Tensor) -> None:
        self._peers = peers
        self._sent = sent[: packing.stride]
        self._received = received[: peers.size * packing.stride]
        self._own = packing.views(self._sent, peers.rank)
        self._others: dict[int, Tensor] = {}
        for rank in range(peers.size):
            if rank != peers.rank:
                part = self._received[rank * packing.stride : (rank + 1) * packing.stride]
                self._others |= packing.views(part, rank)

    def begin(self, tensors: Sequence[Tensor], what: str) -> Pending | None:
        """Send this rank's of the tensors, which are as the pieces say; None where nobody has any bytes."""
        if self._own:
            torch._foreach_copy_(list(self._own.values()), [tensors[index] for index in self._own])
        if self._sent.numel() == 0:
            return None
        return self._peers.all_gather(self._received, self._sent, what)

    def finish(self, tensors: Sequence[Tensor], pending: Pending | None) -> None:
        """Write what has come from the other ranks to the tensors."""
        if pending is not None:
            pending.wait()
        if self._others:
            torch._foreach_copy_([tensors[index] for index in self._others], list(self._others.values()))


def buffers(stride: int, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes for what a rank sends, and for what it receives of all."""
    sent = torch.empty(stride, dtype=torch.uint8, device=device)
    return sent, sent.new_empty(ranks * stride)
