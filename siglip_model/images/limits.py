"""A limit on the pixels decoded at one time, counted over all threads. Imports neither PyTorch nor Pillow."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MAX_PIXELS = 2**27  # admits photos of 108 megapixels; 1 GiB at the eight bytes per pixel of a conversion to RGB
LARGE = 2**24  # pixels; memory of this size and more is given back to the system before more is taken


@dataclass
class Counter:
    """A number of this process, like the `Value` that processes share."""

    value: int


class PixelBudget:
    """How many pixels may be decoded at one time. A larger image is refused; a thread waits until there is room.

    max_pixels: the limit, for one image and for all images in flight together; None means MAX_PIXELS. Raises ValueError
    unless it is a whole number from 1. As a context manager it is closed at the end. context: of `multiprocessing`; its
    processes then share the limit with this one, from which they inherit it.
    """

    def __init__(self, max_pixels: int | None = None, context: Any = None) -> None:
        limit = MAX_PIXELS if max_pixels is None else max_pixels
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"max_pixels is {limit!r}; supported: a whole number from 1")
        self.max_pixels = limit
        self._room: Any = Counter(limit) if context is None else context.Value("q", limit, lock=False)
        self._ended: Any = Counter(0) if context is None else context.Value("b", 0, lock=False)
        self._changed: Any = threading.Condition() if context is None else context.Condition()

    def refusal(self, pixels: int, described: str = "") -> str | None:
        """Why an image that counts as so many pixels is not decoded; None if it may be. described: its own size."""
        if pixels <= self.max_pixels:
            return None
        return (
            f"{described or f'{pixels:,} pixels'} exceed the limit of {self.max_pixels:,};"
            " raise it with --max-pixels (in Python: max_pixels)"
        )

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Holds room for the pixels, all of it for more than `max_pixels`. Raises RuntimeError after `close`."""
        pixels = min(pixels, self.max_pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._ended.value or self._room.value >= pixels)
            if self._ended.value:
                raise RuntimeError("the images are no longer needed")
            self._room.value -= pixels
        try:
            if pixels >= LARGE:
                _malloc_trim()(0)
            yield
        finally:
            with self._changed:
                self._room.value += pixels
                self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting, so that threads whose images are no longer needed do not decode them."""
        with self._changed:
            self._ended.value = 1
            self._changed.notify_all()

    def __enter__(self) -> PixelBudget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _malloc_trim() -> Callable[[int], Any]:
    """glibc's function that returns freed memory: each thread's heap would keep what its largest image took."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", lambda padding: None)
