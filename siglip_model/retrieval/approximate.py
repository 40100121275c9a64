"""Approximate search: a graph index (HNSW; Malkov and Yashunin 2018) by usearch, saved beside each embedding file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from siglip_model.checkpoints.atomic import replacement
from siglip_model.embed.file import EmbeddingFile, EmbeddingFileError
from siglip_model.retrieval.collection import Collection
from siglip_model.retrieval.exact import nearest

ROWS_AT_ONCE = 2**14  # that are added to an index
CANDIDATES = 4  # times `top`, and at least 64, that the index gives for their exact cosines
HEADER_BYTES, VALUE_BYTES = 8, 2  # of usearch's file, which begins with the rows in float16; the graph follows
DIGEST_BYTES = 16
VERSION = b"siglip index 2\n\0"  # of this layout, before the digest; the first had none


class ApproximateIndex:
    """The indices of a collection's files, memory-mapped. A missing one is built, and one of an earlier file replaced.

    An index is saved as FILE.SIZE-TIME.usearch, by the size and modification time of the file that it was built from.
    It ends in VERSION and a digest of its graph, which usearch follows unchecked; a damaged copy of a row only costs
    recall.
    Building one holds the rows of its file in memory, in float16. on_build(path): called before an index is built.
    Raises ImportError without usearch, EmbeddingFileError for a damaged index and for a row that is not finite.
    """

    def __init__(self, collection: Collection, on_build: Callable[[Path], None] = lambda path: None) -> None:
        try:
            import usearch.index as usearch
        except ImportError as error:
            raise ImportError(
                f"approximate search needs usearch ({error}); install it with: pip install 'siglip-triton[search]'"
            ) from error
        self._collection = collection
        self.paths = [index_path(file) for file in collection.files]
        self._indices = []
        for path, file in zip(self.paths, collection.files, strict=True):
            if not path.exists():
                on_build(path)
                _build(usearch.Index(ndim=file.format.width, metric="cos", dtype="f16"), file, path)
            self._indices.append(_opened(usearch.Index, file, path))

    def nearest(self, queries: Tensor, top: int) -> list[list[tuple[float, int]]]:
        """As `Collection.nearest`: among the candidates of the indices the cosines are exact and in the exact order."""
        candidates = [set[int]() for _ in queries]
        count = max(64, CANDIDATES * top)
        first = 0
        for index, file in zip(self._indices, self._collection.files, strict=True):
            index.expansion_search = count
            for found, query in zip(candidates, queries.cpu().numpy(), strict=True):
                found.update((first + index.search(query, count).keys.astype(np.int64)).tolist())
            first += file.count
        results = []
        for query, found in zip(queries, candidates, strict=True):
            numbers = sorted(found)
            blocks = [self._collection.rows(numbers)] if numbers else []
            cosines, places = nearest(query[None], blocks, top)
            pairs = zip(cosines[0].tolist(), places[0].tolist(), strict=True)
            results.append([(cosine, numbers[place]) for cosine, place in pairs])
        return results


def recall(found: list[list[tuple[float, int]]], exact: list[list[tuple[float, int]]]) -> float:
    """The share of the exact results, of all queries, that were found. 1 where there are none."""
    pairs = zip(found, exact, strict=True)
    hits = sum(len({row for _, row in some} & {row for _, row in every}) for some, every in pairs)
    wanted = sum(map(len, exact))
    return hits / wanted if wanted else 1.0


def index_path(file: EmbeddingFile) -> Path:
    """Where the index of a file is saved, for as long as the file does not change."""
    status = os.stat(file.path)
    return file.path.with_name(f"{file.path.name}.{status.st_size:x}-{status.st_mtime_ns:x}.usearch")


def _build(index: Any, file: EmbeddingFile, path: Path) -> None:
    first = 0
    for block in file.embeddings().split(ROWS_AT_ONCE) if file.count else ():
        finite = block.isfinite().all(dim=1)
        if not finite.all():
            raise file.error(f"is damaged: row {first + int(finite.logical_not().nonzero()[0])} is not finite")
        keys = np.arange(first, first + len(block), dtype=np.uint64)
        index.add(keys, block.float().numpy())
        first += len(block)
    with replacement(path) as temporary:
        index.save(str(temporary))
        digest = _graph_digest(temporary, file, os.path.getsize(temporary))
        with open(temporary, "ab") as saved:
            saved.write(VERSION + digest)
    earlier = re.compile(rf"{re.escape(file.path.name)}\.[0-9a-f]+-[0-9a-f]+\.usearch")
    for other in path.parent.iterdir():
        if earlier.fullmatch(other.name) and other != path:
            other.unlink(missing_ok=True)


def _graph_digest(path: Path, file: EmbeddingFile, end: int) -> bytes:
    """Of an index without its rows, up to the byte `end`."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as saved:
        digest.update(saved.read(HEADER_BYTES))
        place = saved.seek(HEADER_BYTES + file.count * file.format.width * VALUE_BYTES)
        while piece := saved.read(min(2**20, max(0, end - place))):
            digest.update(piece)
            place += len(piece)
    return digest.digest()


def _opened(index_type: Any, file: EmbeddingFile, path: Path) -> Any:
    try:
        end = os.path.getsize(path) - len(VERSION) - DIGEST_BYTES
        with open(path, "rb") as saved:
            saved.seek(max(0, end))
            version, digest = saved.read(len(VERSION)), saved.read()
        if version != VERSION:
            raise ValueError("it was built by an older version, or its end is damaged")
        if digest != _graph_digest(path, file, end):
            raise ValueError("its graph is damaged")
        index = index_type.restore(path, view=True)
        if len(index) != file.count or index.ndim != file.format.width:
            raise ValueError(
                f"{len(index)} rows of {index.ndim}, and {file.path} has {file.count} of {file.format.width}"
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise EmbeddingFileError(
            f"{path} is not a usable index of {file.path}: {error}; delete it to build it again"
        ) from error
    return index
