"""Whether a tokenizer and an image processor suit a model: found before any image is read.

Components of other libraries are not examined.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.fields import shown
from siglip_model.config import PretrainedConfig, Siglip2VisionConfig, SiglipConfig
from siglip_model.images.naflex import Siglip2ImageProcessor
from siglip_model.images.processor import ImageProcessor
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.text.tokenizer import Tokenizer


def check_fit(config: PretrainedConfig, tokenizer: Any, image_processor: Any, where: str) -> None:
    """Raises CheckpointError if the model takes neither the processor's images nor the tokenizer's ids.

    where: what the message names if a component was not loaded from a file.
    """
    if isinstance(image_processor, ImageProcessor):
        _check_images(getattr(config, "vision_config", config), image_processor, image_processor.name_or_path or where)
    if isinstance(tokenizer, Tokenizer) and isinstance(config, SiglipConfig):
        _check_ids(config.text_config, tokenizer, _file(tokenizer) or where)


def _check_images(vision: Any, processor: ImageProcessor, where: str) -> None:
    for name in ("image_mean", "image_std") if processor.do_normalize else ():
        value = getattr(processor, name)
        if isinstance(value, list) and len(value) != vision.num_channels:
            raise CheckpointError(
                f"{where}: {name} is {shown(value)}; supported: a number, or one for each of the model's "
                f"{vision.num_channels} channels"
            )
    naflex = isinstance(vision, Siglip2VisionConfig)
    kinds = (Siglip2ImageProcessor if naflex else SiglipImageProcessor).kinds
    if processor.kinds != kinds:
        raise CheckpointError(
            f"{where}: the image processor is a {type(processor).__name__}; supported by the model: {kinds[0]}(Pil)"
        )
    if naflex:
        patch_size = getattr(processor, "patch_size", None)
        if patch_size != vision.patch_size:
            raise CheckpointError(f"{where}: patch_size is {patch_size}; supported: the model's, {vision.patch_size}")
        return
    name, size = _size_of_pixels(processor)
    if "height" not in size:
        return
    grid = vision.image_size // vision.patch_size
    patches = (size["height"] // vision.patch_size) * (size["width"] // vision.patch_size)
    if patches not in (1, grid**2):
        side = grid * vision.patch_size
        raise CheckpointError(
            f"{where}: {name} is {dict(size)}, {patches:,} patches of the model; supported: "
            f"{ {'height': side, 'width': side} }, {grid**2:,} patches"
        )


def _size_of_pixels(processor: ImageProcessor) -> tuple[str, dict[str, int]]:
    """The option that decides how large all images become, and its value; an empty size if each image decides."""
    for step, name in (("do_pad", "pad_size"), ("do_center_crop", "crop_size"), ("do_resize", "size")):
        if getattr(processor, step):
            return name, getattr(processor, name) or {}
    return "size", {}


def check_pixels(config: PretrainedConfig, image_processor: Any, pixel_values: torch.Tensor) -> None:
    """Raises CheckpointError if a processor that does not resize made pixels (.., height, width) of another size."""
    vision: Any = getattr(config, "vision_config", config)  # a vision tower's configuration is itself
    if isinstance(vision, Siglip2VisionConfig) or not isinstance(image_processor, ImageProcessor):
        return
    if "height" in _size_of_pixels(image_processor)[1]:
        return
    height, width = pixel_values.shape[-2:]
    grid = vision.image_size // vision.patch_size
    if (height // vision.patch_size) * (width // vision.patch_size) not in (1, grid**2):
        side = grid * vision.patch_size
        where = image_processor.name_or_path or "the image processor"
        raise CheckpointError(
            f"{where}: do_resize is False, and the image has {height} x {width} pixels; supported: {side} x {side}"
        )


def _file(tokenizer: Tokenizer) -> str:
    return os.path.join(tokenizer.name_or_path, tokenizer.config_name) if tokenizer.name_or_path else ""


def _check_ids(text: Any, tokenizer: Tokenizer, where: str) -> None:
    if tokenizer.pad_token is None and tokenizer.name_or_path:
        raise CheckpointError(f"{where}: pad_token is None; supported: a token, which every text is padded with")
    # A GPU would end with a device-side assertion.
    ids = {name: getattr(tokenizer, f"{name}_id") or 0 for name in ("eos_token", "pad_token")}
    ids["added_tokens_decoder"] = max(tokenizer.added_tokens_decoder, default=0)
    ids["vocabulary"] = max(tokenizer.get_vocab().values(), default=0)
    for name, largest in ids.items():
        if largest >= text.vocab_size:
            if name in ("added_tokens_decoder", "vocabulary"):  # both files add tokens
                where = f"{where} with {tokenizer.vocabulary_path}"
            raise CheckpointError(
                f"{where}: {name} reaches id {largest}; supported: ids below the model's vocab_size, {text.vocab_size}"
            )
