"""An upper bound on the time and the memory of what a test runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded(seconds: float = 2.0, gib: float = 1.0) -> Iterator[None]:
    """Asserts that the body takes at most so long, and that resident memory grows by at most so much meanwhile.

    Other processes do not count: the time is the processor's. In all the body may take five times as long.
    """
    before = _reset_peak()
    start, worked = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        taken, worked = time.perf_counter() - start, time.process_time() - worked
        grown = _memory("VmHWM") - before
    assert worked <= seconds and taken <= 5 * seconds, f"worked {worked:.1f} s, took {taken:.1f} s"
    assert grown <= gib, f"took {grown:.2f} GiB"


def _reset_peak() -> float:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory becomes its present value
    except OSError:  # the peak of the whole process then counts
        return _memory("VmHWM")
    return _memory("VmRSS")


def _memory(name: str) -> float:
    """A line of /proc/self/status in GiB; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), 0.0)
