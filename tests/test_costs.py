"""What `stepladder plan` says, beside steps of several processes in which everything is counted."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from process_pool import ProcessPools
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stepladder.bench.shapes import OUTSIDE as OUTSIDE_OF_MODELS
from stepladder.bench.shapes import shapes_of
from stepladder.cli import main
from stepladder.cli.plan import ELEMENTWISE, MATRICES, REPLICATED, SHARDED, plan
from stepladder.distributed import assignment, costs, peers

# Uneven and empty shards, a vector that is smaller than the number of ranks, a convolution, an embedding.
SHAPES = [(30, 16), (24, 16), (16, 24), (3, 40), (1, 7), (24,), (8, 4, 3, 3), (3, 12, 8), (2,), (64, 16), (7,)]
OUTSIDE = [(30, 16)]
MACHINE = {"flops": 1e12, "bandwidth": 1e9, "latency": 1e-5}
# Of a rank, so that there is more than one bucket.
BUCKET_BYTES = 1024


def counted_step(name: str, scheme: str) -> tuple[int, int, int, list[int]]:
    """Of this rank: bytes of state, collectives of a step, bytes received, and the owners of matrices."""
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
        optimizer: Any = MATRICES[name](groups, **where)
    else:
        optimizer = ELEMENTWISE[name](params)
    calls: Counter[str] = Counter()
    received = 0
    gather, exchange = peers._all_gather, dist.all_to_all_single

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

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", BUCKET_BYTES)
        for step in range(2):
            for p, value in zip(params, values, strict=True):
                p.grad = laid(value)
            if step == 1:
                monkey.setattr(peers, "_all_gather", gathering)
                monkey.setattr(dist, "all_to_all_single", exchanging)
                for other in ("all_reduce", "broadcast", "reduce_scatter_tensor"):
                    monkey.delattr(dist, other)
            optimizer.step()
    owners = [optimizer._owners.owners[p] for p in matrices] if name in MATRICES else []
    return optimizer.state_bytes(), calls.total(), received, owners


@pytest.mark.parametrize("scheme", [REPLICATED, SHARDED])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_plan_is_what_a_step_does(pools: ProcessPools, size: int, scheme: str):
    for name in ("muon", "muonh", "adamw", "sgd"):
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(assignment, "BUCKET_BYTES", BUCKET_BYTES)
            expected = plan(name, SHAPES, OUTSIDE, torch.float32, scheme, size, **MACHINE)
        states, collectives, received, owners = zip(*pools(size).run(counted_step, name, scheme), strict=True)
        assert expected.state_bytes == list(states)
        assert set(collectives) == {expected.collectives}
        assert expected.received_bytes == list(received)
        if name in MATRICES:
            family = MATRICES[name]
            matrices = [torch.empty(s, device="meta") for s in SHAPES if len(s) > 1 and s not in OUTSIDE]
            group = family([torch.empty(2, 2)]).defaults
            work = [0.0] * size
            for param, owner in zip(matrices, owners[0], strict=True):
                work[owner] += family.cost(param, group)
            assert expected.operations == pytest.approx(work, rel=1e-12)
            assert expected.collectives > 2


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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--optimizer", "lamb"), "'lamb' is not one of 'muon', 'muonh', 'sgd'"),
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
