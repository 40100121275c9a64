"""Where inputs are read ahead of the model: in threads, in processes, or in those of both that a trial finds faster.

Threads share memory, and decoding releases the GIL; processes also do in parallel what holds it, but start in seconds
and send each result through a pipe. `Trial` compares the whole run's rate under both, once it has lasted long enough.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch

from siglip_model.embed.reading import ImageReader
from siglip_model.embed.sources import Source
from siglip_model.images.batches import Attempt, Pool, Threads
from siglip_model.images.files import UnreadableImageError, describe_failure

DECODE = ("threads", "processes", "auto")
TRIAL_AFTER = 30.0  # seconds: a run that has lasted so long is a long one
TRIAL_SECONDS = 10.0  # under threads, then under processes
CONTEXT = multiprocessing.get_context("spawn")  # neither the model's threads nor its device survive a fork
GAIN = 1.1  # of processes, to be chosen: a smaller one is not told from noise


class Processes:
    """Reads in `count` processes, each with one thread of PyTorch, which end with this one."""

    def __init__(self, read: ImageReader, count: int) -> None:
        shared = read.for_processes(CONTEXT)
        self._pool = ProcessPoolExecutor(count, CONTEXT, initializer=_begin, initargs=(shared,))

    def submit(self, item: Source) -> Future[Attempt[Any]]:
        if os.name == "nt":
            return self._pool.submit(_read, item)
        # The pool may start a process, which inherits the mask: Ctrl-C reaches the whole group, and the parent ends it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_read, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """Ends them when they have read what was submitted."""
        self._pool.shutdown(wait=False)


def _broken(error: BrokenProcessPool) -> RuntimeError:
    return RuntimeError(
        "a process that reads images has ended, or could not start: out of memory, or a script without"
        f' `if __name__ == "__main__":` around its call; or decode in threads ({error})'
    )


_reader: Callable[[Source], Any]


def _begin(read: Callable[[Source], Any]) -> None:
    global _reader
    torch.set_num_threads(1)  # the processes share the cores as they are
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reader = read


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _read(source: Source) -> Attempt[Any]:
    """As `batches.attempt`, with an error that can be pickled, and that reads the same."""
    try:
        return _reader(source), None
    except UnreadableImageError as error:
        return None, UnreadableImageError(str(error))
    except Exception as error:
        return None, UnreadableImageError(describe_failure(source.name, error))


class Workers:
    """The `count` threads or processes that read ahead, as `decode` says (see DECODE); a context for one run.

    PyTorch uses one thread in each of them, so that they do not multiply with those of the model, which keeps its own.
    trial: what one has found, in words.
    """

    def __init__(self, decode: str, count: int) -> None:
        if decode != "threads" and count < 1:
            raise ValueError(f"decode is {decode!r}, which needs num_workers of at least 1")
        self.decode, self.count = decode, count
        self.trial = ""
        self._torch_threads = torch.get_num_threads()  # asked here, so that the calling thread has its own number

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        torch.set_num_threads(self._torch_threads)  # the number of threads that start later
        if isinstance(error, BrokenProcessPool):
            raise _broken(error) from error

    def pool(self, timed: Callable[[Any], Any], read: Any, window: int) -> Pool[Any, Any]:
        """timed: `read`, for threads. read: an ImageReader, unless it is for threads alone."""
        if self.decode == "processes":
            return Processes(read, self.count)
        threads = Threads(timed, self.count, partial(torch.set_num_threads, 1))
        if self.decode == "threads":
            return threads
        return Trial(threads, partial(Processes, read, self.count), window, self._note)

    def _note(self, words: str) -> None:
        self.trial = words


class Trial:
    """Reads in threads. A run that lasts is timed under threads and then under processes, and keeps the faster.

    Items are submitted as fast as the run consumes the results, so that their rate is the rate of the whole run.
    window: of the items in flight. on_choice(words): called when the trial is over.
    """

    def __init__(
        self,
        threads: Threads[Source, Any],
        processes: Callable[[], Processes],
        window: int,
        on_choice: Callable[[str], None],
    ) -> None:
        self._open: list[Threads[Source, Any] | Processes] = [threads]
        self._pools = self._plan(threads, processes, window, on_choice)

    def submit(self, item: Source) -> Future[Attempt[Any]]:
        return next(self._pools).submit(item)

    def close(self) -> None:
        for pool in self._open:
            pool.close()

    def _plan(
        self,
        threads: Threads[Source, Any],
        start: Callable[[], Processes],
        window: int,
        on_choice: Callable[[str], None],
    ) -> Generator[Threads[Source, Any] | Processes, None, None]:
        """The pool for each item."""
        begun = time.monotonic()
        while time.monotonic() - begun < TRIAL_AFTER:
            yield threads
        in_threads = yield from _rate(threads)
        processes = start()
        self._open.append(processes)
        for _ in range(2 * window):  # until what they read has reached the model
            yield processes
        in_processes = yield from _rate(processes)
        is_faster = in_processes > GAIN * in_threads
        on_choice(f"{in_processes / in_threads:.2f} times as fast in processes as in threads")
        if not is_faster:
            processes.finish()
        while True:
            yield processes if is_faster else threads


def _rate(pool: Any) -> Generator[Any, None, float]:
    """Items per second."""
    begun, count = time.monotonic(), 0
    while (seconds := time.monotonic() - begun) < TRIAL_SECONDS:
        yield pool
        count += 1
    return count / seconds
