"""Selects the image processor class from a checkpoint's files."""

from __future__ import annotations

import os
from typing import Any

from siglip_model.checkpoints.files import split_hub_arguments
from siglip_model.images.fast import SiglipImageProcessorFast
from siglip_model.images.pillow import SiglipImageProcessor
from siglip_model.images.processor import ImageProcessor, read_settings


def load_image_processor(
    path_or_id: str | os.PathLike[str], *, use_fast: bool | None = None, **arguments: Any
) -> ImageProcessor:
    """The image processor of a directory or Hub repository; `use_fast` overrides the class that the file names.

    Other arguments and errors as for `ImageProcessor.from_pretrained`.
    """
    hub, given = split_hub_arguments(arguments)
    settings = read_settings(path_or_id, hub)
    if use_fast is None:
        use_fast = settings.get("image_processor_type") == SiglipImageProcessorFast.__name__
    cls = SiglipImageProcessorFast if use_fast else SiglipImageProcessor
    return cls._from_settings(settings, given)
