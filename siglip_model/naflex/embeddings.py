"""Patches to tokens, each with a position embedding that is resized to its image's shape."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

from siglip_model.config import Siglip2VisionConfig
from siglip_model.layers import UsesBackend, apply_linear
from siglip_model.naflex.layout import Layout
from siglip_model.vision_tower import position_table


class NaFlexEmbeddings(UsesBackend, nn.Module):
    """A linear projection of each patch, plus its position embedding."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim, self.patch_size, self.num_patches = config.hidden_size, config.patch_size, config.num_patches
        self.position_embedding_size = math.isqrt(config.num_patches)
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor, layout: Layout) -> Tensor:
        """pixel_values: floating point or uint8 (B, P, C · p · p). Returns the layout's (B, P or 1, T, width)."""
        weight = self.patch_embedding.weight
        position = resized_positions(position_table(self.position_embedding), layout.shapes, layout.numbers)
        patches = layout.drop_padding(pixel_values.to(weight.dtype))
        return apply_linear(self.ops, self.patch_embedding, patches, position.expand(*patches.shape[:2], -1))


def resized_positions(table: Tensor, shapes: Tensor, numbers: Tensor) -> Tensor:
    """The position embedding of each token, from a grid that is resized to its image (bilinear, antialiased).

    table: (G · G, width), a square grid. shapes: (..., 2), height and width of the token's image in patches. numbers:
    (...), the token's number in its image, row by row; padding has the position of the first.

    What torch.nn.functional.interpolate computes per image, but as one product for all tokens of all images: a row of
    the resized grid is a weighted mean of the table's rows, with weights that depend on the token alone. So the shapes
    stay on the device, and the gradient of the table is a matrix product, which is deterministic. (Of a grid one column
    wide, interpolate gives all rows the value of the first on a CPU, up to torch 2.13 at least. That is not followed.)
    """
    height, width = shapes.clamp_min(1).unbind(-1)
    numbers = torch.where(numbers < height * width, numbers, 0)
    side = math.isqrt(len(table))
    dtype = torch.promote_types(table.dtype, torch.float32)
    rows = _weights(numbers // width, height, side, dtype)  # [..., G]
    columns = _weights(numbers % width, width, side, dtype)
    kind = table.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        resized = (rows[..., :, None] * columns[..., None, :]).flatten(-2) @ table.to(dtype)
    return resized.to(table.dtype)


def _weights(target: Tensor, size: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """The weights (..., side) of a line's values in element `target` (...) of the line resized to `size` (...).

    A triangle around the element's centre, as wide as an element of the longer line.
    """
    scale = (side / size.to(dtype))[..., None]
    centre = (target[..., None] + 0.5) * scale
    distance = torch.arange(side, dtype=dtype, device=target.device) + 0.5 - centre
    weights = (1 - (distance / scale.clamp_min(1)).abs()).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
