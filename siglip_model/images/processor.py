"""The base of both image processors: options, transformers' calling convention, and files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from siglip_model.batch import BatchFeature, check_tensor_kind
from siglip_model.checkpoints.arguments import split_unused, supported_arguments
from siglip_model.checkpoints.errors import CheckpointError, build_from_file
from siglip_model.checkpoints.fields import shown
from siglip_model.checkpoints.files import (
    StoredObject,
    find_json,
    json_file,
    read_json_object,
    split_hub_arguments,
    to_json,
    write_file,
)
from siglip_model.checkpoints.hub import checkpoint_within
from siglip_model.checkpoints.upload import check_upload_arguments, save_and_upload, upload
from siglip_model.images.inputs import LAYOUTS, flatten_images, to_levels
from siglip_model.images.options import (
    BICUBIC,
    BILINEAR,
    ImageOptions,
    SiglipImageProcessorKwargs,
    is_number,
    output_size,
    to_exact_size,
    to_resample,
    to_size,
)

PROCESSOR_NAME = "processor_config.json"
LARGEST = 1e9  # of factors, means and deviations, and the inverse of the least: pixel values remain finite in float32
_FLAGS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "default_to_square",
          "disable_grouping")  # fmt: skip
_STEPS = ("do_resize", "do_rescale", "do_normalize")  # None is kept, as in transformers: the step is left out


class ImageProcessor:
    """The base of both image processors; a subclass implements `_process`.

    do_convert_rgb, do_resize, do_center_crop, do_rescale, do_normalize, do_pad: the steps to run, in this order.
    size: {"height", "width"} or (height, width); {"shortest_edge"}, optionally limited by "longest_edge" (an int means
        shortest_edge, or a square if `default_to_square`); or {"max_height", "max_width"}.
    resample: Pillow's number or name of a filter; 3 is bicubic.
    crop_size: height and width of the centre to cut out; a smaller image is padded with zeros.
    rescale_factor, image_mean, image_std: numbers; the last two also as one number per channel.
    pad_size: height and width that finished images are padded to, with zeros on the right and below; None: the largest
        of the batch.
    input_data_format, device, return_tensors: see `preprocess`. disable_grouping: resize each image by itself.

    Each option is an attribute and an argument of a call, which overrides the attribute.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    file_name: ClassVar[str] = "preprocessor_config.json"
    valid_kwargs: ClassVar[type] = SiglipImageProcessorKwargs
    # The names in files that ask for this class, or its twin with the other backend. The first is written.
    kinds: ClassVar[tuple[str, ...]] = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
    backend: ClassVar[str] = ""  # transformers' name of what computes
    name_or_path: str = ""  # the file that the options were loaded from

    # The defaults, which a subclass may replace; each instance has its own values.
    do_convert_rgb: bool | None = True
    do_resize: bool | None = True
    size: Any = {"height": 224, "width": 224}  # noqa: RUF012
    default_to_square: bool | None = False
    resample: Any = BICUBIC
    do_center_crop: bool | None = None
    crop_size: Any = None
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    image_mean: Any = [0.5, 0.5, 0.5]  # noqa: RUF012
    image_std: Any = [0.5, 0.5, 0.5]  # noqa: RUF012
    do_pad: bool | None = None
    pad_size: Any = None
    input_data_format: str | None = None
    data_format: str | None = None
    disable_grouping: bool | None = None
    device: Any = None
    return_tensors: str | None = None

    def __init__(self, **options: Any) -> None:
        known = self._options()
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown argument {', '.join(unknown)}; known: {', '.join(known)}")
        for name in known:
            value = options.get(name)
            if value is None and not (name in options and name in _STEPS):
                value = copy.deepcopy(getattr(type(self), name))
            if name == "size":
                value = to_size(value, bool(options.get("default_to_square") or type(self).default_to_square))
            elif name in ("crop_size", "pad_size") and value is not None:
                value = to_exact_size(name, value)
            setattr(self, name, list(value) if isinstance(value, (tuple, np.ndarray)) else value)
        check_tensor_kind(self.return_tensors)
        self._resolve({})  # reports bad values early

    @classmethod
    def _options(cls) -> tuple[str, ...]:
        return tuple(cls.valid_kwargs.__annotations__)

    @classmethod
    def _stored(cls) -> tuple[str, ...]:
        """The options in files: those of a machine and of a caller are neither written nor read."""
        return tuple(name for name in cls._options() if name not in ("device", "return_tensors"))

    def __repr__(self) -> str:
        given = ((name, getattr(self, name)) for name in self._options())
        shown_options = (f"{name}={value!r}" for name, value in given if value is not None)
        return f"{type(self).__name__}({', '.join(shown_options)})"

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        """`pixel_values` of an image, a batch (4-D or a list) or a list of lists of images, which is flattened.

        images: PIL (any mode), numpy or torch with channels first or last (1, 3 or 4; first if both fit), path, URL or
            base64 string. EXIF orientation is applied to images loaded here, not to PIL images. Images of modes I;16, I
            and F, and uint16 arrays, are scaled from their value range to 8 bits (where transformers clips them).
            Arrays of other dtypes hold levels from 0 to 255, or else belong with do_rescale=False.
        return_tensors: "pt" or "np" for one float32 tensor or array (batch, channels, height, width); None for a list.
        input_data_format: "channels_first" or "channels_last" instead of inferring the layout.
        device: device of computation and result ("cuda", torch.device ...); not for SiglipImageProcessorPil.
        options: any constructor option, for this call only.

        Raises UnreadableImageError (an OSError) naming a file that is not an image; TypeError for an unknown argument
        or an input that is not an image; ValueError for other bad values, and for unequal sizes where a tensor was
        requested.
        """
        kind = check_tensor_kind(options.pop("return_tensors", self.return_tensors))
        device = options.pop("device", self.device)
        resolved = self._resolve(options)
        flat = [to_levels(image, resolved) for image in flatten_images(images)]
        return self._collect(self._process(flat, resolved, device), resolved, kind)

    def _collect(self, images: list[Any], options: ImageOptions, kind: str | None) -> BatchFeature:
        """The result of a call. images: (channels, height, width), after all steps."""
        return BatchFeature(pixel_values=images if kind is None else stack(images, kind))

    def _size_of(self, shape: Sequence[int], options: ImageOptions) -> tuple[int, int]:
        """The (height, width) that `do_resize` gives an image of `shape` (height, width)."""
        return output_size(shape, options.size)

    # One step each, for arrays or tensors with channels first: (channels, height, width), or a batch of 4 dimensions.

    def resize(self, image: Any, size: Any, resample: Any = BILINEAR) -> Any:
        """The image resized. size, resample: as the options."""
        return self._step(image, do_resize=True, size=size, resample=resample)

    def center_crop(self, image: Any, size: Any) -> Any:
        """The centre of the image. size: as `crop_size`."""
        return self._step(image, do_center_crop=True, crop_size=size)

    def rescale(self, image: Any, scale: float) -> Any:
        """The image's values times `scale`, in float32."""
        return self._step(image, do_rescale=True, rescale_factor=scale)

    def normalize(self, image: Any, mean: Any, std: Any) -> Any:
        """(image - mean) / std, in float32. mean, std: a number, or one per channel."""
        return self._step(image, do_normalize=True, image_mean=mean, image_std=std)

    def pad(self, images: list[Any], pad_size: Any = None) -> list[Any]:
        """Images of 3 dimensions with zeros on the right and below. pad_size: as the option."""
        return self._process(images, self._alone(do_pad=True, pad_size=pad_size), None)

    def _step(self, image: Any, **options: Any) -> Any:
        batch = image if image.ndim == 4 else image[None]
        results = self._process(list(batch), self._alone(**options), None)
        stacked = torch.stack(results) if isinstance(results[0], torch.Tensor) else np.stack(results)
        return stacked if image.ndim == 4 else stacked[0]

    def _alone(self, **options: Any) -> ImageOptions:
        """These options with all other steps left out."""
        return self._resolve({**dict.fromkeys(_FLAGS, False), "input_data_format": "channels_first", **options})

    def _process(self, images: list[Any], options: ImageOptions, device: Any) -> list[Any]:
        raise NotImplementedError

    def _resolve(self, overrides: Mapping[str, Any]) -> ImageOptions:
        settings: dict[str, Any] = {name: getattr(self, name) for name in self._stored()}
        for name, value in overrides.items():
            if name not in settings:
                known = ", ".join(self._options())
                raise TypeError(f"{type(self).__name__}: unknown argument {name}; known: {known}")
            settings[name] = value
        return ImageOptions(**self._validated(settings))

    def _validated(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The options of a call in the form of ImageOptions. Raises ValueError for bad values."""
        for name in _FLAGS:
            if name not in settings:
                continue
            if settings[name] is not None and not isinstance(settings[name], (bool, np.bool_)):
                raise ValueError(f"{name} is {shown(settings[name])}; supported: True, False")
            settings[name] = bool(settings[name])
        default_to_square = settings.pop("default_to_square", False)
        if settings["do_resize"]:
            settings["resample"] = to_resample(settings["resample"])
            if "size" in settings:
                settings["size"] = to_size(settings["size"], default_to_square)
        if settings.get("do_center_crop"):
            settings["crop_size"] = to_exact_size("crop_size", settings["crop_size"])
        if settings.get("do_pad") and settings["pad_size"] is not None:
            settings["pad_size"] = to_exact_size("pad_size", settings["pad_size"])
        if settings.pop("data_format") not in (None, "channels_first"):
            raise ValueError("data_format: supported: 'channels_first', the model's layout")
        factor = settings["rescale_factor"]
        if settings["do_rescale"] and not (is_number(factor) and 1 / LARGEST <= abs(factor) <= LARGEST):
            raise ValueError(
                f"rescale_factor is {shown(factor)}; supported: {1 / LARGEST:g} to {LARGEST:g}, or negative"
            )
        if settings["do_normalize"]:
            for name in ("image_mean", "image_std"):
                value = settings[name]
                if isinstance(value, np.ndarray):
                    value = settings[name] = value.tolist()
                if not is_number(value) and not (
                    isinstance(value, (list, tuple)) and value and all(map(is_number, value))
                ):
                    raise ValueError(f"{name} is {shown(value)}; supported: a number, or one per channel")
            mean, std = settings["image_mean"], settings["image_std"]
            if not is_number(mean) and not is_number(std) and len(mean) != len(std):
                raise ValueError(
                    f"image_mean has {len(mean)} numbers and image_std is {shown(std)}; supported: equally many"
                )
            for name, value, least in (("image_mean", mean, 0), ("image_std", std, 1 / LARGEST)):
                if not all(least <= abs(number) <= LARGEST for number in ([value] if is_number(value) else value)):
                    raise ValueError(f"{name} is {shown(value)}; supported: {least:g} to {LARGEST:g}, or negative")
        layout = settings["input_data_format"]
        settings["input_data_format"] = next((name for name in LAYOUTS if layout == name), None)
        if layout is not None and settings["input_data_format"] is None:
            raise ValueError(f"input_data_format is {layout!r}; supported: {', '.join(map(repr, LAYOUTS))}, None")
        return settings

    # ---- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: Any) -> Any:
        """Loads a directory or Hub repository: processor_config.json, else preprocessor_config.json; or one such file.

        arguments: the constructor's options, which override the file; those of `resolve_file`.
        return_unused_kwargs: return unknown arguments beside the processor, as a dict, instead of raising TypeError.
        Raises CheckpointError naming a missing, damaged or unsupported file; OSError like `resolve_file`; TypeError for
        an unknown argument, ValueError for one of transformers whose effect is not supported.
        """
        hub, given = split_hub_arguments(supported_arguments(cls.__name__, arguments))
        return cls._from_settings(read_settings(pretrained_model_name_or_path, hub, cls.kinds), given)

    @classmethod
    def _from_settings(cls, settings: StoredObject, given: Mapping[str, Any]) -> Any:
        given, unused = split_unused(given, cls._options())
        processor = build_from_file(settings.path, cls, cls._known(settings), given)
        processor.name_or_path = str(settings.path)
        return processor if unused is None else (processor, unused)

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **options: Any) -> Any:
        """The processor with the settings of `to_dict` or of a file, overridden by options.

        Names in the dict that are no options are left out, as in a file; see `from_pretrained` for
        return_unused_kwargs.
        """
        options, unused = split_unused(options, cls._options())
        processor = cls(**{**cls._known(image_processor_dict), **options})
        return processor if unused is None else (processor, unused)

    @classmethod
    def _known(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a file's settings that are options."""
        return {name: value for name, value in settings.items() if name in cls._stored()}

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """The processor with the settings in a file. Raises CheckpointError naming it."""
        return cls._from_settings(read_json_object(Path(json_file)), {})  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json, without options that are None by default.

        Both backends' processors write the first of `kinds`, a name which every version of transformers loads.
        """
        settings = {name: getattr(self, name) for name in self._stored()}
        for name in ("rescale_factor", "image_mean", "image_std"):  # may be numpy numbers
            value = settings[name]
            settings[name] = float(value) if is_number(value) else [float(number) for number in value]
        settings["resample"] = int(to_resample(self.resample))
        if "default_to_square" in settings:
            settings["default_to_square"] = self.default_to_square or None
        settings = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in settings.items()
            if value is not None or name in _STEPS
        }
        return {**settings, "image_processor_type": self.kinds[0]}

    def to_json_string(self) -> str:
        """`to_dict` in JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string` atomically."""
        path = Path(json_file_path)
        write_file(path.parent, path.name, self.to_json_string().encode())

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **upload_arguments: Any
    ) -> list[str]:
        """Writes preprocessor_config.json atomically. Returns its path in a list.

        push_to_hub: also upload it; its arguments in upload_arguments.
        """
        check_upload_arguments(push_to_hub, upload_arguments)
        path = write_file(save_directory, self.file_name, to_json(self.to_dict()))
        if push_to_hub:
            upload(save_directory, [self.file_name], **upload_arguments)
        return [path]

    def push_to_hub(self, repo_id: str, **upload_arguments: Any) -> Any:
        """Writes preprocessor_config.json to a repository of the Hub. Arguments: see `checkpoints.upload.upload`."""
        return save_and_upload(self.save_pretrained, repo_id, **upload_arguments)


def read_settings(path_or_id: str | os.PathLike[str], hub: dict[str, Any], kinds: Sequence[str]) -> StoredObject:
    """The image processor's settings: nested in processor_config.json (transformers 5), or in their own file.

    path_or_id: may also be the path of such a file, of any name, as in transformers.
    kinds: the supported names of its class. Raises CheckpointError for another.
    """
    file = json_file(path_or_id)
    whole = find_json(path_or_id, PROCESSOR_NAME, hub) if file is None else read_json_object(file)
    if whole is not None and whole.get("image_processor") is not None:
        if not isinstance(whole["image_processor"], dict):
            whole.refuse("image_processor", "an object")
        settings = StoredObject(whole["image_processor"])
        settings.path = whole.path
    else:
        alone = find_json(path_or_id, ImageProcessor.file_name, hub) if file is None else whole
        if alone is None:
            raise CheckpointError(
                f"{path_or_id} has neither {ImageProcessor.file_name} nor a {PROCESSOR_NAME} with an image processor"
                f"{checkpoint_within(path_or_id)}"
            )
        settings = alone
    if kind_of(settings) not in ("", *kinds):
        field = "image_processor_type" if settings.get("image_processor_type") else "feature_extractor_type"
        settings.refuse(field, ", ".join(name for name in kinds if not name.endswith("Pil")))
    return settings


def kind_of(settings: Mapping[str, Any]) -> Any:
    """The name of the class that settings ask for, or an empty string."""
    return settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""


def stack(images: list[Any], kind: str) -> torch.Tensor | np.ndarray:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"pixel_values: images of shapes {shapes} cannot be stacked; give do_resize=True, or return_tensors=None"
        )
    if isinstance(images[0], torch.Tensor):
        stacked = torch.stack(images)
        return stacked if kind == "pt" else stacked.numpy(force=True)
    array = np.array(images)
    return torch.from_numpy(array) if kind == "pt" else array
