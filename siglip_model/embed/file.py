"""The embeddings' file: a safetensors file with the names of its rows."""

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


HEADER_LIMIT = 100_000_000  # the format's own


TENSOR_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class EmbeddingFileError(ValueError):
    """The output, or the journal beside it, cannot be continued; the message says why and what to do."""


@dataclass(frozen=True)
class Embeddings:
    """What a file of embeddings holds: row i of `embeddings` (n, width) is the image `files[i]`."""

    embeddings: torch.Tensor
    files: list[str]
    failed: dict[str, str]
    settings: dict[str, str]


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads a file that `siglip embed` wrote. Raises EmbeddingFileError if it is another kind of file."""
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
    """The header of a file that `write` made, with `__start__`, where its data begins. Refuses any other file."""
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
            problem = "it is cut short"
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError):
        pass
    raise EmbeddingFileError(f"{path} is there already and {problem}; take another --out, or --overwrite to replace it")
