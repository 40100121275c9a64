"""Photos for the measurement of bulk embedding: JPEG files of smooth noise, which compresses about as photos do."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

DIFFERENT = 64  # photos that are drawn; further files are copies
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # deleted when the process ends


@functools.cache
def photos(count: int, width: int, height: int) -> list[str]:
    """Paths of so many files, in a temporary folder."""
    from PIL import Image

    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="photos-"))
    draw = np.random.default_rng(0)
    paths: list[str] = []
    for number in range(count):
        paths.append(str(Path(_FOLDERS[-1].name) / f"{number:06}.jpg"))
        if number >= DIFFERENT:
            shutil.copyfile(paths[number % DIFFERENT], paths[-1])
            continue
        coarse = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths
