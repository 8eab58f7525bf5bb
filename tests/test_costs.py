"""What `stepladder plan` says, beside steps of several processes in which everything is counted."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from process_pool import ProcessPools
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import stepladder as sl
from stepladder.bench.shapes import OUTSIDE as OUTSIDE_OF_MODELS
from stepladder.bench.shapes import shapes_of
from stepladder.cli import main
from stepladder.cli.plan import ELEMENTWISE, MATRICES, REPLICATED, SHARDED, plan, state_bytes
from stepladder.distributed import assignment, costs, peers
from stepladder.optim import shampoo, soap

# Uneven and empty shards, a vector that is smaller than the number of ranks, a convolution, an embedding.
SHAPES = [(30, 16), (24, 16), (16, 24), (3, 40), (1, 7), (24,), (8, 4, 3, 3), (3, 12, 8), (2,), (64, 16), (7,)]
OUTSIDE = [(30, 16)]
MACHINE = {"flops": 1e12, "bandwidth": 1e9, "latency": 1e-5}
# Of a rank, so that there is more than one bucket.
BUCKET_BYTES = 1024


@dataclass
class Counted:
    """What one rank did: bytes of state, collectives and bytes received of a step, owners, and what was refreshed."""

    state_bytes: int
    collectives: int
    received: int
    owners: list[int]
    refreshed: list[float]


def counted_step(name: str, scheme: str, options: dict[str, Any]) -> Counted:
    """The last of some steps is counted, and refreshes in the last steps from one to the next."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]

    def laid(value: Tensor) -> Any:
        return distribute_tensor(value, mesh, [Shard(0)]) if scheme == SHARDED else value.clone()

    params = [nn.Parameter(laid(value)) for value in values]
    matrices = [p for p in params if p.ndim > 1 and tuple(p.shape) not in OUTSIDE]
    if name in MATRICES:
        rest = [p for p in params if all(p is not other for other in matrices)]
        groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
        where = {"mesh": mesh} if scheme == REPLICATED else {}
        optimizer: Any = MATRICES[name](groups, **options, **where)
    else:
        optimizer = ELEMENTWISE[name](params)
    calls: Counter[str] = Counter()
    received = 0
    gather, exchange, reduce = peers._all_gather, dist.all_to_all_single, dist.all_reduce
    rotate, roots = soap.Work.rotate, shampoo.roots
    size = dist.get_world_size()
    refreshed: list[float] = []

    def gathering(out: Tensor, own: Tensor, **options: Any) -> Any:
        nonlocal received
        calls["gather"] += 1
        received += out.nbytes - own.nbytes
        return gather(out, own, **options)

    def exchanging(out: Tensor, own: Tensor, of_each: list[int], to_each: list[int], **options: Any) -> Any:
        nonlocal received
        calls["exchange"] += 1
        received += sum(of_each) - of_each[dist.get_rank()]
        return exchange(out, own, of_each, to_each, **options)

    def reducing(value: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal received
        calls["reduce"] += 1
        # Scattered and gathered again, in even parts.
        received += 2 * (size - 1) * math.ceil(value.numel() / size) * value.itemsize
        return reduce(value, *arguments, **options)

    def rotating(work: Any) -> None:
        refreshed[-1] += sl.SOAP.work(work.job.param, work.job.group)[1]
        rotate(work)

    def rooting(stacks: list[Tensor], *arguments: Any) -> Any:
        refreshed[-1] += sum(11.0 * len(stack) * stack.shape[-1] ** 3 for stack in stacks)
        return roots(stacks, *arguments)

    period = options.get("precondition_frequency", 1)
    last = 2 * period
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", BUCKET_BYTES)
        monkey.setattr(soap.Work, "rotate", rotating)
        monkey.setattr(shampoo, "roots", rooting)
        for step in range(last + 1):
            refreshed.append(0.0)
            for p, value in zip(params, values, strict=True):
                p.grad = laid(value)
            if step == last:
                monkey.setattr(peers, "_all_gather", gathering)
                monkey.setattr(dist, "all_to_all_single", exchanging)
                monkey.setattr(dist, "all_reduce", reducing)
                for other in ("broadcast", "reduce_scatter_tensor"):
                    monkey.delattr(dist, other)
            optimizer.step()
    owners = [optimizer._owners.owners[p] for p in matrices] if name in MATRICES else []
    return Counted(optimizer.state_bytes(), calls.total(), received, owners, refreshed[-period:])


# With blocks, and factors of several sides.
PRECONDITIONED = {"precondition_frequency": 3, "max_preconditioner_dim": 12, "merge_dims": False}


@pytest.mark.parametrize("scheme", [REPLICATED, SHARDED])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_plan_is_what_a_step_does(pools: ProcessPools, size: int, scheme: str):
    preconditioned = [(name, PRECONDITIONED | {"stagger": x}) for name in ("shampoo", "soap") for x in (False, True)]
    for name, options in [*((name, {}) for name in ("muon", "muonh", "adamw", "sgd", "lars", "lamb")), *preconditioned]:
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(assignment, "BUCKET_BYTES", BUCKET_BYTES)
            expected = plan(name, SHAPES, OUTSIDE, torch.float32, scheme, size, options, **MACHINE)
        counted = pools(size).run(counted_step, name, scheme, options)
        assert expected.state_bytes == [each.state_bytes for each in counted]
        assert {each.collectives for each in counted} == {expected.collectives}
        assert expected.received_bytes == [each.received for each in counted]
        if name not in MATRICES:
            assert expected.collectives == (name in ("lars", "lamb") and scheme == SHARDED)
            continue
        family = MATRICES[name]
        matrices = [torch.empty(s, device="meta") for s in SHAPES if len(s) > 1 and s not in OUTSIDE]
        group = family([torch.empty(2, 2)]).defaults | options
        work = [0.0] * size
        for param, owner in zip(matrices, counted[0].owners, strict=True):
            work[owner] += family.cost(param, group)
        assert expected.operations == pytest.approx(work, rel=1e-12)
        assert expected.collectives > 2
        # Of each step from one refresh to the next, what each rank was seen to refresh, and what else it does.
        steps = list(zip(*(each.refreshed for each in counted), strict=True))
        every = [all_of - sum(own) / len(steps) for all_of, own in zip(work, zip(*steps, strict=True), strict=True)]
        greatest = [max(map(sum, zip(every, refreshed, strict=True))) for refreshed in steps]
        assert max(expected.busiest_operations) == pytest.approx(max(greatest), rel=1e-12)
        assert expected.waited_operations == pytest.approx(sum(greatest) / len(greatest), rel=1e-12)
        assert (max(map(sum, steps)) > 0) == (name in ("shampoo", "soap"))


def test_time_is_work_and_exchange():
    traffic = costs.Traffic(collectives=5, received=[3_000_000, 4_000_000], buckets=4)
    in_turn, overlapped = costs.seconds([1e9, 6e9], traffic, flops=1e12, bandwidth=1e9, latency=1e-4)
    # 6 ms of work, 4 ms of bytes, five times 0.1 ms.
    assert in_turn == pytest.approx(10.5e-3)
    # Of 4.4 ms of exchange one part in four is left beside the work.
    assert overlapped == pytest.approx(0.1e-3 + 6e-3 + 1.1e-3)
    # And the other way round, where the work hides.
    _, overlapped = costs.seconds([1e9, 2e9], traffic, flops=1e12, bandwidth=1e9, latency=1e-4)
    assert overlapped == pytest.approx(0.1e-3 + 4.4e-3 + 0.5e-3)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


FOUR = ("--ranks", "4", "--bandwidth", "25", "--flops", "100")


def test_the_table(tmp_path):
    file = tmp_path / "plan.json"
    result = command("--optimizer", "muon", "--model", "gpt2", *FOUR, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("replicated", "sharded", "20 µs for each collective"))
    first, second = json.loads(file.read_text())["plans"]
    # 340 MB of matrices in fp32, alike in work and bytes on four ranks.
    nbytes = 12 * 12 * 768 * 768 * 4
    assert first["received_bytes"] == [3 * 32 + 3 * nbytes // 4] * 4
    assert second["received_bytes"] == [3 * 32 + 9 * nbytes // 16] * 4
    assert (first["collectives"], second["collectives"]) == (5, 9)
    assert max(first["operations"]) == pytest.approx(sum(first["operations"]) / 4)
    # Momentum at the owners; AdamW's two states, and a step count for each of its tensors, everywhere.
    rest = 50257 * 768 + 1024 * 768 + 12 * (4 * 768 + (3 + 1 + 4 + 1) * 768) + 2 * 768
    assert first["state_bytes"] == [nbytes // 4 + 8 * rest + 4 * (2 + 12 * 8 + 2)] * 4
    assert 0 < first["overlapped_s"] < first["in_turn_s"]


def test_elementwise_optimizers_exchange_nothing():
    result = command("--optimizer", "lion", "--model", "768x3072,12*768", *FOUR, "--scheme", "sharded")
    assert result.exit_code == 0, result.output
    assert "exchanges nothing" in result.output
    assert "replicated" not in result.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_what_the_formulas_say(dtype: torch.dtype):
    w = torch.empty(20, 36, dtype=dtype, device="meta")
    both = 2 * w.numel() * dtype.itemsize + 8
    for family, options, factors in [
        # Six blocks of 10 and 12.
        (sl.Shampoo, {"max_preconditioner_dim": 12}, 8 * 6 * (10**2 + 12**2)),
        (sl.Shampoo, {"max_preconditioner_dim": 12, "packed": True}, 8 * 6 * (55 + 78)),
        (sl.SOAP, {}, 8 * (20**2 + 36**2)),
        (sl.SOAP, {"max_preconditioner_dim": 30, "packed": True}, 4 * (20**2 + 210)),
        (sl.SOAP, {"variant": "kl"}, 8 * (20**2 + 36**2) + 4 * (20 + 36)),
    ]:
        group = family([torch.empty(2, 2)]).defaults | {"merge_dims": False} | options
        assert state_bytes(family, w, group) == both + factors


def test_refreshes_and_norms_are_said(tmp_path):
    file = tmp_path / "plan.json"
    result = command("--optimizer", "shampoo", "--stagger", "--model", "gpt2", *FOUR, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("shampoo, staggered", "at each step", "busiest step"))
    for each in json.loads(file.read_text())["plans"]:
        assert max(each["operations"]) < each["waited_operations"] < max(each["busiest_operations"])
        for how in ("in_turn_s", "overlapped_s"):
            assert 0 < each[how] < each[f"busiest_{how}"]
    result = command("--optimizer", "lamb", "--model", "gpt2", *FOUR, "--json", str(file))
    assert "exchange of norms" in result.output
    first, second = json.loads(file.read_text())["plans"]
    assert (first["collectives"], first["in_turn_s"]) == (0, None)
    # Two sums of squares of 148 tensors, in fp64; 20 µs, and 25 GB/s.
    nbytes = 2 * 3 * (148 * 2 * 8 // 4)
    assert second["received_bytes"] == [nbytes] * 4
    assert second["in_turn_s"] == second["overlapped_s"] == pytest.approx(20e-6 + nbytes / 25e9)


@pytest.mark.parametrize(("optimizer", "model"), [("soap", "12*768"), ("muon", "llama-1b")])
def test_steps_that_are_alike_have_no_rows_of_their_own(optimizer: str, model: str):
    result = command("--optimizer", optimizer, "--model", model, *FOUR)
    assert result.exit_code == 0, result.output
    assert "busiest" not in result.output


def test_steps_repeat_when_all_refreshes_do():
    due = [{(2, 1): 10.0}, {(3, 0): 30.0, (3, 2): 3.0}, {}]
    # Without what is refreshed, 5 a step, 1 a step, and 7.
    found = costs.each_step([10.0, 12.0, 7.0], due, [1, 0, 0], 2)
    assert found == [[38.0, 5.0], [8.0, 15.0], [11.0, 5.0], [38.0, 15.0], [8.0, 5.0], [11.0, 15.0]]
    assert costs.each_step([], [], [], 2) == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--optimizer", "adafactor"), "'adafactor' is not one of 'muon', 'muonh', 'shampoo', 'soap', 'sgd'"),
        (("--stagger",), "muon refreshes nothing, expected shampoo or soap"),
        (("--model", "gpt5"), "'gpt5' is no set and no shape, expected 1000x768"),
        (("--ranks", "0"), "0 is not in the range 1<=x<=4096"),
        (("--bandwidth", "nan"), "nan is not in the range 1e-06<=x<=1000000000.0"),
        (("--flops", "0"), "0.0 is not in the range 1e-06<=x<=1000000000.0"),
        (("--latency", "inf"), "inf is not in the range 0<=x<=1000000000.0"),
        (("--scheme", "ddp"), "'ddp' is not one of 'replicated', 'sharded'"),
        (("--dtype", "int8"), "'int8' is not one of"),
        (("--json", "/nowhere/plan.json"), "'/nowhere/plan.json' cannot be written"),
    ],
)
def test_what_cannot_be_planned(changed: tuple[str, str], said: str):
    result = command("--optimizer", "muon", "--model", "gpt2-layer", *FOUR, *changed)
    assert result.exit_code == 2
    assert changed[0] in result.output
    assert said in " ".join(result.output.split())


def test_what_is_no_hidden_matrix_is_a_parameter_of_its_model():
    for name, shapes in OUTSIDE_OF_MODELS.items():
        assert set(shapes) <= set(shapes_of(name))
