"""Zero-shot classification of the bundled images: what `siglip demo` shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from siglip_model.demo import SCORE_FILE

if TYPE_CHECKING:
    from siglip_model.zero_shot import Prediction, ZeroShotImageClassificationPipeline


def classify_demo_pictures(
    classifier: ZeroShotImageClassificationPipeline,
    folder: str | Path,
    hypothesis_template: str,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Scores each image of `folder` against the names of all of them.

    Returns, in the order of the names, {"image": path, "name": its true name, "right": whether that name ranks first,
    "predictions": [{"score", "label"}, ...] best first}. Raises FileNotFoundError if there are no images.
    """
    images = [str(path) for path in sorted(Path(folder).glob("*.png"))]
    if not images:
        raise FileNotFoundError(f"no images in {folder}; this installation lacks them")
    names = [image_name(image) for image in images]
    ranked = classifier(images, names, hypothesis_template=hypothesis_template, batch_size=batch_size)
    return [
        {"image": image, "name": name, "right": predictions[0]["label"] == name, "predictions": predictions}
        for image, name, predictions in zip(images, names, cast("list[list[Prediction]]", ranked), strict=True)
    ]


def image_name(path: str) -> str:
    """The true name of an image, from its file name: red-apple.png shows a red apple."""
    return Path(path).stem.replace("-", " ").replace("_", " ")


def ten_way_score(checkpoint: str | Path) -> float | None:
    """The checkpoint's measured accuracy among ten names, in [0, 1]; None if it has no score file."""
    try:
        return float(json.loads(Path(checkpoint, SCORE_FILE).read_text())["ten_way"])
    except FileNotFoundError:
        return None
