"""An output in several files and their manifest, `FILE.json`: for ranks that share the work, or above a size.

Of ranks, the manifest fixes the number of files once; a row belongs to one of them by a hash of its name, a member of a
shard by that of its shard. Each file has a journal of its own. Rank r of n writes the files r, r + n, r + 2n ... in one
pass over the inputs, so that a later run on another number of ranks resumes every file.

Above a size (`shard_size`), one process with one journal cuts the rows, in order, into files of equal length.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.embed.file import SUFFIXES, EmbeddingFileError

SHARDS = 64  # of an output that several ranks write first
MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Manifest:
    """The numbered files of an output. rows: of each but the last, in order; None where a hash divides them."""

    out: Path
    count: int
    rows: int | None = None

    @staticmethod
    def path_of(out: Path) -> Path:
        return out.with_name(f"{out.name}.json")

    @classmethod
    def read(cls, out: Path, path: Path | None = None) -> Manifest:
        """The manifest of an output. Raises EmbeddingFileError for a damaged one."""
        path = path or cls.path_of(out)
        try:
            content = json.loads(path.read_bytes())
            manifest = cls(out, content["shards"], content.get("rows"))
            for number, most in ((manifest.count, MOST_SHARDS), (manifest.rows, 2**63)):
                if number is not None and not (type(number) is int and 1 <= number <= most):
                    raise ValueError(f"a number is {number!r}")
            if manifest.count is None:
                raise ValueError("it has no number of files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EmbeddingFileError(f"{path} is not the manifest of an output ({error})") from error
        return manifest

    def encode(self) -> bytes:
        content = {"shards": self.count, **({} if self.rows is None else {"rows": self.rows})}
        return json.dumps({**content, "files": [path.name for path in self.paths()]}, indent=1).encode() + b"\n"

    def path(self, number: int) -> Path:
        return self.out.with_name(f"{self.out.stem}-{number:05}-of-{self.count:05}{self.out.suffix}")

    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(self.count)]


@dataclass(frozen=True)
class Shards:
    """The files of an output of which this process writes those of its rank."""

    out: Path
    count: int
    rank: int = 0
    world_size: int = 1

    def path(self, number: int) -> Path:
        return Manifest(self.out, self.count).path(number)

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
    """The files that ranks share, by their manifest, which is created where `count` or several ranks ask for one.

    None for an output of one process. Raises EmbeddingFileError where the manifest is damaged or has another count,
    where `out` is a file or was cut by size, and for more ranks than files.
    """
    out = Path(out)
    path = Manifest.path_of(out)
    shared = count is not None or world_size > 1
    if os.path.exists(out):  # also where its name is too long
        if shared:
            raise EmbeddingFileError(f"{out} is one file, which is not divided; choose another --out")
        return None
    if os.path.exists(path):
        manifest = Manifest.read(out)
        if manifest.rows is not None:
            if shared:
                raise EmbeddingFileError(
                    f"{path} names files cut by size, which ranks cannot share; choose another --out"
                )
            return None
        if count not in (None, manifest.count):
            raise EmbeddingFileError(f"{path} names {manifest.count} files, not {count}; choose another --out")
        count = manifest.count
    elif not shared:
        return None
    else:
        count = SHARDS if count is None else count
        if not 1 <= count <= MOST_SHARDS:
            raise ValueError(f"shards is {count}; supported: a whole number from 1 to {MOST_SHARDS}")
    if world_size > count:
        raise EmbeddingFileError(f"{out} has {count} files for {world_size} ranks; use at most one rank per file")
    if not path.exists():  # every rank writes the same content
        atomic_write(path, Manifest(out, count).encode())
    return Shards(out, count, rank, world_size)


def shard_files(out: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the rows of `out`, an output or its manifest: those that exist of a manifest, or `out`.

    A folder stands for the embedding files in it. Raises EmbeddingFileError where there are none, for a damaged
    manifest, and where a file is missing from rows in order.
    """
    path = Path(os.path.realpath(out) if os.path.islink(out) else out)  # other files are beside the target
    if path.is_dir():
        for entry in path.iterdir():
            if is_manifest(entry.name) and entry.name[0] != ".":
                shard_files(entry)
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES) and file.name[0] != ".")
        if not files:
            raise EmbeddingFileError(f"{path} is a folder without a file that ends in {' or '.join(SUFFIXES)}")
        return files
    if is_manifest(path.name):
        path = path.with_suffix("")
    elif path.exists():
        return [path]
    elif not Manifest.path_of(path).exists():
        return [Path(out)]  # is missing; of a link that leads nowhere the caller knows the name of the link
    manifest = Manifest.read(path)
    files = [file for file in manifest.paths() if file.exists()]
    if manifest.rows is not None and len(files) < manifest.count:
        missing = next(file for file in manifest.paths() if not file.exists())
        raise EmbeddingFileError(f"{missing} is missing, which {Manifest.path_of(path)} names")
    return files


def is_manifest(name: str) -> bool:
    return name.endswith(tuple(f"{suffix}.json" for suffix in SUFFIXES))
