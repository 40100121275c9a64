"""Reads the images of sources, in threads or processes: decodes them, and prepares what the model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from siglip_model.embed.sources import Source
from siglip_model.fit import check_pixels
from siglip_model.images import model_inputs
from siglip_model.images.files import DOWNLOAD_SECONDS, open_image
from siglip_model.images.limits import PixelBudget
from siglip_model.images.model_inputs import Inputs


@dataclass(frozen=True)
class ImageReader:
    """Calling it with a source gives the model's inputs for its image, on the CPU.

    config: the model's. levels: give the image instead, uint8 (1, 3, height, width), for `Preparation`.
    at_least: as for `open_image`.
    """

    image_processor: Any
    config: Any
    budget: PixelBudget
    levels: bool = False
    at_least: int | None = None

    def __call__(self, source: Source) -> Inputs:
        with open_image(content_of(source), DOWNLOAD_SECONDS, self.budget, self.at_least) as image:
            options = AS_LEVELS if self.levels else {}
            prepared = model_inputs.prepare(self.image_processor, image, **options)
        if not self.levels:
            check_pixels(self.config, self.image_processor, prepared["pixel_values"])
        return prepared

    def for_processes(self, context: Any) -> ImageReader:
        """A reader for the processes of a context, which share a budget as large as this one's."""
        return replace(self, budget=PixelBudget(self.budget.max_pixels, context))


# The steps that are left to the device
AS_LEVELS = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


def shortest_side(image_processor: Any, option: str) -> int:
    """The `at_least` of images that the processor resizes. Raises ValueError, which names the option that needs it,
    unless it resizes all to one size."""
    size = getattr(image_processor, "size", None)
    fixed = (
        isinstance(size, dict) and {"height", "width"} <= size.keys() and getattr(image_processor, "do_resize", False)
    )
    if not fixed or hasattr(image_processor, "max_num_patches"):
        raise ValueError(
            f"{option} needs an image processor that resizes all images to one size; this one is {image_processor!r}"
        )
    return int(max(size["height"], size["width"]))  # type: ignore[index]


def content_of(source: Source) -> Any:
    if isinstance(source.content, Exception):
        raise source.content
    return source.content
