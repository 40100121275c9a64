"""torch's DataLoader, whose workers leave it to the run when to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def load_batches(dataset: Any, **arguments: Any) -> Iterator[Any]:
    """The batches of a DataLoader. Its workers end when the iterator is closed, or raises an error.

    Raises an exception that the dataset gives in place of a batch: one that it raised would arrive from a worker with
    the text of a traceback as its message.

    Batch systems also send SIGTERM to workers, whose death would end the run before it saves, so they ignore it. Python
    ends workers by the same signal when it exits, and would wait for them forever: an error's traceback keeps the
    DataLoader's iterator alive, which would otherwise end them.
    """
    found: Any = iter(DataLoader(dataset, worker_init_fn=_ignore_termination, **arguments))
    try:
        for batch in found:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        if arguments.get("num_workers"):
            found._shutdown_workers()


def _ignore_termination(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
