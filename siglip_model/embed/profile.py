"""Where the time of a run goes: seconds per stage of the loop, and what bounds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from siglip_model.embed.workers import Workers

Item = TypeVar("Item")
Value = TypeVar("Value")

BOUND_BY = {
    "list": "listing the inputs, and finding which are finished",
    "decode": "reading and decoding the inputs",
    "copy": "the copy to the device",
    "compute": "the model",
    "write": "the journal and the output file",
}


@dataclass(frozen=True)
class ProfileReport:
    """Seconds of the loop per stage, and of all together.

    decode: the time that the loop waited for the workers that read and decode ahead of it. decode_in: what these are,
    see `workers.DECODE`. busy: the share of threads' time in which they did so; None for processes. trial: what one of
    both has found. rest: of the loop, such as the report of progress.
    """

    list: float
    decode: float
    copy: float
    compute: float
    write: float
    rest: float
    total: float
    decode_in: str
    workers: int
    busy: float | None
    trial: str

    @property
    def bound_by(self) -> str:
        """The stage that takes most of the loop's time, in words."""
        stage = max(BOUND_BY, key=lambda name: getattr(self, name))
        if stage != "decode":
            return BOUND_BY[stage]
        kind = self.decode_in if self.decode_in != "auto" else "threads or processes"
        busy = "" if self.busy is None else f" that are busy {self.busy:.0%} of the time"
        return f"{BOUND_BY[stage]}, by {self.workers} {kind}{busy}" + (
            f" (a trial: {self.trial})" if self.trial else ""
        )


class Profile:
    """Measures the stages of one run. synchronize: waits for the device, so that its work counts where it was launched,
    which costs the overlap of the device with the host. Without it nothing is measured."""

    def __init__(self, workers: Workers, synchronize: Callable[[], None] | None) -> None:
        self._workers = workers
        self._synchronize = synchronize
        self._seconds = dict.fromkeys(("list", "batch", "copy", "compute", "write"), 0.0)
        self._reading = 0.0
        self._lock = threading.Lock()
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._synchronize is None:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            if name in ("copy", "compute"):
                self._synchronize()
            self._seconds[name] += time.perf_counter() - started

    def in_threads(self, read: Callable[[Item], Value]) -> Callable[[Item], Value]:
        """`read`, whose time in all threads counts."""

        def timed(item: Item) -> Value:
            started = time.perf_counter()
            try:
                return read(item)
            finally:
                with self._lock:
                    self._reading += time.perf_counter() - started

        return read if self._synchronize is None else timed

    def report(self) -> ProfileReport | None:
        """None if nothing was measured."""
        if self._synchronize is None:
            return None
        total = time.perf_counter() - self._started
        measured = dict(self._seconds)
        measured["decode"] = measured.pop("batch") - measured["list"]  # inputs are listed as batches are asked for
        rest = total - sum(measured.values())
        workers = self._workers
        busy = self._reading / (total * max(1, workers.count)) if workers.decode == "threads" else None
        return ProfileReport(
            **measured,
            rest=rest,
            total=total,
            decode_in=workers.decode,
            workers=workers.count,
            busy=busy,
            trial=workers.trial,
        )
