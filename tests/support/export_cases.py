"""The public models with inputs of two batch sizes: one to export with, and another to compare the result on."""

from typing import Any

import torch
from oracle import TINY_TEXT, TINY_VISION, randomised
from torch import Tensor, nn

import siglip_model

ONE_LAYER = {"num_hidden_layers": 1}
EXPORTED, COMPARED = 2, 3  # batch sizes

CALLS = {
    "SiglipModel": ("input_ids", "pixel_values", "attention_mask"),
    "SiglipTextModel": ("input_ids",),
    "SiglipVisionModel": ("pixel_values",),
    "SiglipForImageClassification": ("pixel_values",),
}


def model(kind: str, backend: str) -> Any:
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER}, num_labels=5
    )
    own = {"SiglipTextModel": config.text_config, "SiglipVisionModel": config.vision_config}.get(kind, config)
    return randomised(getattr(siglip_model, kind)(own, backend=backend)).requires_grad_(False)


def inputs(kind: str, batch: int, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1, tokens // 2 :] = 0
    everything = {
        "input_ids": torch.randint(0, 99, (batch, tokens), generator=generator),
        "pixel_values": torch.randn(batch, 3, 48, 48, generator=generator),
        "attention_mask": mask,
    }
    return {name: everything[name] for name in CALLS[kind]}


class Method(nn.Module):
    """A module whose forward is a method of the model, with fixed further arguments."""

    def __init__(self, model: nn.Module, name: str, **arguments: Any):
        super().__init__()
        self.model = model
        self.name = name
        self.arguments = arguments

    def forward(self, *tensors: Tensor) -> Any:
        return getattr(self.model, self.name)(*tensors, **self.arguments)
