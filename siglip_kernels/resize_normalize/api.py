"""The resize_normalize op: contract and registration. The mathematics and the kernel are in forward.py.

It is registered as `siglip_kernels::resize_normalize` and has no derivative: its input is whole numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip_kernels.arguments import KERNEL_DTYPES, check_parameter, check_same_device, check_tensor, given
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported

MODES = ("bilinear", "bicubic")


def _validate(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype
) -> None:
    """Raises for every unsupported argument. Traceable: it reads no values."""
    if not isinstance(images, (list, tuple)) or not images:
        got = "is empty" if isinstance(images, (list, tuple)) else f"is {given(images)}"
        raise unsupported("resize_normalize", "images", got, "a list of at least one tensor (C, H, W)")
    for image in images:
        check_tensor("resize_normalize", "images", image)
        if image.dtype != torch.uint8:
            raise unsupported("resize_normalize", "images", f"has dtype {image.dtype}", "uint8")
        if image.dim() != 3 or 0 in image.shape:
            got = f"has shape {tuple(image.shape)}"
            raise unsupported("resize_normalize", "images", got, "(C, H, W), extents from 1 on")
        if image.shape[0] != images[0].shape[0]:
            got = f"has {image.shape[0]} channels and another image {images[0].shape[0]}"
            raise unsupported("resize_normalize", "images", got, "images of equally many channels")
        check_same_device("resize_normalize", "images", image, "another image", images[0].device)
    for name, parameter in (("mean", mean), ("std", std)):
        shape = (images[0].shape[0],)
        check_parameter(
            "resize_normalize", name, parameter, shape, images[0], torch.float32, x_name="images",
            other="the arithmetic", supported="float32",
        )  # fmt: skip
    if len(size) != 2 or not all(type(edge) is int and edge > 0 for edge in size):
        got = f"is ({', '.join(str(given(edge)) for edge in size)})"
        raise unsupported("resize_normalize", "size", got, "(height, width), whole numbers from 1 on")
    if mode not in MODES:
        raise unsupported("resize_normalize", "mode", f"is {given(mode)}", ", ".join(map(repr, MODES)))
    if dtype not in KERNEL_DTYPES:
        raise unsupported("resize_normalize", "dtype", f"is {dtype}", ", ".join(map(str, KERNEL_DTYPES)))


@torch.library.custom_op("siglip_kernels::resize_normalize", mutates_args=())
def _resize_normalize(
    images: list[Tensor], mean: Tensor, std: Tensor, size: list[int], mode: str, dtype: torch.dtype
) -> Tensor:
    require_kernels("resize_normalize", "images", images[0])
    from siglip_kernels.resize_normalize.forward import resize_normalize_forward

    with on_device(images[0]):
        contiguous = [image.contiguous() for image in images]
        return resize_normalize_forward(
            contiguous, mean.contiguous(), std.contiguous(), (size[0], size[1]), mode, dtype
        )


@_resize_normalize.register_fake
def _(images, mean, std, size, mode, dtype):
    return mean.new_empty((len(images), images[0].shape[0], *size), dtype=dtype)


def resize_normalize(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype
) -> Tensor:
    """Images of any sizes, resized with antialiasing, rounded to whole levels, normalised: the model's pixel values.

    images: (C, H, W) each, uint8. mean, std: (C,) fp32, in levels of 0 to 255; of a processor, image_mean and image_std
    divided by its rescale_factor. size: (height, width) of the result. mode: "bilinear" or "bicubic", a filter that is
    widened where an image shrinks. dtype: of the result, fp32, fp16 or bf16.
    Returns (B, C, height, width).

    The arithmetic is that of torchvision's resize on a GPU, and so of transformers' image processor there: fp32, levels
    clamped and rounded once, half to even, then (level - mean) / std. Sums are in another order, so that a level whose
    exact value is within rounding of one half may differ by one.

    Raises UnsupportedInputError (a ValueError) for other shapes and dtypes, and MissingBackendError for tensors that
    are not on an NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    _validate(images, mean, std, size, mode, dtype)
    return _resize_normalize(list(images), mean, std, list(size), mode, dtype)
