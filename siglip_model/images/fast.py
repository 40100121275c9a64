"""Images to pixel values with PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from siglip_model.images.inputs import channels_last, check_alpha_range, pil_to_array
from siglip_model.images.options import BICUBIC, BILINEAR, NEAREST, ImageOptions, output_size, per_channel
from siglip_model.images.processor import ImageProcessor


class SiglipImageProcessorFast(ImageProcessor):
    """Resizes (antialiased) and scales in PyTorch, images of equal size together, on the input's device or `device`.

    8-bit images (bilinear, bicubic) are within TOLERANCE_LEVELS of 255 grey levels of `SiglipImageProcessor` on every
    device: the horizontal and vertical passes are each rounded to 8 bits as in Pillow, and run in the order of the
    installed Pillow. `nearest` may choose the other neighbour in a tie. Floating images are resized unclamped, where
    Pillow requires quantisation to 8 bits.

    transformers' torchvision processor computes the same on the CPU except for Pillow's order of passes; on other
    devices it rounds only once, so overshoot at full-contrast edges differs (by up to 30 levels).
    """

    TOLERANCE_LEVELS: ClassVar[int] = 2
    _MODES: ClassVar[dict[int, str]] = {NEAREST: "nearest-exact", BILINEAR: "bilinear", BICUBIC: "bicubic"}

    def _resolve(self, overrides: Mapping[str, Any]) -> ImageOptions:
        options = super()._resolve(overrides)
        if options.do_resize and options.resample not in self._MODES:
            raise ValueError(
                f"resample is {options.resample}: SiglipImageProcessorFast supports {NEAREST} (nearest), {BILINEAR} "
                f"(bilinear) and {BICUBIC} (bicubic); use SiglipImageProcessor for other filters"
            )
        return options

    def _process(self, images: list[Any], options: ImageOptions, device: Any) -> list[torch.Tensor]:
        tensors = [self._to_tensor(image, options, device) for image in images]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
        results = list(tensors)
        for indices in groups.values():
            group = [tensors[index] for index in indices]
            # A large photograph is not copied.
            batch = self._transform(torch.stack(group) if len(group) > 1 else group[0][None], options)
            for index, result in zip(indices, batch, strict=True):
                results[index] = result
        return results

    def _to_tensor(self, image: Any, options: ImageOptions, device: Any) -> torch.Tensor:
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

    def _transform(self, batch: torch.Tensor, options: ImageOptions) -> torch.Tensor:
        if options.do_resize:
            size = output_size(batch.shape[2:], options.size)
            batch = _resize_with_torch(batch, size, self._MODES[options.resample])
        if options.do_normalize:
            channels = batch.shape[1]
            mean, std = (
                torch.tensor(per_channel(name, getattr(options, name), channels), device=batch.device)
                for name in ("image_mean", "image_std")
            )
            if options.do_rescale:  # one pass over the pixels instead of two
                mean, std = mean * (1.0 / options.rescale_factor), std * (1.0 / options.rescale_factor)
            return batch.to(torch.float32).sub(mean[:, None, None]).div_(std[:, None, None])
        return batch * options.rescale_factor if options.do_rescale else batch


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if not array.dtype.isnative:  # of the other byte order
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise ValueError(f"images: got an array of dtype {array.dtype}; supported: dtypes of PyTorch") from error


def _over_white(image: torch.Tensor) -> torch.Tensor:
    """Four channels to three: composited over white, in float32 for every dtype."""
    whole = not image.is_floating_point()
    if not whole:
        check_alpha_range(image)
    scale = float(torch.iinfo(image.dtype).max) if whole and image.dtype != torch.bool else 1.0
    unit = image.to(torch.float32) / scale
    composite = unit[:3] * unit[3:] + (1 - unit[3:])
    if scale == 1.0:
        return composite.to(image.dtype)
    return composite.mul(scale + 1.0 - 1e-3).to(image.dtype)  # like torchvision: equal intervals, no rounding


_ROUNDED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # the dtypes that torchvision rounds


def _resize_with_torch(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """(batch, channels, height, width) to `size` (height, width); 8-bit values are rounded, floating ones unclamped."""
    height, width = batch.shape[2:]
    if (height, width) == size:
        return batch
    if batch.dtype != torch.uint8 or mode == "nearest-exact":
        return interpolate(batch, size, mode)
    if _pillow_goes_vertically_first((height, width), size):
        return interpolate(interpolate(batch, (size[0], width), mode), size, mode)
    if batch.is_cpu:
        return interpolate(batch, size, mode)  # horizontally first, rounded between the passes
    return interpolate(interpolate(batch, (height, size[1]), mode), size, mode)


def interpolate(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """One torch.nn.functional.interpolate, in float32 where the dtype has no kernel, rounded back to that dtype."""
    original = batch.dtype
    smooth = mode != "nearest-exact"
    native = original in (torch.float32, torch.float64) or (original == torch.uint8 and (not smooth or batch.is_cpu))
    resized = torch.nn.functional.interpolate(
        batch if native else batch.to(torch.float32),
        size=size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth,
    )
    if native:
        return resized
    if original == torch.uint8:
        resized = resized.clamp_(0, 255)
    return (resized.round_() if original in _ROUNDED else resized).to(original)


def _pillow_goes_vertically_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """True in Pillow 13 if the height shrinks by more than twice as many pixels as the width; earlier never.

    (12.3 also does for images more than a hundred times as high as wide; this is not reproduced.)
    """
    import PIL

    lost_height, lost_width = old[0] - new[0], old[1] - new[1]
    return int(PIL.__version__.split(".")[0]) >= 13 and lost_height > max(0, 2 * lost_width)
