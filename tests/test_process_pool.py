"""The processes that the tests of torch.distributed run in."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from process_pool import ProcessPools, RankError


def total(value: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    value = value * (dist.get_rank() + 1)
    dist.all_reduce(value)
    return value, torch.get_num_threads(), os.getpid()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_answers_and_stays(pools: ProcessPools, size: int):
    answers = pools(size).run(total, torch.arange(3.0))
    factor = size * (size + 1) // 2
    assert [answer[0].tolist() for answer in answers] == [[0.0, factor, 2.0 * factor]] * size
    assert {answer[1] for answer in answers} == {1}
    assert [answer[2] for answer in pools(size).run(total, torch.ones(1))] == [answer[2] for answer in answers]


def total_of_pairs() -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=pairs[dist.get_rank() // 2])
    return value.item()


def test_ranks_can_form_groups(pools: ProcessPools):
    assert pools(4).run(total_of_pairs) == [1.0, 1.0, 5.0, 5.0]


def raise_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} will not")
    return dist.get_rank()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def test_a_failure_names_its_rank_and_the_next_call_works(pools: ProcessPools):
    pool = pools(2)
    with pytest.raises(RankError, match=r"rank 1 of 2 raised\n(.|\n)*ValueError: rank 1 will not") as raised:
        pool.run(raise_on, 1)
    assert raised.value.results == {0: 0}
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 7") as died:
        pool.run(die_on, 1)
    assert set(died.value.failures) == {0, 1}
    with pytest.raises(RankError, match=r"rank 0 of 2 did not answer within 0\.5 s"):
        pool.run(sleep_on, 0, timeout=0.5)
    assert pool.run(raise_on, -1) == [0, 1]
