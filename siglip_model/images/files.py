"""Image files: listing those below a folder, and opening one from a path, a URL or base64. Imports no PyTorch."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

# The suffixes that a search through a folder takes. A file named explicitly is opened regardless of its suffix.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k",
)  # fmt: skip

LISTED_IN_MEMORY = 2**24  # bytes of paths; a longer list continues on disk


class UnreadableImageError(OSError, ValueError):
    """An image that is missing, truncated, not an image or of unknown value range; the message names source and why."""


def load_image(image: str | os.PathLike[str] | Image.Image, timeout: float | None = None) -> Image.Image:
    """The image in RGB with its EXIF orientation applied, as transformers' pipelines load it.

    Images of more than 8 bits are scaled from their value range (`value_range.to_8_bits`), where transformers clips.

    image: a path, an http(s) URL, a base64 string with or without `data:image/...;base64,`, or a PIL image.
    timeout: seconds to wait for a URL; None waits indefinitely.
    Raises UnreadableImageError (an OSError and a ValueError) naming the source, TypeError for any other type.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        source: Any = image
    elif isinstance(image, (str, os.PathLike)):
        source = os.fspath(image)
    else:
        raise TypeError(
            f"image is of type {type(image).__name__}; supported: a path, a URL, a base64 string or a PIL image"
        )
    try:
        if isinstance(source, str):
            with Image.open(_open_source(source, timeout)) as opened:
                return _upright_rgb(opened)
        return _upright_rgb(source)
    # Decoders raise many types: OSError, SyntaxError, struct.error, DecompressionBombError ...
    except Exception as error:
        raise UnreadableImageError(f"{describe_source(source)}: {_reason(source, error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    from siglip_model.images.value_range import to_8_bits

    return to_8_bits(ImageOps.exif_transpose(image), opened=image).convert("RGB")


def _open_source(source: str, timeout: float | None) -> str | BytesIO:
    if is_url(source):
        from urllib.request import Request, urlopen

        request = Request(source, headers={"User-Agent": "siglip_model"})
        with urlopen(request, timeout=timeout) as response:
            return BytesIO(response.read())
    if os.path.exists(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    return BytesIO(base64.decodebytes(encoded.encode()))


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def describe_source(source: object) -> str:
    """A source as error messages name it; long base64 strings are shortened."""
    text = source if isinstance(source, str) else f"<{type(source).__name__}>"
    return text if len(text) <= 500 else f"{text[:60]}... ({len(text)} characters)"


def _reason(source: object, error: Exception) -> str:
    if isinstance(source, str) and os.path.isdir(source):
        readable = os.access(source, os.R_OK | os.X_OK)
        return "is a folder, not an image" if readable else "is a folder that cannot be read"
    if isinstance(source, str) and not source.startswith("data:image/") and not is_url(source):
        if os.path.islink(source) and not os.path.exists(source):
            return "is a link to a file that does not exist"
        if not os.path.exists(source):
            return "no such file (nor is it a URL beginning with http:// or https://, or an image in base64)"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or in an unsupported format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def list_images(inputs: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yields the images that the inputs stand for: absolute paths, and URLs unchanged. Memory stays constant.

    A folder stands for the images anywhere below it, chosen by suffix, without hidden names, following links, sorted
    by name so that two runs agree. Any other input stands for itself and is repeated if it was given twice.
    """
    for entry in inputs:
        source = os.fspath(entry)
        if is_url(source):
            yield source
        elif os.path.isdir(source):
            yield from _walk(os.path.abspath(source), ())
        else:
            yield os.path.abspath(source)


class ImageList:
    """The images that the inputs stand for, listed once: a sized iterable of paths in constant memory.

    The paths are kept in a temporary file, one line of JSON each, that stays in memory while it is short. Iterate one
    pass at a time.
    """

    def __init__(self, inputs: Iterable[str | os.PathLike[str]]) -> None:
        self._lines = tempfile.SpooledTemporaryFile(LISTED_IN_MEMORY)  # noqa: SIM115  # closed by `close`
        self._count = 0
        for path in list_images(inputs):
            # JSON escapes newlines within names, and the surrogates of names that are not valid Unicode.
            self._lines.write(json.dumps(path).encode() + b"\n")
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        self._lines.seek(0)
        for line in self._lines:
            yield json.loads(line)

    def close(self) -> None:
        self._lines.close()


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _walk(folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError:
        yield folder  # opening it as an image reports the reason, and the walk continues
        return
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to an enclosing folder
        return
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, (*ancestors, identity))
        elif _is_image_name(name):
            yield path
