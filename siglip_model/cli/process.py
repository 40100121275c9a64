"""Settings of the whole process, with which threads that decode images and those of the model share it well.

The commands make them, because the process is theirs; the library leaves them to the program that imports it.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
MOST_KEPT = 256 * 2**20  # bytes of freed memory at the end of a heap
LARGEST_REUSED = 32 * 2**20  # bytes of an allocation; glibc takes no more


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of an image for the next one, for the rest of the process. Elsewhere it does nothing.

    By default a thread gives its large buffers back to the kernel, which has to clear them for the next image: nearly
    half of the processor's time of a run with a small model.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_REUSED)
        mallopt(TRIM_THRESHOLD, MOST_KEPT)


def wait_without_spinning() -> None:
    """Lets the model's threads sleep while they wait, so that those that decode have the cores. Call it before PyTorch
    is imported; OMP_WAIT_POLICY in the environment goes before."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def share_with_decoders() -> None:
    """Both. Call it before PyTorch is imported."""
    keep_freed_memory()
    wait_without_spinning()
