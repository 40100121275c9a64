"""One run per folder."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process can lock the folder. Raises BlockingIOError if another one has.

    The lock ends with the process, however that ends. Warns on file systems without locks; Windows has none of these.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / LOCK, "w") as file:
        try:
            # Not flock, which the forked workers would hold for seconds after the run is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(f"out (--out) is {str(folder)!r}, in which another run is training") from error
            warnings.warn(f"{folder} cannot be locked ({error}); start no other run in it", stacklevel=3)
        yield
