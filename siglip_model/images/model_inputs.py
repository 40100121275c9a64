"""What a model takes of images: prepared one by one, then joined to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""Arguments of a model by name: pixel_values, and at native resolution pixel_attention_mask and spatial_shapes."""

_NAMES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def prepare(image_processor: Any, image: Any, **options: Any) -> Inputs:
    """The model's inputs for one image, on the CPU."""
    batch = image_processor(images=[image], **{**options, "return_tensors": "pt"})
    return {name: batch[name] for name in _NAMES if name in batch}


def join(images: Sequence[Inputs], *, keep_padding: bool = False) -> Inputs:
    """One batch. At native resolution it is as long as its longest image, or with keep_padding as the prepared ones."""
    joined = {name: [image[name] for image in images] for name in images[0]}
    if "spatial_shapes" in joined and not keep_padding:
        longest = max(map(tokens, images))
        for name in ("pixel_values", "pixel_attention_mask"):
            joined[name] = [tensor[:, :longest] for tensor in joined[name]]
    return {name: torch.cat(tensors) for name, tensors in joined.items()}


def to_model(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Pixels on the model's device, in its dtype. The shapes stay on the CPU, where they are read without waiting."""
    return {**inputs, "pixel_values": inputs["pixel_values"].to(device, dtype)}


def tokens(inputs: Inputs) -> int:
    """Patches of one image at native resolution."""
    return int(inputs["spatial_shapes"].prod())
