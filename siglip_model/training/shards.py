"""Batches of WebDataset shards: tar files in which name.jpg stands beside name.txt or name.json.

Each worker of each rank is one reader. Readers share the shards out; where there are fewer shards than readers, several
read one shard and take its samples by turns. Every reader shuffles its shards and, through a buffer, its samples by
epoch, and starts the next epoch by itself, so that no rank waits for another that has more.
"""

from __future__ import annotations

import json
import os
import random
import tarfile
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

from torch.utils.data import IterableDataset, get_worker_info

from siglip_model.images.files import IMAGE_SUFFIXES, decode_image
from siglip_model.training.batch import Batch, BatchSource
from siglip_model.training.captions import CAPTION_COLUMNS, clean_captions, decode, first_of
from siglip_model.training.loader import load_batches
from siglip_model.training.preparation import Preparation, Prepared, collate
from siglip_model.training.skipped import Skipped

_ADJACENT = " next to it; in a shard the files of a sample must follow one another"


def is_shards(data: str) -> bool:
    """Whether `data` names shards instead of a folder."""
    return data.startswith("pipe:") or data.endswith((".tar", ".tar.gz", ".tgz"))


def find_shards(data: str) -> list[str]:
    """The shards of webdataset's notation: 'a/{000..099}.tar', 'pipe:curl ...', several separated by '::'.

    Raises FileNotFoundError for a local file that does not exist, RuntimeError without webdataset.
    """
    shards = _webdataset().shardlists.expand_urls(data)
    for shard in shards:
        if ":" not in shard and not os.path.isfile(shard):
            raise FileNotFoundError(f"no such shard: {shard}")
    return shards


def read_shard(shard: str, broken: Callable[[Skipped], None]) -> Iterator[dict[str, Any]]:
    """The samples of one shard, grouped as webdataset does. What of it cannot be read is told to `broken`."""
    _webdataset()
    from webdataset.tariterators import group_by_keys

    def note(error: Exception) -> bool:
        reason = next((text for text in map(str, error.args) if text), type(error).__name__)
        broken(Skipped(shard, f"cannot be read in full ({' '.join(reason.split())})"))
        return True

    def members() -> Iterator[dict[str, Any]]:
        try:
            yield from _members(shard)
        except Exception as error:  # of tarfile, gzip, a command ...
            note(error)

    # Shard by shard: a sample that one shard cuts off must not be joined with the next shard's first.
    yield from group_by_keys(members(), handler=note)


class _Member(tarfile.TarInfo):
    """Raises ReadError for a header that is cut off, damaged or missing, which tarfile takes for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _members(shard: str) -> Iterator[dict[str, Any]]:
    """The files of a shard, as `group_by_keys` takes them. Raises what prevents reading it to its end."""
    from webdataset.gopen import gopen

    stream = gopen(shard)
    # A command's own `read` fails as soon as the command has, before all that it wrote is read.
    content = getattr(stream, "stream", stream)
    try:
        with tarfile.open(fileobj=content, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                if member.isreg() and (file := archive.extractfile(member)) is not None:
                    yield {"fname": member.name, "data": file.read(), "__url__": shard}
                archive.members.clear()  # type: ignore[attr-defined]  # the list would grow with the shard
    except Exception:
        _end(stream)  # which says why, if a command has failed
        raise
    _end(stream)


def _end(stream: Any) -> None:
    """Closes the stream; that of a command after the command has ended by itself. Raises OSError if it failed."""
    if not hasattr(stream, "proc"):
        stream.close()
        return
    while stream.stream.read(2**20):
        pass
    if code := stream.proc.wait():
        raise OSError(f"its command ended with exit code {code}")


def sample_name(sample: dict[str, Any]) -> str:
    return f"{sample['__url__']}:{sample['__key__']}"


def sample_captions(sample: dict[str, Any]) -> list[str]:
    """The captions in its txt, one per line, or else in its json. Raises ValueError if there are none."""
    captions = clean_captions(decode(sample.get("txt", b"")).splitlines())
    if not captions and "json" in sample:
        content = json.loads(sample["json"])
        if isinstance(content, dict):
            captions = clean_captions(first_of(CAPTION_COLUMNS, content))
    if not captions:
        raise ValueError("has no caption" + ("" if {"txt", "json"} & sample.keys() else _ADJACENT))
    return captions


def sample_image(sample: dict[str, Any]) -> Any:
    """The decoded image. Raises ValueError if it is broken or there is none."""
    content = next((value for key, value in sample.items() if f".{key}" in IMAGE_SUFFIXES), None)
    if content is None:
        raise ValueError(f"has no image{_ADJACENT}")
    return decode_image(content, sample_name(sample))


def shard_batches(
    shards: Sequence[str],
    preparation: Preparation,
    *,
    batch_size: int,
    shuffle_buffer: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
) -> BatchSource:
    """The source of this rank's share, batch_size // world pairs, of each batch.

    A position holds how many samples each of the rank's readers has read in its epoch: a resumed reader reads the epoch
    from its start, and decodes from there on. With another number of readers the shards are shuffled again, with a
    warning.
    """
    workers = max(1, num_workers)
    readers = [world, workers]  # by rank and in each: with equal products their numbers would mean others

    def batches(first: int, position: Any) -> Generator[Batch, None, None]:
        salt, places = "", [[0, 0] for _ in range(workers)]
        if position is not None and position["readers"] == readers:
            salt, places = position["salt"], [list(place) for place in position["places"]]
        elif position is not None:
            salt = f" from {first}"
            before, now = (f"{ranks} x {each}" for ranks, each in (position["readers"], readers))
            warnings.warn(
                f"data: {before} readers (processes x workers) before, {now} now: the shards are shuffled again",
                stacklevel=2,
            )
        reader = _Reader(
            shards,
            preparation,
            batch_size // world,
            shuffle_buffer,
            f"{seed}{salt}",
            rank,
            world * workers,
            first,
            places,
        )
        found = load_batches(reader, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
        for batch in found:
            slot, epoch, taken = batch.position
            places[slot] = [epoch, taken]
            position = {"readers": readers, "salt": salt, "places": [list(place) for place in places]}
            yield replace(batch, position=position)

    return batches


@dataclass
class _Reader(IterableDataset[Any]):
    """One worker's batches, or the error that ends it.

    places: epoch and samples taken of each of the rank's readers, where they start.
    DataLoader takes batches from its workers by turns: batch n of the run is always that of reader n mod workers.
    """

    shards: Sequence[str]
    preparation: Preparation
    share: int
    shuffle_buffer: int
    seed: str
    rank: int
    readers: int
    first: int
    places: list[list[int]]

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        slot = (self.first + (worker.id if worker else 0)) % len(self.places)
        epoch, taken = self.places[slot]
        number = self.rank * len(self.places) + slot
        pairs: list[Prepared] = []
        skipped: list[Skipped] = []
        while True:
            before, good = taken, 0
            for sample in islice(self._shuffled(epoch, number, skipped.append), taken, None):
                taken += 1
                try:
                    captions = sample_captions(sample)
                    seed = f"{self.seed} {number} {epoch} {taken}"
                    pairs.append(self.preparation(sample_name(sample), sample_image(sample), captions, seed))
                except Exception as error:
                    name = sample_name(sample)
                    skipped.append(Skipped(name, str(error).removeprefix(f"{name}: ")))
                    continue
                good += 1
                if len(pairs) == self.share:
                    yield collate(pairs, skipped, (slot, epoch, taken))
                    pairs, skipped = [], []
            if before == 0 and good == 0:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
                yield ValueError(
                    f"data: one of the {self.readers} readers (processes times --num-workers) of {len(self.shards)} "
                    f"shards finds no usable sample ({reasons or 'there are fewer samples than readers'})"
                )
            epoch, taken = epoch + 1, 0

    def _shuffled(self, epoch: int, number: int, broken: Callable[[Skipped], None]) -> Iterator[dict[str, Any]]:
        """The reader's samples of an epoch, not decoded."""
        chance = random.Random(f"{self.seed} {epoch}")  # of all readers
        shards = chance.sample(self.shards, len(self.shards))
        own = shards[number :: self.readers] or [shards[number % len(shards)]]
        sharers = range(number % len(shards), self.readers, len(shards)) if self.readers > len(shards) else range(1)
        samples: Iterator[dict[str, Any]] = (sample for shard in own for sample in read_shard(shard, broken))
        if len(sharers) > 1:
            samples = islice(samples, number // len(shards), None, len(sharers))
        buffer = dict(bufsize=self.shuffle_buffer, initial=self.shuffle_buffer)
        return _webdataset().shuffle(**buffer, rng=random.Random(f"{self.seed} {epoch} {number}"))(samples)


def _webdataset() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise RuntimeError("reading shards needs pip install 'siglip-triton[train]'") from error
    return webdataset
