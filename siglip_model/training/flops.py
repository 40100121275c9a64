"""Floating-point operations of a training step, for the model's FLOP/s utilisation (MFU; Chowdhery et al. 2022)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from siglip_model.model import SiglipModel


def flops_per_pair(model: SiglipModel) -> int:
    """Of one image and one text, counted by PyTorch on the meta device: forward, and twice that for backward.

    Without the loss, and without what activation checkpointing repeats, as MFU is defined. A frozen tower has no
    backward.
    """
    vision, text = model.config.vision_config, model.config.text_config
    with torch.device("meta"):
        twin = SiglipModel(model.config, backend="eager")
        pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
        ids = torch.zeros(1, text.max_position_embeddings, dtype=torch.int64)
    total = 0
    for tower, inputs, trained in (
        (twin.vision_model, pixels, model.vision_model),
        (twin.text_model, ids, model.text_model),
    ):
        with FlopCounterMode(display=False) as counter:
            tower(inputs)
        total += counter.get_total_flops() * (3 if any(p.requires_grad for p in trained.parameters()) else 1)
    return total
