"""Images in batches, opened ahead of the model by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    items: Iterable[Item], function: Callable[[Item], Result], *, workers: int, window: int
) -> Generator[tuple[Item, Result | None, Exception | None], None, None]:
    """`(item, function(item), None)` for each item in its order, or `(item, None, error)` where it raised.

    With `workers` threads, up to `window` items are under way while the caller is busy; with 0 each is computed when
    asked for. Items are drawn in the caller's thread.
    """
    if workers == 0:
        for item in items:
            yield _attempt(item, function)
        return
    from concurrent.futures import Future, ThreadPoolExecutor

    pool = ThreadPoolExecutor(workers, thread_name_prefix="read_ahead")
    pending: deque[Future[tuple[Item, Result | None, Exception | None]]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_attempt, item, function))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _attempt(item: Item, function: Callable[[Item], Result]) -> tuple[Item, Result | None, Exception | None]:
    try:
        return item, function(item), None
    except Exception as error:
        return item, None, error


def _batches(items: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _value_or_raise(value: torch.Tensor | None, error: Exception | None) -> torch.Tensor:
    if error is not None:
        raise error
    assert value is not None  # read_ahead gives one or the other
    return value
