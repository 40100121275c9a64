"""Writing files so that a reader, or a process killed half-way, meets the old content or the new, never a mixture."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at ``path`` by ``data``: a temporary file in the same directory, fsync, rename.

    The directory must exist. A file that is replaced keeps its permissions.
    """
    path = Path(path)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    temporary = write_temporary(path, write)
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_temporary(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a new hidden file beside ``path``; its path is returned once its bytes are on the disk.

    The name is ``.NAME.RANDOM.tmp``. If ``write`` fails, nothing is left behind.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp's file is private to the user; a checkpoint is an ordinary file.
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        sync_file(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_file(path: Path) -> None:
    """Return once the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Return once the directory's entries (renames, removals) are on the disk (nothing to do on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
