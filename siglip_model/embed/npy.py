"""An embedding file as numpy's: `photos.npy`, and its text in two files beside it.

`numpy.load("photos.npy", mmap_mode="r")` maps the rows (n, width). Line i of `photos.names.jsonl` names row i, {"file",
"stamp"}. The first line of `photos.run.jsonl` holds the settings and the sizes of the other two files; each further one
is an image that failed, {"file", "error"}. The format has no bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from siglip_model.embed.file import (
    PRODUCER,
    TEXT_LIMIT,
    Content,
    EmbeddingFile,
    EmbeddingFileError,
    RowFormat,
    Span,
    encode_lines,
    shortened,
)

DTYPES = {"F32": "<f4", "F16": "<f2"}


def names_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.names.jsonl")


def run_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.run.jsonl")


def write_npy(files: Sequence[BinaryIO], content: Content) -> None:
    """Writes the three files (rows, run, names) in constant memory."""
    file, run, names = files
    file.write(_header(content.format, content.count))
    file.writelines(content.rows())
    names_bytes = 0
    for line in encode_lines(content.names(), "stamp"):
        names_bytes += names.write(line)
    failed_bytes = sum(map(len, encode_lines(content.failures(), "error")))
    first = {
        "settings": dict(content.metadata),
        "rows": content.count,
        "names_bytes": names_bytes,
        "failed_bytes": failed_bytes,
    }
    run.write(json.dumps(first).encode() + b"\n")
    run.writelines(encode_lines(content.failures(), "error"))


def _header(rows_format: RowFormat, rows: int) -> bytes:
    """Of numpy's format 1.0: magic, length, a literal of Python; as long as a multiple of 64, so that rows are aligned.

    Source: numpy.lib.format.
    """
    text = (
        f"{{'descr': '{DTYPES[rows_format.dtype]}', 'fortran_order': False, 'shape': ({rows}, {rows_format.width}), }}"
    )
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class NpyEmbeddingFile(EmbeddingFile):
    """A .npy file of embeddings with the files beside it, and the methods of an EmbeddingFile."""

    def error(self, problem: str) -> EmbeddingFileError:
        beside = " and ".join(path(self.path).name for path in (run_path, names_path))
        return EmbeddingFileError(f"{self.path}, with {beside} beside it, {shortened(problem)}")

    def _read_header(self) -> None:
        run, names = (self._beside(path(self.path)) for path in (run_path, names_path))
        for file in (self._file, run):  # a run replaces them before it writes the names, which are there
            if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                raise self.error("was replaced while it was opened; open it again")
        try:
            content = json.loads(run.readline(TEXT_LIMIT).decode())
            self.metadata: dict[str, str] = content["settings"]
            rows, names_bytes, failed_bytes = (content[name] for name in ("rows", "names_bytes", "failed_bytes"))
            if self.metadata["producer"] != PRODUCER:
                raise ValueError
            if not all(type(number) is int and number >= 0 for number in (rows, names_bytes, failed_bytes)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.error(f"was not written by `siglip embed`, or {run_path(self.path).name} is damaged") from None
        self._check_metadata()
        if self.metadata["dtype"] not in DTYPES:
            raise self._damaged_header("dtype", self.metadata["dtype"])
        self.format, self.count = RowFormat(self.metadata["dtype"], int(self.metadata["width"])), rows
        header = _header(self.format, rows)
        if self._file.read(len(header)) != header:
            raise self.error(f"is damaged: its header is not that of {rows} rows of {self.format.width} values")
        starts = {"embeddings": len(header), "files": 0, "failed": run.tell()}
        sizes = {"embeddings": rows * self.format.row_bytes, "files": names_bytes, "failed": failed_bytes}
        self._spans = {}
        for (name, start), file in zip(starts.items(), (self._file, names, run), strict=True):
            self._spans[name] = Span(file, start, start + sizes[name], os.path.basename(file.name))
            self._check_size(Path(file.name), os.fstat(file.fileno()).st_size, start + sizes[name])

    def _beside(self, path: Path) -> BinaryIO:
        try:
            return self._open(path)
        except FileNotFoundError:
            raise self.error(
                f"is incomplete: {path.name} is missing; if a run was stopped while it wrote the file, run it again"
            ) from None
