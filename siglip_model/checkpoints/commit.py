"""A checkpoint's directory, and the atomic replacement of all its files.

A checkpoint is ``config.json`` with either ``model.safetensors`` or ``model.safetensors.index.json`` and its shards
(with both, ``model.safetensors`` counts, as in transformers). A variant has names of its own, such as
``model.fp16.safetensors`` and ``model.safetensors.index.fp16.json``, and the same rules. No system call renames several
files at once, so a save uses two hidden directories beside them:

1. All new files are written to ``.save-partial`` and synced to the disk. The old files are untouched.
2. ``.save-partial`` is renamed to ``.save-complete``. This one rename is the commit.
3. The files move from ``.save-complete`` to their places: first the shards; then, for a sharded checkpoint, an old
   ``model.safetensors`` is removed; then the index or ``model.safetensors`` moves, then ``config.json``. Finally the
   files that only the old checkpoint had and the empty ``.save-complete`` are removed.

`current_file` reads a file from ``.save-complete`` if it is still there, else from its place. If a save is killed
during 1, this is the whole old checkpoint. If it is killed during 3, it is the new one: each move is atomic, so every
new file is in one of the two places; an old file with a new file's name is hidden until it is replaced; an old
``model.safetensors`` is hidden while the new index waits, and removed before that index moves; an old index is hidden
by the new ``model.safetensors`` in either place; no index that is read names old shards. The next save finishes 3
before it begins.

Readers that do not know ``.save-complete`` see the old files until 3, and a mixture only between its renames. If
``config.json`` does not change and both checkpoints are single files, 3 is one rename and atomic for all readers.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.atomic import ordinary_mode, sync_directory, sync_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PARTIAL = ".save-partial"
_COMPLETE = ".save-complete"
_SHARD = re.compile(r"model(?:\.(\w+))?-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r"model\.safetensors\.index(?:\.(\w+))?\.json")
_WEIGHTS = re.compile(r"model(?:\.(\w+))?\.safetensors")


def weights_name(variant: str | None) -> str:
    """The name of the single file: model.safetensors, or model.fp16.safetensors for the variant "fp16"."""
    return WEIGHTS_NAME if variant is None else f"model.{_checked(variant)}.safetensors"


def index_name(variant: str | None) -> str:
    """The name of the shards' index: model.safetensors.index.json or model.safetensors.index.fp16.json."""
    return INDEX_NAME if variant is None else f"model.safetensors.index.{_checked(variant)}.json"


def _checked(variant: str) -> str:
    if not isinstance(variant, str) or not re.fullmatch(r"\w+", variant):
        raise unsupported("a checkpoint", "variant", f"is {variant!r}", "letters, digits and '_', such as 'fp16'")
    return variant


def current_file(directory: Path, name: str) -> Path | None:
    """The current path of one of the checkpoint's files, even if the last save was killed after its commit."""
    complete = directory / _COMPLETE
    if (complete / name).is_file():
        return complete / name
    single = _WEIGHTS.fullmatch(name)
    if single and (complete / index_name(single[1])).is_file():
        return None  # the single file is old: the new index replaces it
    return directory / name if (directory / name).is_file() else None


@contextmanager
def replacing_checkpoint(directory: Path) -> Iterator[Path]:
    """Yield an empty directory for the new checkpoint's files; on exit they replace the old ones together.

    If the body raises, the old files stay. Concurrent saves to one directory wait for each other, except on Windows,
    which has no ``fcntl``.
    """
    with _locked(directory):
        _finish(directory)
        partial = directory / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.iterdir():
                path.chmod(ordinary_mode(directory / path.name))  # safetensors creates its files as private
                sync_file(path)
            sync_directory(partial)
            os.rename(partial, directory / _COMPLETE)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(directory)
        _finish(directory)


def _finish(directory: Path) -> None:
    """Step 3: move the files of a committed save, this one or an earlier one that was killed, to their places."""
    complete = directory / _COMPLETE
    if not complete.is_dir():
        return
    names = {path.name for path in complete.iterdir()}
    shards = {name for name in names if _SHARD.fullmatch(name)}
    for name in sorted(shards):
        os.replace(complete / name, directory / name)
    for name in names:
        if index := _INDEX.fullmatch(name):
            (directory / weights_name(index[1])).unlink(missing_ok=True)
    for name in sorted(names - shards - {CONFIG_NAME}):
        os.replace(complete / name, directory / name)
    if CONFIG_NAME in names:
        os.replace(complete / CONFIG_NAME, directory / CONFIG_NAME)
    sync_directory(directory)
    _remove_superseded(directory)
    complete.rmdir()
    sync_directory(directory)


def _remove_superseded(directory: Path) -> None:
    """Remove an index and shards that a single file has replaced, and shards that the index does not name."""
    needed = {}  # by variant, the text of the index
    for path in directory.iterdir():
        if index := _INDEX.fullmatch(path.name):
            needed[index[1]] = path.read_text(encoding="utf-8")
    for path in directory.iterdir():
        if single := _WEIGHTS.fullmatch(path.name):
            (directory / index_name(single[1])).unlink(missing_ok=True)
            needed[single[1]] = ""
    for path in directory.iterdir():
        shard = _SHARD.fullmatch(path.name)
        if shard and shard[1] in needed and f'"{path.name}"' not in needed[shard[1]]:
            path.unlink()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock; a single saver needs no lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
