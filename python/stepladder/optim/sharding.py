"""Parameters that are spread over the ranks of torch.distributed: torch's DTensors, as FSDP2 makes them.

A step works on what this rank holds; a shard's elements need nothing from other ranks, norms of whole tensors do.
Whatever is summed over ranks goes in one collective for each mesh dimension, whatever the number of parameters, and
every rank takes part in it, also one that has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepladder.distributed.peers import collective


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a distributed tensor, without the new object that `to_local()` makes; else itself."""
    held: Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def layout(tensor: Any) -> str:
    """How messages say where a tensor is."""
    if not is_distributed(tensor):
        return f"is a plain {type(tensor).__name__}"
    return f"has placements {tuple(tensor.placements)} on {tensor.device_mesh}"


def check_placements(param: Any, where: str) -> None:
    """Refuse a distributed parameter that is no set of shards and replicas.

    Raises:
        TypeError: Names the placements.
    """
    if is_distributed(param) and any(placement.is_partial() for placement in param.placements):
        raise TypeError(f"{where} {layout(param)}, expected Shard and Replicate: redistribute() it first")


def is_under_way(tensor: Tensor) -> bool:
    """Whether a collective is still to fill a tensor's local part."""
    return hasattr(local(tensor), "wait")


def check_companion(tensor: Any, param: Any, what: str) -> None:
    """Refuse a gradient or state that is distributed where its parameter is not, on another mesh, or in other pieces.

    Raises:
        TypeError: Names the placements of both.
        ValueError: Placements agree, but not the shapes of what this rank has.
    """
    if not is_distributed(tensor) and not is_distributed(param):
        return
    if is_distributed(tensor) != is_distributed(param) or tensor.device_mesh != param.device_mesh:
        raise TypeError(f"{what} {layout(tensor)}, its parameter {layout(param)}: expected the parameter's mesh")
    if tuple(tensor.placements) == tuple(param.placements) and local(tensor).shape != local(param).shape:
        raise ValueError(
            f"{what} has a shard of shape {tuple(local(tensor).shape)} on this rank, expected the parameter's "
            f"{tuple(local(param).shape)}"
        )


def check_state(tensor: Any, param: Any, what: str) -> None:
    """Refuse a state that does not lie as its parameter does.

    Raises:
        TypeError: Names the placements of both.
    """
    check_companion(tensor, param, what)
    if is_distributed(param) and tuple(tensor.placements) != tuple(param.placements):
        raise TypeError(f"{what} {layout(tensor)}, its parameter {layout(param)}: expected the same placements")


def settled(grad: Any, param: Any) -> Tensor:
    """A distributed gradient that lies as its parameter does, in plain memory; mostly the gradient itself."""
    from torch.distributed.tensor import DTensor

    held, before, after = local(grad), tuple(grad.placements), tuple(param.placements)
    if before != after or is_under_way(grad):
        with collective(f"the redistribution of a gradient from {before} to {after}"):
            grad = grad.redistribute(placements=after)
            held = local(grad)
            if is_under_way(grad):
                held = held.wait()  # type: ignore[attr-defined]
    held = held.resolve_conj().resolve_neg()
    if held is local(grad):
        result: Tensor = grad
        return result
    result = DTensor.from_local(
        held, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return result


def first_element(param: Any, where: str) -> int:
    """The logical index, in a whole parameter, of the first element of this rank's shard.

    Raises:
        ValueError: The shard's elements are not consecutive there; names the placements.
    """
    if not is_distributed(param):
        return 0
    # Dimensions of size 1 before it leave the order as it is; a shard of such a dimension is all or nothing.
    leading = next((dim for dim, size in enumerate(param.shape) if size != 1), 0)
    begin, size = 0, param.shape[leading] if param.ndim else 1
    for mesh_dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim > leading:
            raise ValueError(
                f"stochastic_rounding=True goes by a parameter's elements in order; {where} {layout(param)}, expected "
                f"Shard(dim={leading}), which leaves shards in one piece"
            )
        if placement.dim == leading:
            piece = -(-size // param.device_mesh.size(mesh_dim))  # as torch.chunk has it
            skipped = min(piece * param.device_mesh.get_local_rank(mesh_dim), size)
            begin, size = begin + skipped, min(piece, size - skipped)
    return begin * int(param.shape[leading + 1 :].numel())


def sharded_dims(param: Any) -> tuple[int, ...]:
    """The mesh dimensions over which a parameter is sharded; on the others, it is replicated."""
    if not is_distributed(param):
        return ()
    return tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())


def over_shards(values: Sequence[Tensor], params: Sequence[Any], largest: bool = False) -> list[Tensor]:
    """What ranks have of their shards, taken together for whole parameters.

    Args:
        values: For each parameter a tensor of one or more sums over this rank's shard; of one shape and dtype.
        params: On every rank the same, in the same order.
        largest: Take the largest in place of the sum.
    """
    import torch.distributed as dist

    whole = list(values)
    members: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if dims := sharded_dims(param):
            members.setdefault((param.device_mesh, dims), []).append(index)
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    for (mesh, dims), indices in members.items():
        packed = torch.stack([whole[index] for index in indices])
        for dim in dims:
            with collective(f"the all_reduce of norms over dimension {dim} of {mesh}"):
                dist.all_reduce(packed, op, group=mesh.get_group(dim))
        for index, value in zip(indices, packed, strict=True):
            whole[index] = value
    return whole


def whole_partials(partials: Sequence[float], params: Sequence[Any], largest: bool = False) -> list[float]:
    """Parts of a norm, taken over all shards.

    Args:
        partials: For each parameter the part that this rank holds, 0 for one without a gradient.
        params: On every rank the same, in the same order.
        largest: The parts are largest magnitudes, else sums.

    Returns:
        The parts of plain parameters in their order, then one for all parameters that lie alike.
    """
    parts = [part for part, param in zip(partials, params, strict=True) if not is_distributed(param)]
    alike: dict[Any, tuple[Any, list[float]]] = {}
    for part, param in zip(partials, params, strict=True):
        if is_distributed(param):
            alike.setdefault((param.device_mesh, sharded_dims(param)), (param, []))[1].append(part)
    heads = [head for head, _ in alike.values()]
    here = [torch.tensor(held, dtype=torch.float64, device=local(head).device) for head, held in alike.values()]
    if not largest:
        return parts + [float(value) for value in over_shards([x.sum() for x in here], heads)]
    # A maximum over ranks may pass over NaN, so that it goes beside.
    pairs = [torch.stack((x.nan_to_num(nan=0.0, posinf=math.inf).max(), x.isnan().any().double())) for x in here]
    return parts + [math.nan if nan else float(x) for x, nan in over_shards(pairs, heads, largest)]


def on_any_rank(flag: bool, params: Iterable[Any]) -> bool:
    """Whether a flag is set on any rank that has shards or replicas of these parameters."""
    import torch.distributed as dist

    for mesh, param in {param.device_mesh: param for param in params if is_distributed(param)}.items():
        value = torch.tensor(float(flag), device=local(param).device)
        for dim in range(mesh.ndim):
            with collective(f"the all_reduce of gradients of a first step with lr=0 over dimension {dim} of {mesh}"):
                dist.all_reduce(value, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        flag = bool(value)
    return flag
