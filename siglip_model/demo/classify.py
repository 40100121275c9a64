"""The pictures that the package brings along, named by the model: what `siglip demo` shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline


def classify_demo_pictures(
    classifier: ZeroShotImageClassificationPipeline,
    folder: str | Path,
    hypothesis_template: str,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Each picture of `folder` against the names of all of them.

    Returns, in the order of the names, {"image": path, "name": its true name, "right": whether that came first,
    "predictions": [{"score", "label"}, ...] best first}. Raises FileNotFoundError where there are no pictures.
    """
    from siglip_model.zero_shot import rank

    pictures = sorted(Path(folder).glob("*.png"))
    if not pictures:
        raise FileNotFoundError(f"no pictures in {folder}; this installation lacks them")
    names = [picture_name(picture) for picture in pictures]
    label_embeds = classifier.encode_labels(names, hypothesis_template)
    scores: list[list[float]] = []
    for start in range(0, len(pictures), batch_size):
        pixels = torch.cat([classifier.prepare(picture) for picture in pictures[start : start + batch_size]])
        scores += classifier.score(pixels, label_embeds).tolist()
    results = []
    for picture, name, row in zip(pictures, names, scores, strict=True):
        predictions = rank(row, names)
        right = predictions[0]["label"] == name
        results.append({"image": str(picture), "name": name, "right": right, "predictions": predictions})
    return results


def picture_name(picture: Path) -> str:
    """A picture's true name is its file's: red-apple.png shows a red apple."""
    return picture.stem.replace("-", " ").replace("_", " ")


def score_on_card(checkpoint: str | Path) -> str | None:
    """What the checkpoint's model card claims for the choice among ten names, such as "91.2%"; None if it does not."""
    try:
        card = Path(checkpoint, "README.md").read_text(encoding="utf-8")
    except OSError:
        return None
    row = re.search(r"^\| ten-way[^|]*\|[* ]*(?P<score>[\d.]+%)[* ]*\|", card, re.MULTILINE)
    return None if row is None else row["score"]
