"""Starts the ranks of a gloo process group, one process each, and returns what they computed."""

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def start(work: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> multiprocessing.ProcessContext:
    """Starts work(rank, *arguments) in one process per rank, which saves the result as RANK.pt in the empty folder.

    The processes are forks of a server that has already imported the slow modules. Unlike spawned ones they end without
    finalising the interpreter: DTensor's caches keep a group, and with it gloo's threads, beyond
    destroy_process_group(), and a thread that then releases the last collective's tensor aborts the process.
    """
    preload = ["torch._dynamo", "torch.distributed.fsdp", "triton", "siglip_kernels", "siglip_model"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    everything = (work, world_size, str(folder), arguments)
    return multiprocessing.start_processes(_rank, everything, world_size, join=False, start_method="forkserver")


def run(work: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """The results of work(rank, *arguments) by rank; see start."""
    context = start(work, world_size, folder, *arguments)
    while not context.join():
        pass
    return [result(folder, rank) for rank in range(world_size)]


def result(folder: Path, rank: int) -> Any:
    return torch.load(folder / f"{rank}.pt", weights_only=False)


def _rank(rank: int, work: Callable[..., Any], world_size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=5),
    )
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
