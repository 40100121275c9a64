"""Embeds any number of images into one file, in constant memory; an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from siglip_model.automatic_capture import CapturesRepeats
from siglip_model.embed.file import TENSOR_DTYPES, EmbeddingFileError
from siglip_model.embed.journal import EmbeddingJournal, resolve_out
from siglip_model.fit import check_pixels
from siglip_model.images.batches import Batch, Failure, read_batches
from siglip_model.images.files import DOWNLOAD_SECONDS, ImageList, describe_failure, is_url, list_images, open_image
from siglip_model.images.limits import PixelBudget
from siglip_model.outputs import pooled, unit_length

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel

COMMIT_SECONDS = 2.0  # the most work that a kill can lose
SAMPLED_VALUES = 4096  # per parameter, in the model's digest


@dataclass(frozen=True)
class EmbedSummary:
    """Counts of a run: images `embedded`, `failed` and `skipped` (embedded earlier), and the finished rows.

    written: whether the file `out` holds these rows. Otherwise there are none, or they wait in the journal until they
    are complete and overwrite the file.
    """

    out: str
    embedded: int
    failed: int
    skipped: int
    rows: int
    width: int
    complete: bool
    seconds: float
    written: bool = True

    @property
    def images_per_second(self) -> float:
        return (self.embedded + self.failed) / self.seconds if self.seconds > 0 else 0.0


class EmbeddingInterrupted(KeyboardInterrupt):
    """The run was interrupted (Ctrl-C); the finished rows are kept, as `summary` describes."""

    def __init__(self, summary: EmbedSummary) -> None:
        super().__init__(summary)  # the argument of a copy
        self.summary = summary

    def __str__(self) -> str:
        return "embedding was interrupted"


def embed_images(
    model: SiglipModel,
    image_processor: Any,
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    num_workers: int = 2,
    max_pixels: int | None = None,
    overwrite: bool = False,
    model_name: str = "",
    on_image: Callable[[str, str, str], None] | None = None,
) -> EmbedSummary:
    """Writes the embeddings of all images to `out`, a .safetensors file that `load_embeddings` reads.

    inputs: images, folders (searched recursively) and URLs, or an ImageList. normalize: scale rows to unit length;
    otherwise rows are the pooled output. dtype: storage dtype, float32, float16 or bfloat16. num_workers: threads
    that open images ahead of the model. max_pixels: limit on the pixels of an image, and on those that all threads
    decode at one time (default: `images.limits.MAX_PIXELS`).
    Images that `out`, or the journal of an interrupted run, already holds are skipped unless their file has changed;
    failed images are retried. An image that was embedded before and fails now keeps its row.
    overwrite: replace the output instead of resuming. An earlier journal is deleted at once; the old file stays until
    the new rows are complete, also across interrupted runs.
    on_image(path, outcome, error): called for every image; the outcome is "embedded", "skipped" or "failed".

    Raises EmbeddingFileError if `out` was made with another model or other settings, is damaged or another kind of
    file, cannot be written, or is being written by another run; ValueError for an unsupported dtype or a model without
    a pooling head; EmbeddingInterrupted on Ctrl-C, after the finished rows were saved.
    """
    codes = {value: code for code, value in TENSOR_DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"embed_images: dtype is {dtype}; supported: {', '.join(str(name) for name in codes)}")
    if batch_size < 1:
        raise ValueError(f"embed_images: batch_size is {batch_size}; supported: a whole number from 1")
    if not model.config.vision_config.vision_use_head:  # checked before the journal is created
        raise ValueError("embed_images: the model has no pooling head (vision_use_head is false), so no embedding")
    budget = PixelBudget(max_pixels)
    model.eval()
    settings = {
        "model": model_digest(model),
        "model_name": str(model_name),
        "computed_in": str(model.dtype).removeprefix("torch."),
        "image_processor": settings_of(image_processor),
        "normalize": str(normalize).lower(),
        "dtype": codes[dtype],
        "width": str(model.config.vision_config.hidden_size),
    }
    on_image = on_image or (lambda path, outcome, error: None)
    with closing(EmbeddingJournal(out, settings, overwrite=overwrite)) as journal:
        run = _Run(journal, str(out), model, image_processor, normalize, dtype, on_image)
        try:
            run.over(inputs, batch_size, num_workers, budget)
            return run.finish(complete=True)
        except KeyboardInterrupt:
            raise EmbeddingInterrupted(run.finish(complete=False)) from None
        except EmbeddingFileError:  # from the journal itself
            raise
        except BaseException:
            if journal.is_open:
                with suppress(EmbeddingFileError):
                    journal.commit()
            raise


class _Run:
    """One run over the inputs, with its counts."""

    def __init__(
        self,
        journal: EmbeddingJournal,
        out: str,
        model: SiglipModel,
        image_processor: Any,
        normalize: bool,
        dtype: torch.dtype,
        on_image: Callable[[str, str, str], None],
    ) -> None:
        self.journal = journal
        self.out = out
        self.model = model
        self.encode_images = CapturesRepeats(model)
        self.image_processor = image_processor
        self.normalize = normalize
        self.dtype = dtype
        self.on_image = on_image
        self.embedded = self.failed = self.skipped = self.rows = 0
        self.written = False
        self.started = self.committed = time.monotonic()
        self.in_flight: set[str] = set()  # read but not yet in the journal, so that a repeated path is skipped

    def over(
        self, inputs: Iterable[str | os.PathLike[str]], batch_size: int, workers: int, budget: PixelBudget
    ) -> None:
        def read(item: tuple[str, str]) -> torch.Tensor:
            with open_image(item[0], DOWNLOAD_SECONDS, budget) as image:
                pixel_values = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            check_pixels(self.model.config, self.image_processor, pixel_values)
            return pixel_values

        paths = inputs if isinstance(inputs, ImageList) else list_images(inputs)
        batches = read_batches(self._todo(paths), read, batch_size=batch_size, workers=workers)
        with closing(batches), budget:
            for batch in batches:
                if isinstance(batch, Failure):
                    self._note(*batch.item, error=describe_failure(batch.item[0], batch.error))
                else:
                    self._embed(batch)

    def _todo(self, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
        for path in paths:
            stamp = _stamp(path)
            if path in self.in_flight or self.journal.has(path, stamp):
                self.skipped += 1
                self.on_image(path, "skipped", "")
            else:
                self.in_flight.add(path)
                yield path, stamp

    @torch.no_grad()
    def _embed(self, batch: Batch[tuple[str, str], torch.Tensor]) -> None:
        pixel_values = torch.cat(batch.values).to(self.model.device, self.model.dtype)
        rows = pooled(self.encode_images(pixel_values)).float()
        if self.normalize:
            rows = unit_length(rows)
        rows = rows.to(self.dtype).cpu().contiguous()
        finite = rows.isfinite().all(dim=-1).tolist()
        for (path, stamp), row, is_finite in zip(batch.items, rows, finite, strict=True):
            if is_finite:
                self._note(path, stamp, embedding=row.view(torch.uint8).numpy().tobytes())
            else:
                self._note(path, stamp, error=f"{path}: its embedding is not finite in {self.model.dtype}")
        if time.monotonic() - self.committed > COMMIT_SECONDS:
            self.journal.commit()
            self.committed = time.monotonic()

    def _note(self, path: str, stamp: str, *, embedding: bytes | None = None, error: str | None = None) -> None:
        self.journal.add(path, stamp, embedding=embedding, error=error)
        self.in_flight.discard(path)
        if error is None:
            self.embedded += 1
        else:
            self.failed += 1
        self.on_image(path, "embedded" if error is None else "failed", error or "")

    def finish(self, *, complete: bool) -> EmbedSummary:
        """Writes the file from the journal; a complete run then deletes the journal, an interrupted one keeps it."""
        if self.journal.is_open:  # else the interrupt came when all was done
            self.journal.commit()
            self.rows, _ = self.journal.counts()
            self.written = self.journal.write(complete=complete)
            if complete:
                self.journal.remove()
        return EmbedSummary(
            out=self.out,
            embedded=self.embedded,
            failed=self.failed,
            skipped=self.skipped,
            rows=self.rows,
            width=int(self.journal.settings["width"]),
            complete=complete,
            seconds=time.monotonic() - self.started,
            written=self.written,
        )


def model_digest(model: SiglipModel) -> str:
    """A hash of samples of all parameters: distinguishes models, and the text towers of one vision tower, quickly."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, values.numel() // SAMPLED_VALUES)]
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(image_processor: Any) -> str:
    """Its options, and which of both processors it is: they resize differently, and write the same files."""
    settings: Mapping[str, Any] = {**image_processor.to_dict(), "computed_by": type(image_processor).__name__}
    return json.dumps(settings, sort_keys=True, default=str)


def _stamp(path: str) -> str:
    """Size and modification time of a file. Empty for URLs, which are assumed not to change."""
    if is_url(path):
        return ""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError for a name that no file can have
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def out_problem(out: Path) -> str | None:
    """Why `out` cannot be written, found before any work is done; None if it can."""
    try:
        resolve_out(out)
    except EmbeddingFileError as error:
        return str(error)
    if out.suffix != ".safetensors":
        return f"{out} does not end in .safetensors"
    return None
