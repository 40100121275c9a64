"""Floating-point operations of a training step, for the model's FLOP/s utilisation (MFU; Chowdhery et al. 2022)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from siglip_model.model import SiglipModel
from siglip_model.training.objective import trains


def flops_per_pair(model: SiglipModel) -> int:
    """Of one image and one text, counted by PyTorch on the meta device: forward, and twice that for backward.

    Without the loss, and without what activation checkpointing and micro-batches repeat, as MFU is defined. A frozen
    tower has no backward. At native resolution an image counts as a square one of the configuration's num_patches.
    """
    with torch.device("meta"):
        twin = type(model)(model.config, backend="eager")
        ids = torch.zeros(1, model.config.text_config.max_position_embeddings, dtype=torch.int64)
    images = {name: tensor[:1] for name, tensor in twin.vision_model.dummy_inputs.items()}
    total = 0
    for tower, inputs, trained in (
        (twin.vision_model, images, model.vision_model),
        (twin.text_model, {"input_ids": ids}, model.text_model),
    ):
        with FlopCounterMode(display=False) as counter:
            tower(**inputs)
        total += counter.get_total_flops() * (3 if trains(trained) else 1)
    return total
