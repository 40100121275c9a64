"""Zero-shot classification accuracy over a folder with one folder of images per class, as ImageNet's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_model.images.files import list_images
from siglip_model.text.prompts import fill_template
from siglip_model.training.evaluation.encoder import Encoder
from siglip_model.training.processes import Processes
from siglip_model.training.skipped import Skipped

NAMES = "classes.json"


def find_classes(folder: str | Path) -> dict[Path, str]:
    """The folders of the classes, and their names: those of classes.json (folder -> name), else the folders' own.

    In a folder's own name "_" stands for a space. Raises ValueError if there are no folders, or one is not named.
    """
    folder = Path(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{folder} holds no folders; supported: one folder of images per class")
    if not (folder / NAMES).is_file():
        return {path: path.name.replace("_", " ") for path in folders}
    try:
        names = json.loads((folder / NAMES).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{folder / NAMES} is not valid JSON in UTF-8 ({error})") from error
    for path in folders:
        if not (isinstance(names, dict) and isinstance(names.get(path.name), str)):
            raise ValueError(f"{folder / NAMES} does not name {path.name!r}; supported: a name for each folder")
    return {path: names[path.name] for path in folders}


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit embeddings (classes, D): the mean over the templates, as open_clip and CLIP ensemble them."""
    parts = [encoder.texts(fill_template(names, template)) for template in templates]
    return torch.nn.functional.normalize(torch.stack(parts).mean(0), dim=-1)


def zero_shot_accuracy(
    encoder: Encoder,
    classes: dict[Path, str],
    templates: Sequence[str],
    processes: Processes,
    on_failure: Callable[[Skipped], None],
) -> dict[str, Any]:
    """Fractions of images whose class is the best (top1) or among the best five (top5); ties and NaN count as wrong."""
    embeddings = class_embeddings(encoder, list(classes.values()), templates)
    images = top1 = top5 = failed = 0

    def own() -> Iterator[tuple[str, int]]:
        pairs = ((path, index) for index, folder in enumerate(classes) for path in list_images([folder]))
        for number, pair in enumerate(pairs):
            if number % processes.world == processes.rank:
                yield pair

    for found, vectors in encoder.images(own(), lambda item: item[0], lambda item: item[0]):
        if isinstance(found, Skipped):
            failed += 1
            on_failure(found)
            continue
        scores = vectors @ embeddings.T
        right = torch.tensor([index for _, index in found], device=scores.device)[:, None]
        others = scores.scatter(1, right, -torch.inf)
        better = (~(others < scores.gather(1, right))).sum(1)
        images += len(found)
        top1 += int((better < 1).sum())
        top5 += int((better < 5).sum())
    images, top1, top5, failed = map(int, processes.sum(images, top1, top5, failed))
    if images == 0:
        raise ValueError(f"no image of {len(classes)} classes could be read")
    scores_of = {"top1": top1 / images, "top5": top5 / images}
    return {"task": "zero-shot", "classes": len(classes), "images": images, "failed": failed, **scores_of}
