"""Floating-point operations of a training step, for the model's FLOP/s utilisation (MFU; Chowdhery et al. 2022)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from siglip_model.model import SiglipModel
from siglip_model.outputs import pooled
from siglip_model.training.lora import add_same_adapters


def flops_per_pair(model: SiglipModel) -> int:
    """Of one image and one text, counted by PyTorch on the meta device: forward, and the gradients that training needs.

    These are of the trained weights, and of the activations between them and the loss: a frozen tower has none, and
    beside adapters (LoRA) the weights themselves have none. Without the loss, and without what activation checkpointing
    and micro-batches repeat, as MFU is defined. At native resolution an image counts as a square one of the
    configuration's num_patches.
    """
    with torch.device("meta"):
        twin = type(model)(model.config, backend="eager")
        add_same_adapters(twin, model)
        ids = torch.zeros(1, model.config.text_config.max_position_embeddings, dtype=torch.int64)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    images = {name: tensor[:1] for name, tensor in twin.vision_model.dummy_inputs.items()}
    with FlopCounterMode(display=False) as counter:
        for embeds in (pooled(twin.vision_model(**images)), pooled(twin.text_model(input_ids=ids))):
            if embeds.requires_grad:
                embeds.sum().backward()
    return counter.get_total_flops()
