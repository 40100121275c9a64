"""A folder of captioned images: which images there are, and the captions of each. Imports no PyTorch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from siglip_model.images.files import list_images
from siglip_model.training.skipped import Skipped

IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text")


class Captioned(NamedTuple):
    """An image file and its captions, at least one."""

    image: str
    captions: tuple[str, ...]


def read_captions(folder: str | Path) -> tuple[list[Captioned], list[Skipped]]:
    """The captioned images of a folder, and what was left out of them.

    Captions are in captions.jsonl, captions.csv or captions.parquet, with columns `image` (or `file_name`), relative to
    the folder, and `caption` (or `captions`, `text`): a text or a list of texts; or in name.txt beside name.jpg, one
    per line. Rows of the same image are joined. Raises ValueError if there are none, or several of these files,
    NotADirectoryError for what is no folder.
    """
    folder = Path(folder)
    tables = captions_files(folder)
    if len(tables) > 1:
        raise ValueError(f"{folder} holds {' and '.join(table.name for table in tables)}; supported: one of them")
    skipped: list[Skipped] = []
    found: dict[str, list[str]] = {}
    for name, row in _rows(tables[0]) if tables else _beside(folder):
        try:
            image = next(row[column] for column in IMAGE_COLUMNS if row.get(column))
            captions: Any = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), [])
        except (StopIteration, AttributeError):
            skipped.append(Skipped(name, f"is no row with {' or '.join(IMAGE_COLUMNS)}"))
            continue
        kept = clean_captions(captions)
        if kept:
            found.setdefault(str(folder / image), []).extend(kept)
        else:
            skipped.append(Skipped(name, "has no caption"))
    if not found:
        first = f"; the first of {len(skipped)}: {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise ValueError(
            f"{folder} holds no captioned images{first}; supported: captions.jsonl, captions.csv or captions.parquet, "
            "or a name.txt beside each name.jpg"
        )
    return [Captioned(image, tuple(captions)) for image, captions in found.items()], skipped


def clean_captions(captions: Any) -> list[str]:
    """The texts that are not blank, of one text or of several."""
    several = [captions] if isinstance(captions, str) else captions
    if not isinstance(several, (list, tuple)):
        return []
    return [text.strip() for text in several if isinstance(text, str) and text.strip()]


def captions_files(folder: Path) -> list[Path]:
    """The files captions.* of the folder that are supported. Raises NotADirectoryError."""
    if not folder.is_dir():
        raise NotADirectoryError(f"data (--data) is {str(folder)!r}, which is no folder; supported: a folder or *.tar")
    return [path for suffix in _READERS if (path := folder / f"captions{suffix}").is_file()]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_READERS[path.suffix](path), start=1):
        yield f"{path}, row {number}", row


def _read_jsonl(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    yield None


def _read_csv(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise RuntimeError(f"reading {path.name} needs pip install 'siglip-triton[train]'") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _beside(folder: Path) -> Iterator[tuple[str, Any]]:
    for image in list_images([folder]):
        text = Path(image).with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
        yield image, {"image": image, "captions": lines}
