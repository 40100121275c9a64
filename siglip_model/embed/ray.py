"""Embedding on a cluster with Ray Data: actors that embed batches, and the parquet files that `siglip search` reads.

Ray reads the images, feeds the actors, replaces those that die and adds more while images wait; it repeats the batches
of a lost actor, so that every image has one row.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from siglip_model.automatic_capture import CapturesRepeats
from siglip_model.embed.file import PRODUCER, EmbeddingFileError
from siglip_model.embed.parquet import KEY, NUMPY_DTYPES, write_parquet
from siglip_model.embed.reading import ImageReader
from siglip_model.embed.run import EmbedSummary, common_settings, settings_of
from siglip_model.embed.sources import Source, pyarrow_parquet
from siglip_model.images import model_inputs
from siglip_model.images.batches import Failure, read_batches
from siglip_model.images.files import IMAGE_SUFFIXES, EncodedImage, describe_failure
from siglip_model.images.limits import PixelBudget
from siglip_model.images.model_inputs import Inputs
from siglip_model.outputs import pooled, unit_length
from siglip_model.zero_shot import TASK, pipeline

try:
    import ray.data
    from ray.data.datasource import BlockBasedFileDatasink
except ImportError as error:
    raise ImportError(
        f"embedding on a cluster needs Ray Data ({error}); install it with: pip install 'siglip-triton[ray]'"
    ) from error

pyarrow_parquet()
import pyarrow  # noqa: E402  # its absence was named
from pyarrow.fs import FileSelector, FileType  # noqa: E402

ROWS_PER_FILE = 2**16
CALLS_AT_ONCE = 2  # of an actor: one batch is decoded while the model computes another
SUCCESS = "_SUCCESS"  # a file, as of Hadoop and Spark
READERS = {"image": "read_images", "bytes": "read_binary_files"}


class ImageEmbedder:
    """A callable class for `Dataset.map_batches(..., batch_format="numpy")`: images in, embeddings out.

    model: a Hub id, or a checkpoint folder that every node reaches. column: of the images; by default `image`
    (read_images), `bytes` (read_binary_files), or the only one that is named by an image suffix, such as `jpg`
    (read_webdataset). Rows are named by the column `path`, and those of shards by `SHARD.tar#MEMBER`.
    Images are encoded files, or uint8 arrays (height, width, 3), in RGB.
    normalize, dtype (float32 or float16, of the rows), max_pixels: as for `embed_images`. computed_in: dtype of the
    model, by default that of the checkpoint. backend, device: as for `pipeline`. num_workers: threads that decode.
    expected: settings of the rows that the driver found; an actor whose model differs raises EmbeddingFileError.

    A call returns a table of `path`, `embedding`, a fixed-size list, and `error`; one of the last two is null. Raises
    ValueError for a dataset without such columns.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        column: str | None = None,
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
        computed_in: str = "auto",
        backend: str = "auto",
        device: str | None = None,
        num_workers: int = 2,
        max_pixels: int | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        classifier = pipeline(TASK, model=model, backend=backend, dtype=computed_in, device=device)
        self._model = classifier.model
        self.settings = {
            "content": "images",
            "image_processor": settings_of(classifier.image_processor),
            "decode": "full",
            "resized_on": "cpu",
            **common_settings(self._model, normalize, dtype, str(model)),
        }
        if self.settings["dtype"] not in NUMPY_DTYPES:
            raise ValueError(f"ImageEmbedder: dtype is {dtype}; parquet supports torch.float32 and torch.float16")
        for name, value in (expected or {}).items():
            if self.settings.get(name) != value:
                raise EmbeddingFileError(
                    f"{model} is another checkpoint on this node: its {name} is {self.settings.get(name)}, and on the"
                    f" driver {value}"
                )
        self._column, self._normalize, self._dtype = column, normalize, dtype
        self._num_workers = num_workers
        self._read = ImageReader(classifier.image_processor, self._model.config, PixelBudget(max_pixels))
        self._encode = CapturesRepeats(self._model)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> pyarrow.Table:
        names, images = self._named(batch)
        rows, errors = dict[int, np.ndarray](), dict[int, str]()

        def read(index: int) -> Inputs:
            return self._read(Source(names[index], "", _content(names[index], images[index])))

        for part in read_batches(range(len(names)), read, batch_size=len(names), workers=self._num_workers):
            if isinstance(part, Failure):
                errors[part.item] = describe_failure(names[part.item], part.error)
                continue
            for index, row in zip(part.items, self._embed(part.values), strict=True):
                if np.isfinite(row).all():
                    rows[index] = row
                else:
                    errors[index] = f"{names[index]}: its embedding is not finite in {self.settings['computed_in']}"
        return self._table(names, rows, errors)

    @torch.no_grad()
    def _embed(self, images: list[Inputs]) -> np.ndarray:
        inputs = model_inputs.to_model(model_inputs.join(images), self._model.device, self._model.dtype)
        rows = pooled(self._encode(**inputs)).float()
        return (unit_length(rows) if self._normalize else rows).to(self._dtype).cpu().numpy()

    def _named(self, batch: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
        """The names and the images of the rows."""
        column = self._column or _image_column(list(batch))
        if column not in batch:
            raise ValueError(f"the dataset has no column {column!r}; its columns are {', '.join(batch)}")
        if "path" in batch:
            return [str(path) for path in batch["path"]], batch[column]
        if "__url__" in batch and "__key__" in batch:
            pairs = zip(batch["__url__"], batch["__key__"], strict=True)
            return [f"{shard}#{key}.{column}" for shard, key in pairs], batch[column]
        reader = READERS.get(column, "read_images")
        raise ValueError(f"the dataset has no column 'path'; read it with ray.data.{reader}(..., include_paths=True)")

    def _table(self, names: list[str], rows: dict[int, np.ndarray], errors: dict[int, str]) -> pyarrow.Table:
        width = int(self.settings["width"])
        values = np.zeros((len(names), width), dtype=NUMPY_DTYPES[self.settings["dtype"]])
        for index, row in rows.items():
            values[index] = row
        missing = np.array([index in errors for index in range(len(names))], dtype=bool)
        kind = pyarrow.list_(pyarrow.from_numpy_dtype(values.dtype), width)
        embeddings = pyarrow.FixedSizeListArray.from_arrays(values.reshape(-1), type=kind, mask=pyarrow.array(missing))
        described = pyarrow.array([errors.get(index) for index in range(len(names))], pyarrow.string())
        columns = {"path": pyarrow.array(names, pyarrow.string()), "embedding": embeddings, "error": described}
        return pyarrow.table(columns)


def embed_dataset(
    dataset: ray.data.Dataset,
    model: str | os.PathLike[str],
    out: str,
    *,
    actors: tuple[int, int] = (1, 4),
    num_gpus: float = 0,
    num_cpus: float = 1,
    batch_size: int = 32,
    rows_per_file: int = ROWS_PER_FILE,
    **options: Any,
) -> EmbedSummary:
    """Embeds the images of a Ray dataset into a folder of parquet files, which `siglip search` and pandas read.

    dataset: of ray.data.read_images(..., include_paths=True, mode="RGB"), read_webdataset(..., decoder=None) or
    read_binary_files(..., include_paths=True). The last two are decoded by the actors as by `siglip embed`: with EXIF
    orientation and limits, and broken images are named in `failed` of the files, where read_images ends the run.
    out: a folder that does not exist or is empty, or a URI that pyarrow opens, such as s3://bucket/folder. When the job
    has ended, it has a file `_SUCCESS`, as of Hadoop and Spark; without it the files are those of a stopped job.
    actors: the fewest and the most, between which Ray chooses by what waits. num_gpus, num_cpus: of each; without
    a GPU it computes on the CPU with num_cpus threads. batch_size: images per forward pass. rows_per_file: at least.
    options: of `ImageEmbedder`.

    Rows are in the order in which they were finished. A path that the dataset has several times has one row, for which
    the driver holds eight bytes per row.
    Raises ValueError for an `out` that is a file or not empty and for other arguments, and Ray's errors for what failed
    on a node.
    """
    if not 1 <= actors[0] <= actors[1]:
        raise ValueError(f"embed_dataset: actors is {actors}; supported: (fewest, most), whole numbers from 1")
    started = time.monotonic()
    name = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    settings = ImageEmbedder(name, **{**options, "backend": "sdpa", "device": "cpu"}).settings
    files = EmbeddingFiles(out, settings, rows_per_file)
    dataset.map_batches(
        ImageEmbedder,
        fn_constructor_args=(name,),
        fn_constructor_kwargs={**options, "expected": settings},
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=actors[0],
            max_size=actors[1],
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    ).write_datasink(files)
    return EmbedSummary(
        out=out,
        embedded=files.embedded,
        failed=files.failed,
        skipped=files.skipped,
        rows=files.embedded,
        width=int(settings["width"]),
        complete=True,
        seconds=time.monotonic() - started,
        written=files.embedded > 0,
    )


class EmbeddingFiles(BlockBasedFileDatasink):
    """Writes what an ImageEmbedder returns as parquet files of `siglip embed`. A repeated task writes its file again.

    settings: the embedder's. embedded, failed, skipped: counts, once all is written; the last of repeated paths.
    Raises ValueError for an `out` that is a file, or not empty.
    """

    def __init__(self, out: str, settings: Mapping[str, str], rows_per_file: int = ROWS_PER_FILE) -> None:
        super().__init__(out, file_format="parquet", min_rows_per_file=rows_per_file)
        # A file does not know whether the others were written
        self._metadata = {**settings, "format": "pt", "producer": PRODUCER, "complete": "false"}
        self._written = ""  # by the task that holds this copy
        self.embedded = self.failed = self.skipped = 0
        if self.filesystem.get_file_info(self.path).type == FileType.File:
            raise ValueError(f"embed_dataset: out is {out}, which is a file; supported: a folder, new or empty")
        if self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True)):
            raise ValueError(f"embed_dataset: out is {out}, which is not empty; choose another")

    def open_output_stream(self, path: str) -> Any:
        self._written = path
        return super().open_output_stream(path)

    def write(self, blocks: Any, context: Any) -> Any:
        """Returns the file that was written, a hash of the name of each of its rows, and how many images failed."""
        blocks = list(blocks)
        super().write(blocks, context)
        names, failed = list[int](), 0
        for block in blocks:
            table = ray.data.block.BlockAccessor.for_block(block).to_arrow()
            if not len(table):  # it has no columns
                continue
            for name, error in zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True):
                if error is None:
                    names.append(_hash(name))
                else:
                    failed += 1
        return self._written, np.array(names, dtype=np.uint64), failed

    def on_write_complete(self, result: Any) -> None:
        super().on_write_complete(result)
        written = sorted((file, names, failed) for file, names, failed in result.write_returns if file)
        self.embedded = sum(len(names) for _, names, _ in written)
        self.failed = sum(failed for *_, failed in written)
        self._remove_repeated({file: names for file, names, _ in written})
        if written:
            with self.filesystem.open_output_stream(f"{self.path}/{SUCCESS}"):
                pass

    def _remove_repeated(self, files: Mapping[str, np.ndarray]) -> None:
        """Of several rows of one path, leaves the first, in the order of the files."""
        hashes, counts = np.unique(np.concatenate([*files.values(), np.empty(0, np.uint64)]), return_counts=True)
        repeated, seen = hashes[counts > 1], set[str]()
        for file, names in files.items():
            if not np.isin(names, repeated).any():
                continue
            with self.filesystem.open_input_file(file) as opened:
                stored = pyarrow_parquet().ParquetFile(opened)
                found = list(_rows(stored.read()))
                failures = json.loads(stored.metadata.metadata[KEY])["failed"]
            kept = []
            for name, row, _ in found:
                if name not in seen:
                    kept.append((name, "", row))
                if _hash(name) in repeated:
                    seen.add(name)
            self.embedded -= len(found) - len(kept)
            self.skipped += len(found) - len(kept)
            with self.filesystem.open_output_stream(file) as replaced:
                write_parquet(replaced, self._metadata, kept, failures)

    def write_block_to_file(self, block: Any, file: Any) -> None:
        found = list(_rows(block.to_arrow()))
        rows = [(path, "", row) for path, row, error in found if error is None]
        failures = [(path, error) for path, _, error in found if error is not None]
        write_parquet(file, self._metadata, rows, failures)


def _rows(table: pyarrow.Table) -> Iterator[tuple[str, bytes, str | None]]:
    """(path, row, error) of an ImageEmbedder's table, or of a file, which has no errors."""
    for batch in table.to_batches():
        column = batch.column("embedding")  # its `values` are also those beside a slice
        width = column.type.list_size
        values = column.values[column.offset * width :][: len(batch) * width].to_numpy().reshape(-1, width)
        has_errors = "error" in batch.schema.names
        errors = batch.column("error").to_pylist() if has_errors else [None] * len(batch)
        for path, row, error in zip(batch.column("path").to_pylist(), values, errors, strict=True):
            yield path, row.tobytes(), error


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _image_column(columns: list[str]) -> str:
    if (usual := next((name for name in READERS if name in columns), None)) is not None:
        return usual
    suffixed = [name for name in columns if f".{name.rpartition('.')[2]}".lower() in IMAGE_SUFFIXES]
    if len(suffixed) != 1:
        raise ValueError(f"the dataset has no single column of images; name one of {', '.join(columns)} as `column`")
    return suffixed[0]


def _content(name: str, image: Any) -> Any:
    """What `ImageReader` takes. Raises ValueError for anything but encoded files and RGB arrays."""
    from PIL import Image

    if isinstance(image, bytes):
        return EncodedImage(name, image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    shape = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ValueError(f'is {shape}; supported: encoded files, and uint8 (height, width, 3) as of mode="RGB"')
