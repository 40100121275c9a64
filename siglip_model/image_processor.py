"""Images to pixel values: RGB, resized to one size, scaled to [0, 1], normalised.

`SiglipImageProcessor` works with Pillow and numpy and equals transformers' SiglipImageProcessorPil bit for bit.
`SiglipImageProcessorFast` works with torch, on the device of its input or on one asked for.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from siglip_model.batch import BatchFeature, check_tensor_kind
from siglip_model.component_files import find_json, split_hub_arguments, to_json, write_file
from siglip_model.errors import CheckpointError
from siglip_model.image_inputs import (
    LAYOUTS,
    channels_last,
    check_alpha_range,
    flatten_images,
    pil_to_array,
)

__all__ = ["SiglipImageProcessor", "SiglipImageProcessorFast", "load_image_processor"]

NEAREST, LANCZOS, BILINEAR, BICUBIC = 0, 1, 2, 3  # Pillow's numbers, which the files hold

_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


@dataclass(frozen=True)
class _Options:
    """What one call does, its arguments checked."""

    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any
    input_data_format: str | None


class ImageProcessor:
    """What both image processors share: options, files, and the calling convention of transformers.

    do_convert_rgb, do_resize, do_rescale, do_normalize: which steps are taken.
    size: {"height", "width"}; or {"shortest_edge"}, which an int means unless `default_to_square`; with {"longest_edge"}
        as its limit; or {"max_height", "max_width"}; or (height, width).
    resample: Pillow's number or name of a filter; 3 is bicubic.
    rescale_factor, image_mean, image_std: numbers, or for the last two one number for each channel.

    Each is an attribute, and an argument of a call that wins over it.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    file_name: ClassVar[str] = "preprocessor_config.json"
    defaults: ClassVar[dict[str, Any]] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "default_to_square": False,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    # What else a call may say.
    call_arguments: ClassVar[tuple[str, ...]] = ("input_data_format", "data_format", "device", "return_tensors")

    def __init__(self, **options: Any) -> None:
        unknown = [name for name in options if name not in self.defaults]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown argument {', '.join(unknown)}; known: {', '.join(self.defaults)}"
            )
        settings = {
            name: default if options.get(name) is None else options[name] for name, default in self.defaults.items()
        }
        settings["size"] = _to_size(settings["size"], settings["default_to_square"])
        for name, value in settings.items():
            setattr(self, name, list(value) if name in ("image_mean", "image_std") and not _is_number(value) else value)
        self._resolve({})  # bad values are found now

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.defaults)})"

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        """`pixel_values` of an image, a batch (4-D or a list) or a list of lists of images, which is flattened.

        images: PIL (any mode), numpy or torch with the channels first or last (1, 3 or 4 of them; first if both fit), path,
            URL or base64 string. EXIF orientation is applied to what is loaded here, and left alone in a PIL image.
        return_tensors: "pt" or "np" for one float32 tensor or array (batch, channels, height, width); None for a list.
        input_data_format: "channels_first" or "channels_last", where it is not to be inferred.
        device: where to work and to return ("cuda", torch.device ...): SiglipImageProcessorFast only.
        All constructor options, for this call alone.

        Raises UnreadableImageError (an OSError) naming a file that is no image; TypeError for an unknown argument or what
        is no image; ValueError for other bad values, and for sizes that make no tensor.
        """
        kind = check_tensor_kind(options.pop("return_tensors", None))
        device = options.pop("device", None)
        if options.pop("data_format", None) not in (None, "channels_first"):
            raise ValueError("data_format: supported: 'channels_first', which the model takes")
        resolved = self._resolve(options)
        pixel_values = self._process(flatten_images(images), resolved, device)
        return BatchFeature(pixel_values=pixel_values if kind is None else _stack(pixel_values, kind))

    def _process(self, images: list[Any], options: _Options, device: Any) -> list[Any]:
        raise NotImplementedError

    def _resolve(self, overrides: Mapping[str, Any]) -> _Options:
        settings: dict[str, Any] = {name: getattr(self, name) for name in self.defaults}
        for name, value in overrides.items():
            if name not in settings and name != "input_data_format":
                known = ", ".join((*self.defaults, *self.call_arguments))
                raise TypeError(f"{type(self).__name__}: unknown argument {name}; known: {known}")
            settings[name] = value
        for name in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            if settings[name] is not None and not isinstance(settings[name], (bool, np.bool_)):
                raise ValueError(f"{name} is {settings[name]!r}; supported: True, False")
            settings[name] = bool(settings[name])
        default_to_square = settings.pop("default_to_square")
        if settings["do_resize"]:
            settings["size"] = _to_size(settings["size"], default_to_square)
            settings["resample"] = _to_resample(settings["resample"])
        if settings["do_rescale"] and not _is_number(settings["rescale_factor"]):
            raise ValueError(f"rescale_factor is {settings['rescale_factor']!r}; supported: a number")
        if settings["do_normalize"]:
            for name in ("image_mean", "image_std"):
                value = settings[name]
                if isinstance(value, np.ndarray):
                    value = settings[name] = value.tolist()
                if not _is_number(value) and not (isinstance(value, (list, tuple)) and all(map(_is_number, value))):
                    raise ValueError(f"{name} is {value!r}; supported: a number, or one for each channel")
            std = settings["image_std"]
            if 0 in ([std] if _is_number(std) else std):
                raise ValueError(f"image_std is {std!r}; supported: numbers other than 0")
        layout = settings.setdefault("input_data_format", None)
        settings["input_data_format"] = next((name for name in LAYOUTS if layout == name), None)
        if layout is not None and settings["input_data_format"] is None:
            raise ValueError(f"input_data_format is {layout!r}; supported: {', '.join(map(repr, LAYOUTS))}, None")
        return _Options(**settings)

    # ---- files

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **arguments: Any) -> Any:
        """The image processor of a directory or a hub repository: processor_config.json, else preprocessor_config.json.

        Arguments: the constructor's options, which win over the file, and revision, cache_dir, local_files_only, token.
        Raises CheckpointError for a missing, damaged or foreign file, naming it; OSError as `resolve_file`.
        """
        hub, given = split_hub_arguments(arguments)
        return cls._from_settings(_read_settings(path_or_id, hub), given)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        return cls(**{**{name: value for name, value in settings.items() if name in cls.defaults}, **given})

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        settings = {name: getattr(self, name) for name in self.defaults}
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        if not self.default_to_square:
            del settings["default_to_square"]
        settings["resample"] = int(_to_resample(self.resample))
        return {**settings, "data_format": "channels_first", "image_processor_type": type(self).__name__}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write preprocessor_config.json, atomically. Returns its path in a list."""
        return [write_file(save_directory, self.file_name, to_json(self.to_dict()))]


class SiglipImageProcessor(ImageProcessor):
    """Pillow resizes, numpy scales: bit for bit what transformers' SiglipImageProcessorPil computes.

    Arrays pass through 8-bit Pillow images when they are resized: floating ones are quantised to 256 levels of [0, 1] (or
    must hold whole numbers of 0 to 255), others raise ValueError.
    """

    def _process(self, images: list[Any], options: _Options, device: Any) -> list[np.ndarray]:
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(
                f"device is {device!r}: SiglipImageProcessor works on the CPU; use SiglipImageProcessorFast"
            )
        return [self._process_one(image, options) for image in images]

    def _process_one(self, image: Any, options: _Options) -> np.ndarray:
        array = _to_channels_first(image, options)
        if options.do_resize:
            height, width = _output_size(array.shape[1:], options.size)
            array = _resize_with_pillow(array, (width, height), options.resample)
        if options.do_rescale:
            array = (array.astype(np.float64) * options.rescale_factor).astype(np.float32)
        if options.do_normalize:
            if not np.issubdtype(array.dtype, np.floating):
                array = array.astype(np.float32)
            mean, std = (
                np.array(_per_channel(name, getattr(options, name), len(array)), dtype=array.dtype)[:, None, None]
                for name in ("image_mean", "image_std")
            )
            array = (array - mean) / std
        return array


class SiglipImageProcessorFast(ImageProcessor):
    """Torch resizes (antialiased) and scales: in batches of equal size, on the device of its input or the one asked for.

    As transformers' torchvision one: 8-bit images are rounded after resizing, floating ones keep their values unclamped.
    From `SiglipImageProcessor` 8-bit images differ by at most TOLERANCE_LEVELS of 255 grey levels (Pillow computes its
    bicubic weights in fixed point), floating ones by the quantisation to 8 bits that Pillow needs.
    """

    TOLERANCE_LEVELS: ClassVar[int] = 2
    _MODES: ClassVar[dict[int, str]] = {NEAREST: "nearest-exact", BILINEAR: "bilinear", BICUBIC: "bicubic"}

    def _process(self, images: list[Any], options: _Options, device: Any) -> list[torch.Tensor]:
        if options.do_resize and options.resample not in self._MODES:
            raise ValueError(
                f"resample is {options.resample}: SiglipImageProcessorFast supports {NEAREST} (nearest), {BILINEAR} "
                f"(bilinear) and {BICUBIC} (bicubic); use SiglipImageProcessor for the others"
            )
        tensors = [self._to_tensor(image, options, device) for image in images]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
        results = list(tensors)
        for indices in groups.values():
            batch = self._transform(torch.stack([tensors[index] for index in indices]), options)
            for index, result in zip(indices, batch, strict=True):
                results[index] = result
        return results

    def _to_tensor(self, image: Any, options: _Options, device: Any) -> torch.Tensor:
        """(channels, height, width), on the device."""
        if not isinstance(image, torch.Tensor):
            if not isinstance(image, np.ndarray):
                array = pil_to_array(image, options.do_convert_rgb)
                array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
                return _from_numpy(array).to(device)
            image = _from_numpy(image)
        image = image.detach()
        if channels_last(image, options.input_data_format):
            image = image.permute(2, 0, 1)
        if device is not None:
            image = image.to(device)
        if options.do_convert_rgb and image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        elif options.do_convert_rgb and image.shape[0] == 4:
            image = _over_white(image)
        return image.contiguous()

    def _transform(self, batch: torch.Tensor, options: _Options) -> torch.Tensor:
        if options.do_resize:
            size = _output_size(batch.shape[2:], options.size)
            batch = _resize_with_torch(batch, size, self._MODES[options.resample])
        if options.do_normalize:
            channels = batch.shape[1]
            mean, std = (
                torch.tensor(_per_channel(name, getattr(options, name), channels), device=batch.device)
                for name in ("image_mean", "image_std")
            )
            if options.do_rescale:  # one pass over the pixels instead of two
                mean, std = mean * (1.0 / options.rescale_factor), std * (1.0 / options.rescale_factor)
            return batch.to(torch.float32).sub(mean[:, None, None]).div_(std[:, None, None])
        return batch * options.rescale_factor if options.do_rescale else batch


def load_image_processor(
    path_or_id: str | os.PathLike[str], *, use_fast: bool | None = None, **arguments: Any
) -> ImageProcessor:
    """The image processor that a directory or hub repository names; `use_fast` decides over the file.

    Otherwise as `from_pretrained`.
    """
    hub, given = split_hub_arguments(arguments)
    settings = _read_settings(path_or_id, hub)
    if use_fast is None:
        use_fast = settings.get("image_processor_type") == SiglipImageProcessorFast.__name__
    cls = SiglipImageProcessorFast if use_fast else SiglipImageProcessor
    return cls._from_settings(settings, given)


# ---- files


def _read_settings(path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """The image processor's settings: nested in processor_config.json (transformers 5), or in a file of their own."""
    name = "processor_config.json"
    settings = (find_json(path_or_id, name, hub) or {}).get("image_processor")
    if settings is None:
        name = ImageProcessor.file_name
        settings = find_json(path_or_id, name, hub)
    if settings is None:
        raise CheckpointError(f"{path_or_id} has neither {name} nor a processor_config.json with an image processor")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{name} of {path_or_id}: image_processor is {settings!r}; supported: an object")
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "SiglipImageProcessor"
    if kind not in ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"):
        raise CheckpointError(
            f"{name} of {path_or_id}: image_processor_type is {kind!r}; supported: SiglipImageProcessor, "
            "SiglipImageProcessorFast"
        )
    for step in ("do_center_crop", "do_pad"):
        if settings.get(step):
            raise CheckpointError(f"{name} of {path_or_id}: {step} is {settings[step]!r}; supported: false")
    return settings


# ---- options


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _to_size(size: Any, default_to_square: bool) -> dict[str, int]:
    """The forms of `size` as a dict. Raises ValueError for any other."""
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
            f"size is {given!r}; supported: a positive int, (height, width), or a dict of positive ints with height and "
            "width, with shortest_edge (and longest_edge), or with max_height and max_width"
        )
    return {name: int(edge) for name, edge in size.items()}


def _to_resample(resample: Any) -> int:
    from PIL import Image

    try:
        if isinstance(resample, str):
            return int(Image.Resampling[resample.upper()])
        if isinstance(resample, (int, np.integer)) and not isinstance(resample, bool):
            return int(Image.Resampling(resample))
    except (KeyError, ValueError):
        pass
    names = ", ".join(f"{int(filter_)} ({filter_.name.lower()})" for filter_ in Image.Resampling)
    raise ValueError(f"resample is {resample!r}; supported: {names}")


def _per_channel(name: str, value: Any, channels: int) -> list[float]:
    values = [float(value)] * channels if _is_number(value) else [float(item) for item in value]
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} numbers; the image has {channels} channels")
    return values


def _output_size(shape: Sequence[int], size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) after resizing an image of (height, width)."""
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
    return new


def _shortest_edge(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """The shorter edge becomes `shortest`, or less where the longer one would pass `longest`; rounded as transformers."""
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


# ---- arrays


def _stack(images: list[Any], kind: str) -> torch.Tensor | np.ndarray:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"pixel_values: images of shapes {shapes} make no tensor; give do_resize=True, or return_tensors=None"
        )
    if isinstance(images[0], torch.Tensor):
        stacked = torch.stack(images)
        return stacked if kind == "pt" else stacked.numpy(force=True)
    array = np.array(images)
    return torch.from_numpy(array) if kind == "pt" else array


def _to_channels_first(image: Any, options: _Options) -> np.ndarray:
    """(channels, height, width): three channels if `do_convert_rgb`, unless the image has a number that says nothing."""
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        array = pil_to_array(image, options.do_convert_rgb)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    if isinstance(image, torch.Tensor):
        image = image.to(torch.float32) if image.dtype == torch.bfloat16 else image
        image = image.numpy(force=True)
    if channels_last(image, options.input_data_format):
        image = np.moveaxis(image, -1, 0)
    if not options.do_convert_rgb or image.shape[0] not in (1, 4):
        return image
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    check_alpha_range(image, np.issubdtype(image.dtype, np.floating))
    white = 255 if np.issubdtype(image.dtype, np.integer) else 1.0
    alpha = image[3:4] / white
    composite = alpha * image[:3] + (1 - alpha) * white
    return (np.round(composite) if white == 255 else composite).astype(image.dtype)


def _resize_with_pillow(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """(channels, height, width) to `size` (width, height), through an 8-bit Pillow image."""
    from PIL import Image

    image = np.moveaxis(image, 0, -1)
    image = image[..., 0] if image.shape[-1] == 1 else image
    to_unit_range = _needs_scaling(image)
    if to_unit_range:
        image = (image.astype(np.float64) * 255).astype(np.float32)
    resized = np.array(Image.fromarray(image.astype(np.uint8)).resize(size, resample=resample))
    resized = resized[None] if resized.ndim == 2 else np.moveaxis(resized, -1, 0)
    return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if to_unit_range else resized


def _needs_scaling(image: np.ndarray) -> bool:
    """Whether values are of [0, 1] rather than of 0 to 255. Raises ValueError if neither."""
    if image.dtype == np.uint8:
        return False
    whole = np.isfinite(image).all() and np.allclose(image, image.astype(int))
    high = 255 if whole else 1
    if not (np.all(image >= 0) and np.all(image <= high)):
        raise ValueError(
            f"images: got {image.dtype} values of [{image.min()}, {image.max()}], which resizing with Pillow cannot keep; "
            "supported: whole numbers of 0 to 255, and any numbers of 0 to 1 (or use SiglipImageProcessorFast)"
        )
    return not whole


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise ValueError(f"images: got an array of dtype {array.dtype}; supported: those that torch has") from error


def _over_white(image: torch.Tensor) -> torch.Tensor:
    """Four channels to three: laid over white in float32, whatever the dtype."""
    check_alpha_range(image, image.is_floating_point())
    scale = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
    unit = image.to(torch.float32) / scale
    composite = unit[:3] * unit[3:] + (1 - unit[3:])
    if image.is_floating_point():
        return composite.to(image.dtype)
    return composite.mul(scale + 1.0 - 1e-3).to(image.dtype)  # as torchvision converts: equal intervals, no rounding


def _resize_with_torch(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """(batch, channels, height, width) to `size` (height, width); 8-bit values are rounded, others stay unclamped."""
    if tuple(batch.shape[2:]) == size:
        return batch
    original = batch.dtype
    smooth = mode != "nearest-exact"
    native = original in (torch.float32, torch.float64) or (original == torch.uint8 and (not smooth or batch.is_cpu))
    if not native:
        batch = batch.to(torch.float32)
    resized = torch.nn.functional.interpolate(
        batch, size=size, mode=mode, align_corners=False if smooth else None, antialias=smooth
    )
    if native:
        return resized
    if original == torch.uint8:
        resized = resized.clamp_(0, 255)
    return (resized if original.is_floating_point else resized.round_()).to(original)
