"""Unit embeddings of many images and texts, in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from siglip_model.images.batches import Failure, read_batches
from siglip_model.images.files import load_image
from siglip_model.images.model_inputs import Inputs, join, prepare, to_model
from siglip_model.model import SiglipModel
from siglip_model.outputs import pooled, unit_length
from siglip_model.processor import SiglipProcessor
from siglip_model.training.preparation import Preparation
from siglip_model.training.skipped import Skipped

Item = TypeVar("Item")


class Encoder:
    """A model in eval mode and its processor."""

    def __init__(self, model: SiglipModel, processor: SiglipProcessor, batch_size: int) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.preparation = Preparation(processor, model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """fp32 (n, D)."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            ids = self.preparation.encode(texts[start : start + self.batch_size]).to(self.model.device)
            parts.append(unit_length(pooled(self.model.get_text_features(ids)).float()))
        return torch.cat(parts)

    def images(
        self, items: Iterable[Item], source: Callable[[Item], Any], name: Callable[[Item], str]
    ) -> Iterator[tuple[list[Item] | Skipped, Tensor]]:
        """Batches of items with the embeddings of their images, fp32 (n, D); or one that cannot be read, alone.

        source: the image of an item, as `load_image` takes it. Threads read ahead, a bounded number.
        """

        def read(item: Item) -> Inputs:
            return prepare(self.processor.image_processor, load_image(source(item)))

        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        for batch in read_batches(items, read, batch_size=self.batch_size, workers=workers):
            if isinstance(batch, Failure):
                reason = str(batch.error).removeprefix(f"{name(batch.item)}: ")
                yield Skipped(name(batch.item), reason), torch.empty(0)
                continue
            with torch.no_grad():
                inputs: Any = to_model(join(batch.values), self.model.device, self.model.dtype)
                yield batch.items, unit_length(pooled(self.model.get_image_features(**inputs)).float())
