"""A checkpoint's directory, and how several of its files are replaced as if they were one.

A checkpoint is ``config.json`` with either ``model.safetensors`` or ``model.safetensors.index.json`` and its shards
(where both are there, ``model.safetensors`` counts, as in transformers). No system call renames several files at once,
so a save goes through two hidden directories beside them:

1. Everything new is written to ``.save-partial`` and synced to the disk. The old files are untouched.
2. ``.save-partial`` is renamed ``.save-complete``. This one rename is the commit.
3. The files move from ``.save-complete`` to their places: shards, then (a sharded checkpoint) an old
   ``model.safetensors`` goes, then index or ``model.safetensors``, then ``config.json``; then what the old checkpoint
   alone had is removed, then the empty ``.save-complete``.

`current_file` reads from ``.save-complete`` what is still there and all else from its place. Killed during 1, that is
the old checkpoint, whole. Killed during 3, it is the new one: every new file is in one of the two places, each move
being atomic; an old file with a new file's name is hidden until it is replaced; an old ``model.safetensors`` is hidden
while the new index waits and gone before that index moves; an old index is hidden by the new ``model.safetensors``
wherever that is; old shards are named by no index that is read. The next save finishes 3 before it begins.

Readers that do not know of ``.save-complete`` see the old files until 3, and a mixture only between its renames; where
``config.json`` stays the same and both checkpoints are single files, 3 is one rename, and atomic for everybody.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from siglip_model.checkpoints.atomic import ordinary_mode, sync_directory, sync_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PARTIAL = ".save-partial"
_COMPLETE = ".save-complete"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def current_file(directory: Path, name: str) -> Path | None:
    """Where a file of the checkpoint is now, even if the last save was killed before it had put everything in place."""
    complete = directory / _COMPLETE
    if (complete / name).is_file():
        return complete / name
    if name == WEIGHTS_NAME and (complete / INDEX_NAME).is_file():
        return None  # an old single file, which the new index replaces
    return directory / name if (directory / name).is_file() else None


@contextmanager
def replacing_checkpoint(directory: Path) -> Iterator[Path]:
    """Give an empty directory to write the new checkpoint's files to; on leaving they replace the old ones, together.

    If the body raises, the old files stay as they are. Where the system has file locks (not on Windows), savers of one
    directory wait for each other.
    """
    with _locked(directory):
        _finish(directory)
        partial = directory / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.iterdir():
                path.chmod(ordinary_mode(directory / path.name))  # safetensors makes its files private
                sync_file(path)
            sync_directory(partial)
            os.rename(partial, directory / _COMPLETE)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(directory)
        _finish(directory)


def _finish(directory: Path) -> None:
    """Step 3: put the files of a committed save in their places, whether it is this save or an earlier, killed one."""
    complete = directory / _COMPLETE
    if not complete.is_dir():
        return
    names = {path.name for path in complete.iterdir()}
    shards = {name for name in names if _SHARD.fullmatch(name)}
    for name in sorted(shards):
        os.replace(complete / name, directory / name)
    if INDEX_NAME in names:
        (directory / WEIGHTS_NAME).unlink(missing_ok=True)
    for name in sorted(names - shards - {CONFIG_NAME}):
        os.replace(complete / name, directory / name)
    if CONFIG_NAME in names:
        os.replace(complete / CONFIG_NAME, directory / CONFIG_NAME)
    sync_directory(directory)
    _remove_superseded(directory)
    complete.rmdir()
    sync_directory(directory)


def _remove_superseded(directory: Path) -> None:
    """Remove the index and shards that a single file has replaced, or the shards of another number of shards."""
    if (directory / WEIGHTS_NAME).is_file():
        (directory / INDEX_NAME).unlink(missing_ok=True)
        needed = ""
    elif (directory / INDEX_NAME).is_file():
        needed = (directory / INDEX_NAME).read_text(encoding="utf-8")
    else:
        return
    for path in directory.iterdir():
        if _SHARD.fullmatch(path.name) and f'"{path.name}"' not in needed:
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
        with suppress(OSError):  # some network file systems cannot lock; one saver alone needs no lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
