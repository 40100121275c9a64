"""Embedding files as one collection of rows, memory-mapped, numbered through in the order of the files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate

import torch
from torch import Tensor

from siglip_model.embed.file import EmbeddingFileError, open_embedding_file
from siglip_model.embed.shards import shard_files
from siglip_model.retrieval.exact import nearest

BLOCK_BYTES = 2**24  # of rows that are compared at once
QUERIES_AT_ONCE = 128  # bounds the scores in memory for any number of queries


class Collection:
    """The rows of one or several embedding files of one model; a context manager that closes them.

    files: what `siglip embed` wrote; an output of several files by its name or its manifest's, and folders of files.
    Raises EmbeddingFileError for a damaged file, and for files of different models.
    """

    def __init__(self, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        named = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        paths = [path for name in named for path in shard_files(name)]
        if not paths:
            raise ValueError("files is empty; supported: one or more files that `siglip embed` wrote")
        with ExitStack() as opened:
            self.files = [opened.enter_context(open_embedding_file(path)) for path in paths]
            self._check_models()
            self._tensors = [file.embeddings() for file in self.files]
            self._opened = opened.pop_all()
        self._starts = [0, *accumulate(file.count for file in self.files)]

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def settings(self) -> dict[str, str]:
        """What the rows of the first file were made with, as text."""
        return self.files[0].metadata

    def _check_models(self) -> None:
        first = self.files[0]
        for file in self.files[1:]:
            if any(file.metadata.get(name) != first.metadata.get(name) for name in ("model", "width", "content")):
                raise file.error(
                    f"was made with {describe_model(file.metadata)}, and {first.path} with"
                    f" {describe_model(first.metadata)}; search them apart"
                )

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, (n, width) at a time."""
        for file, tensor in zip(self.files, self._tensors, strict=True):
            rows = max(1, BLOCK_BYTES // (tensor.element_size() * tensor.shape[1]))
            for block in tensor.split(rows) if len(tensor) else ():
                yield block
                file.release()

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """The rows of these numbers, float32 (n, width)."""
        places = [self._place(number) for number in numbers]
        return torch.stack([self._tensors[file][row].float() for file, row in places])

    def nearest(self, queries: Tensor, top: int) -> list[list[tuple[float, int]]]:
        """Per query, its `top` best (cosine, row number) over all rows, best first. queries: as for `exact.nearest`."""
        found: list[list[tuple[float, int]]] = []
        for some in queries.split(QUERIES_AT_ONCE):
            try:
                cosines, rows = nearest(some, self.blocks(), top)
            except ValueError as error:
                raise EmbeddingFileError(f"{', '.join(str(file.path) for file in self.files)}: {error}") from error
            found += [list(zip(*pair, strict=True)) for pair in zip(cosines.tolist(), rows.tolist(), strict=True)]
        return found

    def names(self, numbers: Sequence[int]) -> dict[int, str]:
        """The name of each of these rows."""
        wanted: list[list[int]] = [[] for _ in self.files]
        for number in numbers:
            file, row = self._place(number)
            wanted[file].append(row)
        return {
            start + row: name
            for start, file, rows in zip(self._starts, self.files, wanted, strict=False)
            for row, name in file.names(rows).items()
        }

    def _place(self, number: int) -> tuple[int, int]:
        """(file, row within it) of a row's number."""
        file = bisect_right(self._starts, number) - 1
        return file, number - self._starts[file]


def describe_model(settings: dict[str, str]) -> str:
    name = settings.get("model_name") or "a model without a name"
    content = settings.get("content")
    return f"{name} ({content}; weights {settings.get('model')}, {settings.get('computed_in')})"
