"""An embedding file as parquet: the columns id, path, stamp and embedding, a fixed-size list.

`path` and `stamp` are those of the safetensors file. Its metadata are under the key `siglip`, as JSON, and so are the
images that failed. The format has no bfloat16, and names must be valid Unicode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch

from siglip_model.embed.file import PRODUCER, TENSOR_DTYPES, EmbeddingFile, RowFormat
from siglip_model.embed.sources import pyarrow_parquet

KEY = b"siglip"
GROUP_BYTES, GROUP_ROWS = 2**25, 2**14  # most of a row group, which is in memory while it is written
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def write_parquet(
    file: BinaryIO,
    metadata: Mapping[str, str],
    rows: Iterable[tuple[str, str, bytes]],
    failures: Iterable[tuple[str, str]],
) -> None:
    """Writes (path, stamp, row) in order, and (path, error) of what failed. Raises ValueError for a name that is not
    valid Unicode."""
    parquet = pyarrow_parquet()
    import pyarrow

    schema, rows_format = _schema(metadata), RowFormat(metadata["dtype"], int(metadata["width"]))
    most = max(1, min(GROUP_ROWS, GROUP_BYTES // rows_format.row_bytes))
    compression = {"id": "zstd", "path": "zstd", "stamp": "zstd", "embedding.list.element": "none"}
    with parquet.ParquetWriter(file, schema, compression=compression, use_dictionary=False) as writer:
        group: list[tuple[str, str, bytes]] = []
        first = 0

        def write_group() -> None:
            nonlocal first
            if group:
                paths, stamps, contents = zip(*group, strict=True)
                values = pyarrow.array(np.frombuffer(b"".join(contents), dtype=NUMPY_DTYPES[metadata["dtype"]]))
                columns = [
                    pyarrow.array(range(first, first + len(group)), pyarrow.int64()),
                    pyarrow.array([_text(path) for path in paths], pyarrow.string()),
                    pyarrow.array(stamps, pyarrow.string()),
                    pyarrow.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type),
                ]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema), row_group_size=most)
                first += len(group)
                group.clear()

        for row in rows:
            group.append(row)
            if len(group) == most:
                write_group()
        write_group()
        content = {"settings": dict(metadata), "failed": [[_text(name), error] for name, error in failures]}
        writer.add_key_value_metadata({KEY: json.dumps(content)})


def _text(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} is not valid Unicode, which parquet requires; write .safetensors") from None
    return name


def _schema(metadata: Mapping[str, str]) -> Any:
    import pyarrow

    value = pyarrow.from_numpy_dtype(NUMPY_DTYPES[metadata["dtype"]])
    item = pyarrow.field("element", value, nullable=False)
    return pyarrow.schema(
        [
            pyarrow.field("id", pyarrow.int64(), nullable=False),
            pyarrow.field("path", pyarrow.string(), nullable=False),
            pyarrow.field("stamp", pyarrow.string(), nullable=False),
            pyarrow.field("embedding", pyarrow.list_(item, int(metadata["width"])), nullable=False),
        ]
    )


class ParquetEmbeddingFile(EmbeddingFile):
    """A parquet file of embeddings, with the methods of an EmbeddingFile."""

    def _read_header(self) -> None:
        parquet = pyarrow_parquet()
        with self._damage():
            self._parquet = parquet.ParquetFile(self._file)
            stored = self._parquet.metadata.metadata or {}
        try:
            content = json.loads(stored[KEY])
            self.metadata, self._failed = content["settings"], content["failed"]
            if self.metadata["producer"] != PRODUCER:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.error("was not written by `siglip embed`") from None
        self._check_metadata()
        if self.metadata["dtype"] not in NUMPY_DTYPES:
            raise self._damaged_header("dtype", self.metadata["dtype"])
        if not self._parquet.schema_arrow.equals(_schema(self.metadata)):
            raise self.error(f"is damaged: its columns are {' '.join(str(self._parquet.schema_arrow).split())}")
        self.format = RowFormat(self.metadata["dtype"], int(self.metadata["width"]))
        self.count = self._parquet.metadata.num_rows

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turns pyarrow's errors, which have many types, into an EmbeddingFileError."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise self.error(f"is not a whole parquet file ({' '.join(str(error).split())})") from error

    def rows(self) -> Iterator[tuple[str, str, bytes]]:
        for paths, stamps, values in self._batches(["path", "stamp", "embedding"]):
            content, size = values.tobytes(), self.format.row_bytes
            for index, is_finite in enumerate(self.format.finite(content)):
                name = paths[index].as_py()
                if not is_finite:
                    raise self.error(f"is damaged: the row of {name} is not finite")
                yield name, stamps[index].as_py(), content[index * size : (index + 1) * size]

    def _batches(self, columns: list[str]) -> Iterator[list[Any]]:
        """The columns, of some rows at a time; embeddings as a flat array."""
        with self._damage():
            for batch in self._parquet.iter_batches(self.format.rows_per_chunk, columns=columns):
                yield [
                    column.flatten().to_numpy() if name == "embedding" else column
                    for name, column in zip(columns, batch.columns, strict=True)
                ]

    def names(self, rows: Sequence[int]) -> dict[int, str]:
        wanted, names, first = sorted(set(rows)), dict[int, str](), 0
        for group in range(self._parquet.num_row_groups):
            count = self._parquet.metadata.row_group(group).num_rows
            here = [row for row in wanted if first <= row < first + count]
            if here:
                with self._damage():
                    paths = self._parquet.read_row_group(group, columns=["path"]).column("path")
                names.update({row: paths[row - first].as_py() for row in here})
            first += count
        return names

    def failures(self) -> Iterator[tuple[str, str]]:
        for entry in self._failed:
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)):
                raise self.error(f"is damaged: among its failures is {entry!r}")
            yield entry[0], entry[1]

    def embeddings(self) -> torch.Tensor:
        """(n, width), in memory: parquet cannot be memory-mapped."""
        embeddings = torch.empty(self.count, self.format.width, dtype=TENSOR_DTYPES[self.format.dtype])
        flat, place = embeddings.view(-1), 0
        for (values,) in self._batches(["embedding"]):
            flat[place : place + len(values)] = torch.from_numpy(values.copy())
            place += len(values)
        return embeddings
