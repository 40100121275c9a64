"""FILE on the disk: one file, in some formats with others beside it, or numbered files with a manifest.

It is read as one, and replaced as one. A single file is replaced by one rename. Of several, the last is the seal: it is
removed before the others are renamed, and renamed after them. A kill in between leaves files without a seal, which no
reader takes for FILE; the rows are in the journal, from which the next run writes them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from siglip_model.checkpoints.atomic import ordinary_mode, sync_directory
from siglip_model.embed.file import (
    BEFORE,
    TENSOR_DTYPES,
    Content,
    EmbeddingFile,
    EmbeddingFileError,
    Embeddings,
    open_embedding_file,
    write_safetensors,
)
from siglip_model.embed.npy import names_path, run_path, write_npy
from siglip_model.embed.shards import MOST_SHARDS, Manifest, shard_files

LACK_BFLOAT16 = (".npy", ".parquet")


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads what `siglip embed` wrote and checks all of it: the header, each name, and that rows are finite.

    path: FILE, also of several files with a manifest, whose rows are then held in memory; or the manifest.
    Raises FileNotFoundError, and EmbeddingFileError for a damaged file or any other kind of file.
    """
    with open_output(path) as file:
        rows: dict[str, None] = {}
        for name, _, _ in file.rows():
            if name in rows:
                raise file.duplicate(name)
            rows[name] = None
        return Embeddings(file.embeddings(), list(rows), dict(file.failures()), file.metadata)


def open_output(path: str | os.PathLike[str]) -> EmbeddingFile | SeveralFiles:
    """FILE, open for reading. Raises FileNotFoundError, EmbeddingFileError, and ImportError for parquet without
    pyarrow."""
    files = shard_files(path)
    if len(files) == 1:
        return open_embedding_file(files[0])
    if not files:
        raise EmbeddingFileError(f"{path}: none of the files that its manifest names has rows yet")
    return SeveralFiles(files)


class SeveralFiles:
    """The files of an output, in order, with the methods of an EmbeddingFile; one of them is open at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.count, complete = 0, []
        for path in paths:
            with open_embedding_file(path) as file:
                if path == paths[0]:
                    self.format, self.metadata = file.format, dict(file.metadata)
                if _compared(file.metadata) != _compared(self.metadata):
                    raise file.error(f"was made with other settings than {paths[0]}")
                complete.append(file.metadata["complete"] == "true")
                self.count += file.count
        self.metadata["complete"] = str(all(complete)).lower()

    def __enter__(self) -> SeveralFiles:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def error(self, problem: str) -> EmbeddingFileError:
        return EmbeddingFileError(f"{self._paths[0]}, with the files after it, {problem}")

    def duplicate(self, name: str) -> EmbeddingFileError:
        return self.error(f"is damaged: {name} has two rows")

    def rows(self) -> Iterator[tuple[str, str, bytes]]:
        for path in self._paths:
            with open_embedding_file(path) as file:
                yield from file.rows()

    def failures(self) -> Iterator[tuple[str, str]]:
        for path in self._paths:
            with open_embedding_file(path) as file:
                yield from file.failures()

    def embeddings(self) -> torch.Tensor:
        """(n, width), in memory."""
        whole = torch.empty(self.count, self.format.width, dtype=TENSOR_DTYPES[self.format.dtype])
        first = 0
        for path in self._paths:
            with open_embedding_file(path) as file:
                whole[first : first + file.count] = file.embeddings()
                first += file.count
        return whole


def _compared(metadata: Mapping[str, str]) -> dict[str, str]:
    """What agrees between the files of an output: a run that adds rows to some says where the model is now."""
    named = {name: value for name, value in metadata.items() if not name.endswith("_name")}
    return {**BEFORE, **named, "complete": ""}


class Output:
    """FILE, to be read and replaced by the one run that holds its journal. out: FILE, not a symbolic link."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._manifest = Manifest.path_of(out)
        # Its name may be too long, for which `Path.exists` raises; there is no such file then
        self._replaced = self._manifest.with_name(f".{self._manifest.name}.replaced")

    def exists(self) -> bool:
        """Whether there is anything of FILE, whole or not."""
        return self.out.exists() or self._manifest.exists()

    def is_whole(self) -> bool:
        """Whether FILE can be read, unless it is damaged: no run was stopped between its files."""
        return all(path.exists() for path in files_of(self.out)) or (self._manifest.exists() and not self.out.exists())

    def open(self) -> Any:
        """As `open_output`."""
        return open_output(self.out)

    def rows_per_file(self) -> int | None:
        """Of numbered files; None for a single one."""
        return None if self.out.exists() or not self._manifest.exists() else Manifest.read(self.out).rows

    def check_names(self, numbered: bool, overwrite: bool) -> None:
        """Raises EmbeddingFileError for a name that would become too long, and for files of others in the way."""
        path = Manifest(self.out, 1).path(0) if numbered else self.out
        longest = max(len(os.fsencode(_unfinished(file).name)) for file in files_of(path))
        if longest > 255:
            most = len(os.fsencode(self.out.name)) - (longest - 255)
            raise EmbeddingFileError(f"the name of {self.out} is too long; supported here: at most {most} bytes")
        strangers = [] if self.out.exists() or overwrite else [path for path in files_of(self.out)[1:] if path.exists()]
        strangers += [path for path in files_of(self.out)[1:] if path.exists() and not path.is_file()]
        if numbered and not self._manifest.exists():
            name = re.compile(rf"{re.escape(self.out.stem)}-\d{{5}}-of-\d{{5}}{re.escape(self.out.suffix)}")
            strangers += [path for path in self.out.parent.iterdir() if name.fullmatch(path.name)]
        if strangers:
            raise EmbeddingFileError(
                f"{min(strangers)} would be replaced, and nothing says that it is of {self.out}; move it away, or"
                " choose another --out"
            )

    def replace(self, pieces: Sequence[Content], rows_per_file: int | None) -> None:
        """Writes one file of one piece, and numbered files of several. Needs room on the disk for old and new."""
        if len(pieces) > MOST_SHARDS:
            raise ValueError(f"it would have {len(pieces)} files; supported: at most {MOST_SHARDS}")
        paths, seal = [self.out], []
        manifest = Manifest(self.out, len(pieces), rows_per_file)
        if len(pieces) > 1:
            paths, seal = manifest.paths(), [self._manifest]
        targets = [file for path in paths for file in files_of(path)] + seal
        try:
            for path, piece in zip(paths, pieces, strict=True):
                _write(path, piece)
            for path in seal:
                with _unfinished_files([path]) as (file,):
                    file.write(manifest.encode())
            if self._manifest.exists() and os.path.exists(self._replaced):  # a run was stopped while it removed files
                self._remove_replaced([file for path in Manifest.read(self.out).paths() for file in files_of(path)])
            self._publish(targets)
        finally:
            for target in targets:
                _unfinished(target).unlink(missing_ok=True)
        self._remove_replaced(targets)

    def _publish(self, targets: Sequence[Path]) -> None:
        *others, seal = targets
        if others:
            if seal == self._manifest and seal.exists():
                os.replace(seal, self._replaced)  # it names the files to be removed
            seal.unlink(missing_ok=True)
            sync_directory(self.out.parent)
            for target in others:
                os.replace(_unfinished(target), target)
            sync_directory(self.out.parent)
        os.replace(_unfinished(seal), seal)
        sync_directory(self.out.parent)
        if seal != self._manifest and self._manifest.exists():  # which FILE takes precedence over
            os.replace(self._manifest, self._replaced)

    def _remove_replaced(self, kept: Sequence[Path]) -> None:
        """Removes the files of an earlier form of FILE: the single one, or those that the earlier manifest names."""
        replaced: list[Path] = []
        if self._manifest in kept and self.out.exists():
            replaced += reversed(files_of(self.out))  # the seal first
        if os.path.exists(self._replaced):
            earlier = Manifest.read(self.out, self._replaced)
            replaced += [file for path in earlier.paths() for file in reversed(files_of(path))]
            replaced.append(self._replaced)
        for path in replaced:
            if path not in kept:
                path.unlink(missing_ok=True)
        if replaced:
            sync_directory(self.out.parent)  # before the journal is deleted


def files_of(path: Path) -> list[Path]:
    """The files that hold the content of a single one; the last is its seal."""
    return [path, run_path(path), names_path(path)] if path.suffix == ".npy" else [path]


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.unfinished")  # one name: the lock admits one writer


@contextmanager
def _unfinished_files(targets: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Files that are to replace the targets; on the disk after the block."""
    with ExitStack() as opened:
        files: list[BinaryIO] = []
        for target in targets:
            _unfinished(target).unlink(missing_ok=True)
            files.append(opened.enter_context(open(_unfinished(target), "xb")))
        yield files
        for target, file in zip(targets, files, strict=True):
            file.flush()
            os.chmod(_unfinished(target), ordinary_mode(target))
            os.fsync(file.fileno())


def _write(path: Path, content: Content) -> None:
    with _unfinished_files(files_of(path)) as files:
        if path.suffix == ".parquet":
            from siglip_model.embed.parquet import write_parquet

            rows = ((*name, row) for name, row in zip(content.names(), content.rows(), strict=True))
            write_parquet(files[0], content.metadata, rows, content.failures())
        elif path.suffix == ".npy":
            write_npy(files, content)
        else:
            write_safetensors(files[0], content)
