"""The processes that tests start as ranks: results by rank, and an end that no thread of gloo can disturb."""

import atexit
import os

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing


def exchange(rank: int, factor: int) -> list[int]:
    atexit.register(os.abort)  # called if the interpreter is finalised
    mine, sum_of_all = torch.tensor(rank + 1), torch.tensor(factor * (rank + 1))
    dist.all_reduce(sum_of_all)
    return [mine.item(), sum_of_all.item()]


def fail(rank: int) -> None:
    dist.barrier()  # both have connected
    if rank == 1:
        raise ValueError("rank 1 is wrong")


def test_results_by_rank_from_interpreters_that_are_not_finalised(tmp_path):
    assert ranks.run(exchange, 2, tmp_path, 10) == [[1, 30], [2, 30]]


def test_an_error_of_one_rank_is_the_test_s(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 is wrong"):
        ranks.run(fail, 2, tmp_path)
