"""The collectives of a group of processes, with names that stand in their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 gave it another name; a torch that was built without torch.distributed has neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Errors of a collective say which it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} failed, as when a rank has ended or did not come within the timeout: {error}"
        ) from error


class Pending:
    """A collective on its way."""

    def __init__(self, work: Any, what: str) -> None:
        self._work = work
        self._what = what

    def wait(self) -> None:
        """Wait for it; on a GPU, the current stream does.

        Raises:
            RuntimeError: It failed; says which it was.
        """
        with collective(self._what):
            self._work.wait()


class Peers:
    """This process among those of a group.

    Args:
        group: Of torch.distributed; this process belongs to it.
        name: Of the optimizer, for errors.

    Attributes:
        rank: This process's in the group.
        size: How many processes the group has.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._name = name
        # Small messages for the host need not wait for a GPU where the group has a backend for the CPU.
        self._on_cpu = "cpu:" in dist.get_backend_config(group)

    def control_device(self, device: torch.device) -> torch.device:
        """Where messages for the host are sent from, beside tensors on `device`."""
        return torch.device("cpu") if self._on_cpu else device

    def all_gather(self, out: Tensor, own: Tensor, what: str) -> Pending:
        """Begin to gather everybody's `own`, one after another by rank, into `out`; both contiguous."""
        what = f"{self._name}'s all-gather of {what}"
        with collective(what):
            return Pending(_all_gather(out, own, group=self.group, async_op=True), what)

    def all_to_all(
        self, incoming: Tensor, outgoing: Tensor, of_each: list[int], to_each: list[int], what: str
    ) -> Pending:
        """Begin to exchange bytes between all ranks; both buffers contiguous, with their bytes for each rank."""
        what = f"{self._name}'s all-to-all of {what}"
        with collective(what):
            work = dist.all_to_all_single(incoming, outgoing, of_each, to_each, group=self.group, async_op=True)
            return Pending(work, what)

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """Send rank `source`'s contiguous tensor to all."""
        with collective(f"{self._name}'s broadcast of {what} from rank {source}"):
            dist.broadcast(tensor, group=self.group, group_src=source)

    def all_gather_objects(self, own: Any, what: str) -> Sequence[Any]:
        """Everybody's object, by rank; pickled."""
        found: list[Any] = [None] * self.size
        with collective(f"{self._name}'s all-gather of {what}"):
            dist.all_gather_object(found, own, group=self.group)
        return found


def world_size() -> int:
    """How many processes torch.distributed was initialised with; 0 before it was."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def check_places(process_group: ProcessGroup | None, mesh: DeviceMesh | None) -> None:
    """Refuse arguments of an optimizer that name no ranks.

    Raises:
        TypeError: One has the wrong type.
        ValueError: Both are given.
        RuntimeError: This torch has no torch.distributed.
    """
    if process_group is None and mesh is None:
        return
    if not dist.is_available():
        raise RuntimeError("process_group and mesh need torch.distributed, which this torch was built without")
    if process_group is not None and mesh is not None:
        raise ValueError("process_group and mesh were both given, expected one of them")
    if mesh is not None:
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a torch.distributed.DeviceMesh, got {mesh!r}")
    elif not isinstance(process_group, dist.ProcessGroup):
        outside = process_group is dist.GroupMember.NON_GROUP_MEMBER
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}"
            + ", which stands for a group without this process" * outside
        )


def group_of(process_group: ProcessGroup | None, mesh: DeviceMesh | None) -> ProcessGroup:
    """The group that replicated parameters are divided over, of checked arguments of which one is given.

    Raises:
        ValueError: The mesh has several dimensions.
    """
    if mesh is None:
        assert process_group is not None
        return process_group
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh={mesh} has {mesh.ndim} dimensions, expected one for parameters that are no DTensors: mesh['name'] "
            "takes the one over which they are replicated"
        )
    return mesh.get_group()
