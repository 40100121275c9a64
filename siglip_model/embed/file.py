"""The embedding file: a safetensors file that also names its rows.

It holds three tensors, in this order and without gaps. `embeddings` (n, width). `files`, bytes: one line of JSON per
row, {"file", "stamp"}, where the stamp (size and modification time) shows whether the file has changed. `failed`,
bytes: one line of JSON per image that could not be read, {"file", "error"}. The header's metadata hold the settings
that all rows share, among them the rows' `dtype` and `width`, and whether the last run was `complete`.

`EmbeddingFile` reads one and checks all of it on the way; `write_safetensors` writes one.
"""

from __future__ import annotations

import json
import mmap
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

PRODUCER = "siglip embed"
SUFFIXES = (".safetensors", ".npy", ".parquet")
BEFORE = {"decode": "full", "resized_on": "cpu"}  # settings of files that were made before there was a choice
TEXT_LIMIT = 2**24  # bytes of a header or of one line; more is not read
MESSAGE_LIMIT = 5000  # characters; twice the settings of an image processor are shorter
WIDTH_LIMIT = 2**20  # values per row, which is read as a whole
CHUNK = 2**20  # bytes of rows that are checked at once
TENSOR_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class EmbeddingFileError(ValueError):
    """The output file or its journal cannot be used; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Embeddings:
    """The content of an embedding file.

    embeddings: (n, width); row i belongs to the image `files[i]`. failed: path -> error of images that could not be
    read; one that was embedded before keeps its row. settings: what the rows were made with, as text.
    """

    embeddings: torch.Tensor
    files: list[str]
    failed: dict[str, str]
    settings: dict[str, str]


@dataclass(frozen=True)
class Content:
    """What a file is written from, row by row; each function begins again when it is called.

    count: of the rows. names: (name, stamp) of each row. rows: their bytes. failures: (name, error).
    """

    metadata: Mapping[str, str]
    count: int
    names: Callable[[], Iterator[tuple[str, str]]]
    rows: Callable[[], Iterator[bytes]]
    failures: Callable[[], Iterator[tuple[str, str]]]

    @property
    def format(self) -> RowFormat:
        return RowFormat(self.metadata["dtype"], int(self.metadata["width"]))


class Span(NamedTuple):
    """Bytes of an open file, and what messages call them."""

    file: BinaryIO
    start: int
    end: int
    name: str


def open_embedding_file(path: str | os.PathLike[str]) -> EmbeddingFile:
    """A single file, open for reading, in the format of its suffix. Raises ImportError for parquet without pyarrow."""
    if os.fspath(path).endswith(".parquet"):
        from siglip_model.embed.parquet import ParquetEmbeddingFile

        return ParquetEmbeddingFile(path)
    if os.fspath(path).endswith(".npy"):
        from siglip_model.embed.npy import NpyEmbeddingFile

        return NpyEmbeddingFile(path)
    return EmbeddingFile(path)


@dataclass(frozen=True)
class RowFormat:
    """How rows are stored. dtype: a key of TENSOR_DTYPES. width: values per row."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        return self.width * TENSOR_DTYPES[self.dtype].itemsize

    @property
    def rows_per_chunk(self) -> int:
        return max(1, CHUNK // self.row_bytes)

    def finite(self, rows: bytes) -> list[bool]:
        """Whether each of these rows is free of NaN and infinity."""
        if not rows:
            return []
        values = torch.frombuffer(bytearray(rows), dtype=TENSOR_DTYPES[self.dtype])
        return values.view(-1, self.width).isfinite().all(dim=-1).tolist()


def encode_lines(entries: Iterable[tuple[str, str]], key: str) -> Iterator[bytes]:
    """One line of JSON per (name, value), where `key` is the value's."""
    for name, value in entries:
        yield json.dumps({"file": name, key: value}).encode() + b"\n"


def write_safetensors(file: BinaryIO, content: Content) -> None:
    """Writes the content in constant memory."""

    def lines() -> tuple[Iterator[bytes], Iterator[bytes]]:
        return encode_lines(content.names(), "stamp"), encode_lines(content.failures(), "error")

    sizes = [sum(map(len, each)) for each in lines()]
    text = json.dumps(_describe(content.metadata, content.count, *sizes)).encode()
    text += b" " * (-len(text) % 8)  # aligns the rows
    file.write(struct.pack("<Q", len(text)) + text)
    file.writelines(content.rows())
    for each in lines():
        file.writelines(each)


def _describe(metadata: Mapping[str, str], rows: int, files_bytes: int, failed_bytes: int) -> dict[str, Any]:
    rows_format = RowFormat(metadata["dtype"], int(metadata["width"]))
    rows_end = rows * rows_format.row_bytes
    files_end = rows_end + files_bytes
    return {
        "__metadata__": dict(metadata),
        "embeddings": {
            "dtype": rows_format.dtype,
            "shape": [rows, rows_format.width],
            "data_offsets": [0, rows_end],
        },
        "files": {"dtype": "U8", "shape": [files_bytes], "data_offsets": [rows_end, files_end]},
        "failed": {"dtype": "U8", "shape": [failed_bytes], "data_offsets": [files_end, files_end + failed_bytes]},
    }


class EmbeddingFile:
    """An embedding file, open for reading in constant memory.

    metadata: the settings, as text. format: of its rows. count: of its rows.
    Every method raises EmbeddingFileError, which names the file, at the first thing that is wrong with it.
    """

    _mapped: mmap.mmap | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._opened = ExitStack()
        with self._opened:
            self._file = self._open(self.path)
            self._read_header()
            self._opened = self._opened.pop_all()

    def _open(self, path: Path) -> BinaryIO:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
            raise EmbeddingFileError(f"{path} is not a regular file")
        try:
            return self._opened.enter_context(open(path, "rb"))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise EmbeddingFileError(f"{path} cannot be read ({error.strerror or error})") from error

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def error(self, problem: str) -> EmbeddingFileError:
        return EmbeddingFileError(f"{self.path} {shortened(problem)}")

    def duplicate(self, name: str) -> EmbeddingFileError:
        """The error for a second row of one image, which the reader detects, who keeps the names."""
        return self.error(f"is damaged: {name} has two rows")

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            if length > min(size, TEXT_LIMIT):
                raise ValueError
            content = json.loads(self._file.read(length).decode())
            if content["__metadata__"]["producer"] != PRODUCER:
                raise ValueError
        except (struct.error, ValueError, KeyError, TypeError, RecursionError):
            raise self.error("was not written by `siglip embed`") from None
        self.metadata: dict[str, str] = content["__metadata__"]
        self._check_metadata()
        lengths = [self._length(content, name) for name in ("embeddings", "files", "failed")]
        expected = _describe(self.metadata, *lengths)
        for name in sorted(content.keys() | expected.keys()):
            if content.get(name) != expected.get(name):
                raise self._damaged_header(name, content.get(name))
        self.format = RowFormat(self.metadata["dtype"], int(self.metadata["width"]))
        self.count = lengths[0]
        self._spans = {
            name: Span(self._file, 8 + length + start, 8 + length + end, f"its tensor `{name}`")
            for name in ("embeddings", "files", "failed")
            for start, end in [expected[name]["data_offsets"]]
        }
        self._check_size(self.path, size, self._spans["failed"].end)

    def _check_size(self, path: Path, size: int, expected: int) -> None:
        if size < expected:
            raise EmbeddingFileError(f"{path} is truncated: it has {size} of {expected} bytes")
        if size > expected:
            raise EmbeddingFileError(
                f"{path} is damaged: it has {size} bytes, {size - expected} more than its header says"
            )

    def _check_metadata(self) -> None:
        for name, value in self.metadata.items():
            if not isinstance(value, str):
                raise self._damaged_header(name, value)
        width = self.metadata.get("width", "")
        supported = {
            "dtype": self.metadata.get("dtype") in TENSOR_DTYPES,
            "width": width.isascii() and width.isdigit() and len(width) < 10 and 0 < int(width) <= WIDTH_LIMIT,
            "complete": self.metadata.get("complete") in ("true", "false"),
        }
        for name, is_supported in supported.items():
            if not is_supported:
                raise self._damaged_header(name, self.metadata.get(name))

    def _length(self, content: dict[str, Any], name: str) -> int:
        """The first dimension of a tensor in the header."""
        try:
            length = content[name]["shape"][0]
        except (KeyError, TypeError, IndexError):
            raise self._damaged_header(name, content.get(name)) from None
        if type(length) is not int or length < 0:
            raise self._damaged_header(name, content[name])
        return length

    def _damaged_header(self, name: str, value: object) -> EmbeddingFileError:
        shown = value if isinstance(value, str) else reprlib.repr(value)  # which bounds depth and length
        return self.error(f"is damaged: in its header `{name}` {'is missing' if value is None else f'is {shown}'}")

    def rows(self) -> Iterator[tuple[str, str, bytes]]:
        """Yields (file, stamp, row) in order. That no file has two rows is for the caller to check."""
        lines = self._lines("files", "stamp")
        size, chunk = self.format.row_bytes, self.format.rows_per_chunk
        for first in range(0, self.count, chunk):
            expected = min(chunk, self.count - first) * size
            self._file.seek(self._spans["embeddings"].start + first * size)
            content = self._file.read(expected)
            if len(content) != expected:
                raise self.error("was truncated while it was read")
            for index, is_finite in enumerate(self.format.finite(content)):
                line = next(lines, None)
                if line is None:
                    raise self.error(f"is damaged: it has {self.count} rows and the names of {first + index}")
                name, stamp = line
                if not is_finite:
                    raise self.error(f"is damaged: the row of {name} is not finite")
                yield name, stamp, content[index * size : (index + 1) * size]
        if next(lines, None) is not None:
            raise self.error(f"is damaged: it has {self.count} rows and the names of more")

    def names(self, rows: Sequence[int]) -> dict[int, str]:
        """The names of these rows, from one pass over the lines that parses no others."""
        wanted = set(rows)
        names = {}
        file, start, end, _ = self._spans["files"]
        file.seek(start)
        for row in range(max(wanted, default=-1) + 1):
            line = file.readline(min(max(0, end - file.tell()), TEXT_LIMIT))
            if row in wanted:
                names[row], _ = self._parsed("files", "stamp", row + 1, line)
        return names

    def failures(self) -> Iterator[tuple[str, str]]:
        """Yields (file, error) of each image that could not be read."""
        return self._lines("failed", "error")

    def _lines(self, tensor: str, key: str) -> Iterator[tuple[str, str]]:
        file, position, end, _ = self._spans[tensor]
        number = 0
        while position < end:
            file.seek(position)  # `rows` moves it between two lines
            line = file.readline(min(end - position, TEXT_LIMIT))
            position += len(line)
            number += 1
            yield self._parsed(tensor, key, number, line)

    def _parsed(self, tensor: str, key: str, number: int, line: bytes) -> tuple[str, str]:
        try:
            entry = json.loads(line.decode())
            name, value = entry["file"], entry[key]
            if not (line.endswith(b"\n") and len(entry) == 2 and isinstance(value, str)):
                raise ValueError
            if os.fsdecode(os.fsencode(name)) != name or (key == "stamp" and not value.isascii()):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.error(f"is damaged: line {number} of {self._spans[tensor].name} cannot be read") from None
        return name, value

    def embeddings(self) -> torch.Tensor:
        """(n, width), memory-mapped: pages are read when they are used, and a write to the tensor stays in memory."""
        if self.count == 0:
            return torch.empty(0, self.format.width, dtype=TENSOR_DTYPES[self.format.dtype])
        self._mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        values = torch.frombuffer(
            self._mapped,
            dtype=TENSOR_DTYPES[self.format.dtype],
            count=self.count * self.format.width,
            offset=self._spans["embeddings"].start,
        )
        return values.view(self.count, self.format.width)

    def release(self) -> None:
        """Gives back the memory of the rows of `embeddings`. They are read again when used; writes are lost."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def shortened(problem: str) -> str:
    """A message that quotes a file, without most of what is longer than any file of `siglip embed` gives cause for."""
    return problem if len(problem) <= MESSAGE_LIMIT else f"{problem[:MESSAGE_LIMIT]}... ({len(problem)} characters)"
