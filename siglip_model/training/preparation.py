"""From an image and its captions to the model's inputs: one caption at random, augmentation, the processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from siglip_model.processor import SiglipProcessor
from siglip_model.training.batch import Batch
from siglip_model.training.skipped import Skipped


class Prepared(NamedTuple):
    """One pair. input_ids: int64 (length,). pixel_values: float32 (C, H, W)."""

    name: str
    input_ids: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class Preparation:
    """text_length: tokens of each text. crop_scale: least area of random crops, as in open_clip; 1 takes whole images.

    flip: mirror half of the images. Raises RuntimeError if crops are asked for without torchvision.
    """

    processor: SiglipProcessor
    text_length: int
    crop_scale: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_scale < 1:
            _random_resized_crop()

    def __call__(self, name: str, image: Image.Image, captions: Sequence[str], seed: str) -> Prepared:
        """The pair; all that is random depends on the seed. Seeds torch's generator."""
        chance = random.Random(seed)
        caption = chance.choice(captions)
        if self.crop_scale < 1:
            torch.manual_seed(chance.getrandbits(63))
            top, left, height, width = _random_resized_crop().get_params(image, [self.crop_scale, 1.0], [3 / 4, 4 / 3])
            image = image.crop((left, top, left + width, top + height))
        if self.flip and chance.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return Prepared(name, self.encode([caption])[0], pixels)

    def encode(self, texts: list[str]) -> Tensor:
        """Token ids, int64 (n, length), padded as the model was trained."""
        ids = self.processor.tokenizer(
            texts, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        )
        return ids["input_ids"]


def _random_resized_crop() -> Any:
    try:
        from torchvision.transforms import RandomResizedCrop
    except ModuleNotFoundError as error:
        raise RuntimeError("crop_scale below 1 needs pip install 'siglip-triton[train]'") from error
    return RandomResizedCrop


def collate(pairs: Sequence[Prepared], skipped: Sequence[Skipped] = (), position: Any = None) -> Batch:
    """A batch of pairs."""
    return Batch(
        torch.stack([pair.input_ids for pair in pairs]),
        torch.stack([pair.pixel_values for pair in pairs]),
        tuple(pair.name for pair in pairs),
        tuple(skipped),
        position,
    )
