"""`siglip info`: versions, devices and available backends of this machine."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING

from siglip_model.cli import terminal
from siglip_model.cli.options import JsonOption, errors_in_one_line

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "siglip-triton"
LIBRARIES = ("torch", "triton", "flash-attn", "transformers", "sentencepiece", "tokenizers", "safetensors", "pillow")


def describe_machine() -> dict[str, dict[str, str | None]]:
    """Three groups of name -> text. versions: None if not installed. backends: None if available, else the reason."""
    import torch

    from siglip_model import backends

    versions: dict[str, str | None] = {DISTRIBUTION: installed_version(DISTRIBUTION)}
    versions["python"] = platform.python_version()
    versions.update({name: installed_version(name) for name in LIBRARIES})
    if torch.version.cuda is not None:
        versions["cuda (of torch)"] = torch.version.cuda
    if torch.version.hip is not None:
        versions["rocm (of torch)"] = torch.version.hip
    return {"versions": versions, "devices": _devices(), "backends": dict(backends.availability())}


def installed_version(distribution: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str | None]:
    import torch

    from siglip_kernels.device import why_not

    processor = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    devices: dict[str, str | None] = {
        "cpu": f"{processor}, {os.cpu_count()} cores, torch uses {threads} thread{'s' * (threads != 1)}"
    }
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        refusal = why_not(device)
        devices[str(device)] = _describe_gpu(device) + ("" if refusal is None else f"; no triton: {refusal}")
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _describe_gpu(device: torch.device) -> str:
    """Name, compute capability and memory, or why PyTorch cannot use the GPU."""
    import torch

    from siglip_kernels.device import gpu_name

    try:
        properties = torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError) as error:
        return f"PyTorch cannot use it: {error}"
    capability = "" if torch.version.hip else f", compute capability {properties.major}.{properties.minor}"
    return f"{gpu_name(device)}{capability}, {properties.total_memory / 2**30:.0f} GiB"


def info(as_json: JsonOption = False) -> None:
    """Show versions, devices, and which backends are available, with the reason for those that are not."""
    with errors_in_one_line():
        facts = describe_machine()
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        terminal.print_machine(facts)
