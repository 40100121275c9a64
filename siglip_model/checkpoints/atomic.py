"""Atomic replacement of a file: a reader sees the old content or the new one, even if the writer is killed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at ``path`` by ``data``. The directory must exist. Raises OSError."""
    with replacement(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A temporary file in the directory of ``path``, which it replaces after the block: fsync, rename.

    A replaced file keeps its permissions; a new one gets those of the umask. Where the block raises, nothing changes.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        os.chmod(temporary, ordinary_mode(path))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush the file's content to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Flush the directory's entries (renames, removals) to the disk. Does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ordinary_mode(path: Path) -> int:
    """The permissions of a file that replaces ``path``: the existing ones, or those of the umask."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
