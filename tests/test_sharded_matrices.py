"""Matrices with owners: parameters of which each rank has a shard, as under fully_shard."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pool import ProcessPools
from test_replicated import (
    DTYPES,
    MAKERS,
    PRECONDITIONERS,
    SHAPES,
    SIZES,
    alike,
    gradients,
    grouped,
    parameters,
    same,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch_cases import has_grad_dtype

import stepladder as sl
from stepladder.distributed import assignment, costs, peers


def mesh_of(kind: str) -> DeviceMesh:
    """All ranks in a row, or for "hybrid" half of them beside the other half."""
    size = dist.get_world_size()
    return init_device_mesh("cpu", (2, size // 2) if kind == "hybrid" else (size,))


def spread(x: Tensor, mesh: DeviceMesh, dim: int = 0) -> Any:
    return distribute_tensor(x, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(dim)])


def sharded(params: list[nn.Parameter], mesh: DeviceMesh) -> list[nn.Parameter]:
    """By rows, the third by columns, which few ranks fill."""
    return [nn.Parameter(spread(p.detach(), mesh, int(index == 2))) for index, p in enumerate(params)]


def give(params: list[Any], step: int) -> None:
    """Gradients that are the same on all ranks, whole or in shards."""
    for p, grad in zip(params, gradients(params, step), strict=True):
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def whole(params: list[Any]) -> list[Tensor]:
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def train_beside_one(name: str, dtype: torch.dtype, kind: str, bucket_bytes: int) -> list[bool]:
    """Ten steps with shards and ten without, on every rank; whether both have the same bits."""
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", bucket_bytes)
        alone = parameters(dtype)
        shards = sharded(parameters(dtype), mesh_of(kind))
        optimizers = [MAKERS[name](grouped(alone, name)), MAKERS[name](grouped(shards, name))]
        found = []
        for step in range(10):
            for params, optimizer in zip((alone, shards), optimizers, strict=True):
                give(params, step)
                optimizer.step()
            found.append(same(alone, whole(shards)))
        return found


# Preconditioners on fewer numbers of ranks, as they take longer; below they are on the others.
CASES = [(name, size) for name in MAKERS for size in ([3] if name in PRECONDITIONERS else SIZES) if name != "clipped"]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_shards_give_the_bits_of_a_single_process(pools: ProcessPools, size: int, name: str):
    assert all(all(found) for found in pools(size).run(train_beside_one, name, torch.float32, "row", 1 << 20))


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_other_dtypes(pools: ProcessPools, dtype: torch.dtype, name: str):
    assert all(all(found) for found in pools(3).run(train_beside_one, name, dtype, "row", 1 << 20))


def step_with_wider_gradients(name: str) -> bool:
    """Parameters in bf16 whose gradients are fp32, one of which one rank lacks."""
    alone, shards = parameters(torch.bfloat16)[: len(SHAPES)], parameters(torch.bfloat16)[: len(SHAPES)]
    shards = sharded(shards, mesh_of("row"))
    optimizers = [MAKERS[name](alone), MAKERS[name](shards)]
    for step in range(3):
        for index, (p, q) in enumerate(zip(alone, shards, strict=True)):
            assert isinstance(q, DTensor)
            p.grad_dtype = q.grad_dtype = None  # type: ignore[attr-defined]
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
            if index == 0:
                p.grad[-(-len(p.grad) // dist.get_world_size()) :] = 0.0
            q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)
            if index == 0 and dist.get_rank() > 0:
                q.grad = None
        for optimizer in optimizers:
            optimizer.step()
    return same(alone, whole(shards))


@has_grad_dtype
@pytest.mark.parametrize("name", ["muon", "soap"])
def test_gradients_in_a_wider_dtype(pools: ProcessPools, name: str):
    assert all(pools(2).run(step_with_wider_gradients, name))


@pytest.mark.parametrize(
    ("in_a_row", "hybrid"), [("muonh", "normuon"), ("shampoo", "staggered shampoo"), ("kl", "staggered soap")]
)
def test_buckets_and_replicas_of_shards_change_no_bits(pools: ProcessPools, in_a_row: str, hybrid: str):
    assert all(all(found) for found in pools(2).run(train_beside_one, in_a_row, torch.float32, "row", 256))
    assert all(all(found) for found in pools(4).run(train_beside_one, hybrid, torch.float32, "hybrid", 256))


def clipped() -> tuple[float, float, list[float]]:
    """Norms of all gradients, alone and over shards, and the greatest relative differences after ten steps."""
    alone, shards = parameters(), sharded(parameters(), mesh_of("row"))
    optimizers = [MAKERS["clipped"](grouped(alone)), MAKERS["clipped"](grouped(shards))]
    for step in range(10):
        for params, optimizer in zip((alone, shards), optimizers, strict=True):
            give(params, step)
            optimizer.step()
    norms = [float(optimizer.grad_norm) for optimizer in optimizers]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(whole(shards), whole(alone), strict=True) if b.numel()]
    return norms[0], norms[1], apart


def test_clipping_takes_the_norm_of_whole_gradients(pools: ProcessPools):
    """Squares are summed in fp32 over leaves of 32 rows of 128 lanes, which shards cut elsewhere: 39 roundings."""
    for alone, shards, apart in pools(3).run(clipped):
        assert shards == pytest.approx(alone, rel=39 * 2.0**-24)
        assert max(apart) <= 1e-5


def step_with_gaps(name: str) -> bool:
    """Gradients that some ranks lack, and add nothing to then; that nobody has; parameters added in mid-run."""
    mesh, rank, size = mesh_of("row"), dist.get_rank(), dist.get_world_size()
    alone, shards = parameters()[: len(SHAPES)], sharded(parameters()[: len(SHAPES)], mesh_of("row"))
    optimizers = [MAKERS[name](alone), MAKERS[name](shards)]
    found = []
    for step in range(8):
        if step == 4:
            alone.append(nn.Parameter(torch.ones(7, 9)))
            shards.append(nn.Parameter(spread(torch.ones(7, 9), mesh)))
            for params, optimizer in zip((alone, shards), optimizers, strict=True):
                optimizer.add_param_group({"params": [params[-1]], "lr": 0.1})
        give(alone, step)
        give(shards, step)
        for index, (p, q) in enumerate(zip(alone, shards, strict=True)):
            assert isinstance(q, DTensor)
            assert p.grad is not None
            assert q.grad is not None
            if (index + step) % 5 == 0:
                p.grad = q.grad = None
            elif (index + step) % 2 == 0 and size > 1:
                lacking = (index + step) % size
                if rank == lacking:
                    q.grad = None
                grads = [distribute_tensor(p.grad, mesh, q.placements).to_local()]
                grads[0] = grads[0] * (rank != lacking)
                p.grad = DTensor.from_local(
                    grads[0], mesh, q.placements, run_check=False, shape=p.shape, stride=p.stride()
                ).full_tensor()
        for optimizer in optimizers:
            optimizer.step()
        found.append(same(alone, whole(shards)))
    return all(found)


@pytest.mark.parametrize("name", ["normuon", "staggered soap"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_missing_gradients_and_new_parameters(pools: ProcessPools, size: int, name: str):
    assert all(pools(size).run(step_with_gaps, name))


def trajectory(
    name: str, first: int, past: int, checkpoint: tuple[list[Tensor], dict[str, Any]] | None, kind: str
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Steps from a checkpoint on: whole parameters, state after the last, and bytes of state after loading."""
    params = parameters()[: len(SHAPES)]
    if checkpoint is not None:
        params = [nn.Parameter(value.clone()) for value in checkpoint[0]]
    if kind != "alone":
        params = sharded(params, mesh_of(kind))
    optimizer = MAKERS[name](params)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint[1])
    loaded = optimizer.state_bytes()
    for step in range(first, past):
        give(params, step)
        optimizer.step()
    return [p.clone() for p in whole(params)], optimizer.state_dict(), loaded


@pytest.mark.parametrize("name", ["adamuon", "muonh", "staggered shampoo", "kl"])
def test_a_checkpoint_of_four_ranks_goes_on_with_any_number(pools: ProcessPools, name: str):
    torch.set_num_threads(1)
    straight, state, _ = trajectory(name, 0, 6, None, "alone")
    saved = pools(4).run(trajectory, name, 0, 3, None, "hybrid")
    for params, saved_state, _ in saved:
        assert same(params, saved[0][0])
        assert alike(saved_state, saved[0][1])
    total = sum(value.nbytes for entry in saved[0][1]["state"].values() for value in entry.values())
    for size in (1, 2, 3):
        answers = pools(size).run(trajectory, name, 3, 6, saved[0][:2], "row")
        for params, again, _ in answers:
            assert same(params, straight)
            assert alike(again, state)
        assert sum(answer[2] for answer in answers) == total
    params, again, _ = trajectory(name, 3, 6, saved[0][:2], "alone")
    assert same(params, straight)
    assert alike(again, state)


def traffic(count: int, bucket_bytes: int) -> tuple[Counter[str], Counter[str], int]:
    """Calls of a step, bytes that this rank receives from others, and bytes of a matrix."""
    calls: Counter[str] = Counter()
    received: Counter[str] = Counter()
    mesh = mesh_of("row")
    params = [nn.Parameter(spread(torch.ones(48, 8), mesh)) for _ in range(count)]
    optimizer = sl.Muon(params)
    for p in params:
        p.grad = spread(torch.eye(48, 8), mesh)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", bucket_bytes)
        optimizer.step()
        exchange = dist.all_to_all_single

        def counted(out: Tensor, own: Tensor, of_each: list[int], to_each: list[int], **options: Any) -> Any:
            calls["all-to-all"] += 1
            received["all-to-all"] += sum(of_each) - of_each[dist.get_rank()]
            return exchange(out, own, of_each, to_each, **options)

        monkey.setattr(dist, "all_to_all_single", counted)
        for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter_tensor"):
            monkey.delattr(dist, name)
        optimizer.step()
    return calls, received, 48 * 8 * 4


@pytest.mark.parametrize("size", SIZES)
def test_the_traffic_is_what_the_documents_say(pools: ProcessPools, size: int):
    for count in (12, 24, 48):
        for bucket_bytes, buckets in [(1 << 30, 1), (count * 48 * 8 * 4 // size // 3, 3)]:
            for calls, received, nbytes in pools(size).run(traffic, count, bucket_bytes):
                assert calls == {"all-to-all": 2 * buckets}
                assert received["all-to-all"] == 3 * (size - 1) * count * nbytes // size**2
                with pytest.MonkeyPatch.context() as monkey:
                    monkey.setattr(assignment, "BUCKET_BYTES", bucket_bytes)
                    owners = assignment.assign([1.0] * count, [0.0] * size)
                    computed = costs.sharded([torch.Size([48, 8])] * count, 4, owners, size)
                everywhere = [(size - 1) * 32 + received["all-to-all"]] * size
                assert computed == costs.Traffic(1 + calls["all-to-all"], everywhere, buckets)


def calls_of_a_first_step(count: int) -> Counter[str]:
    calls: Counter[str] = Counter()
    mesh = mesh_of("row")
    params = [nn.Parameter(spread(torch.ones(6, 4), mesh)) for _ in range(count)]
    optimizer = sl.MuonH(params)
    for p in params:
        p.grad = spread(torch.eye(6, 4), mesh)
    with pytest.MonkeyPatch.context() as monkey:
        for owner, name in [(dist, "all_to_all_single"), (peers, "_all_gather")]:
            run = getattr(owner, name)

            def counted(*arguments: Any, run: Any = run, name: str = name, **options: Any) -> Any:
                calls[name] += 1
                return run(*arguments, **options)

            monkey.setattr(owner, name, counted)
        for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter_tensor"):
            monkey.delattr(dist, name)
        optimizer.step()
    return calls


def test_a_first_step_looks_at_all_matrices_together(pools: ProcessPools):
    for count in (1, 12):
        assert pools(3).run(calls_of_a_first_step, count) == [{"all_to_all_single": 3, "_all_gather": 2}] * 3


def train_fully_sharded(optimizer_class: Any) -> list[bool]:
    """A model under fully_shard, saved and loaded by torch.distributed.checkpoint's functions, beside one alone."""
    mesh = mesh_of("row")

    def made() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 1))

    def optimizer_of(model: nn.Module) -> Any:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return optimizer_class([{"params": matrices}, {"params": vectors, "algorithm": "adamw"}], lr=0.05)

    def shard(model: nn.Module) -> nn.Module:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    alone, model = made(), shard(made())
    optimizers = [optimizer_of(alone), optimizer_of(model)]
    found = []

    def step(number: int) -> None:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
        for net, optimizer in zip((alone, model), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        a, b = (whole(list(net.parameters())) for net in (alone, model))
        # Gradients are averaged over ranks, of which each had the same.
        found.append(all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True)))

    for number in range(5):
        step(number)
    saved = get_optimizer_state_dict(model, optimizers[1])
    again = shard(made())
    again.load_state_dict(model.state_dict())
    before = whole(list(again.parameters()))
    other = optimizer_of(again)
    set_optimizer_state_dict(again, other, saved)
    found.append(same(before, whole(list(again.parameters()))))
    found.append(alike_in_shards(optimizers[1].state_dict(), other.state_dict()))
    model, optimizers[1] = again, other
    for number in range(5, 10):
        step(number)
    return found


def alike_in_shards(a: Any, b: Any) -> bool:
    """As `alike`, of what this rank has."""
    if isinstance(a, DTensor):
        return isinstance(b, DTensor) and torch.equal(a.to_local(), b.to_local())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike_in_shards(a[key], b[key]) for key in a)
    return alike(a, b)


@pytest.mark.parametrize(("size", "optimizer_class"), [(2, sl.Muon), (4, sl.Muon), (2, sl.Shampoo), (4, sl.SOAP)])
def test_fully_shard(pools: ProcessPools, size: int, optimizer_class: Any):
    """The last layer's weight has one row, and so most ranks nothing of it; means over 2 and 4 ranks are exact."""
    assert all(all(found) for found in pools(size).run(train_fully_sharded, optimizer_class))


def scaled_steps(name: str) -> list[bool]:
    """As GradScaler steps, with one step that one rank alone finds not to be finite; and one at a rate of zero."""
    alone, shards = parameters()[: len(SHAPES)], sharded(parameters()[: len(SHAPES)], mesh_of("row"))
    optimizers = [MAKERS[name](alone), MAKERS[name](shards)]
    found = []
    for step in range(4):
        for params, optimizer in zip((alone, shards), optimizers, strict=True):
            give(params, step)
            for p in params:
                assert p.grad is not None
                p.grad = p.grad * 8.0
            bad = step == 1 and (params is alone or dist.get_rank() == 1)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(bad))
            optimizer.param_groups[0]["lr"] = 0.0 if step == 2 else 0.02
            optimizer.step()
        if step != 1:
            found.append(same(gradients(alone, step), whole([nn.Parameter(p.grad) for p in shards])))
        found.append(same(alone, whole(shards)))
    return found


@pytest.mark.parametrize("name", ["muonh", "shampoo", "soap"])
def test_a_gradient_scaler_skips_on_all_ranks(pools: ProcessPools, name: str):
    assert all(all(found) for found in pools(2).run(scaled_steps, name))


def refusals() -> dict[str, str]:
    row, square = mesh_of("row"), init_device_mesh("cpu", (2, 2))
    w = torch.ones(8, 8)
    good = nn.Parameter(spread(w, row))
    wrong: dict[str, Any] = {
        "two shards": lambda: sl.Muon(
            [("head.weight", nn.Parameter(distribute_tensor(w, square, [Shard(0), Shard(1)])))]
        ),
        "no shard": lambda: sl.Muon([nn.Parameter(distribute_tensor(w, row, [Replicate()]))]),
        "partial": lambda: sl.Muon([nn.Parameter(DTensor.from_local(w, row, [Partial()]))]),
        "group": lambda: sl.Muon([good], process_group=dist.group.WORLD),
        "mesh": lambda: sl.Muon([good], mesh=square),
        "other mesh": lambda: sl.MuonH([good, nn.Parameter(spread(w, square))]),
        "plain": lambda: sl.MuonH([good, nn.Parameter(w)]),
        "plain before": lambda: sl.Muon([nn.Parameter(w), good]),
        "plain long before": lambda: sl.Muon([nn.Parameter(w)]).add_param_group({"params": [good]}),
        "shampoo": lambda: sl.Shampoo([good], process_group=dist.group.WORLD),
        "soap": lambda: sl.SOAP([nn.Parameter(distribute_tensor(w, square, [Shard(0), Shard(1)]))]),
    }
    found = {}
    for name, make in wrong.items():
        try:
            make()
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    zero = torch.cat([w, torch.zeros(8, 8)])  # the second matrix of it
    params = [nn.Parameter(spread(w, row)), nn.Parameter(spread(zero, row))]
    optimizer = sl.MuonH([params[0]])
    optimizer.add_param_group({"params": [params[1]], "split_sizes": (8, 8)})
    for p in params:
        p.grad = torch.ones_like(p)
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        assert same(whole(params), [w, zero])
        assert not optimizer._owners.owners  # type: ignore[union-attr]
        found["zero"] = str(error)
    for optimizer_class in (sl.Muon, sl.Shampoo, sl.SOAP):
        optimizer_class([good], mesh=row)
    return found


def test_layouts_that_cannot_be_served_are_refused_at_once(pools: ProcessPools):
    everywhere = pools(4).run(refusals)
    zero = [found["zero"] for found in everywhere]
    (owner,) = (rank for rank, text in enumerate(zero) if "parameter 1 has a matrix of norm 0.0, which MuonH" in text)
    assert [f"rank {owner} refused its step" in text for text in zero] == [rank != owner for rank in range(4)]
    for found in everywhere:
        assert (
            "parameter 0 (head.weight) has placements (Shard(dim=0), Shard(dim=1)) on DeviceMesh" in found["two shards"]
        )
        assert "parameter 0 has placements (Replicate(),)" in found["no shard"]
        assert "Partial" in found["partial"]
        assert "expected no process_group" in found["group"]
        assert "expected the mesh that was given" in found["mesh"]
        assert "parameter 1 is sharded over dimension 1" in found["other mesh"]
        assert "parameter 1 is a plain tensor beside DTensors" in found["plain"]
        assert "parameter 1 is a DTensor beside plain tensors" in found["plain before"]
        assert "parameter 1 is a DTensor beside plain tensors" in found["plain long before"]
        assert "expected no process_group" in found["shampoo"]
        assert "parameter 0 has placements (Shard(dim=0), Shard(dim=1))" in found["soap"]
