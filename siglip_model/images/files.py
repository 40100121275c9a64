"""Image files: listing those below a folder, and opening one from a path, a URL or base64. Imports no PyTorch."""

from __future__ import annotations

import base64
import binascii
import errno
import json
import math
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from siglip_model.images.limits import PixelBudget

if TYPE_CHECKING:
    from PIL import Image

# The suffixes that a search through a folder takes. A file named explicitly is opened regardless of its suffix.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k",
)  # fmt: skip

LISTED_IN_MEMORY = 2**24  # bytes of paths; a longer list continues on disk
DOWNLOAD_BYTES = 2**28  # of one image
DOWNLOAD_SECONDS = 60.0  # of one image, where a run must not wait indefinitely
PILLOW_LIMIT = 178_956_970  # pixels from which Pillow refuses to open an image by default
# Beginnings of ICO and ICNS files: containers whose images tell their size when they are decoded
SIZE_WITHIN = (b"\0\0\1\0", b"icns")
_PILLOW_LIMIT_SUSPENDED = threading.Lock()
_DECODED_AS = {"WEBP": 2, "AVIF": 2, "JPEG2000": 3}  # times eight bytes per pixel, rounded up
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 0x0112, 322, 323  # tags of EXIF and TIFF
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


class UnreadableImageError(OSError, ValueError):
    """An image that is missing, truncated, not an image or of unknown value range; the message names source and why."""


@dataclass(frozen=True)
class EncodedImage:
    """The content of an image file that is part of another, such as a member of an archive; messages give its name."""

    name: str
    content: bytes


def load_image(
    image: str | os.PathLike[str] | Image.Image, timeout: float | None = None, max_pixels: int | None = None
) -> Image.Image:
    """The image in RGB with its EXIF orientation applied, as transformers' pipelines load it.

    Images of more than 8 bits are scaled from their value range (`value_range.to_8_bits`), where transformers clips.
    Of several frames, the first.

    image: a path, an http(s) URL, a base64 string with or without `data:image/...;base64,`, or a PIL image, which is
    returned itself if there is nothing to change.
    timeout: seconds that a URL may take; None waits indefinitely.
    max_pixels: refuse a larger image before decoding it (default: `limits.MAX_PIXELS`), unless it is a PIL image.
    Raises UnreadableImageError (an OSError and a ValueError) naming the source, TypeError for any other type.
    """
    with ExitStack() as held:
        return _load(image, timeout, PixelBudget(max_pixels), held)


def decode_image(content: bytes, name: str) -> Image.Image:
    """`load_image` of a file's content. name: what UnreadableImageError names."""
    with ExitStack() as held:
        return _load(EncodedImage(name, content), None, PixelBudget(), held)


@contextmanager
def open_image(
    image: str | os.PathLike[str] | Image.Image | EncodedImage,
    timeout: float | None,
    budget: PixelBudget,
    at_least: int | None = None,
) -> Iterator[Image.Image]:
    """`load_image` for one of several threads: within the block, the image's pixels take up room in the budget.

    at_least: a side in pixels. A JPEG file is then decoded at 1/2, 1/4 or 1/8 of its size if neither side becomes
    shorter (libjpeg's scaling, which changes pixels).
    Afterwards the image is closed, unless it is the one given, so that its memory is free when its room is.
    """
    with ExitStack() as held:
        loaded = _load(image, timeout, budget, held, at_least)
        if loaded is not image:
            held.callback(loaded.close)
        yield loaded


def _load(
    image: str | os.PathLike[str] | Image.Image | EncodedImage,
    timeout: float | None,
    budget: PixelBudget,
    held: ExitStack,
    at_least: int | None = None,
) -> Image.Image:
    """The image; its room in the budget is held until the stack is closed."""
    from PIL import Image

    if isinstance(image, (Image.Image, EncodedImage)):
        source: Any = image
    elif isinstance(image, (str, os.PathLike)):
        source = os.fspath(image)
    else:
        raise TypeError(
            f"image is of type {type(image).__name__}; supported: a path, a URL, a base64 string or a PIL image"
        )
    try:
        if isinstance(source, (str, EncodedImage)):
            return _decode(source, timeout, budget, held, at_least)
        held.enter_context(budget.reserve(source.width * source.height))
        return _upright_rgb(source)
    # Decoders raise many types: OSError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise UnreadableImageError(f"{describe_source(source)}: {_reason(source, error)}") from error


def _decode(
    source: str | EncodedImage,
    timeout: float | None,
    budget: PixelBudget,
    held: ExitStack,
    at_least: int | None,
) -> Image.Image:
    from PIL import Image

    with _open_source(source, timeout) as file:
        unknown_size = file.read(4) in SIZE_WITHIN
        file.seek(0)
        if unknown_size:
            held.enter_context(budget.reserve(budget.max_pixels))
        try:
            with _pillow_permits(budget.max_pixels), Image.open(file, formats=_formats()) as opened:
                if unknown_size:
                    opened.load()
                pixels, described = _size_of(opened)
                if refusal := budget.refusal(pixels, described):
                    raise ValueError(refusal)
                if not unknown_size:
                    held.enter_context(budget.reserve(pixels))
                if at_least is not None:
                    opened.draft(None, (at_least, at_least))  # type: ignore[arg-type]  # keeps the mode
                return _upright_rgb(opened, own=True)
        except Image.DecompressionBombError as error:  # raised before the image's size can be asked
            count = re.search(r"\d+", str(error))
            refusal = budget.refusal(int(count[0])) if count else None
            raise ValueError(refusal or str(error)) from error


# EPS files are programs, which Pillow hands to Ghostscript. BLP and IPTC files state one size and hold an image of
# another, which Pillow decodes.
_REFUSED_FORMATS = ("EPS", "BLP", "IPTC")


def _formats() -> list[str]:
    """The formats of Pillow that are opened."""
    from PIL import Image

    Image.preinit()  # first, as in Image.open: the usual formats are tried before the others
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def _size_of(image: Image.Image) -> tuple[int, str]:
    """The pixels that an image counts as before it is decoded, and its size in words.

    A tiled TIFF image counts as at least one tile, which is decoded whole. Images that take more than eight bytes per
    pixel until they are RGB count several times: their decoder keeps copies, or their mode is scaled in float32.
    """
    from siglip_model.images.value_range import WIDE_MODES

    tags: Any = getattr(image, "tag_v2", {})
    tile = [side for side in (tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)) if isinstance(side, int)]
    pixels = max(image.width * image.height, math.prod(tile) if len(tile) == 2 else 0)
    described = f"{image.width} x {image.height} pixels"
    times = _DECODED_AS.get(image.format or "", 2 if image.mode in WIDE_MODES else 1)
    if times == 1:
        return pixels, described
    return times * pixels, f"{described} of mode {image.mode} in {image.format}, which count {times} times,"


@contextmanager
def _pillow_permits(max_pixels: int) -> Iterator[None]:
    """Suspends Pillow's own limit, which is global, while an image is opened under a higher one."""
    from PIL import Image

    if max_pixels <= PILLOW_LIMIT:
        yield
        return
    with _PILLOW_LIMIT_SUSPENDED:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _upright_rgb(image: Image.Image, own: bool = False) -> Image.Image:
    """Copies the pixels only where they change, since large images bound a run's memory. own: `image` may be closed."""
    from PIL import ImageOps

    from siglip_model.images.value_range import to_8_bits

    image.load()
    upright = image
    if image.getexif().get(_ORIENTATION, 1) != 1:
        upright = ImageOps.exif_transpose(image)
        if own:
            image.close()
    levels = to_8_bits(upright, opened=image)
    return levels if levels.mode == "RGB" else levels.convert("RGB")


def _open_source(source: str | EncodedImage, timeout: float | None) -> BinaryIO:
    if isinstance(source, EncodedImage):
        return BytesIO(source.content)
    if is_url(source):
        return _download(source, timeout)
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    else:
        # Opening a FIFO would wait for a writer, reading a device may never end.
        if not stat.S_ISREG(mode):
            raise ValueError(f"is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not an image")
        return open(source, "rb")  # Pillow would map a file given by name, and end in SIGBUS if it shrinks
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    return BytesIO(base64.decodebytes(encoded.encode()))


def _download(url: str, timeout: float | None) -> BytesIO:
    from urllib.request import Request, urlopen

    ends = None if timeout is None else time.monotonic() + timeout
    content = BytesIO()
    with urlopen(Request(url, headers={"User-Agent": "siglip_model"}), timeout=timeout) as response:
        while piece := response.read1(2**16):  # unlike `read`, returns what one wait for the network brought
            content.write(piece)
            if content.tell() > DOWNLOAD_BYTES:
                raise ValueError(f"is larger than {DOWNLOAD_BYTES >> 20} MiB, the limit of a download")
            if ends is not None and time.monotonic() > ends:
                raise TimeoutError(f"the download was not complete after {timeout:g} s")
        expected = response.headers.get("Content-Length", "")
        if expected.isdigit() and content.tell() < int(expected):  # some decoders would not notice
            raise ValueError(f"the download ended after {content.tell():,} of {int(expected):,} bytes")
    content.seek(0)
    return content


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def describe_source(source: object) -> str:
    """A source as error messages name it; long base64 strings are shortened."""
    name = source.name if isinstance(source, EncodedImage) else source
    text = name if isinstance(name, str) else f"<{type(source).__name__}>"
    return text if len(text) <= 500 else f"{text[:60]}... ({len(text)} characters)"


def describe_failure(source: str, error: Exception) -> str:
    """One line that names the source and why it could not be read or prepared."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UnreadableImageError) else f"{describe_source(source)}: {text}"


def _reason(source: object, error: Exception) -> str:
    unidentified = type(error).__name__ == "UnidentifiedImageError"
    if isinstance(source, str) and os.path.isdir(source):
        try:
            os.scandir(source).close()
        except OSError as problem:
            return f"is a folder that cannot be read ({problem.strerror})"
        return "is a folder, not an image"
    if isinstance(source, str) and not source.startswith("data:image/") and not is_url(source):
        if os.path.islink(source) and isinstance(_problem_of(source), FileNotFoundError):
            return "is a link to a file that does not exist"
        no_base64 = isinstance(error, (FileNotFoundError, binascii.Error, UnicodeError)) or unidentified
        if no_base64 and not os.path.lexists(source):
            return "no such file (nor is it a URL beginning with http:// or https://, or an image in base64)"
    if unidentified:
        return "not an image, or in an unsupported format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _problem_of(path: str) -> OSError | None:
    """Why the file's status cannot be read."""
    try:
        os.stat(path)
    except OSError as error:
        return error
    return None


def list_images(inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yields the images that the inputs, one or several, stand for: absolute paths, and URLs unchanged. Memory stays
    constant.

    A folder stands for the images anywhere below it, chosen by suffix, without hidden names, following links (each
    linked folder once), sorted by name so that two runs agree. Entries below it that cannot be listed, such as links
    that lead nowhere, stand for themselves, as does any other input, which is repeated if it was given twice.
    """
    for entry in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        source = os.fspath(entry)
        if is_url(source):
            yield source
        elif os.path.isdir(source):
            yield from _walk(os.path.abspath(source))
        else:
            yield os.path.abspath(source)


class ImageList:
    """The images that the inputs stand for, listed once: a sized iterable of paths in constant memory.

    The paths are kept in a temporary file, one line of JSON each, that stays in memory while it is short. Iterate one
    pass at a time.
    """

    def __init__(self, inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
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


def _walk(root: str) -> Iterator[str]:
    """The images below a folder, and the entries that cannot be listed: opening them as images reports the reason.

    A link to an enclosing folder, or to one that another link led to, is not followed: links between n folders would
    otherwise be followed along each of their n! paths.
    """
    reached: set[tuple[int, int]] = set()  # through links
    enclosing: list[tuple[int, int]] = []
    levels = [(os.path.dirname(root), iter([(os.path.basename(root), True, False)]))]
    while levels:
        folder, entries = levels[-1]
        entry = next(entries, None)
        if entry is None:
            levels.pop()
            if enclosing:
                enclosing.pop()
            continue
        name, is_folder, is_link = entry
        path = os.path.join(folder, name)
        if not is_folder:
            yield path
            continue
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in enclosing or (is_link and identity in reached):
                continue
            below = _entries(path)
        except OSError:
            yield path
            continue
        if is_link:
            reached.add(identity)
        enclosing.append(identity)
        levels.append((path, iter(below)))


def _entries(folder: str) -> list[tuple[str, bool, bool]]:
    """(name, is a folder, is a link) of the folders and images within, and of what may be either, sorted by name."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_link = entry.is_symlink()
            try:
                is_folder = stat.S_ISDIR(entry.stat().st_mode) if is_link else entry.is_dir()
            except OSError:  # a link that leads nowhere, or into a loop, or past a folder without permission
                found.append((entry.name, False, is_link))
                continue
            if is_folder or _is_image_name(entry.name):
                found.append((entry.name, is_folder, is_link))
    return sorted(found)
