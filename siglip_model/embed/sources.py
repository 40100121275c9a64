"""What becomes rows: images and texts, from files, URLs, WebDataset shards, parquet columns and lists of lines.

A source names its row: an image by its path or URL, a member of a shard as SHARD.tar#MEMBER, encoded images in a column
as FILE.parquet#ROW, and a text by itself. Memory is bounded by the largest image.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from siglip_model.images.files import (
    DOWNLOAD_BYTES,
    IMAGE_SUFFIXES,
    EncodedImage,
    ImageList,
    UnreadableImageError,
    is_url,
    list_images,
)
from siglip_model.text.encodings import encoding_of

TAR, PARQUET = ".tar", ".parquet"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXT_CHARACTERS = 2**16  # of one text, of which the model reads its first 64 tokens
ROWS_AT_ONCE = 64  # of a parquet file


@dataclass(frozen=True)
class Source:
    """A row to be made. name: in the output. stamp: changes with the content; empty where that is the name.

    content: a path, URL or EncodedImage, or a text; or the error for which there is none. None: a blank text, which
    has no row.
    """

    name: str
    stamp: str
    content: str | EncodedImage | Exception | None


def image_sources(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    column: str | None = None,
    owns: Callable[[str], bool] | None = None,
) -> Iterator[Source]:
    """The images of the inputs, in order: of files, folders, URLs, WebDataset shards (.tar) and .parquet files.

    column: of parquet files, with encoded images, Hugging Face's {"bytes", "path"}, or paths and URLs; may be omitted
    where only one column is of these types. owns: whether a shard is to be read here; by default all are.
    What a shard or a file lacks is a source with an error. Raises ValueError for a column that does not exist or is of
    another type, ImportError for parquet files without pyarrow.
    """
    for path in inputs if isinstance(inputs, ImageList) else list_images(inputs):
        if path.endswith(TAR) and os.path.isfile(path):
            if owns is None or owns(path):
                yield from _members(path)
        elif path.endswith(PARQUET) and os.path.isfile(path):
            yield from _rows(path, column, ("images", "paths"))
        elif path.endswith(COMPRESSED) and os.path.isfile(path):
            yield _failed(path, "is compressed; supported: .tar, whose members are read where they are")
        else:
            yield Source(path, stamp_of(path), path)


def text_sources(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | TextIO],
    column: str | None = None,
    encoding: str | None = None,
) -> Iterator[Source]:
    """The texts of the inputs, in order: the lines of text files, and columns of .parquet files.

    encoding: of text files; by default the one that a byte order mark names, else UTF-8. Raises ValueError for a file
    of another encoding, and for columns as `image_sources`.
    """
    for entry in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        if not isinstance(entry, (str, os.PathLike)):
            yield from _lines(entry, "the list of texts")
            continue
        path = os.path.abspath(entry)
        if path.endswith(PARQUET):
            yield from _rows(path, column, ("texts",))
            continue
        with open(path, encoding=encoding or _encoding_of(path)) as file:
            yield from _lines(file, path)


def _lines(file: TextIO, name: str) -> Iterator[Source]:
    number = 0
    while True:
        try:
            line = file.readline(TEXT_CHARACTERS + 1)
        except UnicodeError as error:
            raise ValueError(
                f"{name} is not encoded in {getattr(file, 'encoding', None)} ({error}); name its encoding, such as"
                " latin-1 or gb18030, as encoding (--encoding)"
            ) from error
        if not line:
            return
        number += 1
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark, which is left where the encoding was named
        if len(line) > TEXT_CHARACTERS:
            while line and not line.endswith("\n"):
                line = file.readline(TEXT_CHARACTERS)
            yield _failed(f"{name}#{number}", f"has more than {TEXT_CHARACTERS:,} characters")
        else:
            yield _text(f"{name}#{number}", line.strip())


def _encoding_of(path: str) -> str:
    with open(path, "rb") as file:
        return encoding_of(file.read(4))


class _Member(tarfile.TarInfo):
    """A member that begins with the headers before it, also where these are those of all members, as git writes them.

    tarfile leaves such a header out, which would look like bytes that are no member.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # which tarfile calls for each header
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        member.offset = min(member.offset, self.offset)
        return member


def _members(path: str) -> Iterator[Source]:
    """The images of a shard. After bytes that are no member it continues with the next that is one."""
    stamp = stamp_of(path)
    end = 0  # of the last member
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            shard = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, tarinfo=_Member)  # noqa: SIM115  # nothing to close
            while end < size and (member := shard.next()) is not None:
                if not _is_padding(file, end, member.offset):
                    yield _failed(f"{path}#{end}", f"bytes {end:,} to {member.offset:,} are not a member")
                end = shard.offset  # type: ignore[attr-defined]  # of the next header
                shard.members.clear()  # type: ignore[attr-defined]  # the list would grow with the shard
                name, stored = f"{path}#{member.name}", _stored_bytes(member)
                missing = member.offset_data + stored - size
                if missing > 0:
                    yield _failed(name, f"is truncated: of {stored:,} bytes {missing:,} are missing")
                elif os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                    if member.isfile():
                        yield _member(shard, name, stamp, member)
                    elif member.islnk() or member.issym():
                        yield _failed(name, f"is a link to {member.linkname}, without content of its own")
        except (tarfile.TarError, OSError) as error:
            yield _failed(path, f"is not a tar file, or cannot be read ({error})")
            return
        if not _is_padding(file, end, size):
            yield _failed(f"{path}#{end}", f"is damaged or truncated: bytes {end:,} to {size:,} are not a member")


def _stored_bytes(member: tarfile.TarInfo) -> int:
    """A sparse file, as `tar --sparse` writes it, is stored without its holes."""
    pieces: list[tuple[int, int]] | None = member.sparse  # type: ignore[attr-defined,assignment]
    return member.size if pieces is None else sum(length for _, length in pieces)


def _member(shard: tarfile.TarFile, name: str, stamp: str, member: tarfile.TarInfo) -> Source:
    if member.size > DOWNLOAD_BYTES:
        return _failed(name, f"is larger than {DOWNLOAD_BYTES >> 20} MiB")
    return Source(name, stamp, EncodedImage(name, _content(shard, member)))


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = shard.extractfile(member)
    assert content is not None  # of a file
    return content.read()


def _is_padding(file: BinaryIO, start: int, end: int) -> bool:
    """Whether these bytes are zeros, as after the last member, or none."""
    file.seek(start)
    while start < end:
        piece = file.read(min(end - start, 2**20))
        if not piece:
            return True
        if piece.strip(b"\0"):
            return False
        start += len(piece)
    return True


def _rows(path: str, column: str | None, kinds: tuple[str, ...]) -> Iterator[Source]:
    parquet = pyarrow_parquet()
    import pyarrow

    stamp = stamp_of(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            name, kind = _column(path, file.schema_arrow, column, kinds)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield _row(path, number, stamp, name, kind, value)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        yield _failed(
            f"{path}#{number}" if number else path, f"is not a whole parquet file, or cannot be read ({problem})"
        )


def _row(path: str, number: int, stamp: str, column: str, kind: str, value: Any) -> Source:
    row = f"{path}#{number}"
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        return _failed(row, f"its column {column} is null")
    if isinstance(value, bytes):
        return Source(row, stamp, EncodedImage(row, value))
    if kind == "texts":
        if len(value) > TEXT_CHARACTERS:
            return _failed(row, f"has more than {TEXT_CHARACTERS:,} characters")
        return _text(row, value)
    image = value if is_url(value) else os.path.abspath(value)
    return Source(image, stamp_of(image), image)


def named_image(name: str, column: str | None = None) -> str | EncodedImage:
    """What `image_sources` named so: a path or URL, or the image within a shard or a .parquet file.

    column: of a .parquet file, as it was given there.
    Raises UnreadableImageError where the file or the image within it is missing.
    """
    path, separator, within = name.partition(f"{TAR}#")
    in_tar = bool(separator)
    if not in_tar:
        path, separator, within = name.rpartition(f"{PARQUET}#")
    if is_url(name) or not separator or os.path.lexists(name):
        return name
    try:
        path += separator[:-1]
        return EncodedImage(name, _from_shard(path, within) if in_tar else _from_table(path, within, column))
    except (OSError, tarfile.TarError, ValueError, LookupError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableImageError(f"{name}: {reason}") from error


def _from_shard(path: str, within: str) -> bytes:
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as shard:
        while (member := shard.next()) is not None:
            shard.members.clear()  # type: ignore[attr-defined]  # the list would grow with the shard
            if member.name == within and member.isfile():
                return _content(shard, member)
    raise ValueError("the shard has no such member now")


def _from_table(path: str, within: str, column: str | None) -> bytes:
    row = int(within)
    with pyarrow_parquet().ParquetFile(path) as file:
        column, _ = _column(path, file.schema_arrow, column, ("images",))
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < count:
                (value,) = file.read_row_group(group, columns=[column]).column(0).slice(row, 1).to_pylist()
                content = value["bytes"] if isinstance(value, dict) else value
                if content is None:
                    raise ValueError("the row holds no image now")
                return bytes(content)
            row -= count
    raise ValueError("the file has no such row now")


def _column(path: str, schema: Any, column: str | None, kinds: tuple[str, ...]) -> tuple[str, str]:
    """The name and the kind of the column to read."""
    suitable = {field.name: kind for field in schema if (kind := _kind(field.type, kinds)) is not None}
    described = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if column is None and len(suitable) == 1:
        return next(iter(suitable.items()))
    if column in suitable:
        return str(column), suitable[str(column)]
    wanted = "strings" if "texts" in kinds else "bytes, strings or {bytes, path}"
    problem = f"has no such column {column}; supported: a column of {wanted}"
    if column is None:
        problem = f"has no single column of {wanted}; name one as column (--column)"
    raise ValueError(f"{path} {problem}; its columns are {described}")


def _kind(kind: Any, kinds: tuple[str, ...]) -> str | None:
    import pyarrow.types as types

    if types.is_dictionary(kind):  # of repeated values, each stored once
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return next((strings for strings in ("texts", "paths") if strings in kinds), None)
    encoded = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    hugging_face = types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    return "images" if "images" in kinds and (encoded or hugging_face) else None


def pyarrow_parquet() -> Any:
    """The module pyarrow.parquet. Raises ImportError, with the remedy, without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"parquet files need pyarrow ({error}); install it with: pip install 'siglip-triton[parquet]'"
        ) from error
    return pyarrow.parquet


def _text(place: str, text: str) -> Source:
    return Source(text, "", text) if text.strip() else Source(place, "", None)


def _failed(name: str, problem: str) -> Source:
    return Source(name, "", ValueError(problem))


def stamp_of(path: str) -> str:
    """Size and modification time of a file. Empty for URLs, which are assumed not to change."""
    if is_url(path):
        return ""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError for a name that no file can have
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
