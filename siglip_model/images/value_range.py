"""Images of 16 bits, of 32-bit integers and of floating-point numbers as 8-bit images. Imports no PyTorch."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

WHITE_IN_16_BITS = 65535
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value


@functools.cache
def warn_once(message: str) -> None:
    """Warns at the first call with this message; later calls are silent."""
    warnings.warn(message, stacklevel=3)


def to_8_bits(image: Image.Image, opened: Image.Image | None = None) -> Image.Image:
    """An image of mode I;16, I or F as mode L, scaled from its value range; any other image unchanged.

    Black is 0. White is, by mode:
    I;16 (also I;16B, I;16L, I;16N): 65535; 4095 in a TIFF file of 12 bits.
    I: 65535 in a PNG or PPM file, or if a value exceeds 255; else 255.
    F: 1 if no value exceeds it, else 255.
    A TIFF file in which 0 is white is inverted; a PNG file's transparent value becomes white.

    opened: the image as read from its file, of which `image` may be a copy; by default `image`.
    Warns once per mode and white. Raises ValueError naming mode and values if one is negative, not finite or above the
    largest white. (Pillow, and with it transformers, clips all of these modes at 255.)
    """
    if image.mode not in WIDE_MODES:
        return image
    from PIL import Image

    opened = image if opened is None else opened
    tags = getattr(opened, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    else:
        white = _white(image.mode, values, opened.format)
    warn_once(f"images of mode {image.mode}: values are read as 0 (black) to {white} (white)")
    if white == 255:
        levels = np.array(image.convert("L"))  # Pillow's rounding, as transformers'
    else:
        levels = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        levels = 255 - levels
    if image.info.get("transparency") is not None:
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)


def _white(mode: str, values: np.ndarray, file_format: str | None) -> int:
    """The value that stands for white in mode I or F. Raises ValueError if it is unknown."""
    low, high = values.min(), values.max()
    largest, supported = (255, "[0, 1] or [0, 255]") if mode == "F" else (WHITE_IN_16_BITS, "[0, 255] or [0, 65535]")
    if not (low >= 0 and high <= largest):
        raise ValueError(f"mode {mode} with values of [{low}, {high}]; supported: {supported} (scale them first)")
    if mode == "F":
        return 1 if high <= 1 else 255
    # Pillow widens 16-bit PGM files to mode I, and before 10.3 16-bit PNG files.
    return WHITE_IN_16_BITS if high > 255 or file_format in ("PNG", "PPM") else 255
