"""Embeds any number of images or texts into one file, in constant memory; an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from siglip_model.automatic_capture import CapturesRepeats
from siglip_model.embed.device import Preparation, Transfers
from siglip_model.embed.file import SUFFIXES, TENSOR_DTYPES, EmbeddingFileError
from siglip_model.embed.journal import EmbeddingJournal, ShardedJournal, resolve_out
from siglip_model.embed.profile import Profile, ProfileReport
from siglip_model.embed.reading import ImageReader, content_of, shortest_side
from siglip_model.embed.shards import Shards, open_shards
from siglip_model.embed.sources import Source, image_sources, pyarrow_parquet, text_sources
from siglip_model.embed.workers import DECODE, Workers
from siglip_model.image_pipelines import TokenBudget, count, images_per_batch
from siglip_model.images import model_inputs
from siglip_model.images.batches import BATCH_SIZE, Batch, Failure, read_batches
from siglip_model.images.files import describe_failure
from siglip_model.images.limits import PixelBudget
from siglip_model.images.model_inputs import Inputs
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.outputs import pooled, unit_length
from siglip_model.text.padding import as_trained

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel

COMMIT_SECONDS = 2.0  # the most work that a kill can lose
SAMPLED_VALUES = 4096  # per parameter, in the model's digest
SAMPLE_TEXT = "A photo of TWO cats: “Ünïcode”, 2×!"  # shows a tokenizer's vocabulary, case and punctuation


@dataclass(frozen=True)
class EmbedSummary:
    """Counts of a run: images or texts `embedded`, `failed` and `skipped` (embedded earlier), and the finished rows.

    written: whether the file `out` holds these rows. Otherwise there are none, or they wait in the journal until they
    are complete and overwrite the file. profile: where the time went, if that was asked for. blank: texts of nothing
    but spaces, which have no row.
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
    profile: ProfileReport | None = None
    blank: int = 0

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
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    column: str | None = None,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    token_budget: int | None = None,
    num_workers: int = 2,
    decode: str = "threads",
    fast_decode: bool = False,
    resize_on_device: bool = False,
    max_pixels: int | None = None,
    overwrite: bool = False,
    shards: int | None = None,
    shard_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    profile: bool = False,
    model_name: str = "",
    on_image: Callable[[str, str, str], None] | None = None,
) -> EmbedSummary:
    """Writes the embeddings of all images to `out`, a .safetensors, .npy or .parquet file that `load_embeddings` reads.

    inputs: images, folders (searched recursively), URLs, WebDataset shards (.tar) and .parquet files, one or several;
    or an ImageList.
    column: of parquet files, as for `sources.image_sources`. normalize: scale rows to unit length; otherwise rows are
    the pooled output. dtype: storage dtype, float32, float16 or bfloat16. batch_size: images per forward pass, by
    default 16. token_budget: instead of it, at native resolution: patches per forward pass, which takes as many images
    as fit. num_workers: threads that open images ahead of the model.
    decode: "threads", "processes" (started anew, so a script calls this under `if __name__ == "__main__":`), or "auto":
    threads, until a run that lasts half a minute has timed both. fast_decode: decode large JPEG files at a fraction of
    their size, not shorter than the model's, which moves pixels (by 19 levels of 255 in photographs, and more at steep
    edges, were seen). resize_on_device: copy images as they are, in uint8, and resize and normalise them on the model's
    device (a SiglipImageProcessor; on CUDA it rounds levels once, on the CPU twice). Both belong to the settings that
    rows share.
    max_pixels: limit on the pixels of an image, and on those that all threads or processes decode at one time (default:
    `images.limits.MAX_PIXELS`).
    Images that `out`, or the journal of an interrupted run, already holds are skipped unless their file has changed;
    failed images are retried. An image that was embedded before and fails now keeps its row.
    overwrite: replace the output instead of resuming. An earlier journal is deleted at once; the old file stays until
    the new rows are complete, also across interrupted runs.
    shards: write this many files instead of one (see `shards`); by default as many as the manifest of an earlier run
    says, and 64 where there is none and several ranks. rank, world_size: of this process among those that share the
    inputs; each writes files of its own. shard_size: bytes of embeddings above which `out` is cut, in order, into
    numbered files with a manifest; not with `shards` or several ranks.
    profile: measure the stages, for which the device is waited for after each.
    on_image(name, outcome, error): called for every image; the outcome is "embedded", "skipped" or "failed".

    Raises EmbeddingFileError if `out` was made with another model or other settings, is damaged or another kind of
    file, cannot be written, or is being written by another run; ValueError for an unsupported dtype, a model without
    a pooling head, batch_size beside token_budget, or a column that does not exist; ImportError for parquet files
    without pyarrow; EmbeddingInterrupted on Ctrl-C, after the finished rows were saved.
    """
    if not model.config.vision_config.vision_use_head:  # checked before the journal is created
        raise ValueError("embed_images: the model has no pooling head (vision_use_head is false), so no embedding")
    tokens = None if token_budget is None else TokenBudget(image_processor, token_budget)
    images = images_per_batch("embed_images", batch_size, tokens, default=BATCH_SIZE)
    sizes: dict[str, Any] = {"batch_size": images} if tokens is None else tokens.sizes()
    if decode not in DECODE:
        raise ValueError(f"embed_images: decode is {decode!r}; supported: {', '.join(DECODE)}")
    at_least = shortest_side(image_processor, "fast_decode") if fast_decode else None
    if resize_on_device:
        shortest_side(image_processor, "resize_on_device")
        if not isinstance(image_processor, SiglipImageProcessor):
            raise ValueError(f"resize_on_device needs a SiglipImageProcessor, not a {type(image_processor).__name__}")
        sizes["ahead"] = images  # whole images wait, which are larger than those for the model
    budget = PixelBudget(max_pixels)
    encode_images = CapturesRepeats(model)
    settings = {
        "content": "images",
        "image_processor": settings_of(image_processor),
        "decode": "fast" if fast_decode else "full",
        "resized_on": model.device.type if resize_on_device else "cpu",
    }
    transfers = Transfers(model.device)
    prepare = Preparation(transfers, image_processor, model.dtype) if resize_on_device else None

    def to_device(images: list[Inputs]) -> Inputs:
        if prepare is not None:
            return prepare(images)
        inputs = model_inputs.join(images)
        (pixels,) = transfers.put([inputs["pixel_values"]])
        return model_inputs.to_model({**inputs, "pixel_values": pixels}, model.device, model.dtype)

    def encode(inputs: Inputs) -> torch.Tensor:
        return pooled(encode_images(**inputs))

    place = open_place(out, shards, shard_size, rank, world_size)
    with budget:
        return run_embedding(
            model,
            image_sources(inputs, column, place.owns if place else None),
            ImageReader(image_processor, model.config, budget, resize_on_device, at_least),
            to_device,
            encode,
            place or out,
            {**settings, **common_settings(model, normalize, dtype, model_name)},
            normalize=normalize,
            dtype=dtype,
            sizes=sizes,
            num_workers=num_workers,
            decode=decode,
            transfers=transfers,
            overwrite=overwrite,
            shard_size=shard_size,
            on_source=on_image,
            profile=profile,
        )


def embed_texts(
    model: SiglipModel,
    tokenizer: Any,
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | TextIO],
    out: str | os.PathLike[str],
    *,
    column: str | None = None,
    encoding: str | None = None,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 2,
    overwrite: bool = False,
    shards: int | None = None,
    shard_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    profile: bool = False,
    model_name: str = "",
    on_text: Callable[[str, str, str], None] | None = None,
) -> EmbedSummary:
    """As `embed_images`, for texts: a row is named by its text, so that equal texts have one row.

    inputs: text files, one text per line, and .parquet files, one or several; or open text files in a list. Blank texts
    are counted and have no row, as they are no query of a search. column, encoding: as for `sources.text_sources`.
    tokenizer: the model's. Texts are cut and padded to the length of the model's training. Raises also ValueError for a
    file of another encoding.
    """
    options = {**as_trained(model.config.text_config.max_position_embeddings), "return_tensors": "pt"}
    sample = tokenizer([SAMPLE_TEXT], **options)["input_ids"].tolist()
    settings = {"content": "texts", "tokenizer": f"{type(tokenizer).__name__}, which makes {sample} of a sample"}

    def read(source: Source) -> Any:
        return tokenizer([content_of(source)], **options)

    transfers = Transfers(model.device)

    def to_device(tokens: list[Any]) -> dict[str, torch.Tensor]:
        joined = {name: torch.cat([each[name] for each in tokens]) for name in tokens[0]}
        return dict(zip(joined, transfers.put(list(joined.values())), strict=True))

    def encode(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return pooled(model.get_text_features(**tokens))

    return run_embedding(
        model,
        text_sources(inputs, column, encoding),
        read,
        to_device,
        encode,
        open_place(out, shards, shard_size, rank, world_size) or out,
        {**settings, **common_settings(model, normalize, dtype, model_name)},
        normalize=normalize,
        dtype=dtype,
        sizes={"batch_size": batch_size},
        num_workers=num_workers,
        decode="threads",
        transfers=transfers,
        overwrite=overwrite,
        shard_size=shard_size,
        on_source=on_text,
        profile=profile,
    )


def open_place(
    out: str | os.PathLike[str], shards: int | None, shard_size: int | None, rank: int, world_size: int
) -> Shards | None:
    """As `open_shards`. Raises ValueError for a `shard_size` that is no size, or that is given beside shared files, and
    for a rank that is none of `world_size`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; supported: ranks from 0 to world_size - 1")
    if shard_size is not None:
        count("shard_size", shard_size, at_least=1)
    if shard_size is not None and (shards is not None or world_size > 1):
        raise ValueError("shard_size cuts the output of one process; give `shards` for that of several ranks")
    place = open_shards(out, shards, rank, world_size)
    if shard_size is not None and place is not None:
        raise EmbeddingFileError(f"{out} has files that ranks share, which are not cut by size; choose another --out")
    return place


def common_settings(model: SiglipModel, normalize: bool, dtype: torch.dtype, model_name: str) -> dict[str, str]:
    """What agrees between the rows of any file, as text. Raises ValueError for an unsupported dtype."""
    codes = {value: code for code, value in TENSOR_DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"embed: dtype is {dtype}; supported: {', '.join(str(name) for name in codes)}")
    return {
        "model": model_digest(model),
        "model_name": str(model_name),
        "computed_in": str(model.dtype).removeprefix("torch."),
        "normalize": str(normalize).lower(),
        "dtype": codes[dtype],
        "width": str(model.config.vision_config.hidden_size),
    }


def run_embedding(
    model: SiglipModel,
    sources: Iterable[Source],
    read: Callable[[Source], Any],
    to_device: Callable[[list[Any]], Any],
    encode: Callable[[Any], torch.Tensor],
    out: str | os.PathLike[str] | Shards,
    settings: Mapping[str, str],
    *,
    normalize: bool,
    dtype: torch.dtype,
    sizes: Mapping[str, Any],
    num_workers: int,
    decode: str,
    transfers: Transfers,
    overwrite: bool,
    shard_size: int | None,
    on_source: Callable[[str, str, str], None] | None,
    profile: bool,
) -> EmbedSummary:
    """Embeds what the sources hold and `out` does not.

    read: a source, in `num_workers` threads or processes, as `decode` says. to_device: what was read of several, as the
    inputs of `encode`, which makes rows. transfers: of the model's device, for the rows' way back.
    sizes: of the batches, arguments of `read_batches`.
    """
    count("embed: batch_size", sizes["batch_size"], at_least=1)
    count("embed: num_workers", num_workers, at_least=0)
    model.eval()
    journal: EmbeddingJournal | ShardedJournal
    if isinstance(out, Shards):
        place, journal = str(out.out), ShardedJournal(out, settings, overwrite=overwrite)
        sources = (source for source in sources if out.owns(source.name))
    else:
        place, journal = str(out), EmbeddingJournal(out, settings, overwrite=overwrite, shard_size=shard_size)
    with closing(journal):
        workers = Workers(decode, num_workers)
        stages = Profile(workers, _synchronizer(model.device) if profile else None)
        on_source = on_source or (lambda name, outcome, error: None)
        run = _Run(journal, place, to_device, encode, transfers, normalize, dtype, on_source, stages)
        try:
            with workers:
                run.over(sources, read, sizes, workers)
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
    """One run over the sources, with its counts."""

    def __init__(
        self,
        journal: EmbeddingJournal | ShardedJournal,
        out: str,
        to_device: Callable[[list[Any]], Any],
        encode: Callable[[Any], torch.Tensor],
        transfers: Transfers,
        normalize: bool,
        dtype: torch.dtype,
        on_source: Callable[[str, str, str], None],
        profile: Profile,
    ) -> None:
        self.journal = journal
        self.out = out
        self.to_device = to_device
        self.encode = encode
        self.transfers = transfers
        self.profile = profile
        self.normalize = normalize
        self.dtype = dtype
        self.on_source = on_source
        self.computed_in = journal.settings["computed_in"]
        self.embedded = self.failed = self.skipped = self.blank = self.rows = 0
        self.written = False
        self.started = self.committed = time.monotonic()
        self.on_device: deque[tuple[Batch[Source, Any], Callable[[], torch.Tensor]]] = deque()
        self.in_flight: set[str] = set()  # read but not yet in the journal, so that a repeated source is skipped

    def over(
        self, sources: Iterable[Source], read: Callable[[Source], Any], sizes: Mapping[str, Any], workers: Workers
    ) -> None:
        """sizes: of the batches, arguments of `read_batches`."""
        pool = partial(workers.pool, self.profile.in_threads(read), read)
        batches = read_batches(self._todo(sources), read, workers=workers.count, pool=pool, **sizes)
        with closing(batches):
            while True:
                with self.profile.stage("batch"):
                    batch = next(batches, None)
                if batch is None:
                    self._settle(0)
                    return
                if isinstance(batch, Failure):
                    self._note(batch.item, error=describe_failure(batch.item.name, batch.error))
                else:
                    self._embed(batch)

    def _todo(self, sources: Iterable[Source]) -> Iterator[Source]:
        remaining = iter(sources)
        while True:
            with self.profile.stage("list"):
                source = next(remaining, None)
                if source is None:
                    return
                if source.content is None:
                    self.blank += 1
                    continue
                if (problem := self.journal.refusal(source.name)) is not None:
                    name = source.name.encode("utf-8", "backslashreplace").decode()
                    source = Source(name, "", ValueError(problem))
                finished = source.name in self.in_flight or self.journal.has(source.name, source.stamp)
            if finished:
                self.skipped += 1
                self.on_source(source.name, "skipped", "")
            else:
                self.in_flight.add(source.name)
                yield source

    @torch.no_grad()
    def _embed(self, batch: Batch[Source, Any]) -> None:
        with self.profile.stage("copy"):
            inputs = self.to_device(batch.values)
        with self.profile.stage("compute"):
            rows = self.encode(inputs).float()
            if self.normalize:
                rows = unit_length(rows)
            self.on_device.append((batch, self.transfers.fetch(rows.to(self.dtype).contiguous())))
        self._settle(self.transfers.batches_behind)

    def _settle(self, behind: int) -> None:
        """Records the rows of all batches but the last `behind`, which the device may still compute."""
        while len(self.on_device) > behind:
            batch, fetched = self.on_device.popleft()
            with self.profile.stage("compute"):
                rows = fetched()
            finite = rows.isfinite().all(dim=-1).tolist()
            for source, row, is_finite in zip(batch.items, rows, finite, strict=True):
                if is_finite:
                    self._note(source, embedding=row.view(torch.uint8).numpy().tobytes())
                else:
                    self._note(source, error=f"{source.name}: its embedding is not finite in {self.computed_in}")
        if time.monotonic() - self.committed > COMMIT_SECONDS:
            with self.profile.stage("write"):
                self.journal.commit()
            self.committed = time.monotonic()

    def _note(self, source: Source, *, embedding: bytes | None = None, error: str | None = None) -> None:
        with self.profile.stage("write"):
            self.journal.add(source.name, source.stamp, embedding=embedding, error=error)
        self.in_flight.discard(source.name)
        if error is None:
            self.embedded += 1
        else:
            self.failed += 1
        self.on_source(source.name, "embedded" if error is None else "failed", error or "")

    def finish(self, *, complete: bool) -> EmbedSummary:
        """Writes the file from the journal; a complete run then deletes the journal, an interrupted one keeps it."""
        if self.journal.is_open:  # else the interrupt came when all was done
            with self.profile.stage("write"):
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
            profile=self.profile.report(),
            blank=self.blank,
        )


def _synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for the work of a device."""
    return (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))


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


def out_problem(out: Path) -> str | None:
    """Why `out` cannot be written, found before any work is done; None if it can."""
    try:
        resolve_out(out)
    except EmbeddingFileError as error:
        return str(error)
    if out.suffix not in SUFFIXES:
        return f"{out} does not end in {' or '.join(SUFFIXES)}"
    if out.suffix == ".parquet":
        pyarrow_parquet()
    return None
