"""A folder of captioned images: which images there are, and the captions of each. Imports no PyTorch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from siglip_model.images.files import list_images
from siglip_model.text.encodings import encoding_of
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
    per line. Texts are in UTF-8, or as a byte order mark says. Rows of the same image are joined. Raises ValueError if
    there are none, or several of these files, NotADirectoryError for what is not a folder.
    """
    folder = Path(folder)
    tables = captions_files(folder)
    if len(tables) > 1:
        raise ValueError(f"{folder} holds {' and '.join(table.name for table in tables)}; supported: one of them")
    skipped: list[Skipped] = []
    found: dict[str, list[str]] = {}
    for name, row in _rows(tables[0]) if tables else _beside(folder):
        try:
            image, captions = _pair(row)
        except ValueError as error:
            skipped.append(Skipped(name, str(error)))
        else:
            found.setdefault(str(folder / image), []).extend(captions)
    if not found:
        first = f"; the first of {len(skipped)}: {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise ValueError(
            f"{folder} holds no captioned images{first}; supported: captions.jsonl, captions.csv or captions.parquet, "
            "or a name.txt beside each name.jpg"
        )
    return [Captioned(image, tuple(captions)) for image, captions in found.items()], skipped


def _pair(row: Any) -> tuple[str, list[str]]:
    """The image and the captions of a row. Raises ValueError that says what is wrong with it."""
    if isinstance(row, Exception):
        raise ValueError(f"cannot be read ({row})") from row
    image = first_of(IMAGE_COLUMNS, row) if isinstance(row, dict) else None
    if not isinstance(image, str):
        raise ValueError(f"is no row with {' or '.join(IMAGE_COLUMNS)}")
    if None in row:  # what csv calls the cells beyond the header
        raise ValueError("has more cells than the header; a caption that holds commas must be quoted")
    captions = clean_captions(first_of(CAPTION_COLUMNS, row))
    if not captions:
        raise ValueError("has no caption")
    return image, captions


def first_of(names: Sequence[str], row: dict[Any, Any]) -> Any:
    """The first of these values that is there; None if none is."""
    return next((row[name] for name in names if row.get(name)), None)


def clean_captions(captions: Any) -> list[str]:
    """The texts that are not blank, of one text or of several. Raises ValueError for bytes that were not decoded."""
    several = [captions] if isinstance(captions, str) else captions
    if not isinstance(several, (list, tuple)):
        return []
    texts = [text.strip() for text in several if isinstance(text, str) and text.strip()]
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ValueError("has a caption that is not valid UTF-8")
    return texts


def decode(content: bytes) -> str:
    """The text of a file; bytes of another encoding stay recognisable, as `clean_captions` expects."""
    return content.decode(encoding_of(content), errors="surrogateescape")


def captions_files(folder: Path) -> list[Path]:
    """The files captions.* of the folder that are supported. Raises NotADirectoryError."""
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{str(folder)!r} is not a folder; supported: a folder, or shards such as 'a/{{000..099}}.tar'"
        )
    return [path for suffix in _READERS if (path := folder / f"captions{suffix}").is_file()]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_READERS[path.suffix](path), start=1):
        yield f"{path}, row {number}", row


def _open(path: Path) -> TextIO:
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    return open(path, encoding=encoding, errors="surrogateescape", newline="")


def _read_jsonl(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield error


def _read_csv(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        # strict: a quote that is never closed would make the rest of the file a caption
        rows = csv.DictReader(file, skipinitialspace=True, strict=True)
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise RuntimeError(f"reading {path.name} needs pip install 'siglip-triton[train]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a valid parquet file ({error})") from error


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _beside(folder: Path) -> Iterator[tuple[str, Any]]:
    for image in list_images([folder]):
        text = Path(image).with_suffix(".txt")
        try:
            lines = decode(text.read_bytes()).splitlines() if text.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            yield image, error
        else:
            yield image, {"image": image, "captions": lines}
