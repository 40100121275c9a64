"""A few images of the evaluation data with what the model takes them for, as a picture."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from siglip_model.images.files import UnreadableImageError, list_images, load_image
from siglip_model.model import SiglipModel
from siglip_model.plot import PlotRow, plot_predictions, thumbnail
from siglip_model.processor import SiglipProcessor
from siglip_model.text.prompts import TEMPLATE
from siglip_model.training.evaluation.retrieval import Pair
from siglip_model.training.evaluation.run import captioned_samples
from siglip_model.training.evaluation.zero_shot import find_classes
from siglip_model.training.processes import Processes
from siglip_model.zero_shot import ZeroShotImageClassificationPipeline

COUNT, BEST = 6, 3


def plot_samples(data: str, model: SiglipModel, processor: SiglipProcessor, path: Path) -> None:
    """Draws COUNT images, each beside the scores of its BEST names: of the classes, or of these images' captions.

    Draws nothing if no image can be read.
    """
    images, labels, template = _chosen(data, Processes(model.device))
    if not images:
        return
    classify = ZeroShotImageClassificationPipeline(model, processor.tokenizer, processor.image_processor)
    found: Any = classify([image for _, image in images], labels, hypothesis_template=template, top_k=BEST)
    rows = [PlotRow(thumbnail(image), title, best) for (title, image), best in zip(images, found, strict=True)]
    plot_predictions(rows, path)


def _chosen(data: str, alone: Processes) -> tuple[list[tuple[str, Any]], list[str], str]:
    """Titled images, the labels and the template that they are scored with."""
    samples = captioned_samples(data, alone)
    if samples is None:
        classes = find_classes(data)
        paths = ((name, path) for folder, name in classes.items() for path in islice(list_images([folder]), 1))
        return _readable(islice(paths, COUNT)), list(classes.values()), TEMPLATE
    pairs = list(islice((sample for sample in samples if isinstance(sample, Pair)), COUNT))
    images = _readable((pair.captions[0], pair.image) for pair in pairs)
    return images, list(dict.fromkeys(title for title, _ in images)), "{}"


def _readable(entries: Any) -> list[tuple[str, Any]]:
    found = []
    for title, source in entries:
        try:
            found.append((title, load_image(source)))
        except UnreadableImageError:  # the evaluation names it
            continue
    return found
