"""From an image and its captions to the model's inputs: one caption at random, augmentation, the processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from siglip_model.images.model_inputs import Inputs, join, prepare
from siglip_model.processor import SiglipProcessor
from siglip_model.training.batch import Batch
from siglip_model.training.skipped import Skipped


class Prepared(NamedTuple):
    """One pair. input_ids: int64 (length,). image: the model's arguments, a batch of one."""

    name: str
    input_ids: Tensor
    image: Inputs


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
        return Prepared(name, self.encode([caption])[0], prepare(self.processor.image_processor, image))

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
        raise RuntimeError("crop_scale (--crop-scale) below 1 needs pip install 'siglip-triton[train]'") from error
    except RuntimeError as error:  # a build of torchvision for another one of torch
        raise RuntimeError(f"crop_scale (--crop-scale): torchvision cannot be imported: {error}") from error
    return RandomResizedCrop


def collate(pairs: Sequence[Prepared], skipped: Sequence[Skipped] = (), position: Any = None) -> Batch:
    """A batch of pairs."""
    return Batch(
        torch.stack([pair.input_ids for pair in pairs]),
        names=tuple(pair.name for pair in pairs),
        skipped=tuple(skipped),
        position=position,
        **join([pair.image for pair in pairs]),
    )
