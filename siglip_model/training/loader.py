"""torch's DataLoader, whose workers leave it to the run when to end."""

from __future__ import annotations

import signal
from typing import Any

from torch.utils.data import DataLoader


def make_loader(dataset: Any, **arguments: Any) -> DataLoader[Any]:
    """A DataLoader. Batch systems also send SIGTERM to its workers, whose death would end the run before it saves."""
    return DataLoader(dataset, worker_init_fn=_ignore_termination, **arguments)


def _ignore_termination(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
