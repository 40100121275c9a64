"""`siglip info`: versions, devices and available backends of this machine."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

from siglip_model.cli import terminal
from siglip_model.cli.options import JsonOption, errors_in_one_line

LIBRARIES = ("torch", "triton", "flash-attn", "transformers", "sentencepiece", "tokenizers", "safetensors", "pillow")


def describe_machine() -> dict[str, dict[str, str | None]]:
    """Three groups of name -> text. versions: None if not installed. backends: None if available, else the reason."""
    import torch

    from siglip_model import backends

    versions: dict[str, str | None] = {"siglip-triton": _version("siglip-triton"), "python": platform.python_version()}
    versions.update({name: _version(name) for name in LIBRARIES})
    if torch.version.cuda is not None:
        versions["cuda (of torch)"] = torch.version.cuda
    return {"versions": versions, "devices": _devices(), "backends": dict(backends.availability())}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str | None]:
    import torch

    processor = platform.processor() or platform.machine()
    devices: dict[str, str | None] = {
        "cpu": f"{processor}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices[f"cuda:{index}"] = f"{properties.name}, compute capability {capability}, {memory}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def info(as_json: JsonOption = False) -> None:
    """Show versions, devices, and which backends are available, with the reason for those that are not."""
    with errors_in_one_line():
        facts = describe_machine()
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        terminal.print_machine(facts)
