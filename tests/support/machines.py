"""Makes PyTorch report other GPUs than this machine has, and a process without Triton's interpreter."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    architecture: str = ""  # AMD's


H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0))
RTX_2080 = Gpu("NVIDIA GeForce RTX 2080 Ti", (7, 5))
MI300X = Gpu("AMD Instinct MI300X", (9, 4), "gfx942:sramecc+:xnack-")  # as ROCm answers


def broken(device: torch.device | int | None = None) -> None:
    """In place of a question about a GPU: as PyTorch answers for one that it lacks."""
    raise AssertionError("Invalid device id")


def report(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, hip: str | None = None) -> None:
    """The GPUs as cuda:0, cuda:1, ...; cuda:0 is current. hip: the version of a PyTorch that is built for ROCm."""

    def find(device: torch.device | int | None = None) -> Gpu:
        index = torch.device("cuda", device).index if isinstance(device, int) else getattr(device, "index", None)
        return gpus[index or 0]

    def properties(device: torch.device | int | None = None) -> SimpleNamespace:
        gpu = find(device)
        major, minor = gpu.capability
        architecture = {"gcnArchName": gpu.architecture} if gpu.architecture else {}
        return SimpleNamespace(name=gpu.name, major=major, minor=minor, total_memory=2**35, **architecture)

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: find(device).capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: 0)
    monkeypatch.setattr("siglip_kernels.device._accepted", set())
    monkeypatch.setattr("siglip_kernels.device.interpreting", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
