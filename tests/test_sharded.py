"""Elementwise and norm-based optimizers on torch.distributed: DTensors, DDP, ZeRO and FSDP2 against one process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, Case, assert_same, gradient, same_bits
from process_pool import ENVIRONMENT, ProcessPools, RankError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

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


ENGINES = [("DDP", 2), ("DDP", 3), ("ZeRO", 2), ("ZeRO", 4), ("FSDP2", 2), ("FSDP2", 3), ("FSDP2", 4), ("HSDP", 4)]
# What is not large tries every engine, and FSDP2 with each number of ranks.
LARGE = {("DDP", 3, torch.float32), ("ZeRO", 4, torch.float32)} | {
    (kind, ranks, torch.bfloat16) for kind, ranks in ENGINES if (kind, ranks) not in (("FSDP2", 3), ("HSDP", 4))
}


@pytest.mark.parametrize(
    ("kind", "ranks", "dtype"),
    [
        pytest.param(
            kind,
            ranks,
            dtype,
            marks=[pytest.mark.large] * ((kind, ranks, dtype) in LARGE),
            id=f"{kind}-{ranks}-{dtype}",
        )
        for kind, ranks in ENGINES
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_engines_have_the_bits_of_one_process(pools: ProcessPools, kind: str, ranks: int, dtype: torch.dtype):
    pools(ranks).run(run_engine, kind, dtype)


def check_clipping(layout: Layout) -> None:
    for norm_type in (1.0, 2.0, 3.0, float("inf")):
        for max_norm in (0.5, 1e6):
            values = [normal(shape, i) for i, shape in enumerate(FULL)]
            shards = [torch.nn.Parameter(distributed(x, layout)) for x in values]
            alone = [torch.nn.Parameter(x.clone()) for x in values]
            plain = torch.nn.Parameter(torch.ones(3))  # counted once, beside shards
            for params in (shards, alone):
                for i, p in enumerate(params):
                    g = normal(FULL[i], 50 + i)
                    p.grad = distributed(g, layout) if isinstance(p, DTensor) else g
            plain.grad = torch.full((3,), 2.0)
            other = torch.nn.Parameter(torch.ones(3))
            other.grad = torch.full((3,), 2.0)
            found = torch.ones(1)
            ours = sl.ops.clip_grad_norm_([plain, *shards], max_norm, norm_type, found_inf=found)
            theirs = torch.nn.utils.clip_grad_norm_([other, *alone], max_norm, norm_type)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            assert found.item() == 0.0
            for p, q in zip([plain, *shards], [other, *alone], strict=True):
                assert p.grad is not None
                assert q.grad is not None
                torch.testing.assert_close(held(p.grad), held(q.grad, layout if p is not plain else None))

    # One rank alone has no gradient, or one that is not a number: all have the same norm.
    p = torch.nn.Parameter(distributed(torch.ones(8, 2), layout))
    p.grad = distributed(torch.full((8, 2), 2.0), layout)
    if dist.get_rank() == 1:
        p.grad.to_local().fill_(float("nan"))
    for norm_type in (2.0, float("inf")):
        found = torch.zeros(1)
        assert sl.ops.clip_grad_norm_([p], 1.0, norm_type, found_inf=found).isnan()
        assert found.item() == 1.0
    p.grad = distributed(torch.full((8, 2), 2.0), layout) if dist.get_rank() == 1 else None
    norm = sl.ops.clip_grad_norm_([p], 1.0)
    rows = 8 // dist.get_world_size()
    assert norm.item() == pytest.approx((rows * 2 * 4.0) ** 0.5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_clipping_takes_the_norm_of_whole_gradients(pools: ProcessPools, ranks: int):
    pools(ranks).run(check_clipping, ((ranks,), (Shard(0),)))


def count_collectives(layers: int) -> list[int]:
    counts = []
    layout = ((dist.get_world_size(),), (Shard(0),))
    optimizers: list[Any] = [
        (sl.AdamW, {}),
        (sl.AdamW, {"max_norm": 1.0}),
        (sl.LAMB, {}),
        (sl.LARS, {"max_norm": 1.0}),
    ]
    for cls, options in optimizers:
        params = [torch.nn.Parameter(distributed(normal((5, 3), i), layout)) for i in range(layers)]
        optimizer = cls(params, lr=0.1, **options)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = distributed(normal((5, 3), 100 * step + i), layout)
            with CommDebugMode() as collectives:
                optimizer.step()
        counts.append(collectives.get_total_counts())
    return counts


def test_collectives_do_not_grow_in_number(pools: ProcessPools):
    few, many = (pools(2).run(count_collectives, layers)[0] for layers in (1, 20))
    assert few == many == [0, 1, 1, 2]


def check_one_group() -> None:
    """Parameters of several meshes, and plain ones, in one group; some appear in mid-run."""
    layouts: list[Layout | None] = [
        ((4,), (Shard(0),)),
        ((2, 2), (Replicate(), Shard(0))),
        None,
        ((2, 2), (Shard(0), Shard(1))),
    ]

    def made(first: int) -> tuple[list[Any], list[Any]]:
        values = [normal((6, 5), first + i) for i in range(4)]
        spread = [
            x.clone() if layout is None else distributed(x, layout) for x, layout in zip(values, layouts, strict=True)
        ]
        return [torch.nn.Parameter(x) for x in spread], [torch.nn.Parameter(x.clone()) for x in values]

    for case in (Case("adamw", sl.AdamW, {"lr": 0.01}), Case("lion", sl.Lion, {"lr": 0.01})):
        shards, alone = made(0)
        ours, single = case.make(shards), case.make(alone)
        for step in range(STEPS):
            if step == 4:
                more, more_alone = made(10)
                ours.add_param_group({"params": more, "lr": 0.05})
                single.add_param_group({"params": more_alone, "lr": 0.05})
                shards, alone = shards + more, alone + more_alone
            for optimizer in (ours, single):  # a schedule that begins at 0
                optimizer.param_groups[0]["lr"] = 0.002 * step
            for i, (p, q) in enumerate(zip(shards, alone, strict=True)):
                g = normal((6, 5), 1000 * step + i)
                layout = layouts[i % 4]
                p.grad, q.grad = (g.clone() if layout is None else distributed(g, layout)), g
            ours.step()
            single.step()
        for i, (p, q) in enumerate(zip(shards, alone, strict=True)):
            assert same_bits(held(p), held(q, layouts[i % 4])), (str(case), i)
            assert ours.state[p].get("step") == single.state[q].get("step")


def test_several_meshes_in_one_group_and_parameters_that_come_later(pools: ProcessPools):
    pools(4).run(check_one_group)


def check_missing_on_a_rank() -> None:
    layout = ((dist.get_world_size(),), (Shard(0),))
    for case in CASES:
        p = torch.nn.Parameter(distributed(normal((6, 5), 0), layout))
        q = torch.nn.Parameter(distributed(normal((6, 5), 1), layout))
        optimizer = case.make([p, q], max_norm=1.0)
        for step in range(4):
            before = held(p).clone()
            p.grad, q.grad = (distributed(normal((6, 5), 10 + step + i), layout) for i in range(2))
            if dist.get_rank() == step % 2:
                p.grad = None
            optimizer.step()
            assert torch.equal(before, held(p)) == (p.grad is None), (str(case), step)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_gradient_that_is_missing_on_one_rank_holds_up_nobody(pools: ProcessPools, ranks: int):
    pools(ranks).run(check_missing_on_a_rank)


def check_partial_gradients() -> None:
    """What tensor parallelism leaves: sums that are still to be taken, which is done before the step."""
    layout = ((dist.get_world_size(),), (Replicate(),))
    mesh = mesh_of(layout[0])
    p, q = torch.nn.Parameter(distributed(normal((4, 3), 0), layout)), torch.nn.Parameter(normal((4, 3), 0))
    ours, single = sl.AdamW([p]), sl.AdamW([q])
    for step in range(3):
        parts = [torch.full((4, 3), 1.0 + step + rank) for rank in range(dist.get_world_size())]
        p.grad = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial()])
        q.grad = torch.stack(parts).sum(0)
        ours.step()
        single.step()
        assert p.grad.placements == (Replicate(),)
    assert same_bits(held(p), q)


def test_partial_gradients_are_summed_first(pools: ProcessPools):
    pools(2).run(check_partial_gradients)


def check_refusals() -> None:
    ranks = dist.get_world_size()
    mesh = mesh_of((ranks,))
    rows = ((ranks,), (Shard(0),))

    def refused(error: type[Exception], match: str, optimizer: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = [held(p).clone() for p in params]
        with pytest.raises(error, match=match):
            optimizer.step()
        assert not any(optimizer.state.values())
        assert all(torch.equal(held(p), x) for p, x in zip(params, before, strict=True))

    def with_gradient(p: Any, grad: Any) -> Any:
        p.grad = grad
        return p

    good = with_gradient(torch.nn.Parameter(torch.ones(4)), torch.ones(4))
    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    refused(
        TypeError,
        r"parameter 1 \(weight\) has placements \(Partial\(.*\),\) on .*expected Shard and Replicate",
        sl.AdamW([("bias", good), ("weight", partial)]),
    )
    columns = with_gradient(
        torch.nn.Parameter(distributed(torch.ones(4, 6, dtype=torch.bfloat16), ((ranks,), (Shard(1),)))),
        distributed(torch.ones(4, 6, dtype=torch.bfloat16), ((ranks,), (Shard(1),))),
    )
    refused(
        ValueError,
        r"stochastic_rounding=True .* parameter 1 \(weight\) has placements \(Shard\(dim=1\),.*expected Shard\(dim=0\)",
        sl.AdamW([("bias", good), ("weight", columns)], stochastic_rounding=True),
    )
    state = sl.AdamW([columns])
    state.step()
    saved = state.state_dict()
    saved["state"][0]["exp_avg"] = torch.ones(4, 6, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"'exp_avg' of parameter 0 is a plain Tensor, .* has placements \(Shard\(dim=1\)"
    ):
        state.load_state_dict(saved)
    state.state[columns]["exp_avg"] = distributed(torch.ones(4, 6, dtype=torch.bfloat16), rows)
    with pytest.raises(
        TypeError, match=r"'exp_avg' of parameter 0 has placements \(Shard\(dim=0\),\) .*\(Shard\(dim=1\)"
    ):
        state.step()


def test_layouts_that_cannot_be_served_are_refused(pools: ProcessPools):
    pools(2).run(check_refusals)


# A model whose parameters are whole rows of no number of ranks.
class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = torch.nn.Linear(6, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.nn.functional.gelu(self.norm(self.first(x))))
        return out


def batch(step: int) -> Tensor:
    """The same for all ranks, so that any number of them computes one trajectory."""
    return normal((8, 6), 500 + step)


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def sharded_model() -> torch.nn.Module:
    model = Small()
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),)))
    return model


def save(case: Case, directory: str, before: int, after: int) -> list[Tensor]:
    """Train, save, and go on; returns the parameters in the end."""
    model = sharded_model()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(before))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=directory)
    train(model, optimizer, range(before, after))
    return [p.full_tensor().detach() for p in model.parameters()]


def resume(case: Case, directory: str, before: int, after: int) -> list[Tensor]:
    model = sharded_model()
    optimizer = case.make(model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # the checkpoint is to bring them
    weights, states = get_state_dict(model, optimizer)
    assert all(not held(p).any() for p in model.parameters())
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    train(model, optimizer, range(before, after))
    return [p.full_tensor().detach() for p in model.parameters()]


RESUMED = [
    Case("momentum", sl.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case("adagrad", sl.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),
    Case("adamw", sl.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Case("lion", sl.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    Case("lamb", sl.LAMB, {"lr": 0.01, "weight_decay": 0.01}),
]


@pytest.mark.parametrize("case", RESUMED, ids=str)
@pytest.mark.parametrize("before", [0, 3])
def test_a_checkpoint_of_four_ranks_resumes_on_others(pools: ProcessPools, tmp_path: Path, case: Case, before: int):
    directory = str(tmp_path / "checkpoint")
    uninterrupted = pools(4).run(save, case, directory, before, before + 3)[0]
    for ranks in (2, 1, 3):
        resumed = pools(ranks).run(resume, case, directory, before, before + 3)
        for p, q in zip(resumed[0], uninterrupted, strict=True):
            # Gradients are the means of equal ones, which takes other roundings on other numbers of ranks.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5 * float(q.abs().max()))


def initialize(zero_rows: bool) -> tuple[list[float], bool]:
    """A first step with lr=0 and no gradient but zeros, on this rank or on all: step counts, and whether any moved."""
    layout = ((dist.get_world_size(),), (Shard(0),))
    p = torch.nn.Parameter(distributed(normal((8, 2), 0), layout))
    before = held(p).clone()
    counts = []
    for cls in (sl.Adam, sl.LAMB, sl.AdamW):
        optimizer = cls([p], lr=0.0, weight_decay=0.1)
        g = torch.zeros(8, 2)
        if not zero_rows:
            g[-1] = 1.0  # the last rank's
        p.grad = distributed(g, layout)
        optimizer.step()
        counts.append(optimizer.state[p]["step"].item())
        assert zero_rows == (not any(held(optimizer.state[p][name]).any() for name in ("exp_avg", "exp_avg_sq"))) or (
            dist.get_rank() < dist.get_world_size() - 1
        )
    return counts, not torch.equal(before, held(p))


def test_a_step_that_only_makes_states_moves_nothing(pools: ProcessPools):
    assert pools(3).run(initialize, True) == [([0.0] * 3, False)] * 3
    # A step like any other, if with a rate of 0: it counts, also where a rank sees zeros alone.
    assert pools(3).run(initialize, False) == [([1.0] * 3, False)] * 3


def count_binds() -> tuple[list[int], bool, int]:
    """How many parameters each step of FSDP2 binds anew, whether states are still read, and parallel regions a step."""
    model = sharded_model()
    optimizer = sl.AdamW(model.parameters())
    bound = []
    bind = optimizer._engine._bind

    def counted(owner: Any, stale: list[int]) -> None:
        bound[-1] += len(stale)
        bind(owner, stale)

    with mock.patch.object(optimizer._engine, "_bind", counted):
        for step in range(5):
            bound.append(0)
            train(model, optimizer, range(step, step + 1))
    sl._C.record_regions(True)
    sl._C.take_regions()
    optimizer.step()
    sl._C.record_regions(False)
    return bound, optimizer._engine.plan.trusts_states, len(sl._C.take_regions())


def test_shards_are_bound_once_and_stepped_in_one_region(pools: ProcessPools):
    assert pools(2).run(count_binds) == [([6, 0, 0, 0, 0], True, 1)] * 2


def scaled_steps(overflow: bool) -> tuple[list[float], float, bool]:
    """Steps under a GradScaler, the second one with an infinity on the last rank: counts, scale, equal to unscaled."""
    layout = ((dist.get_world_size(),), (Shard(0),))
    p, q = (torch.nn.Parameter(distributed(normal((5, 4), 0), layout)) for _ in range(2))
    ours, unscaled = sl.AdamW([p]), sl.AdamW([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for step in range(3):
        g = normal((5, 4), 1 + step)
        infinite = overflow and step == 1
        p.grad = distributed(8.0 * g, layout)
        q.grad = None if infinite else distributed(g, layout)
        if infinite and dist.get_rank() == 1:
            p.grad.to_local()[0] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.step(ours)
        scaler.update()
        unscaled.step()
        counts.append(ours.state[p]["step"].item())
        if infinite:
            scaler.update(8.0)
    return counts, scaler.get_scale(), torch.equal(held(p), held(q))


def test_a_gradient_scaler_skips_on_all_ranks(pools: ProcessPools):
    assert pools(2).run(scaled_steps, False) == [([1.0, 2.0, 3.0], 8.0, True)] * 2
    assert pools(2).run(scaled_steps, True) == [([1.0, 1.0, 2.0], 8.0, True)] * 2


def die_in_a_step(cls: type[Any], options: dict[str, Any]) -> str:
    layout = ((dist.get_world_size(),), (Shard(0),))
    p, plain = torch.nn.Parameter(distributed(normal((6, 5), 0), layout)), torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p, plain], lr=0.1, **options)
    p.grad, plain.grad = distributed(normal((6, 5), 1), layout), torch.ones(3)
    before = held(p).clone()
    if dist.get_rank() == 1:
        os._exit(9)
    with pytest.raises(RuntimeError, match=r"the all_reduce of norms over dimension 0 of .* failed") as failed:
        optimizer.step()
    assert torch.equal(held(p), before)
    assert torch.equal(plain, torch.ones(3))
    return str(failed.value)


@pytest.mark.parametrize(("cls", "options"), [(sl.LAMB, {}), (sl.AdamW, {"max_norm": 1.0})])
def test_the_death_of_a_rank_ends_the_others_step(pools: ProcessPools, cls: type[Any], options: dict[str, Any]):
    with pytest.raises(RankError, match="rank 1 of 3 died with exit code 9") as failed:
        pools(3).run(die_in_a_step, cls, options)
    assert set(failed.value.results) == {0, 2}


def test_the_example_of_the_documents_trains():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = Path(__file__).parents[1] / "examples" / "train_fsdp2.py"
    environment = os.environ | ENVIRONMENT
    output = subprocess.run(
        [*command, example], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in output.splitlines() if line.startswith("step")]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 4
