"""Images as sequences of patches at their own aspect ratio, as SigLIP 2 reads them at native resolution (NaFlex)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch

from siglip_model.batch import BatchFeature
from siglip_model.checkpoints.fields import shown
from siglip_model.images.options import BILINEAR, MOST_PIXELS, ImageOptions
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.processor import ImageProcessor, stack
from siglip_model.images.tensor import SiglipImageProcessor

_SMALLEST_SCALE, _LARGEST_SCALE, _PRECISION = 1e-6, 100.0, 1e-5  # of the search for a size, as in transformers


class Siglip2ImageProcessorKwargs(TypedDict, total=False):
    """The options of SigLIP 2's image processors. All but the first two: see `ImageProcessor`."""

    patch_size: int
    max_num_patches: int
    do_convert_rgb: bool | None
    do_resize: bool | None
    resample: Any
    do_rescale: bool | None
    rescale_factor: float
    do_normalize: bool | None
    image_mean: float | list[float]
    image_std: float | list[float]
    input_data_format: str | None
    data_format: str | None
    disable_grouping: bool | None
    device: Any
    return_tensors: str | None


class _NaFlex(ImageProcessor):
    """What both processors share: sizes, and the form of the result."""

    model_input_names: ClassVar[list[str]] = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]
    valid_kwargs: ClassVar[type] = Siglip2ImageProcessorKwargs
    kinds: ClassVar[tuple[str, ...]] = (
        "Siglip2ImageProcessor",
        "Siglip2ImageProcessorFast",
        "Siglip2ImageProcessorPil",
    )
    fixed: ClassVar[type[ImageProcessor]]
    size: Any = None
    default_to_square: bool | None = None
    resample: Any = BILINEAR
    patch_size: int = 16
    max_num_patches: int = 256

    def _validated(self, settings: dict[str, Any]) -> dict[str, Any]:
        for name in ("patch_size", "max_num_patches"):
            value = settings[name]
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {shown(value)}; supported: a positive int")
        pixels = settings["max_num_patches"] * settings["patch_size"] ** 2
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"max_num_patches is {settings['max_num_patches']} and patch_size {settings['patch_size']}, {pixels:,} "
                f"pixels; supported: at most {MOST_PIXELS:,}"
            )
        return super()._validated(settings)

    def _size_of(self, shape: Sequence[int], options: ImageOptions) -> tuple[int, int]:
        return size_for_patches(int(shape[0]), int(shape[1]), options.patch_size, options.max_num_patches)

    # The steps by themselves are those of the processor of images of one size.

    def pad(self, images: list[Any], pad_size: Any = None) -> list[Any]:
        """See `ImageProcessor.pad`."""
        return self.fixed().pad(images, pad_size)

    def _step(self, image: Any, **options: Any) -> Any:
        return self.fixed()._step(image, **options)

    def _collect(self, images: list[Any], options: ImageOptions, kind: str | None) -> BatchFeature:
        side, most = options.patch_size, options.max_num_patches
        grids = [(image.shape[1] // side, image.shape[2] // side) for image in images]
        for image, (rows, columns) in zip(images, grids, strict=True):
            if (rows * side, columns * side) != tuple(image.shape[1:]) or not 0 < rows * columns <= most:
                raise ValueError(
                    f"images: got {image.shape[1]} x {image.shape[2]} pixels without do_resize; supported: multiples "
                    f"of patch_size {side}, at most max_num_patches {most} patches"
                )
        padded = [_to_patches(image, side, most) for image in images]
        masks = [_mask(image, rows * columns, most) for image, (rows, columns) in zip(images, grids, strict=True)]
        if kind is None:
            return BatchFeature(pixel_values=padded, pixel_attention_mask=masks, spatial_shapes=grids)
        shapes = np.array(grids, dtype=np.int64)
        return BatchFeature(
            pixel_values=stack(padded, kind),
            pixel_attention_mask=stack(masks, kind),
            spatial_shapes=torch.from_numpy(shapes) if kind == "pt" else shapes,
        )


class Siglip2ImageProcessor(_NaFlex, SiglipImageProcessor):
    """Resizes an image to at most `max_num_patches` patches, keeping its aspect ratio nearly, and cuts it into patches.

    Computes with PyTorch: bit for bit transformers' Siglip2ImageProcessor. A call returns pixel_values, float32
    (batch, max_num_patches, patch_size² · channels), row by row and padded with zeros; pixel_attention_mask, int32
    (batch, max_num_patches), 1 for patches; spatial_shapes, int64 (batch, 2), height and width in patches. The last two
    are on the CPU on every device. Without do_resize, sizes must be multiples of patch_size.
    do_convert_rgb is True by default, so that grey and transparent images work (transformers: None).
    """

    fixed = SiglipImageProcessor


Siglip2ImageProcessorFast = Siglip2ImageProcessor  # its name in transformers 4


class Siglip2ImageProcessorPil(_NaFlex, SiglipImageProcessorPil):
    """`Siglip2ImageProcessor` with Pillow and numpy: bit for bit transformers' Siglip2ImageProcessorPil."""

    fixed = SiglipImageProcessorPil


@functools.lru_cache(maxsize=1024)
def size_for_patches(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The size in pixels, in whole patches, of an image of this size scaled to at most so many patches.

    Both sides are scaled by the largest common factor, which a bisection finds up to 10⁻⁵ (as in transformers, so that
    the sizes are the same), and rounded up to patches.
    """

    def patches(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_size)), max(1, math.ceil(width * scale / patch_size))

    low, high = _SMALLEST_SCALE, _LARGEST_SCALE
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        rows, columns = patches(middle)
        if rows * columns <= max_num_patches:
            low = middle
        else:
            high = middle
    rows, columns = patches(low)
    return rows * patch_size, columns * patch_size


def _to_patches(image: Any, side: int, most: int) -> Any:
    """(channels, height, width) to (most, side · side · channels): patches row by row, then zeros."""
    channels, height, width = image.shape
    split = image.reshape(channels, height // side, side, width // side, side)
    if isinstance(image, torch.Tensor):
        patches = split.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        return torch.nn.functional.pad(patches, (0, 0, 0, most - len(patches)))
    patches = split.transpose(1, 3, 2, 4, 0).reshape(-1, side * side * channels)
    return np.pad(patches, ((0, most - len(patches)), (0, 0)))


def _mask(image: Any, count: int, most: int) -> Any:
    mask = (np.arange(most) < count).astype(np.int32)
    return torch.from_numpy(mask) if isinstance(image, torch.Tensor) else mask
