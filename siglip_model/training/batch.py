"""What the training loop reads: batches, and the source that yields them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from siglip_model.training.skipped import Skipped


@dataclass(frozen=True)
class Batch:
    """N texts, and one or more images of each.

    input_ids: int64 (N, length). pixel_values: (V, N, C, H, W), where image [v, n] belongs to text n, or (N, C, H, W)
    for one view. The text tower runs once for all views. At native resolution pixel_values, (N, P, values) for one
    view, pixel_attention_mask and spatial_shapes are those of `Siglip2VisionModel`. names: of the samples. skipped: the
    samples left out since the batch before. position: what the source needs, beside the next batch's number, to resume
    after this batch; JSON. Raises ValueError for shapes that do not match.
    """

    input_ids: Tensor
    pixel_values: Tensor
    names: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    position: Any = None
    pixel_attention_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None

    def __post_init__(self) -> None:
        native = self.spatial_shapes is not None
        views, texts = self.pixel_values.shape[: -2 if native else -3], self.input_ids.shape[0]
        if len(views) not in ((1,) if native else (1, 2)) or views[-1] != texts:
            supported = "(N, P, values)" if native else "(N, C, H, W) or (V, N, C, H, W)"
            raise ValueError(
                f"Batch: pixel_values {tuple(self.pixel_values.shape)} for {texts} texts; supported: {supported}"
            )

    @property
    def images(self) -> int:
        """Views times texts."""
        return self.pixel_values.shape[: -2 if self.spatial_shapes is not None else -3].numel()

    def inputs(self, most: int | None) -> list[dict[str, Tensor]]:
        """The arguments of `Embedder`, in micro-batches of at most so many texts."""
        size = len(self.input_ids) if most is None else most
        views = self.pixel_values.ndim == 5
        parts = {"input_ids": self.input_ids.split(size), "pixel_values": self.pixel_values.split(size, dim=int(views))}
        if self.spatial_shapes is not None:
            parts["spatial_shapes"] = self.spatial_shapes.split(size)
        if self.pixel_attention_mask is not None:
            parts["pixel_attention_mask"] = self.pixel_attention_mask.split(size)
        return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]

    def to(self, device: torch.device) -> Batch:
        """On the device but for the mask and the shapes, which models read on the CPU without waiting for a GPU."""
        ids, pixels = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.pixel_values))
        return replace(self, input_ids=ids, pixel_values=pixels)

    def pin_memory(self) -> Batch:
        """For DataLoader's `pin_memory`."""
        return replace(self, input_ids=self.input_ids.pin_memory(), pixel_values=self.pixel_values.pin_memory())


BatchSource = Callable[[int, Any], Generator[Batch, None, None]]
"""Returns this process's batches, without end, from the batch of a number (0, 1, ...) on.

The second argument is the `position` of the batch before, or None at the start of the data. Training closes it.
"""


def generated(make: Callable[[int, torch.Generator], Batch], seed: int) -> BatchSource:
    """The source of batches that a function makes from their number and a generator seeded by it."""

    def batches(first: int, position: Any) -> Generator[Batch, None, None]:
        number = first
        while True:
            yield make(number, torch.Generator().manual_seed(seed_of(seed, number)))
            number += 1

    return batches


def seed_of(seed: int, number: int) -> int:
    """Knuth's multiplier spreads seeds, so that runs with neighbouring seeds share no batches."""
    return (seed * 2654435761 + number * 40503 + 1) % 2**63
