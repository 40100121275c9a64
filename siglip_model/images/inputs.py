"""Inputs of an image processor: images, batches or nested lists, from any source, in any channel layout."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from siglip_model.images.files import UnreadableImageError, load_image
from siglip_model.images.options import ImageOptions
from siglip_model.images.value_range import WHITE_IN_16_BITS, to_8_bits, warn_once

if TYPE_CHECKING:
    from PIL import Image

CHANNEL_COUNTS = (1, 3, 4)
LAYOUTS = ("channels_first", "channels_last")

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def is_image(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, (Image.Image, np.ndarray, torch.Tensor))


def load_images(images: Any) -> Any:
    """Replaces paths, URLs and base64 strings, also in nested lists, by their images: RGB, EXIF orientation applied.

    Raises UnreadableImageError naming the source; TypeError for anything else that is not an image.
    """
    if isinstance(images, (list, tuple)):
        return [load_images(item) for item in images]
    if isinstance(images, (str, os.PathLike)):
        return load_image(images)
    if is_image(images):
        return images
    raise TypeError(
        f"images: got {type(images).__name__}; supported: PIL image, numpy array, torch tensor, path, URL, lists"
    )


def flatten_images(images: Any) -> list[Any]:
    """One image, a 4-D batch, a list of either, or a list of lists of images, as a flat list. Raises ValueError."""
    images = load_images(images)
    if not isinstance(images, list):
        images = [images]
    if any(isinstance(item, list) for item in images):
        if not all(isinstance(item, list) for item in images):
            raise ValueError("images: got a list that mixes images and lists of images; supported: one kind")
        images = [image for item in images for image in item]
        if any(isinstance(image, list) for image in images):
            raise ValueError("images: lists are nested three deep; supported: images, or lists of images")
        if any(_dimensions(image) == 4 for image in images):
            raise ValueError("images: got 4-D batches in a list of lists; supported: images of 3 dimensions there")
    flat: list[Any] = []
    for image in images:
        dimensions = _dimensions(image)
        if dimensions not in (3, 4):
            raise ValueError(
                f"images: got an array of shape {tuple(image.shape)}; supported: (channels, height, width) or "
                "(height, width, channels), or a batch of these"
            )
        flat += [image] if dimensions == 3 else list(image)
    if not flat:
        raise ValueError("images is empty; supported: at least one image")
    for image in flat:
        size = image.size if hasattr(image, "getbands") else image.shape
        if 0 in tuple(size):
            raise ValueError(f"images: got an empty image, of size {tuple(size)}")
    return flat


def _dimensions(image: Any) -> int:
    return 3 if hasattr(image, "getbands") else image.ndim


def channels_last(image: np.ndarray | torch.Tensor, input_data_format: str | None) -> bool:
    """Whether the channels are last: as given, else inferred from a dimension of 1, 3 or 4 (first if both fit).

    Raises ValueError if neither dimension fits.
    """
    if input_data_format is not None:
        return input_data_format == "channels_last"
    if image.shape[0] in CHANNEL_COUNTS:
        return False
    if image.shape[2] in CHANNEL_COUNTS:
        return True
    raise ValueError(
        f"images: got an array of shape {tuple(image.shape)}, whose first and last dimensions are not 1, 3 or 4; "
        "give input_data_format='channels_first' or 'channels_last' if one of them holds channels"
    )


def to_8_bit_image(image: Image.Image, do_convert_rgb: bool) -> Image.Image:
    """The image in a mode of 8 bits per band; itself if there is nothing to change.

    do_convert_rgb: convert to RGB, compositing alpha or a transparent colour over white. EXIF orientation is ignored.
    Raises UnreadableImageError naming the image's file if its pixels cannot be decoded or their value range is unknown,
    ValueError for a mode that Pillow does not convert (La).
    """
    from PIL import Image

    name = getattr(image, "filename", None) or repr(image)
    try:
        image.load()
        image = to_8_bits(image)
    except Exception as error:
        raise UnreadableImageError(f"{name}: {error or type(error).__name__}") from error
    if not do_convert_rgb:
        return image.convert("L") if image.mode == "1" else image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_alpha_range(image: np.ndarray | torch.Tensor) -> None:
    """Raises ValueError for a floating image with alpha whose values leave [0, 1], which compositing requires."""
    low, high = image.min().item(), image.max().item()
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images: a floating image of 4 channels spans [{low}, {high}]; supported: [0, 1]")


def to_levels(image: Any, options: ImageOptions) -> Any:
    """An array as `rescale_factor` 1/255 expects it, in levels from 0 to 255: uint16 is scaled from its value range.

    Arrays of other dtypes are returned unchanged, as in transformers; a warning, once per kind, says if their values
    cannot be levels. Without rescaling, or with another factor, every array is returned unchanged. So are PIL images.
    """
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        return image
    dtype = str(image.dtype).removeprefix("torch.") if isinstance(image, torch.Tensor) else image.dtype.name
    if dtype == "uint8" or not options.do_rescale or not math.isclose(options.rescale_factor, 1 / 255):
        return image
    if dtype == "uint16":
        warn_once("arrays of dtype uint16: values are read as 0 (black) to 65535 (white)")
        if isinstance(image, torch.Tensor):
            return image.to(torch.float32).mul_(255 / WHITE_IN_16_BITS).round_().to(torch.uint8)
        return np.rint(image * np.float32(255 / WHITE_IN_16_BITS)).astype(np.uint8)
    if dtype == "bool":
        warn_once("arrays of dtype bool: true is read as level 1 of 255, as in transformers; give levels in uint8")
    elif _is_real(image):
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 255):
            warn_once(
                f"arrays of dtype {dtype}: values that are not finite or outside [0, 255] are kept, as in transformers"
            )
        elif dtype.startswith(("float", "bfloat")) and 0 < high <= 1:
            warn_once(
                f"arrays of dtype {dtype}: values in [0, 1] are rescaled by 1/255 again, as in transformers; "
                "give do_rescale=False"
            )
    return image


def _is_real(image: np.ndarray | torch.Tensor) -> bool:
    if isinstance(image, torch.Tensor):
        return not image.is_meta and not image.is_complex()
    return image.dtype.kind in "iuf"
