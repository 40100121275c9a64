"""Devices from the names, ordinals and maps that transformers accepts."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def resolve_device(device: Any) -> torch.device:
    """A device from its name or its ordinal (-1 is the CPU); None and "auto" are the first accelerator, else the CPU.

    Raises ValueError for what names no device. Warns where an ordinal is given and there is no accelerator.
    """
    if isinstance(device, (str, torch.device)) and device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}; supported: 'auto', 'cpu', 'cuda', 'cuda:1', ...") from error
    if device is not None and device != "auto" and (not isinstance(device, int) or isinstance(device, bool)):
        raise ValueError(
            f"device is {device!r}; supported: a name such as 'cuda:1', a torch.device, an ordinal or None"
        )
    if isinstance(device, int) and device < 0:
        return torch.device("cpu")
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, device if isinstance(device, int) else 0)
    if isinstance(device, int):
        warnings.warn(f"device {device}: this machine has no accelerator, so the CPU is used", stacklevel=3)
    return torch.device("cpu")


SPREADING = ("balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a model over several devices


def resolve_device_map(device_map: torch.device | str | int | dict[str, Any] | None) -> torch.device:
    """The one device of a device_map: None is torch's default device, "auto" is CUDA where available, else the CPU.

    A dict must give all parts the same device. Raises ValueError for several devices, such as "balanced" where there
    are several accelerators, and for what names none.
    """
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"device_map is {device_map!r}; supported: one device for the whole model")
        return resolve_device_map(next(iter(device_map.values())))
    if device_map is None:
        return torch.get_default_device()
    if device_map in SPREADING and torch.accelerator.device_count() > 1:
        raise ValueError(f"device_map is {device_map!r}; supported: one device for the whole model, as 'cuda:0'")
    if device_map in ("auto", *SPREADING):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map is {device_map!r}; supported: one device, as 'cuda:0', or 'auto'") from error
