"""Images to pixel values with Pillow and numpy: RGB, resized, scaled to [0, 1], normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from siglip_model.images.inputs import channels_last, check_alpha_range, to_8_bit_image
from siglip_model.images.options import ImageOptions, padded_size, per_channel
from siglip_model.images.processor import ImageProcessor

if TYPE_CHECKING:
    from PIL import Image


class SiglipImageProcessorPil(ImageProcessor):
    """Resizes with Pillow and scales with numpy: bit for bit transformers' SiglipImageProcessorPil, from 8-bit images.

    Resizing converts arrays to 8-bit Pillow images: floating arrays are quantised to 256 levels of [0, 1] (or must hold
    whole numbers from 0 to 255); others raise ValueError.
    """

    backend: ClassVar[str] = "pil"

    def _process(self, images: list[Any], options: ImageOptions, device: Any) -> list[np.ndarray]:
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"device is {device!r}: {type(self).__name__} works on the CPU; use {self.kinds[0]}")
        processed = [self._process_one(image, options) for image in images]
        if not options.do_pad:
            return processed
        height, width = padded_size([image.shape for image in processed], options.pad_size)
        return [
            np.pad(image, ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2]))) for image in processed
        ]

    def _process_one(self, image: Any, options: ImageOptions) -> np.ndarray:
        if isinstance(image, (np.ndarray, torch.Tensor)):
            array = _to_channels_first(image, options)
            size = self._size_of(array.shape[1:], options) if options.do_resize else None
            array = array if size is None else _resize_array(array, size, options.resample)
        else:
            image = to_8_bit_image(image, options.do_convert_rgb)
            size = self._size_of(image.size[::-1], options) if options.do_resize else None
            array = _to_array(image, size, options.resample)
        if options.crop_size is not None and options.do_center_crop:
            array = _center_crop(array, options.crop_size)
        return _scale_by_table(array, options) if array.dtype == np.uint8 else _scale(array, options)


def _to_channels_first(image: np.ndarray | torch.Tensor, options: ImageOptions) -> np.ndarray:
    """(channels, height, width); with `do_convert_rgb`, one or four channels become three."""
    if isinstance(image, torch.Tensor):
        image = image.to(torch.float32) if image.dtype == torch.bfloat16 else image
        image = image.numpy(force=True)
    if channels_last(image, options.input_data_format):
        image = np.moveaxis(image, -1, 0)
    if not options.do_convert_rgb or image.shape[0] not in (1, 4):
        return image
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    if np.issubdtype(image.dtype, np.floating):
        check_alpha_range(image)
    white = 255 if np.issubdtype(image.dtype, np.integer) else 1.0
    alpha = image[3:4] / white
    composite = alpha * image[:3] + (1 - alpha) * white
    return (np.round(composite) if white == 255 else composite).astype(image.dtype)


def _to_array(image: Image.Image, size: tuple[int, int] | None, resample: int) -> np.ndarray:
    """An 8-bit image as (channels, height, width), resized to `size` (height, width) unless it is None."""
    if size is not None and image.mode in ("L", "RGB"):
        # The same numbers as through an array, without copies of a whole image that may be large.
        image, size = image.resize(size[::-1], resample=resample), None
    array = np.array(image)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array if size is None else _resize_array(array, size, resample)


def _resize_array(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """(channels, height, width) to `size` (height, width), through an 8-bit Pillow image."""
    from PIL import Image

    image = np.moveaxis(image, 0, -1)
    if image.shape[-1] > 4:
        raise ValueError(f"images: got {image.shape[-1]} channels to resize with Pillow; supported: 1 to 4")
    image = image[..., 0] if image.shape[-1] == 1 else image
    to_unit_range = _needs_scaling(image)
    if to_unit_range:
        image = (image.astype(np.float64) * 255).astype(np.float32)
    resized = np.array(Image.fromarray(image.astype(np.uint8)).resize(size[::-1], resample=resample))
    resized = resized[None] if resized.ndim == 2 else np.moveaxis(resized, -1, 0)
    return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if to_unit_range else resized


def _center_crop(image: np.ndarray, crop: Mapping[str, int]) -> np.ndarray:
    """The centre of (channels, height, width); a smaller image is padded, one zero more before it than behind."""
    height, width = crop["height"], crop["width"]
    missing = max(0, height - image.shape[1]), max(0, width - image.shape[2])
    before = -(-missing[0] // 2), -(-missing[1] // 2)
    image = np.pad(image, ((0, 0), (before[0], missing[0] - before[0]), (before[1], missing[1] - before[1])))
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def _scale(array: np.ndarray, options: ImageOptions) -> np.ndarray:
    """Rescales in float64 and casts to float32, then normalises in the dtype of the array."""
    if options.do_rescale:
        array = (array.astype(np.float64) * options.rescale_factor).astype(np.float32)
    if options.do_normalize:
        if not np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float32)
        mean, std = (
            np.array(per_channel(name, getattr(options, name), len(array)), dtype=array.dtype)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        array = (array - mean) / std
    return array


def _scale_by_table(array: np.ndarray, options: ImageOptions) -> np.ndarray:
    """`_scale` by table lookup: an 8-bit channel has only 256 values."""
    channels = len(array)
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256))
    tables = _scale(levels, options)[:, 0]
    return np.stack([table[channel] for table, channel in zip(tables, array, strict=True)])


def _needs_scaling(image: np.ndarray) -> bool:
    """Whether values lie in [0, 1] rather than in 0 to 255. Raises ValueError if neither."""
    if image.dtype == np.uint8:
        return False
    whole = np.isfinite(image).all() and np.allclose(image, image.astype(int))
    high = 255 if whole else 1
    if not (np.all(image >= 0) and np.all(image <= high)):
        raise ValueError(
            f"images: got {image.dtype} values of [{image.min()}, {image.max()}], which Pillow cannot resize; "
            "supported: whole numbers from 0 to 255, and any numbers from 0 to 1 (or use SiglipImageProcessor)"
        )
    return not whole
