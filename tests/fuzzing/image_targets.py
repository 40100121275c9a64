"""Images of several formats, of which one is damaged."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_targets import LABELS, build_siglip, picture
from embedding_targets import OUT, embed
from mutations import image_file
from target import Result, Target

from siglip_model import pipeline
from siglip_model.embed import load_embeddings

IMAGE_NAMES = [f"images/0.{suffix}" for suffix in ("bmp", "gif", "ico", "jpg", "png", "ppm", "tif", "webp")]


def build_images(folder: Path) -> None:
    """An image of each format, and a checkpoint."""
    folder.mkdir()
    build_siglip(folder / "checkpoint")
    (folder / "images").mkdir()
    for name in IMAGE_NAMES:
        picture().save(folder / name)


def use_embed_folder(folder: Path) -> Result:
    embed(folder, [str(folder / "images")])
    stored = load_embeddings(folder / OUT)
    rows = dict(zip(stored.files, stored.embeddings.tolist(), strict=True))
    return {"rows": _by_name(rows, folder), "failed": _by_name(stored.failed, folder)}


def use_pipeline_on_each(folder: Path) -> Result:
    paths = [str(folder / name) for name in IMAGE_NAMES]
    results = pipeline(model=folder / "checkpoint", device="cpu")(paths, LABELS)
    rows = {path: [entry["score"] for entry in result] for path, result in zip(paths, results, strict=True)}
    return {"rows": _by_name(rows, folder), "failed": {}}


def _by_name(values: Mapping[str, Any], folder: Path) -> Result:
    return {os.path.relpath(path, folder): value for path, value in values.items()}


def images_problem(result: Result, whole: Result, done: str) -> str:
    """The damaged image has a finite row or a reason that names it; the others have their rows."""
    rows = result["rows"]
    other = [name for name, row in whole["rows"].items() if not np.allclose(rows.get(name, np.nan), row, atol=1e-5)]
    if len(other) > 1 or not all(np.isfinite(row).all() for row in rows.values()):
        return f"no row or another for {other}"
    unclear = [reason for name, reason in result["failed"].items() if not re.search(f"{re.escape(name)}: .+", reason)]
    return f"the reason is {unclear[0]!r}" if unclear else ""


IMAGE = Target(
    "image",
    build_images,
    dict.fromkeys(IMAGE_NAMES, image_file),
    {"embed_images": use_embed_folder, "pipeline": use_pipeline_on_each},
    ("UnreadableImageError",),
    images_problem,
)
