"""Matrices with owners: replicated parameters, as under DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from copy import deepcopy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pool import ProcessPools, RankError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import stepladder as sl
from stepladder.distributed import assignment, costs, peers

SIZES = [1, 2, 3, 4]
# Some have less rows than there are ranks; a convolution's weight, a batch, and one without elements.
SHAPES = [(24, 16), (16, 24), (3, 40), (1, 2), (8, 4, 3, 3), (3, 12, 8), (0, 5), (24, 16), (64, 16), (2, 2)]
VECTORS = [(24,), (7,), (1,)]

MAKERS: dict[str, Any] = {
    "muon": lambda params, **where: sl.Muon(params, lr=0.02, weight_decay=0.1, **where),
    "sum": lambda params, **where: sl.Muon(
        params, lr=0.02, momentum_form="sum", nesterov=False, adjust_lr_fn="match_rms_adamw", **where
    ),
    "normuon": lambda params, **where: sl.Muon(params, lr=0.02, variant="normuon", **where),
    "adamuon": lambda params, **where: sl.Muon(params, lr=0.02, variant="adamuon", **where),
    "cautious": lambda params, **where: sl.Muon(params, lr=0.02, cautious_weight_decay=True, **where),
    "clipped": lambda params, **where: sl.Muon(params, lr=0.02, max_norm=0.5, **where),
    "reference": lambda params, **where: sl.Muon(params, lr=0.02, backend="reference", **where),
    "muonh": lambda params, **where: sl.MuonH(params, lr=0.02, **where),
    "shampoo": lambda params, **where: sl.Shampoo(
        params, lr=0.02, max_preconditioner_dim=16, precondition_frequency=2, weight_decay=0.1, **where
    ),
    "staggered shampoo": lambda params, **where: sl.Shampoo(
        params,
        lr=0.02,
        max_preconditioner_dim=48,
        precondition_frequency=4,
        stagger=True,
        packed=True,
        grafting="sgd",
        **where,
    ),
    "soap": lambda params, **where: sl.SOAP(params, lr=0.02, precondition_frequency=3, weight_decay=0.1, **where),
    "staggered soap": lambda params, **where: sl.SOAP(
        params, lr=0.02, precondition_frequency=4, stagger=True, packed=True, precondition_1d=True, **where
    ),
    "kl": lambda params, **where: sl.SOAP(
        params, lr=0.02, precondition_frequency=4, stagger=True, variant="kl", backend="cpu", **where
    ),
}
PRECONDITIONERS = ("shampoo", "staggered shampoo", "soap", "staggered soap", "kl")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [*SHAPES, *VECTORS]]


def grouped(params: list[nn.Parameter], name: str = "muon") -> list[dict[str, Any]]:
    """Vectors go to AdamW; the second matrix has three parts, or a preconditioner and a vector beside it."""
    if name in PRECONDITIONERS:
        own = {"params": [params[1], params[len(SHAPES)]], "lr": 0.01, "precondition_frequency": 5}
        vectors = params[len(SHAPES) + 1 :]
    else:
        own, vectors = {"params": [params[1]], "lr": 0.01, "split_sizes": (4, 4, 8)}, params[len(SHAPES) :]
    return [
        {"params": [params[0], *params[2 : len(SHAPES)]]},
        own,
        {"params": vectors, "algorithm": "adamw"},
    ]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """The same on all ranks, as after a reduction."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def everywhere(params: list[nn.Parameter]) -> bool:
    """Whether all ranks have the same bits."""
    own = torch.cat([p.detach().reshape(-1).float() for p in params])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return all(torch.equal(own, other) for other in found)


def train_beside_one(name: str, dtype: torch.dtype) -> list[bool]:
    """Ten steps with owners and ten without, on every rank; whether both, and all ranks, have the same bits."""
    pairs = []
    for where in ({}, {"process_group": dist.group.WORLD}):
        params = parameters(dtype)
        pairs.append((params, MAKERS[name](grouped(params, name), **where)))
    found = []
    for step in range(10):
        for params, optimizer in pairs:
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad
            optimizer.step()
        found += [same(pairs[0][0], pairs[1][0]), everywhere(pairs[1][0])]
    return found


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", SIZES)
def test_owners_give_the_bits_of_a_single_process(pools: ProcessPools, size: int, name: str):
    assert all(all(found) for found in pools(size).run(train_beside_one, name, torch.float32))


DTYPES = [
    ("muon", torch.float64),
    ("muon", torch.bfloat16),
    ("muon", torch.float16),
    ("staggered shampoo", torch.float64),
    ("shampoo", torch.float16),
    ("soap", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_other_dtypes(pools: ProcessPools, dtype: torch.dtype, name: str):
    assert all(all(found) for found in pools(3).run(train_beside_one, name, dtype))


def step_with_gaps(name: str) -> bool:
    """Gradients that some ranks lack, that nobody has, frozen parameters, and ones that are added in mid-run."""
    rank = dist.get_rank()
    pairs = []
    for where in ({}, {"process_group": dist.group.WORLD}):
        params = parameters()
        params[3].requires_grad_(False)
        optimizer = MAKERS[name](grouped(params, name), **where)
        pairs.append((params, optimizer))
    found = []
    for step in range(8):
        for params, optimizer in pairs:
            if step == 4:
                params.append(nn.Parameter(torch.ones(6, 9)))
                optimizer.add_param_group({"params": [params[-1]]})
            for index, (p, grad) in enumerate(zip(params, gradients(params, step), strict=True)):
                nobody = index == 3 or (index + step) % 5 == 0
                lacks = bool(optimizer._owners) and (index + rank + step) % 3 == 0 and dist.get_world_size() > 1
                source = (index + step) % dist.get_world_size() == rank
                p.grad = None if nobody or (lacks and not source) else grad
            optimizer.step()
        found += [same(pairs[0][0], pairs[1][0]), everywhere(pairs[1][0])]
    return all(found)


@pytest.mark.parametrize("name", ["normuon", "staggered shampoo", "staggered soap"])
@pytest.mark.parametrize("size", SIZES)
def test_missing_gradients_and_new_parameters(pools: ProcessPools, size: int, name: str):
    assert all(pools(size).run(step_with_gaps, name))


def states_of_matrices(name: str) -> tuple[int, int, list[list[str]]]:
    """Bytes of the states of matrices: of a single process, of this rank; and which states it has for each."""
    alone, shared = parameters()[: len(SHAPES)], parameters()[: len(SHAPES)]
    optimizers = [MAKERS[name](alone), MAKERS[name](shared, process_group=dist.group.WORLD)]
    for params, optimizer in zip((alone, shared), optimizers, strict=True):
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()
    return optimizers[0].state_bytes(), optimizers[1].state_bytes(), [sorted(optimizers[1].state[p]) for p in shared]


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("muonh", ["momentum_buffer", "radius"]),
        ("shampoo", ["exp_avg", "exp_avg_sq", "factors", "failed_roots", "roots", "step"]),
        ("soap", ["bases", "exp_avg", "exp_avg_sq", "factors", "failed_bases", "step"]),
    ],
)
def test_a_state_lives_at_the_owner_alone(pools: ProcessPools, name: str, states: list[str]):
    answers = pools(3).run(states_of_matrices, name)
    assert sum(answer[1] for answer in answers) == answers[0][0]
    for each in zip(*(answer[2] for answer in answers), strict=True):
        assert sorted(each) == [[], [], states]


def trajectory(
    name: str, first: int, past: int, checkpoint: tuple[list[Tensor], dict[str, Any]] | None, where: str
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Steps from a checkpoint on: parameters, state and bytes of state after the last."""
    params = parameters()
    options: dict[str, Any] = {}
    if where == "mesh":
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    elif where == "group":
        options["process_group"] = dist.group.WORLD
    optimizer = MAKERS[name](grouped(params, name), **options)
    if checkpoint is not None:
        for p, value in zip(params, checkpoint[0], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(checkpoint[1])
    loaded = optimizer.state_bytes()
    for step in range(first, past):
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad
        optimizer.step()
    return [p.detach().clone() for p in params], optimizer.state_dict(), loaded


def alike(a: Any, b: Any) -> bool:
    """Whether two state_dicts hold the same bits."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("name", ["normuon", "adamuon", "muonh", "staggered shampoo", "staggered soap", "kl"])
def test_a_checkpoint_of_four_ranks_goes_on_with_any_number(pools: ProcessPools, name: str):
    torch.set_num_threads(1)
    whole, state, _ = trajectory(name, 0, 6, None, "alone")
    saved = pools(4).run(trajectory, name, 0, 3, None, "group")
    for params, saved_state, _ in saved:
        assert same(params, saved[0][0])
        assert alike(saved_state, saved[0][1])
    for size, where in [(1, "group"), (2, "mesh"), (3, "group")]:
        answers = pools(size).run(trajectory, name, 3, 6, saved[0][:2], where)
        for params, again, _ in answers:
            assert same(params, whole)
            assert alike(again, state)
        # States of AdamW are with every rank.
        sizes = [sum(value.nbytes for value in entry.values()) for _, entry in sorted(saved[0][1]["state"].items())]
        owned = len(SHAPES) + (name in PRECONDITIONERS)
        matrices = [answer[2] - sum(sizes[owned:]) for answer in answers]
        total = sum(sizes[:owned])
        assert sum(matrices) == total
    params, again, _ = trajectory(name, 3, 6, saved[0][:2], "alone")
    assert same(params, whole)
    assert alike(again, state)


class Counting:
    """Counts what the optimizers' collectives send, in calls and in bytes that this rank receives from others."""

    def __init__(self, monkey: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        gather = peers._all_gather

        def counted(out: Tensor, own: Tensor, **options: Any) -> Any:
            what = "control" if own.dtype == torch.int64 else "results"
            self.calls[what] += 1
            self.bytes[what] += out.nbytes - own.nbytes
            return gather(out, own, **options)

        monkey.setattr(peers, "_all_gather", counted)
        for name in ("all_reduce", "broadcast", "all_gather", "all_to_all_single", "reduce_scatter_tensor"):
            monkey.setattr(dist, name, self._refuse)

    @staticmethod
    def _refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a step in which all ranks have all gradients needs no such collective")


def traffic(count: int, bucket_bytes: int) -> tuple[dict[str, int], dict[str, int], list[int], int]:
    """Calls and bytes of a step, owners, and the greatest number of bytes that a rank sends, summed over buckets."""
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", bucket_bytes)
        rows = 384 // count
        params = [nn.Parameter(torch.ones(rows, 32)) for _ in range(count)]
        optimizer = sl.Muon(params, process_group=dist.group.WORLD)
        for p in params:
            p.grad = torch.eye(rows, 32)
        optimizer.step()
        counting = Counting(monkey)
        optimizer.step()
        assert optimizer._owners is not None
        owners = [optimizer._owners.owners[p] for p in params]
        return dict(counting.calls), dict(counting.bytes), owners, rows * 32 * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_traffic_is_what_the_documents_say(pools: ProcessPools, size: int):
    """Matrices of one shape, divided evenly: every bucket is as full on every rank as on any other."""
    for bucket_bytes, buckets in [(1 << 30, 1), (384 * 32 * 4 // size // 2, 2)]:
        for count in (24, 48, 96, 192):
            answers = pools(size).run(traffic, count, bucket_bytes)
            for calls, received, owners, nbytes in answers:
                assert calls == {"control": 1, "results": buckets}
                assert received == {"control": (size - 1) * 32, "results": (size - 1) * count * nbytes // size}
                assert max(Counter(owners).values()) == count // size
                with pytest.MonkeyPatch.context() as monkey:
                    monkey.setattr(assignment, "BUCKET_BYTES", bucket_bytes)
                    computed = costs.replicated([nbytes] * count, owners, size)
                assert computed == costs.Traffic(sum(calls.values()), [sum(received.values())] * size, buckets)


def uneven_traffic() -> tuple[int, list[tuple[int, int]]]:
    """Bytes received in a step, and owner and bytes of each matrix."""
    with pytest.MonkeyPatch.context() as monkey:
        params = parameters()
        optimizer = MAKERS["muon"](grouped(params), process_group=dist.group.WORLD)
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()
        counting = Counting(monkey)
        optimizer.step()
        assert optimizer._owners is not None
        return counting.bytes["results"], [(optimizer._owners.owners[p], p.nbytes) for p in params[: len(SHAPES)]]


def test_the_greatest_share_sets_the_traffic(pools: ProcessPools):
    for received, matrices in pools(3).run(uneven_traffic):
        sent = Counter({rank: 0 for rank in range(3)})
        for owner, nbytes in matrices:
            sent[owner] += nbytes
        assert received == 2 * -(-max(sent.values()) // 16) * 16
        computed = costs.replicated([nbytes for _, nbytes in matrices], [owner for owner, _ in matrices], 3)
        assert computed == costs.Traffic(2, [2 * 32 + received] * 3, 1)


def step_by_many_buckets(name: str) -> bool:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", 256)
        return all(train_beside_one(name, torch.float32))


@pytest.mark.parametrize("name", ["muonh", "shampoo", "staggered soap"])
def test_buckets_do_not_change_the_bits(pools: ProcessPools, name: str):
    assert all(pools(2).run(step_by_many_buckets, name))


def step_at_rest(name: str = "muonh") -> bool:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = MAKERS[name](grouped(params, name), process_group=dist.group.WORLD)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(2):
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad
        optimizer.step()
    return same(before, params)


@pytest.mark.parametrize("name", ["muonh", "shampoo", "soap"])
def test_a_learning_rate_of_zero_moves_nothing(pools: ProcessPools, name: str):
    assert all(pools(2).run(step_at_rest, name))


def scaled_steps(name: str) -> list[bool]:
    """As GradScaler steps: gradients that are scaled, and a step that one rank alone finds not to be finite."""
    pairs = []
    for where in ({}, {"process_group": dist.group.WORLD}):
        params = parameters()
        pairs.append((params, MAKERS[name](grouped(params, name), **where)))
    found = []
    for step in range(4):
        for params, optimizer in pairs:
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad * 8.0
            owners = optimizer._owners is not None
            bad = step == 2 and (not owners or dist.get_rank() == dist.get_world_size() - 1)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(bad))
            optimizer.step()
            if step != 2:
                # What is written back is the true gradient, whoever owns the matrix.
                found.append(same([p.grad for p in params if p.grad is not None], gradients(params, step)))
        found += [same(pairs[0][0], pairs[1][0]), everywhere(pairs[1][0])]
    return found


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap"])
def test_a_gradient_scaler_skips_on_all_ranks(pools: ProcessPools, name: str):
    assert all(all(found) for found in pools(2).run(scaled_steps, name))


def step_that_one_refuses(what: str) -> tuple[str, bool, bool]:
    """The error, whether nothing moved, and whether the next step is as any other."""
    params = parameters()
    optimizer = MAKERS["muon"](grouped(params), process_group=dist.group.WORLD)
    for p, grad in zip(params, gradients(params, 0), strict=True):
        p.grad = grad
    optimizer.step()
    before = [p.detach().clone() for p in params]
    bad = dist.get_rank() == 1
    extra = nn.Parameter(torch.ones(2, 2))
    if what == "gradient" and bad:
        params[0].grad = torch.ones(24, 16).to_sparse()
    if what == "group":
        optimizer.add_param_group({"params": [extra if bad else nn.Parameter(torch.ones(2, 3))]})
    try:
        optimizer.step()
        message = ""
    except RuntimeError as error:
        message = str(error)
    still = same(before, params)
    if what == "group":
        return message, still, True
    params[0].grad = gradients(params, 0)[0]
    optimizer.step()
    return message, still, everywhere(params) and not same(before, params)


def test_a_step_that_one_rank_refuses_is_taken_by_none(pools: ProcessPools):
    answers = pools(3).run(step_that_one_refuses, "gradient")
    assert "sparse" in answers[1][0]
    assert all("rank 1 refused its step" in answers[rank][0] for rank in (0, 2))
    assert all(still and goes_on for _, still, goes_on in answers)


def test_ranks_with_other_parameters_are_found_out(pools: ProcessPools):
    answers = pools(2).run(step_that_one_refuses, "group")
    assert all("has other parameters than rank" in message and still for message, still, _ in answers)


# What each of two ranks is given: owners would be others, one would exchange norms, matrices would be swapped.
AT_ODDS: dict[str, Any] = {
    "costs": lambda rank, params: sl.Shampoo(
        params, max_preconditioner_dim=(4, 64)[rank], process_group=dist.group.WORLD
    ),
    "refreshes": lambda rank, params: sl.SOAP(params, stagger=rank == 1, process_group=dist.group.WORLD),
    "norms": lambda rank, params: sl.Muon(params, max_norm=(None, 1.0)[rank], process_group=dist.group.WORLD),
    "order": lambda rank, params: sl.Muon(
        [(str(index), params[index]) for index in ((0, 1), (1, 0))[rank]], process_group=dist.group.WORLD
    ),
}


def step_at_odds(what: str) -> tuple[str, bool]:
    params = [nn.Parameter(torch.ones(12, 12)), nn.Parameter(torch.full((12, 12), 2.0))]
    optimizer = AT_ODDS[what](dist.get_rank(), params)
    for p in params:
        p.grad = torch.eye(12)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), same(params, [torch.ones(12, 12), torch.full((12, 12), 2.0)])
    return "no error", False


@pytest.mark.parametrize("what", AT_ODDS)
def test_ranks_at_odds_are_found_out(pools: ProcessPools, what: str):
    for message, still in pools(2).run(step_at_odds, what):
        assert "has other parameters than rank" in message
        assert still


def save_on_one_rank() -> tuple[str, bool]:
    """Rank 0 alone asks for the state while rank 1 goes on; then both go on together."""
    params = parameters()
    optimizer = MAKERS["muon"](grouped(params), process_group=dist.group.WORLD)

    def step() -> None:
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()

    step()
    message = "no error"
    try:
        optimizer.state_dict() if dist.get_rank() == 0 else step()
    except RuntimeError as error:
        message = str(error)
    step()
    optimizer.state_dict()
    return message, everywhere(params)


def test_a_rank_that_alone_asks_for_the_state_is_told_so(pools: ProcessPools):
    for message, goes_on in pools(2).run(save_on_one_rank):
        assert message.startswith("rank 0 called state_dict() where rank 1 took a step: every rank has to call")
        assert goes_on


def bytes_made_by_loading(name: str) -> tuple[int, int, bool]:
    """Bytes that loading makes on this rank, bytes of its states, and whether a bad checkpoint gives owners."""
    optimizers = []
    for _ in range(2):
        params = parameters()[: len(SHAPES)]
        optimizers.append(MAKERS[name](params, process_group=dist.group.WORLD))
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
    optimizers[0].step()
    saved = optimizers[0].state_dict()
    bad = deepcopy(saved)
    bad["state"][len(SHAPES) - 1]["momentum_buffer"] = torch.ones(5)
    with pytest.raises(ValueError, match="has shape"):
        optimizers[1].load_state_dict(bad)
    kept = bool(optimizers[1]._owners.owners)
    made = []
    empty_like = torch.empty_like
    with pytest.MonkeyPatch.context() as monkey:

        def counted(*arguments: Any, **options: Any) -> Tensor:
            made.append(empty_like(*arguments, **options))
            return made[-1]

        monkey.setattr(torch, "empty_like", counted)
        optimizers[1].load_state_dict(saved)
    return sum(x.nbytes for x in made if x.device.type != "meta"), optimizers[1].state_bytes(), kept


def test_loading_makes_the_states_of_what_a_rank_owns_alone(pools: ProcessPools):
    for made, states, kept in pools(3).run(bytes_made_by_loading, "normuon"):
        assert 0 < made == states
        assert not kept


def step_until_one_is_gone(how: str) -> str:
    """Rank 1 ends or sleeps between its first bucket and its second."""
    step_at_rest()  # loads what is loaded late, without a hurry
    group = dist.new_group(timeout=timedelta(seconds=4))
    dist.barrier()
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(assignment, "BUCKET_BYTES", 512)
        params = parameters()
        optimizer = MAKERS["muon"](params[: len(SHAPES)], process_group=group)
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()
        step_matrices, calls = sl.Muon.step_matrices, []

        def interrupted(*arguments: Any) -> None:
            calls.append(arguments)
            if dist.get_rank() == 1 and len(calls) == 2:
                if how == "ends":
                    os._exit(9)
                time.sleep(7)
            step_matrices(*arguments)

        monkey.setattr(sl.Muon, "step_matrices", interrupted)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_the_end_of_a_rank_is_an_error_that_names_the_collective(pools: ProcessPools):
    """A rank is killed in the middle of a step; training goes on from the last checkpoint as if it had not been."""
    torch.set_num_threads(1)
    whole = trajectory("muonh", 0, 4, None, "alone")[0]
    saved = pools(3).run(trajectory, "muonh", 0, 2, None, "group")[0][:2]
    with pytest.raises(RankError, match="rank 1 of 3 died with exit code 9") as died:
        pools(3).run(step_until_one_is_gone, "ends")
    assert set(died.value.results) == {0, 2}
    for message in died.value.results.values():
        assert "Muon's all-gather of bucket" in message
        assert "of stepped parameters failed" in message
    for size in (3, 2):
        assert all(same(whole, answer[0]) for answer in pools(size).run(trajectory, "muonh", 2, 4, saved, "group"))


def test_a_rank_that_does_not_come_is_given_up_after_the_timeout(pools: ProcessPools):
    pool = pools(2)
    message = pool.run(step_until_one_is_gone, "sleeps")[0]
    assert "Muon's all-gather of bucket" in message
    pool.close()  # its ranks are no longer in step


def checkpointed(optimizer_class: Any) -> list[bool]:
    """By torch.distributed.checkpoint's functions, into an optimizer that has taken no step."""
    found = []
    model, other = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) for _ in range(2))
    optimizers = []
    for net in (model, other):
        for index, p in enumerate(net.parameters()):
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
        vectors = [p for p in net.parameters() if p.ndim == 1]
        groups = [
            {"params": [p for p in net.parameters() if p.ndim == 2]},
            {"params": vectors, "algorithm": "lion"},
        ]
        optimizers.append(optimizer_class(groups, lr=0.1, process_group=dist.group.WORLD))

    def step(net: nn.Module, optimizer: Any, number: int) -> None:
        net_params = list(net.parameters())
        for p, grad in zip(net_params, gradients(net_params, number), strict=True):
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizers[0], 0)
    saved = get_optimizer_state_dict(model, optimizers[0])
    other.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, optimizers[1], saved)
    found.append(same(before, list(other.parameters())))
    for net, optimizer in zip((model, other), optimizers, strict=True):
        step(net, optimizer, 1)
    found.append(same(list(model.parameters()), list(other.parameters())))
    found.append(alike(optimizers[0].state_dict(), optimizers[1].state_dict()))
    return found


@pytest.mark.parametrize("optimizer_class", [sl.Muon, sl.Shampoo, sl.SOAP])
def test_distributed_checkpointing(pools: ProcessPools, optimizer_class: Any):
    """On four ranks two of which own nothing."""
    assert all(all(found) for found in pools(4).run(checkpointed, optimizer_class))


def shared_memory(name: str) -> bool:
    """Matrices that share rows are stepped one after another, by one owner."""
    results = []
    for where in ({}, {"process_group": dist.group.WORLD}):
        w = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
        params = [nn.Parameter(w[:8]), nn.Parameter(w[4:]), nn.Parameter(torch.ones(5, 5))]
        optimizer = MAKERS[name](params, **where)
        for step in range(3):
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad
            optimizer.step()
        results.append(w)
    return torch.equal(*results)


@pytest.mark.parametrize("name", ["muon", "shampoo", "soap"])
def test_parameters_that_share_memory_have_one_owner(pools: ProcessPools, name: str):
    assert all(pools(3).run(shared_memory, name))


def refusals() -> dict[str, str]:
    """What each wrong argument is answered with."""
    params = [nn.Parameter(torch.ones(4, 4))]
    world: Any = dist.group.WORLD
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    outside = dist.new_group([1 - dist.get_rank() if dist.get_rank() == 1 else 0])
    wrong: dict[str, dict[str, Any]] = {
        "both": {"process_group": world, "mesh": mesh["replicas"]},
        "dimensions": {"mesh": mesh},
        "no group": {"process_group": "world"},
        "no mesh": {"mesh": 4},
    }
    if dist.get_rank() == 1:
        wrong["outside"] = {"process_group": outside}
    found = {}
    for name, options in wrong.items():
        try:
            sl.Muon(params, **options)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    optimizer = sl.Muon(params, process_group=world)
    try:
        deepcopy(optimizer)
    except TypeError as error:
        found["copy"] = str(error)
    return found


def test_refusals(pools: ProcessPools):
    for rank, found in enumerate(pools(2).run(refusals)):
        expected = {
            "both": "process_group and mesh were both given",
            "dimensions": "has 2 dimensions, expected one",
            "no group": "process_group must be a torch.distributed.ProcessGroup, got 'world'",
            "no mesh": "mesh must be a torch.distributed.DeviceMesh, got 4",
            "copy": "cannot be pickled or copied: state_dict()",
        }
        if rank == 1:
            expected["outside"] = "a group without this process"
        assert found.keys() == expected.keys()
        assert all(text in found[name] for name, text in expected.items())


def warnings_of_no_group() -> list[int]:
    """How many warnings there are without process_group, at the first step with None, and at the second."""
    params = [nn.Parameter(torch.ones(4, 3))]
    params[0].grad = torch.ones(4, 3)
    none = sl.Muon(params, process_group=None)
    found = []
    for optimizer in (sl.Muon(params), none, none):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found.append(sum("process_group=None" in str(warning.message) for warning in caught))
    return found


def test_a_group_that_is_none_is_warned_of(pools: ProcessPools):
    """dist.group.WORLD is None before init_process_group."""
    assert pools(2).run(warnings_of_no_group) == [[0, 1, 0]] * 2
    assert pools(1).run(warnings_of_no_group) == [[0, 0, 0]]


def test_a_torch_without_collectives_is_one_for_single_processes():
    script = """
import torch, torch.distributed as dist
for name in ("all_gather_single", "all_gather_into_tensor"):
    vars(dist).pop(name, None)
dist.is_available = lambda: False
import stepladder as sl
p = torch.nn.Parameter(torch.ones(4, 3))
p.grad = torch.ones(4, 3)
sl.Muon([p]).step()
try:
    sl.Muon([p], process_group=object())
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "process_group and mesh need torch.distributed, which this torch was built without\n"
