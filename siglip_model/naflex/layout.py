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
from siglip_kernels.transforms import can_read_values
from siglip_model.backends import Backend
from siglip_model.encoder import MaskArguments, mask_arguments

_WHOLE = (torch.int64, torch.int32)


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

    def drop_padding(self, x: Tensor) -> Tensor:
        return x

    def restore_padding(self, x: Tensor) -> Tensor:
        if self.lengths is None or not self.clears_padding:
            return x
        return x.masked_fill((self.numbers >= self.lengths[:, None])[..., None], 0)


@dataclass(frozen=True)
class Packed:
    """The patches of all images one after the other, as a batch of one: (1, T, ...).

    numbers: (1, T), shapes: (1, T, 2), lengths: (B,), mask: as in `Padded`. rows: where the T tokens lie in the B · P
    of the padded batch, whose sizes are `padded`.
    """

    numbers: Tensor
    shapes: Tensor
    lengths: Tensor
    mask: MaskArguments
    rows: Tensor
    padded: tuple[int, int]

    def drop_padding(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.rows][None]

    def restore_padding(self, x: Tensor) -> Tensor:
        batch, patches = self.padded
        zeros = x.new_zeros(batch * patches, x.shape[-1])
        return zeros.index_copy(0, self.rows, x[0]).view(batch, patches, -1)


def layout(ops: Backend, pixel_values: Tensor, mask: Any, shapes: Any, *, dense: bool) -> Padded | Packed:
    """The layout that suits the backend: packed if it attends to packed sequences and the host may read the shapes.

    pixel_values: (B, P, C · p · p). mask: (B, P), non-zero for the first height · width patches of each image, or None
    if all are valid. shapes: int64 (B, 2), height and width in patches. dense: whether attention weights are wanted,
    which are padded.

    Shapes on the CPU are read without waiting for a GPU, those on a GPU only to pack; what is read is checked.
    Raises ValueError for other shapes and dtypes, an image without patches or with more than P, and a mask that
    contradicts the shapes.
    """
    batch, patches = pixel_values.shape[:2]
    _check(mask, shapes, batch, patches)
    device = pixel_values.device
    packs = device.type in ops.packs_on and not dense
    counts = None
    if (shapes.device.type == "cpu" or packs) and can_read_values(shapes) and can_read_values(pixel_values):
        counts = _read_counts(mask, shapes, patches)
    shapes = shapes.to(device, torch.int64, non_blocking=True)
    if mask is None or (counts is not None and min(counts, default=patches) == patches):
        return Padded(torch.arange(patches, device=device), shapes[:, None], None, {}, False)
    lengths = shapes.prod(-1)
    if counts is not None and packs:
        return _packed(shapes, lengths, counts, patches)
    # Backends that pack take lengths, which need no reading of the mask.
    given = {"lengths": lengths.int()} if ops.packs_on else mask_arguments(ops, mask.to(device))
    numbers = torch.arange(patches, device=device)
    return Padded(numbers, shapes[:, None], lengths.int(), given, clears_padding=bool(ops.packs_on))


def _packed(shapes: Tensor, lengths: Tensor, counts: list[int], patches: int) -> Packed:
    batch, tokens, device = len(counts), sum(counts), shapes.device
    images = torch.arange(batch, device=device).repeat_interleave(lengths, output_size=tokens)  # [T]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    numbers = torch.arange(tokens, device=device) - starts[images]
    mask = {"cu_seqlens": starts.int(), "max_seqlen": max(counts)}
    rows = images * patches + numbers
    return Packed(numbers[None], shapes[images][None], lengths.int(), mask, rows, (batch, patches))


def _check(mask: Any, shapes: Any, batch: int, patches: int) -> None:
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


def _read_counts(mask: Tensor | None, shapes: Tensor, patches: int) -> list[int]:
    """Patches per image, with one read of the device. Raises for values that contradict each other."""
    facts = shapes.flatten().long()
    if mask is None or mask.device == shapes.device:
        valid = torch.arange(patches, device=shapes.device) < shapes.prod(-1, keepdim=True)
        wrong = (~valid if mask is None else valid != mask.bool()).any(-1)
        facts = torch.cat([facts, wrong.long()])
    values = facts.tolist()
    edges = len(shapes) * 2
    sizes = list(zip(values[0:edges:2], values[1:edges:2], strict=True))
    for image, (height, width) in enumerate(sizes):
        got = f"says {height} × {width} patches for image {image}"
        if height < 1 or width < 1:
            raise unsupported("Siglip2VisionModel", "spatial_shapes", got, "at least one patch")
        if height * width > patches:
            supported = f"at most the {patches} of pixel_values and pixel_attention_mask"
            raise unsupported("Siglip2VisionModel", "spatial_shapes", got, supported)
    for image, is_wrong in enumerate(values[edges:]):
        if is_wrong:
            height, width = sizes[image]
            what = "is None, so all are valid," if mask is None else "does not mark the first ones"
            got = f"{what} where spatial_shapes says {height} × {width} patches of {patches} for image {image}"
            supported = "non-zero for the first height · width patches of each image, zero for the others"
            raise unsupported("Siglip2VisionModel", "pixel_attention_mask", got, supported)
    return [height * width for height, width in sizes]
