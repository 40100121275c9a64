"""The embedding file: a safetensors file that also names its rows."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

PRODUCER = "siglip embed"
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors format
TENSOR_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class EmbeddingFileError(ValueError):
    """The output file or its journal cannot be used; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Embeddings:
    """The content of an embedding file.

    embeddings: (n, width); row i belongs to the image `files[i]`. failed: path -> error of images without a row.
    settings: what the rows were made with, as text.
    """

    embeddings: torch.Tensor
    files: list[str]
    failed: dict[str, str]
    settings: dict[str, str]


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads a file that `siglip embed` wrote. Raises EmbeddingFileError for any other kind of file."""
    from safetensors import safe_open

    read_header(Path(path))
    with safe_open(path, framework="pt") as file:
        lines = {
            name: [json.loads(line) for line in file.get_tensor(name).numpy().tobytes().splitlines()]
            for name in ("files", "failed")
        }
        return Embeddings(
            embeddings=file.get_tensor("embeddings"),
            files=[line["file"] for line in lines["files"]],
            failed={line["file"]: line["error"] for line in lines["failed"]},
            settings=file.metadata(),
        )


@dataclass(frozen=True)
class Header:
    """What precedes the data of an embedding file; spans: tensor -> [start, end) of its bytes within the file."""

    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]


def read_header(path: Path) -> Header:
    """The header of a file written by `siglip embed`. Raises EmbeddingFileError for any other or truncated file."""
    problem = "it was not written by `siglip embed`"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, HEADER_LIMIT):
                raise ValueError
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__")
        if metadata["producer"] == PRODUCER:
            offsets = {name: content[name]["data_offsets"] for name in ("embeddings", "files", "failed")}
            spans = {name: (8 + length + start, 8 + length + end) for name, (start, end) in offsets.items()}
            if spans["failed"][1] == size:
                return Header(metadata, spans)
            problem = "it is truncated"
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError):
        pass
    raise EmbeddingFileError(f"{path} already exists and {problem}; choose another --out, or --overwrite to replace it")


def read_lines(file: BinaryIO, span: tuple[int, int]) -> Iterator[dict[str, str]]:
    """The JSON lines within a span of bytes, one at a time."""
    start, end = span
    file.seek(start)
    while file.tell() < end:
        yield json.loads(file.readline())
