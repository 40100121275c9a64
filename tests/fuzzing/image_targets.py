"""Images of many formats, of which one is damaged."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_targets import LABELS, build_siglip, picture
from embedding_targets import OUT, embed
from mutations import image_file, png_file
from PIL import Image
from target import Result, Target, run_command

from siglip_model import pipeline
from siglip_model.cli.options import SOME_FAILED
from siglip_model.embed import load_embeddings

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
SAVED: dict[str, tuple[str, dict[str, Any]]] = {  # mode and options of `save` by file name
    "0.bmp": ("RGB", {}),
    "0.gif": ("P", {"save_all": True, "append_images": [Image.new("P", (32, 32), 3)]}),
    "0.ico": ("RGBA", {"sizes": [(32, 32), (16, 16)]}),
    "0.jp2": ("RGB", {}),
    "0.jpg": ("RGB", {"exif": TURNED}),
    "1.jpg": ("CMYK", {"progressive": True}),
    "0.png": ("RGB", {}),
    "1.png": ("P", {}),
    "2.png": ("I;16", {}),
    "0.ppm": ("RGB", {}),
    "0.tga": ("RGB", {"compression": "tga_rle"}),
    "0.tif": ("RGB", {"compression": "tiff_lzw"}),
    "1.tif": ("F", {}),
    "0.webp": ("RGB", {}),
}
IMAGE_NAMES = [f"images/{name}" for name in SAVED]


def build_images(folder: Path) -> None:
    """Images of many formats, and a checkpoint."""
    folder.mkdir()
    build_siglip(folder / "checkpoint")
    (folder / "images").mkdir()
    for name, (mode, options) in SAVED.items():
        _in_mode(mode).save(folder / "images" / name, **options)


def _in_mode(mode: str) -> Image.Image:
    levels = np.asarray(picture())[:, :, 0]
    if mode == "I;16":
        return Image.fromarray(levels.astype(np.uint16) * 256)
    return Image.fromarray(levels / np.float32(255)) if mode == "F" else picture().convert(mode)


def use_embed_folder(folder: Path) -> Result:
    embed(folder, [str(folder / "images")])
    return _stored(folder)


def _stored(folder: Path) -> Result:
    stored = load_embeddings(folder / OUT)
    rows = dict(zip(stored.files, stored.embeddings.tolist(), strict=True))
    return {"rows": _by_name(rows, folder), "failed": _by_name(stored.failed, folder)}


def use_embed_command(folder: Path) -> Result:
    words = ["embed", str(folder / "images"), "--out", str(folder / OUT), "--json"]
    run_command([*words, "--model", str(folder / "checkpoint"), "--device", "cpu"], allowed=(0, SOME_FAILED))
    return _stored(folder)


def use_classify_command(folder: Path) -> Result:
    words = ["classify", str(folder / "images"), "--labels", ",".join(LABELS), "--json"]
    words += ["--model", str(folder / "checkpoint"), "--device", "cpu"]
    results = json.loads(run_command(words, allowed=(0, SOME_FAILED)))
    rows = {result["image"]: _scores(result["predictions"]) for result in results if "error" not in result}
    failed = {result["image"]: result["error"] for result in results if "error" in result}
    return {"rows": _by_name(rows, folder), "failed": _by_name(failed, folder)}


def use_pipeline_on_each(folder: Path) -> Result:
    paths = [str(folder / name) for name in IMAGE_NAMES]
    results = pipeline(model=folder / "checkpoint", device="cpu")(paths, LABELS)
    rows = {path: _scores(result) for path, result in zip(paths, results, strict=True)}
    return {"rows": _by_name(rows, folder), "failed": {}}


def _scores(predictions: list[dict[str, Any]]) -> list[float]:
    return [entry["score"] for entry in sorted(predictions, key=lambda entry: entry["label"])]


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
    {name: png_file if name.endswith(".png") else image_file for name in IMAGE_NAMES},
    {
        "embed_images": use_embed_folder,
        "siglip embed": use_embed_command,
        "siglip classify": use_classify_command,
        "pipeline": use_pipeline_on_each,
    },
    ("UnreadableImageError",),
    images_problem,
)
