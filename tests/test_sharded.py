"""Elementwise and norm-based optimizers on torch.distributed: DTensors, DDP, ZeRO and FSDP2 against one process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case, assert_same, gradient, same_bits
from process_pool import ProcessPools
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import stepladder as sl

STEPS = 10
# On 2 to 4 ranks: even, uneven and empty shards; rows that no multiple of 8 begins; no element, and none but one.
SHAPES = ((8, 16), (7, 5), (3, 3), (1, 9), (13,), (1,), (0, 4), (2, 3, 5))
NORM_RULES = ("lars", "lamb")
ELEMENTWISE = [case for case in CASES if case.rule not in NORM_RULES]

# Mesh shape and placements for a number of ranks; each of a parameter's dimensions that is sharded must exist.
Layout = tuple[tuple[int, ...], tuple[Any, ...]]
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "rows on 2": (2, ((2,), (Shard(0),))),
    "rows on 3": (3, ((3,), (Shard(0),))),
    "rows on 4": (4, ((4,), (Shard(0),))),
    "last dimension on 3": (3, ((3,), (Shard(-1),))),
    "replicas on 2": (2, ((2,), (Replicate(),))),
    "replicas of rows": (4, ((2, 2), (Replicate(), Shard(0)))),
    "rows of rows": (4, ((2, 2), (Shard(0), Shard(0)))),
    "rows and columns": (4, ((2, 2), (Shard(0), Shard(-1)))),
}


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(step: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    for shape in shapes:
        yield gradient(shape, dtype, generator)


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """One for each shape and process, as a mesh makes process groups."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def distributed(x: Tensor, layout: Layout) -> DTensor:
    """A tensor that every rank has, as shards; dimensions count from the end where they are negative."""
    placements = [Shard(p.dim % x.ndim) if isinstance(p, Shard) else p for p in layout[1]]
    return distribute_tensor(x, mesh_of(layout[0]), placements, src_data_rank=None)


def held(x: Tensor, layout: Layout | None = None) -> Tensor:
    """What this rank has of a distributed tensor, or would have of a whole one."""
    x = x.detach()
    if layout is not None and x.ndim:
        x = distributed(x, layout)
    return x.to_local() if isinstance(x, DTensor) else x


class Held:
    """An optimizer as `assert_same` takes it: what this rank has of its parameters, or would have."""

    def __init__(self, optimizer: Any, layout: Layout | None = None) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            params = []
            for p in group["params"]:
                q = held(p, layout).clone()
                q.grad = None if p.grad is None else held(p.grad, layout)
                self.state[q] = {name: held(value, layout) for name, value in optimizer.state.get(p, {}).items()}
                params.append(q)
            self.param_groups.append({"params": params})


@functools.cache
def gradient_pairs(step: int, layout: Layout, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The gradients of a step as shards, and whole."""
    return [(distributed(g, layout), g) for g in gradients(step, dtype)]


def run_pair(case: Case, layout: Layout, dtype: torch.dtype, close: bool = False, **options: Any) -> None:
    """Ten steps of shards and of one process, from the same gradients."""
    values = [normal(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    shards = [torch.nn.Parameter(distributed(x, layout)) for x in values]
    alone = [torch.nn.Parameter(x.clone()) for x in values]
    ours, single = case.make(shards, **options), case.make(alone, **options)
    for step in range(STEPS):
        for index, (p, q, pair) in enumerate(zip(shards, alone, gradient_pairs(step, layout, dtype), strict=True)):
            # A gradient that is missing holds up nothing but its parameter.
            p.grad, q.grad = pair if index != step % 5 else (None, None)
        ours.step()
        single.step()
    for p in shards:
        for name, value in ours.state[p].items():
            assert name == "step" or (isinstance(value, DTensor) and value.placements == p.placements)
    if not close:
        assert_same(Held(ours), Held(single, layout))
        return
    for p, q in zip(shards, alone, strict=True):
        for a, b in [(p, q), *((value, single.state[q][name]) for name, value in ours.state[p].items())]:
            largest = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(held(a), held(b, layout), rtol=0, atol=1e-5 * largest)


def run_elementwise(layout: Layout, dtype: torch.dtype) -> None:
    for case in ELEMENTWISE:
        run_pair(case, layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_have_the_bits_of_one_process(pools: ProcessPools, name: str, dtype: torch.dtype):
    ranks, layout = LAYOUTS[name]
    pools(ranks).run(run_elementwise, layout, dtype)


def run_stochastic(layout: Layout) -> None:
    for case in (Case("adamw", sl.AdamW, {"lr": 0.01}), Case("sgd", sl.SGD, {"lr": 0.1})):
        for backend in ("cpu", "reference"):
            run_pair(case, layout, torch.bfloat16, stochastic_rounding=True, seed=7, backend=backend)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "olumns" not in name and "last" not in name])
def test_stochastic_rounding_goes_by_the_whole_parameters_elements(pools: ProcessPools, name: str):
    ranks, layout = LAYOUTS[name]
    pools(ranks).run(run_stochastic, layout)


def run_norm_based(layout: Layout, dtype: torch.dtype) -> None:
    for case in CASES:
        if case.rule in NORM_RULES:
            run_pair(case, layout, dtype, close=True)
            run_pair(case, layout, dtype, close=True, max_norm=0.5)
    run_pair(Case("adamw", sl.AdamW, {"lr": 0.01}), layout, dtype, close=True, max_norm=0.5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_norms_are_those_of_whole_parameters(pools: ProcessPools, name: str):
    ranks, layout = LAYOUTS[name]
    pools(ranks).run(run_norm_based, layout, torch.float32)


class Ugly(torch.nn.Module):
    """Parameters of ugly shapes, whose gradients are given: the loss is linear in them."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
        super().__init__()
        params = [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]
        self.params = torch.nn.ParameterList(params)

    def forward(self, factors: list[Tensor]) -> Tensor:
        losses = [(p * c).sum() for p, c in zip(self.params, factors, strict=True)]
        return torch.stack(losses).sum()


# FSDP2 cannot do without elements.
FULL = tuple(shape for shape in SHAPES if 0 not in shape)


def factors(step: int, rank: int, ranks: int) -> list[Tensor]:
    """Integers, of which every sum and mean over ranks is exact in every dtype."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [12.0 * torch.randint(-3, 4, shape, generator=generator) for shape in FULL]


def backward(model: torch.nn.Module, step: int, dtype: torch.dtype) -> None:
    """The gradients of a step: on ranks this rank's part, whose mean one process has."""
    model.zero_grad()
    parts = [factors(step, rank, dist.get_world_size()) for rank in range(dist.get_world_size())]
    mine = parts[dist.get_rank()]
    if isinstance(model, Ugly) and not isinstance(next(model.parameters()), DTensor):
        mine = [sum(pieces) / len(parts) for pieces in zip(*parts, strict=True)]
    model([x.to(dtype) for x in mine]).backward()


def run_engine(kind: str, dtype: torch.dtype) -> None:
    for case in ELEMENTWISE:
        model: torch.nn.Module = Ugly(FULL, dtype)
        alone = Ugly(FULL, dtype)
        single = case.make(alone.parameters())
        if kind == "FSDP2":
            fully_shard(model, mesh=mesh_of((dist.get_world_size(),)))
        elif kind == "HSDP":
            fully_shard(model, mesh=mesh_of((2, 2)))
        else:
            model = torch.nn.parallel.DistributedDataParallel(model)
        if kind == "ZeRO":
            optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=case.optimizer, **case.hyper)
        else:
            optimizer = case.make(model.parameters())
        for step in range(STEPS):
            backward(model, step, dtype)
            backward(alone, step, dtype)
            optimizer.step()
            single.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            same = p.full_tensor() if isinstance(p, DTensor) else p
            assert same_bits(same, q), (str(case), tuple(q.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("DDP", 2), ("DDP", 3), ("ZeRO", 2), ("ZeRO", 4), ("FSDP2", 2), ("FSDP2", 3), ("FSDP2", 4), ("HSDP", 4)],
)
def test_engines_have_the_bits_of_one_process(pools: ProcessPools, kind: str, ranks: int, dtype: torch.dtype):
    pools(ranks).run(run_engine, kind, dtype)
