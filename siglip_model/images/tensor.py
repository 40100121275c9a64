"""Images to pixel values with PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from siglip_kernels.resize_normalize.api import MODES
from siglip_model.images.inputs import channels_last, check_alpha_range, to_8_bit_image
from siglip_model.images.options import (
    BICUBIC,
    BILINEAR,
    LANCZOS,
    NEAREST,
    ImageOptions,
    padded_size,
    per_channel,
)
from siglip_model.images.processor import ImageProcessor

if TYPE_CHECKING:
    from PIL import Image

STRIP_BYTES = 2**22


class SiglipImageProcessor(ImageProcessor):
    """Resizes (antialiased) and scales in PyTorch, images of equal size together, on the input's device or `device`.

    Bit for bit transformers' SiglipImageProcessor, which computes with torchvision; torchvision is not needed here. On
    the CPU 8-bit images are rounded after each of both passes, on other devices once, as there. Floating images are
    resized unclamped. Filters: nearest, bilinear, bicubic and Lanczos, the last on the CPU wherever the image is.
    """

    backend: ClassVar[str] = "torchvision"
    _MODES: ClassVar[dict[int, str]] = {
        NEAREST: "nearest-exact",
        LANCZOS: "lanczos",
        BILINEAR: "bilinear",
        BICUBIC: "bicubic",
    }

    def _resolve(self, overrides: Mapping[str, Any]) -> ImageOptions:
        options = super()._resolve(overrides)
        if options.do_resize and options.resample not in self._MODES:
            raise ValueError(
                f"resample is {options.resample}: {type(self).__name__} supports {NEAREST} (nearest), {LANCZOS} "
                f"(lanczos), {BILINEAR} (bilinear) and {BICUBIC} (bicubic); use {self.kinds[-1]} for other "
                "filters"
            )
        return options

    def fused_steps(self, device: torch.device) -> dict[str, Any] | None:
        """The steps for an RGB image as arguments of `siglip_kernels.resize_normalize`; None if it has no such steps.

        That is the case unless they are: to one size, bilinear or bicubic, then normalise.
        """
        options = self._resolve({})
        mode = self._MODES.get(options.resample)
        fits = options.do_resize and options.do_normalize and options.do_convert_rgb and "height" in options.size
        if not fits or options.do_center_crop or options.do_pad or mode not in MODES:
            return None
        mean, std = _mean_and_std(options, 3, device)
        return {"mean": mean, "std": std, "size": (options.size["height"], options.size["width"]), "mode": mode}

    def _process(self, images: list[Any], options: ImageOptions, device: Any) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, image in enumerate(images):
            tensor, size = self._to_tensor(image, options, device)
            alone = index if options.disable_grouping else None
            groups.setdefault((tensor.shape, tensor.dtype, tensor.device, size, alone), []).append(index)
            tensors.append(tensor)
        results = list(tensors)
        for (*_, size, _), indices in groups.items():
            group = [tensors[index] for index in indices]
            # A large photograph is not copied.
            batch = self._transform(torch.stack(group) if len(group) > 1 else group[0][None], size, options)
            for index, result in zip(indices, batch, strict=True):
                results[index] = result
        if not options.do_pad:
            return results
        height, width = padded_size([result.shape for result in results], options.pad_size)
        pad = torch.nn.functional.pad
        return [pad(result, (0, width - result.shape[-1], 0, height - result.shape[-2])) for result in results]

    def _to_tensor(self, image: Any, options: ImageOptions, device: Any) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """(channels, height, width) on the device, and the size to resize it to (None without `do_resize`)."""
        if not isinstance(image, (torch.Tensor, np.ndarray)):
            image = to_8_bit_image(image, options.do_convert_rgb)
            size = self._size_of((image.height, image.width), options) if options.do_resize else None
            on_cpu = device is None or torch.device(device).type == "cpu"
            width = size[1] if size is not None and on_cpu else image.width
            return _pil_to_tensor(image, width, self._MODES.get(options.resample, "")).to(device), size
        tensor = self._array_to_tensor(image, options, device)
        return tensor, self._size_of(tensor.shape[1:], options) if options.do_resize else None

    def _array_to_tensor(self, image: Any, options: ImageOptions, device: Any) -> torch.Tensor:
        if isinstance(image, np.ndarray):
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

    def _transform(self, batch: torch.Tensor, size: tuple[int, int] | None, options: ImageOptions) -> torch.Tensor:
        if size is not None:
            batch = resize(batch, size, self._MODES[options.resample])
        if options.crop_size is not None and options.do_center_crop:
            batch = _center_crop(batch, options.crop_size)
        if options.do_normalize:
            mean, std = _mean_and_std(options, batch.shape[1], batch.device)
            return batch.to(torch.float32).sub(mean[:, None, None]).div_(std[:, None, None])
        return batch * options.rescale_factor if options.do_rescale else batch


def _mean_and_std(options: ImageOptions, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(channels,) each, of pixels before they are rescaled: both steps are one pass."""
    mean, std = (
        torch.tensor(per_channel(name, getattr(options, name), channels), device=device)
        for name in ("image_mean", "image_std")
    )
    if options.do_rescale:
        mean, std = mean * (1.0 / options.rescale_factor), std * (1.0 / options.rescale_factor)
    return mean, std


def _pil_to_tensor(image: Image.Image, width: int, mode: str) -> torch.Tensor:
    """An 8-bit image as (channels, height, width), resized to this width.

    Works in strips: a large image is never copied whole. Rounded to 8 bits, the horizontal pass is PyTorch's own first
    pass on the CPU, so that resizing the height afterwards gives the same bits as resizing both at once.
    """
    bands = len(image.getbands())
    pixels = torch.empty((bands, image.height, width), dtype=torch.uint8)
    rows = max(1, STRIP_BYTES // (image.width * bands))
    for top in range(0, image.height, rows):
        below = min(top + rows, image.height)
        strip = torch.from_numpy(np.array(image.crop((0, top, image.width, below))))
        strip = strip.reshape(1, below - top, image.width, bands).permute(0, 3, 1, 2)
        pixels[:, top:below] = resize(strip, (below - top, width), mode)[0]
    return pixels


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


def resize(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """(batch, channels, height, width) to `size` (height, width), in float32 where the dtype has no kernel.

    Whole numbers are rounded; 8-bit values also stay within 0 to 255, floating ones are unclamped.
    """
    if tuple(batch.shape[2:]) == size:
        return batch
    original, device = batch.dtype, batch.device
    smooth = mode != "nearest-exact"
    if mode == "lanczos":  # which PyTorch has for the CPU only
        batch = batch.cpu()
    native = original in (torch.float32, torch.float64) or (original == torch.uint8 and (not smooth or batch.is_cpu))
    resized = torch.nn.functional.interpolate(
        batch if native else batch.to(torch.float32),
        size=size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth,
    ).to(device)
    if native:
        return resized
    if original == torch.uint8:
        resized = resized.clamp_(0, 255)
    return (resized.round_() if original in _ROUNDED else resized).to(original)


def _center_crop(batch: torch.Tensor, crop: Mapping[str, int]) -> torch.Tensor:
    """The centre of (.., height, width); a smaller image is padded, one zero more behind it than before."""
    height, width = crop["height"], crop["width"]
    missing = max(0, height - batch.shape[-2]), max(0, width - batch.shape[-1])
    before = missing[0] // 2, missing[1] // 2
    batch = torch.nn.functional.pad(batch, (before[1], missing[1] - before[1], before[0], missing[0] - before[0]))
    top, left = (batch.shape[-2] - height) // 2, (batch.shape[-1] - width) // 2
    return batch[..., top : top + height, left : left + width]


SiglipImageProcessorFast = SiglipImageProcessor  # its name in transformers 4
