"""Random augmentation of a batch of drawings: geometry, background and colour."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """pictures: uint8 (n, 4, h, w), RGBA. Returns float32 (n, 3, size, size) in [-1, 1], like the image processor.

    No mirroring, because left and right arrows have different names.
    """

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    count = len(pictures)
    rgba = pictures.float() / 255
    rgba[:, :3] *= rgba[:, 3:]  # premultiplied, so that resampling does not bleed invisible colours

    # Affine map of output to input coordinates, both in [-1, 1]: rotation, size, aspect, shear, shift.
    angle = torch.randn(count, generator=generator).clamp(-2, 2) * math.radians(8)
    size_x = torch.exp(uniform(count, low=-0.15, high=0.25))
    size_y = size_x * torch.exp(uniform(count, low=-0.12, high=0.12))
    shear = uniform(count, low=-0.12, high=0.12)
    shift = uniform(count, 2, low=-0.10, high=0.10)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cos * size_x, (shear * cos - sin) * size_y, shift[:, 0]], -1),
            torch.stack([sin * size_x, (shear * sin + cos) * size_y, shift[:, 1]], -1),
        ],
        -2,
    )
    grid = F.affine_grid(affine, [count, 4, size, size], align_corners=False)
    # A smooth warp: designs draw the same thing in different proportions.
    warp = torch.randn(count, 2, 4, 4, generator=generator) * uniform(count, 1, 1, 1, low=0.0, high=0.06)
    grid = grid + F.interpolate(warp, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    rgba = F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)
    colour, alpha = rgba[:, :3], rgba[:, 3:]

    # A matrix near the identity rotates and mixes hues; some images lose most of their colour.
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    saturation = uniform(count, 1, 1, low=0.6, high=1.4)
    saturation = torch.where(uniform(count, 1, 1, low=0, high=1) < 0.05, torch.zeros(()), saturation)
    mixing = torch.eye(3) * saturation + grey * (1 - saturation)
    mixing = mixing + torch.randn(count, 3, 3, generator=generator) * 0.06
    colour = torch.einsum("nij,njhw->nihw", mixing, colour)
    brightness = uniform(count, 1, 1, 1, low=0.75, high=1.2)
    lift = uniform(count, 1, 1, 1, low=-0.1, high=0.15)
    colour = (colour * brightness + lift * alpha).clamp(min=0).minimum(alpha)

    white = torch.ones(count, 3, 1, 1)
    background = torch.where(
        uniform(count, 1, 1, 1, low=0, high=1) < 0.6, white, uniform(count, 3, 1, 1, low=0, high=1)
    )
    image = colour + background * (1 - alpha)
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    strength = uniform(count, 1, 1, 1, low=-1.0, high=0.8).clamp(min=0)
    image = image.lerp(blurred, strength)
    return image.clamp(0, 1) * 2 - 1
