"""An output in several files, so that processes share the work and any number of them resumes it.

`FILE.safetensors.json`, the manifest, fixes the number of files once; a row belongs to one of them by a hash of its
name, a member of a shard by that of its shard. Each file has a journal of its own. Rank r of n writes the files r,
r + n, r + 2n ... in one pass over the inputs, so that a later run on another number of ranks resumes every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.embed.file import EmbeddingFileError
from siglip_model.embed.journal import EmbeddingJournal

SHARDS = 64  # of an output that several ranks write first
MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Shards:
    """The files of an output of which this process writes those of its rank."""

    out: Path
    count: int
    rank: int = 0
    world_size: int = 1

    def path(self, number: int) -> Path:
        return self.out.with_name(f"{self.out.stem}-{number:05}-of-{self.count:05}{self.out.suffix}")

    @property
    def mine(self) -> range:
        return range(self.rank, self.count, self.world_size)

    def number(self, name: str) -> int:
        """Of the file that holds the row of this name."""
        key = os.fsencode(name.partition(".tar#")[0].removesuffix(".tar"))
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % self.count

    def owns(self, name: str) -> bool:
        return self.number(name) in self.mine


def open_shards(
    out: str | os.PathLike[str], count: int | None = None, rank: int = 0, world_size: int = 1
) -> Shards | None:
    """The files of an output, by its manifest, which is created where `count` or several ranks ask for one.

    None for an output of one file. Raises EmbeddingFileError where the manifest is damaged or has another count, where
    `out` is a file, and for more ranks than files.
    """
    out = Path(out)
    manifest = out.with_name(f"{out.name}.json")
    if os.path.exists(manifest):  # also where its name would be too long
        written = _read(manifest)
        if count not in (None, written):
            raise EmbeddingFileError(f"{manifest} names {written} files, not {count}; choose another --out")
        count = written
    elif count is None and world_size == 1:
        return None
    else:
        count = SHARDS if count is None else count
        if not 1 <= count <= MOST_SHARDS:
            raise ValueError(f"shards is {count}; supported: a whole number from 1 to {MOST_SHARDS}")
        if out.exists():
            raise EmbeddingFileError(f"{out} is one file, which is not divided; choose another --out")
    if world_size > count:
        raise EmbeddingFileError(f"{out} has {count} files for {world_size} ranks; use at most one rank per file")
    shards = Shards(out, count, rank, world_size)
    if not manifest.exists():  # every rank writes the same content
        content = {"shards": count, "files": [shards.path(number).name for number in range(count)]}
        atomic_write(manifest, json.dumps(content, indent=1).encode() + b"\n")
    return shards


def shard_files(out: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the rows of `out`: those of its manifest that exist, or `out` itself without one."""
    path = Path(out)
    shards = None if path.exists() else open_shards(path)
    if shards is None:
        return [path]
    files = [shards.path(number) for number in range(shards.count)]
    return [file for file in files if file.exists()]


def _read(manifest: Path) -> int:
    try:
        count = json.loads(manifest.read_bytes())["shards"]
        if type(count) is not int or not 1 <= count <= MOST_SHARDS:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EmbeddingFileError(f"{manifest} is not the manifest of an output ({error})") from error
    return count


class ShardedJournal:
    """The journals of a rank's files as one; methods as those of `EmbeddingJournal`."""

    def __init__(self, shards: Shards, settings: Mapping[str, str], *, overwrite: bool = False) -> None:
        self.settings = dict(settings)
        self._shards = shards
        self._journals: dict[int, EmbeddingJournal] = {}
        try:
            for number in shards.mine:
                self._journals[number] = EmbeddingJournal(shards.path(number), settings, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    def _of(self, name: str) -> EmbeddingJournal:
        return self._journals[self._shards.number(name)]

    def has(self, path: str, stamp: str) -> bool:
        return self._of(path).has(path, stamp)

    def add(self, path: str, stamp: str, *, embedding: bytes | None = None, error: str | None = None) -> None:
        self._of(path).add(path, stamp, embedding=embedding, error=error)

    def commit(self) -> None:
        for journal in self._journals.values():
            journal.commit()

    def counts(self) -> tuple[int, int]:
        counts = [journal.counts() for journal in self._journals.values()]
        return sum(embedded for embedded, _ in counts), sum(failed for _, failed in counts)

    def write(self, *, complete: bool) -> bool:
        """Writes every file that has a row, and returns whether the files hold all rows."""
        written = [journal.write(complete=complete) or journal.counts()[0] == 0 for journal in self._journals.values()]
        return all(written)

    def remove(self) -> None:
        for journal in self._journals.values():
            journal.remove()

    @property
    def is_open(self) -> bool:
        return any(journal.is_open for journal in self._journals.values())

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()
