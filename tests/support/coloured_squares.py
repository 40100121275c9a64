"""Training on twelve colours, each with its own token: a tiny model, and batches of it."""

import json
from pathlib import Path
from typing import Any

import torch

from siglip_model import SiglipConfig, SiglipModel
from siglip_model.training.batch import Batch
from siglip_model.training.objective import initialise_logits

COLOURS = torch.rand(12, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1
PAIRS = 6


def tiny_model(seed: int = 0, layers: int = 1, **vision: object) -> SiglipModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 4, "pad_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 1},
        vision_config={**tower, "image_size": 8, "patch_size": 4, **vision},
    )
    torch.manual_seed(seed)
    model = SiglipModel(config)
    initialise_logits(model)
    return model


def coloured_squares(number: int, generator: torch.Generator) -> Batch:
    """Six of twelve colours in two noisy views."""
    chosen = torch.randperm(len(COLOURS), generator=generator)[:PAIRS]
    input_ids = torch.ones(PAIRS, 4, dtype=torch.int64)
    input_ids[:, 0] = chosen + 3
    pixels = COLOURS[chosen].expand(2, PAIRS, 3, 8, 8)
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    return Batch(input_ids, pixels, tuple(f"colour {index}" for index in chosen.tolist()))


def weights(model: SiglipModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def log_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of the log, without what depends on the clock."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key not in ("images_per_second", "mfu")} for entry in entries
    ]
