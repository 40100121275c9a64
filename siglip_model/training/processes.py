"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, and its device.

    control: a group for a few numbers and objects, on the CPU. background: another for checkpoints, which are written
    by a thread. Both are None in a single process.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, *numbers: float) -> list[float]:
        """The sums over the ranks."""
        if self.control is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()


@contextmanager
def joined_processes(device: str = "auto", timeout: float = 600) -> Iterator[Processes]:
    """Joins the processes that torchrun started, each with a GPU of its own unless `device` is "cpu".

    timeout: seconds after which a collective that another rank does not join ends this one. Raises ValueError for a
    device that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device (--device) is {device!r}; supported: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device (--device) is 'cuda', but PyTorch finds no GPU; supported here: auto, cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"torchrun started process {local} of this machine, which has {count} GPUs; one for each")
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(place)
        return
    patience = datetime.timedelta(seconds=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    try:
        yield processes_of_group(place, patience)
    finally:
        dist.destroy_process_group()


def processes_of_group(device: torch.device, timeout: datetime.timedelta | None = None) -> Processes:
    """The ranks of the default process group."""
    groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
    return Processes(device, dist.get_rank(), dist.get_world_size(), *groups)
