"""Images in batches, read ahead of the model by threads. Imports no PyTorch: the commands load it late."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

BATCH_SIZE = 16  # of `embed` and `classify`, unless they are told

Item = TypeVar("Item")
Value = TypeVar("Value")
Given = TypeVar("Given", contravariant=True)
Attempt = tuple[Value | None, Exception | None]


@dataclass(frozen=True)
class Batch(Generic[Item, Value]):
    """Items that were read, with their values, in the order of the input."""

    items: list[Item]
    values: list[Value]


class Pool(Protocol[Given, Value]):
    """What reads items, several at a time."""

    def submit(self, item: Given) -> Future[Attempt[Value]]: ...

    def close(self) -> None:
        """Ends it without waiting; what has not begun is not read."""


@dataclass(frozen=True)
class Failure(Generic[Item]):
    """One item that could not be read."""

    item: Item
    error: Exception


def read_batches(
    items: Iterable[Item],
    read: Callable[[Item], Value],
    *,
    batch_size: int,
    workers: int,
    cost: Callable[[Value], int] | None = None,
    ahead: int | None = None,
    pool: Callable[[int], Pool[Item, Value]] | None = None,
) -> Generator[Batch[Item, Value] | Failure[Item], None, None]:
    """Reads each item and yields the values in batches of `batch_size`; only the last batch may be smaller.

    cost: of a value. Consecutive values are then a batch as long as they cost at most `batch_size` together; one value
    may cost more. ahead: about how many values are read ahead, by default twice `batch_size`.
    pool: makes what reads, of the number of items in flight, instead of `workers` threads.
    An item for which `read` raises an Exception is left out of its batch and yielded as a Failure at once. Memory
    holds a bounded number of values, independent of the number of items. Close the generator to stop its threads early.
    """
    batch: Batch[Item, Value] = Batch([], [])
    spent = 0
    window = (2 * batch_size if ahead is None else ahead) + workers
    results = read_ahead(items, read, workers=workers, window=window, pool=pool)
    try:
        for item, value, error in results:
            if error is not None:
                yield Failure(item, error)
                continue
            price = 1 if cost is None else cost(value)  # type: ignore[arg-type]  # a value wherever there is no error
            if batch.items and spent + price > batch_size:
                yield batch
                batch, spent = Batch([], []), 0
            batch.items.append(item)
            batch.values.append(value)  # type: ignore[arg-type]
            spent += price
            if spent >= batch_size:
                yield batch
                batch, spent = Batch([], []), 0
        if batch.items:
            yield batch
    finally:
        results.close()


def read_ahead(
    items: Iterable[Item],
    function: Callable[[Item], Value],
    *,
    workers: int,
    window: int,
    pool: Callable[[int], Pool[Item, Value]] | None = None,
) -> Generator[tuple[Item, Value | None, Exception | None], None, None]:
    """Yields `(item, function(item), None)` for each item in order, or `(item, None, error)` where it raised.

    With `workers` threads, up to `window` items are in flight while the caller is busy; with 0 threads each item is
    computed when it is requested. Items are drawn in the caller's thread. pool: as for `read_batches`.
    """
    if workers == 0:
        for item in items:
            yield item, *_attempt(item, function)
        return
    readers = Threads(function, workers) if pool is None else pool(window)
    pending: deque[tuple[Item, Future[Attempt[Value]]]] = deque()
    try:
        for item in items:
            pending.append((item, readers.submit(item)))
            if len(pending) > window:
                item, future = pending.popleft()
                yield item, *future.result()
        while pending:
            item, future = pending.popleft()
            yield item, *future.result()
    finally:
        readers.close()


class Threads(Generic[Item, Value]):
    """`count` threads that apply a function to items. prepare: called in each of them first."""

    def __init__(
        self, function: Callable[[Item], Value], count: int, prepare: Callable[[], object] | None = None
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._function = function
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="read_ahead", initializer=prepare)

    def submit(self, item: Item) -> Future[Attempt[Value]]:
        return self._pool.submit(_attempt, item, self._function)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _attempt(item: Item, function: Callable[[Item], Value]) -> Attempt[Value]:
    try:
        return function(item), None
    except Exception as error:
        _clear_locals(error)
        return None, error


def _clear_locals(error: BaseException) -> None:
    """Frees what the frames of the error and its causes hold: a broken image, decoded in part, until it is reported."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
