"""Options of an image processor: every accepted form, validated and normalised."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from siglip_model.checkpoints.fields import shown

NEAREST, LANCZOS, BILINEAR, BICUBIC = 0, 1, 2, 3  # Pillow's numbers, as in the files

MOST_PIXELS = 2**24  # of one resized image: 4096 x 4096, 200 MB in float32

_EDGES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


class SiglipImageProcessorKwargs(TypedDict, total=False):
    """The options of an image processor: each is an attribute, and an argument of its constructor and of a call."""

    do_convert_rgb: bool | None
    do_resize: bool | None
    size: Any
    default_to_square: bool | None
    resample: Any
    do_center_crop: bool | None
    crop_size: Any
    do_rescale: bool | None
    rescale_factor: float
    do_normalize: bool | None
    image_mean: float | list[float]
    image_std: float | list[float]
    do_pad: bool | None
    pad_size: Any
    input_data_format: str | None
    data_format: str | None
    disable_grouping: bool | None
    device: Any
    return_tensors: str | None


class Size(dict[str, int]):
    """A size as a dict, whose edges are also attributes (None for those that it does not give)."""

    def __getattr__(self, name: str) -> int | None:
        if name in _EDGES:
            return self.get(name)
        raise AttributeError(f"Size has no {name!r}; it may hold {', '.join(_EDGES)}")


@dataclass(frozen=True)
class ImageOptions:
    """The validated options of one call."""

    do_convert_rgb: bool
    do_resize: bool
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any
    input_data_format: str | None
    disable_grouping: bool
    # Of SigLIP's processors.
    size: dict[str, int] = field(default_factory=dict)
    do_center_crop: bool = False
    crop_size: dict[str, int] | None = None
    do_pad: bool = False
    pad_size: dict[str, int] | None = None
    # Of SigLIP 2's.
    patch_size: int = 0
    max_num_patches: int = 0


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


def to_size(size: Any, default_to_square: bool) -> dict[str, int]:
    """Any accepted form of `size` as a dict. Raises ValueError for other forms."""
    given = size
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        size = {"height": size, "width": size} if default_to_square else {"shortest_edge": size}
    elif isinstance(size, (list, tuple)) and len(size) == 2 and not any(isinstance(item, tuple) for item in size):
        size = {"height": size[0], "width": size[1]}
    elif not isinstance(size, Mapping) and hasattr(size, "__iter__") and hasattr(size, "shortest_edge"):
        size = dict(size)  # transformers' SizeDict
    if (
        not isinstance(size, Mapping)
        or set(size) not in _SIZE_KEYS
        or not all(
            isinstance(edge, (int, np.integer)) and not isinstance(edge, bool) and edge > 0 for edge in size.values()
        )
    ):
        raise ValueError(
            f"size is {shown(given)}; supported: a positive int, (height, width), or a dict of positive ints with "
            "height and width, with shortest_edge (and longest_edge), or with max_height and max_width"
        )
    edges = [int(edge) for name, edge in size.items() if name != "longest_edge"]
    if edges[0] * edges[-1] > MOST_PIXELS:
        raise ValueError(f"size is {shown(given)}; supported: at most {MOST_PIXELS:,} pixels")
    return Size({name: int(edge) for name, edge in size.items()})


def to_exact_size(name: str, size: Any) -> dict[str, int]:
    """Any accepted form of `crop_size` or `pad_size` as height and width. Raises ValueError for other forms."""
    try:
        exact = to_size(size, default_to_square=True)
        if "height" in exact:
            return exact
    except ValueError:
        pass
    raise ValueError(
        f"{name} is {shown(size)}; supported: a positive int, (height, width) or {{'height', 'width'}}, of at most "
        f"{MOST_PIXELS:,} pixels"
    )


def padded_size(shapes: Sequence[Sequence[int]], pad_size: Mapping[str, int] | None) -> tuple[int, int]:
    """(height, width) that images of these shapes (.., height, width) are padded to: `pad_size`, else the largest.

    Raises ValueError if an image is larger, or if padding makes one of more than MOST_PIXELS.
    """
    largest = max(int(shape[-2]) for shape in shapes), max(int(shape[-1]) for shape in shapes)
    height, width = largest if pad_size is None else (pad_size["height"], pad_size["width"])
    if largest[0] > height or largest[1] > width:
        raise ValueError(f"pad_size is {dict(pad_size or {})}; supported: at least the images' {largest}")
    if height * width > MOST_PIXELS and any(tuple(shape[-2:]) != (height, width) for shape in shapes):
        raise ValueError(f"do_pad makes images of {height} x {width} pixels; supported: at most {MOST_PIXELS:,} pixels")
    return height, width


def to_resample(resample: Any) -> int:
    """Pillow's number of a filter given by number or name. Raises ValueError for an unknown filter."""
    from PIL import Image

    try:
        if isinstance(resample, str):
            return int(Image.Resampling[resample.upper()])
        if isinstance(resample, (int, np.integer)) and not isinstance(resample, bool):
            return int(Image.Resampling(int(resample)))
    except (KeyError, ValueError):
        pass
    names = ", ".join(f"{int(filter_)} ({filter_.name.lower()})" for filter_ in Image.Resampling)
    raise ValueError(f"resample is {shown(resample)}; supported: {names}")


def per_channel(name: str, value: Any, channels: int) -> list[float]:
    """`value` as one number per channel. Raises ValueError if their count differs from `channels`."""
    values = [float(value)] * channels if is_number(value) else [float(item) for item in value]
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} numbers; the image has {channels} channels")
    return values


def output_size(shape: Sequence[int], size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) after resizing an image of `shape` (height, width).

    Raises ValueError if either becomes 0, or both together exceed MOST_PIXELS.
    """
    height, width = int(shape[0]), int(shape[1])
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        new = int(height * scale), int(width * scale)
    else:
        new = _shortest_edge(height, width, size["shortest_edge"], size.get("longest_edge"))
    if 0 in new:
        raise ValueError(f"size {dict(size)} makes an image of {height} x {width} pixels {new[0]} x {new[1]}")
    if new[0] * new[1] > MOST_PIXELS:
        raise ValueError(
            f"size {dict(size)} makes an image of {height} x {width} pixels {new[0]} x {new[1]}; supported: at most "
            f"{MOST_PIXELS:,} pixels"
        )
    return new


def _shortest_edge(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """Scales the shorter edge to `shortest`, or less if the longer would exceed `longest`; rounds as transformers."""
    short, long = min(height, width), max(height, width)
    if longest is None:
        new_short, new_long = shortest, int(shortest * long / short)
        return (new_long, new_short) if width <= height else (new_short, new_long)
    unrounded: float | None = None
    if long / short * shortest > longest:
        unrounded = longest * short / long
        shortest = round(unrounded)
    if short == shortest:
        return height, width
    factor = shortest if unrounded is None else unrounded
    if width < height:
        return int(factor * height / width), shortest
    return shortest, int(factor * width / height)
