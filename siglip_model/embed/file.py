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

    _read_header(Path(path))
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


def _length(lines: Iterator[bytes]) -> int:
    return sum(len(line) for line in lines)


def _lines(file: BinaryIO, start: int, offsets: list[int]) -> Iterator[dict[str, str]]:
    file.seek(start + offsets[0])
    while file.tell() < start + offsets[1]:
        yield json.loads(file.readline())


def _read_header(path: Path) -> dict:
    """The header of a file written by `siglip embed`, plus `__start__`, the offset of its data. Rejects other files."""
    problem = "it was not written by `siglip embed`"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, HEADER_LIMIT):
                raise ValueError
            header = json.loads(file.read(length))
        if header["__metadata__"]["producer"] == PRODUCER:
            header["__start__"] = 8 + length
            if header["__start__"] + header["failed"]["data_offsets"][1] == size:
                return header
            problem = "it is truncated"
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError):
        pass
    raise EmbeddingFileError(f"{path} already exists and {problem}; choose another --out, or --overwrite to replace it")
