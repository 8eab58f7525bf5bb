"""Owners of the matrices of an optimizer, what all ranks agree on before a step, and whole states of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepladder.distributed.assignment import Refreshes, assign
from stepladder.distributed.packing import Gathering, Packing, Piece, buffers
from stepladder.distributed.peers import Peers

# What a gradient's dtype is called among ranks, from 1 on; 0 is none at all.
GRADIENT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex128,
    torch.complex64,
)
_CODES = {dtype: code for code, dtype in enumerate(GRADIENT_DTYPES, 1)}

# What a rank is about to do.
STEP, REFUSE, SAVE = range(3)

Group = dict[str, Any]


class Owners(ABC):
    """Owners of the matrices of one optimizer.

    A matrix is given to a rank when it first has a gradient or a state, and stays there. All ranks take the same
    steps with the same groups, and come to the same owners without asking each other.

    Args:
        peers: The group of ranks.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.owners: dict[Tensor, int] = {}
        self._loads = [0.0] * peers.size
        self._due: list[Refreshes] = [{} for _ in range(peers.size)]
        self._digest: tuple[object, int] = None, 0

    def is_elsewhere(self, param: Tensor) -> bool:
        """Whether another rank owns a parameter."""
        return self.owners.get(param, self.peers.rank) != self.peers.rank

    def own(self, units: Sequence[Sequence[Tensor]], costs: Sequence[float], refreshes: Sequence[Refreshes]) -> None:
        """Give parameters owners that have none.

        Args:
            units: Parameters that stay together.
            costs: Of the work on each unit.
            refreshes: What of it falls on some steps alone.
        """
        ranks = assign(costs, self._loads, refreshes, self._due)
        self.owners |= {param: rank for unit, rank in zip(units, ranks, strict=True) for param in unit}

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Within this, an error takes back what owners were given."""
        before = dict(self.owners), list(self._loads), [dict(refreshes) for refreshes in self._due]
        try:
            yield
        except BaseException:
            self.owners, self._loads, self._due = before
            raise

    def agree(self, params: Sequence[Tensor], structure: int, skip: bool, error: Exception | None) -> tuple[bool, bool]:
        """Find out whether all ranks are about to take the same step; one small all-gather where they are.

        A gradient that some ranks lack is then given to them by `fill`.

        Args:
            params: All that ranks are to agree on.
            structure: What `structure` says of them.
            skip: Whether this rank leaves the step out, as its gradients were found not to be finite.
            error: What this rank's checks found, which is raised again once the others know.

        Returns:
            Whether any rank leaves the step out, and whether this rank or another was given gradients.

        Raises:
            RuntimeError: Another rank refused its step, has other parameters, states or owners, or is in state_dict().
        """
        device = self.peers.control_device(params[0].device if params else torch.device("cpu"))
        here = [STEP, int(skip), structure, _digest(_codes(params))] if error is None else [REFUSE, 0, 0, 0]
        said = self._say(here, device, "what each rank is about to do")
        if error is not None:
            raise error
        self._check_together(said)
        if refused := [rank for rank, row in enumerate(said) if row[0] == REFUSE]:
            raise RuntimeError(f"rank {refused[0]} refused its step, and so no rank took it; its own error says why")
        if any(row[1] for row in said):
            return True, False
        if others := [rank for rank, row in enumerate(said) if row[2] != structure]:
            raise RuntimeError(
                f"rank {others[0]} has other parameters than rank {self.peers.rank}, or other owners of them: expected "
                "the same groups, names, shapes, dtypes, hyper-parameters and max_norm on all ranks, and the same "
                "checkpoint"
            )
        if all(row[3] == here[3] for row in said):
            return False, False
        self._fill(params, device)
        return False, True

    def _say(self, here: list[int], device: torch.device, what: str) -> list[list[int]]:
        """Tell all ranks four numbers; returns what each has said."""
        own = torch.tensor(here, dtype=torch.int64, device=device)
        everyone = own.new_empty(self.peers.size * len(here))
        self.peers.all_gather(everyone, own, what).wait()
        said: list[list[int]] = everyone.view(self.peers.size, len(here)).tolist()
        return said

    @staticmethod
    def _check_together(said: list[list[int]]) -> None:
        """Refuse that some ranks save while others step.

        Raises:
            RuntimeError: Names a rank of each.
        """
        saving = [rank for rank, row in enumerate(said) if row[0] == SAVE]
        if saving and len(saving) < len(said):
            stepping = next(rank for rank, row in enumerate(said) if row[0] != SAVE)
            raise RuntimeError(
                f"rank {saving[0]} called state_dict() where rank {stepping} took a step: every rank has to call "
                "state_dict(), as each has the states of what it owns alone"
            )

    def structure(self, groups: Sequence[Group], fates: Callable[[], dict[Tensor, object]], setting: str) -> int:
        """A digest of the parameters, their owners, and what new ones will be chosen by.

        Args:
            groups: Of all that ranks are to agree on.
            fates: The latter, of parameters that may be given owners.
            setting: What else is to be alike on all ranks.
        """
        key = setting, tuple(id(param) for group in groups for param in group["params"]), len(self.owners)
        if self._digest[0] != key:
            expected = fates()
            lines = [setting]
            for group in groups:
                names = group.get("param_names") or [""] * len(group["params"])
                for name, param in zip(names, group["params"], strict=True):
                    fate = self.owners.get(param, expected.get(param))
                    lines.append(f"{name} {tuple(param.shape)} {param.dtype} {fate}")
            self._digest = key, _digest("\n".join(lines).encode())
        return self._digest[1]

    def _fill(self, params: Sequence[Tensor], device: torch.device) -> None:
        """Give this rank the gradients that it lacks and another has."""
        own = torch.tensor(list(_codes(params)), dtype=torch.uint8, device=device)
        everyone = own.new_empty(self.peers.size * len(params))
        self.peers.all_gather(everyone, own, "which gradients each rank has").wait()
        table = everyone.view(self.peers.size, len(params)).tolist()
        lacking: list[tuple[int, Piece]] = []
        for index, column in enumerate(zip(*table, strict=True)):
            found = {code for code in column if code}
            if len(found) > 1:
                dtypes = ", ".join(str(GRADIENT_DTYPES[code - 1]) for code in sorted(found))
                raise RuntimeError(f"the gradient of parameter {index} has dtypes {dtypes} on different ranks")
            if found and not all(column):
                source = next(rank for rank, code in enumerate(column) if code)
                lacking.append((index, Piece(params[index].shape, GRADIENT_DTYPES[column[source] - 1], source)))
        self.fill(params, lacking)

    @abstractmethod
    def fill(self, params: Sequence[Tensor], lacking: list[tuple[int, Piece]]) -> None:
        """Give this rank the gradients that it lacks and another has.

        Args:
            params: All parameters, the same on all ranks.
            lacking: Their indices where a rank lacks one, with the first rank that has it.
        """

    def whole(self, states: dict[Tensor, Any], params: Sequence[Tensor]) -> dict[Tensor, Any]:
        """States with those that other ranks own, which they send; every rank must ask for them.

        Args:
            states: This rank's, by parameter.
            params: All parameters of the optimizer.

        Raises:
            RuntimeError: Another rank took a step meanwhile, ended, or did not come in time.
        """
        # As large as what ranks say before a step, so that one that steps meanwhile is found out by both.
        device = self.peers.control_device(params[0].device if params else torch.device("cpu"))
        what = "states for state_dict(), which every rank has to call,"
        self._check_together(self._say([SAVE, 0, 0, 0], device, what))
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
            sent, received = buffers(packing.stride, self.peers.size, device)
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


def _codes(params: Sequence[Tensor]) -> bytes:
    """Which gradients this rank has, in which dtype."""
    return bytes(0 if p.grad is None else _CODES.get(p.grad.dtype, 0) for p in params)


def _digest(said: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big", signed=True)
