"""Where the patches of a batch lie inside the vision tower: padded to one length per image, or packed without padding.

Padding is dropped once, before the first layer, and restored after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import can_read_values, under_transform
from siglip_model.backends import Backend
from siglip_model.encoder import MaskArguments, mask_arguments

_WHOLE = (torch.int64, torch.int32)
_ASSERTS_ON = ("cpu", "cuda", "meta")  # types of devices; others are waited for


@dataclass(frozen=True)
class Padded:
    """Tokens as the caller's: (B, P, ...).

    numbers: the number of each token in its image (P,). shapes: height and width of the image in patches, (B, 1, 2).
    lengths: patches per image, int32 (B,), or None without padding. mask: arguments of the backend's attention.
    clears_padding: whether the tokens of padding are set to zero at the end.
    """

    numbers: Tensor
    shapes: Tensor
    lengths: Tensor | None
    mask: MaskArguments
    clears_padding: bool

    def valid(self) -> Tensor | None:
        """bool (B, P): which tokens are no padding; None if all are."""
        return None if self.lengths is None else self.numbers < self.lengths[:, None]

    def drop_padding(self, x: Tensor) -> Tensor:
        return x

    def restore_padding(self, x: Tensor) -> Tensor:
        valid = self.valid()
        return x if valid is None or not self.clears_padding else x.masked_fill(~valid[..., None], 0)


@dataclass(frozen=True)
class Packed:
    """The patches of all images one after the other, as a batch of one: (1, T, ...).

    numbers: (1, T), shapes: (1, T, 2), lengths: (B,), mask: as in `Padded`. rows: where the T tokens lie in the B · P
    of the padded batch, whose sizes are `padded`. A token that belongs to no image has the row B · P.
    """

    numbers: Tensor
    shapes: Tensor
    lengths: Tensor
    mask: MaskArguments
    rows: Tensor
    padded: tuple[int, int]

    def valid(self) -> Tensor:
        """See `Padded`."""
        return torch.arange(self.padded[1], device=self.lengths.device) < self.lengths[:, None]

    def drop_padding(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x[self.rows.clamp_max(len(x) - 1)][None]

    def restore_padding(self, x: Tensor) -> Tensor:
        batch, patches = self.padded
        zeros = x.new_zeros(batch * patches + 1, x.shape[-1])
        return zeros.index_copy(0, self.rows, x[0])[:-1].view(batch, patches, -1)


Layout = Padded | Packed


def layout(ops: Backend, pixel_values: Tensor, mask: Any, shapes: Any, *, dense: bool) -> Layout:
    """The layout that suits the backend: packed if it attends to packed sequences and the host may read the shapes.

    pixel_values: (B, P, C · p · p). mask: (B, P), non-zero for the first height · width patches of each image, or None
    if all are valid. shapes: int64 (B, 2), height and width in patches. dense: whether attention weights are wanted,
    which are padded.

    What the host may read of shapes and mask is read and checked: what lies on the CPU, and of a GPU what is read to
    pack. The GPU itself checks the rest, without the host waiting for it.
    Raises ValueError for other shapes and dtypes, an image without patches or with more than P, and a mask that
    contradicts the shapes. Of these the GPU's checks stop the program, as an index out of range does in PyTorch.
    """
    batch, patches = pixel_values.shape[:2]
    check_forms(mask, shapes, batch, patches)
    device = pixel_values.device
    packs = device.type in ops.packs_on and not dense
    readable = (shapes.device.type == "cpu" or packs) and can_read_values(shapes) and can_read_values(pixel_values)
    counts = check_values(mask, shapes, patches, device, read=readable)
    shapes = shapes.to(device, torch.int64, non_blocking=True)
    if mask is None or (counts is not None and min(counts, default=patches) == patches):
        return Padded(torch.arange(patches, device=device), shapes[:, None], None, {}, False)
    if counts is not None and packs:
        return _packed(shapes, patches, sum(counts), max(counts))
    return _padded(ops, shapes, patches, mask.to(device, non_blocking=True))


def fixed_layout(ops: Backend, shapes: Tensor, patches: int, tokens: int, *, dense: bool) -> Layout:
    """The layout of a CUDA graph, which has the same sizes for all shapes, and reads none.

    shapes: int64 (B, 2) on the model's device, zeros where the batch has no image. tokens: as many as a packed batch
    has, at least those of all images together; those left over belong to no image. dense: as for `layout`.
    """
    packs = shapes.device.type in ops.packs_on and not dense
    return _packed(shapes, patches, tokens, patches) if packs else _padded(ops, shapes, patches)


def _padded(ops: Backend, shapes: Tensor, patches: int, mask: Tensor | None = None) -> Padded:
    numbers, lengths = torch.arange(patches, device=shapes.device), shapes.prod(-1)
    if ops.packs_on:
        return Padded(numbers, shapes[:, None], lengths.int(), {"lengths": lengths.int()}, clears_padding=True)
    given = mask_arguments(ops, numbers < lengths[:, None] if mask is None else mask)
    return Padded(numbers, shapes[:, None], lengths.int(), given, clears_padding=False)


def _packed(shapes: Tensor, patches: int, tokens: int, longest: int) -> Packed:
    batch, lengths = len(shapes), shapes.prod(-1)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    numbers = torch.arange(tokens, device=shapes.device)
    images = torch.searchsorted(starts[1:], numbers, right=True)  # [T]; for the tokens left over, batch
    beyond = images == batch
    images = images.clamp_max(batch - 1)
    numbers = (numbers - starts[images]).masked_fill(beyond, 0)
    rows = (images * patches + numbers).masked_fill(beyond, batch * patches)
    mask = {"cu_seqlens": starts.int(), "max_seqlen": longest}
    return Packed(numbers[None], shapes[images][None], lengths.int(), mask, rows, (batch, patches))


def check_patches(pixel_values: object, values: int) -> None:
    """Raises ValueError unless these are patches of so many values: floating point or uint8 (B, P, values)."""
    supported = f"floating point or uint8 (batch, patches, {values})"
    if not isinstance(pixel_values, Tensor):
        got = "is None" if pixel_values is None else f"is {type(pixel_values).__name__}"
        raise unsupported("Siglip2VisionModel", "pixel_values", got, supported)
    has_pixels = pixel_values.is_floating_point() or pixel_values.dtype == torch.uint8
    if pixel_values.dim() != 3 or pixel_values.shape[-1] != values or pixel_values.shape[1] < 1 or not has_pixels:
        got = f"has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}"
        raise unsupported("Siglip2VisionModel", "pixel_values", got, supported)


def check_forms(mask: Any, shapes: Any, batch: int, patches: int) -> None:
    """Raises for what can be told without reading values."""
    supported = f"int64 {(batch, 2)}, height and width of each image in patches"
    if not isinstance(shapes, Tensor):
        raise unsupported("Siglip2VisionModel", "spatial_shapes", f"is {type(shapes).__name__}", supported)
    if tuple(shapes.shape) != (batch, 2) or shapes.dtype not in _WHOLE:
        got = f"has shape {tuple(shapes.shape)} and dtype {shapes.dtype}"
        raise unsupported("Siglip2VisionModel", "spatial_shapes", got, supported)
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, patches)):
        got = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is {type(mask).__name__}"
        raise unsupported("Siglip2VisionModel", "pixel_attention_mask", got, f"{(batch, patches)}, or None")


def check_values(
    mask: Tensor | None, shapes: Tensor, patches: int, device: torch.device, *, read: bool
) -> list[int] | None:
    """Raises for values that contradict each other; see `layout`. Returns the patches per image if they are read.

    read: whether the host reads the shapes, and in the same read a mask beside them; `device` checks the rest.
    """
    if not read:
        _check_on_device(mask, shapes, patches, device)
        return None
    is_beside = mask is None or mask.device == shapes.device
    wrong = _contradictions(mask, shapes, patches).any(-1).long() if is_beside else shapes.new_empty(0).long()
    values = torch.cat([shapes.flatten().long(), wrong]).tolist()
    edges = len(shapes) * 2
    sizes = list(zip(values[0:edges:2], values[1:edges:2], strict=True))
    for image, (height, width) in enumerate(sizes):
        got = f"says {height} × {width} patches for image {image}"
        if height < 1 or width < 1:
            raise unsupported("Siglip2VisionModel", "spatial_shapes", got, "at least one patch")
        if height * width > patches:
            supported = f"at most the {patches} of pixel_values and pixel_attention_mask"
            raise unsupported("Siglip2VisionModel", "spatial_shapes", got, supported)
    wrong_images = values[edges:]
    if mask is not None and not is_beside:
        if mask.device.type == "cpu":
            wrong_images = _contradictions(mask, torch.tensor(sizes).view(-1, 2), patches).any(-1).tolist()
        else:
            _check_on_device(mask, shapes, patches, mask.device)
    for image, is_wrong in enumerate(wrong_images):
        if is_wrong:
            height, width = sizes[image]
            what = "is None, so all are valid," if mask is None else "does not mark the first ones"
            got = f"{what} where spatial_shapes says {height} × {width} patches of {patches} for image {image}"
            supported = "non-zero for the first height · width patches of each image, zero for the others"
            raise unsupported("Siglip2VisionModel", "pixel_attention_mask", got, supported)
    return [height * width for height, width in sizes]


def _contradictions(mask: Tensor | None, shapes: Tensor, patches: int) -> Tensor:
    """bool (B, P): patches of which mask and shapes say different things."""
    valid = torch.arange(patches, device=shapes.device) < shapes.prod(-1, keepdim=True)
    return ~valid if mask is None else valid != mask.bool()


def _check_on_device(mask: Tensor | None, shapes: Tensor, patches: int, device: torch.device) -> None:
    if under_transform() or torch.jit.is_tracing():  # which know no assertions
        return
    device = device if device.type in _ASSERTS_ON else torch.device("cpu")
    shapes, mask = shapes.to(device, non_blocking=True), None if mask is None else mask.to(device, non_blocking=True)
    fits = (shapes >= 1).all() & (shapes.prod(-1) <= patches).all()
    torch._assert_async(
        fits & ~_contradictions(mask, shapes, patches).any(),
        "Siglip2VisionModel: spatial_shapes and pixel_attention_mask contradict each other, or an image has no patches "
        "or more than pixel_values. On the CPU both are read, and the error says which image is wrong.",
    )
