"""Images of every mode and arrays of every dtype and layout, and comparison with transformers' Pillow processor."""

import itertools
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as TransformersPil

from siglip_model.images.pillow import SiglipImageProcessorPil

SIZE = {"height": 24, "width": 20}
NEW_ENOUGH = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str, size: tuple[int, int] = (31, 17)) -> Image.Image:
    """An image of any mode, with alpha if it has it; for "P+" and the like, transparency is in `info`."""
    width, height = size
    colour = Image.fromarray(noise(height, width, 4), "RGBA")
    if mode in WIDE_MODES:
        values = np.random.default_rng(1).integers(0, 65536, (height, width))
        if mode == "F":
            return Image.fromarray((values / 65535).astype(np.float32))
        stored = {"I": "=i4", "I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
        return Image.frombytes(mode, size, values.astype(stored).tobytes())
    if mode in ("P", "PA", "P+index", "P+bytes"):
        palette = colour.convert("RGB").convert("P")
        if mode == "P+index":
            palette.info["transparency"] = palette.getpixel((0, 0))
        if mode == "P+bytes":
            palette.info["transparency"] = bytes(noise(256))
        return palette.convert("PA") if mode == "PA" else palette
    if mode in ("RGB+", "L+"):
        opaque = colour.convert(mode[:-1])
        opaque.info["transparency"] = opaque.getpixel((0, 0))
        return opaque
    if mode in ("RGBA", "LA", "RGBa"):
        return colour.convert(mode)
    return colour.convert("RGB").convert(mode)


MODES = ["1", "L", "L+", "LA", "P", "P+index", "P+bytes", "PA", "RGB", "RGB+", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
         "HSV", "LAB"]  # fmt: skip
WIDE_MODES = ["I;16", "I;16B", "I;16L", "I;16N", "I", "F"]  # of other value ranges, where transformers clips


def assert_equal(images: Any, make: Any = None, **options: Any) -> None:
    """Asserts that type, dtype, shape and bits equal transformers'."""
    if not NEW_ENOUGH:
        pytest.skip("transformers before 5.23 treats alpha and single channels differently")
    make = make or {"size": SIZE}
    processor, reference = SiglipImageProcessorPil(**make), TransformersPil(**make)
    got, expected = (one(images, **options)["pixel_values"] for one in (processor, reference))
    assert type(got) is type(expected) and len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def arrays() -> list[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    cases = []
    for channels, first in itertools.product((1, 3, 4), (True, False)):
        shape = (channels, 13, 9) if first else (13, 9, channels)
        place = f"{channels} {'first' if first else 'last'}"
        cases += [
            (f"uint8 {place}", generator.integers(0, 256, shape, dtype=np.uint8)),
            (f"float32 {place}", generator.random(shape).astype(np.float32)),
            (f"float64 {place}", generator.random(shape)),
            (f"float16 {place}", generator.random(shape).astype(np.float16)),
            (f"int64 {place}", generator.integers(0, 256, shape)),
            (f"bool {place}", generator.random(shape) < 0.5),
        ]
        if channels < 4:
            cases.append((f"whole floats {place}", generator.integers(0, 256, shape).astype(np.float32)))
    return cases


ARRAYS = arrays()
