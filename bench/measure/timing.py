"""Measures time and memory: contenders side by side, rotated inputs, medians with 20th and 80th percentiles.

On a GPU the clock is a pair of CUDA events around a burst of calls. Successive calls read successive copies of the
inputs, together more than twice the L2 cache, so no call finds its inputs there. Where launches are to be hidden, the
GPU first spins for as long as the host needs to queue the burst, so that the events enclose kernels back to back.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
BURST_MILLISECONDS, LONGEST_BURST = 0.5, 64
MOST_COPIES = 256
REST_SECONDS = 0.02  # before a call on a CPU, in which the spinning threads of the last contender fall asleep


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), fifths[0], fifths[-1], len(milliseconds))


class Steps:
    """One contender's calls, one per copy of the inputs, in turn."""

    def __init__(self, steps: Sequence[Callable[[], object]]):
        self.steps = steps
        self.next = 0

    def __call__(self) -> None:
        self.steps[self.next]()
        self.next = (self.next + 1) % len(self.steps)


Clock = Callable[[Steps], float]
"""Measures the milliseconds of one call, once."""


def cpu_clock(steps: Steps) -> float:
    time.sleep(REST_SECONDS)
    start = time.perf_counter()
    steps()
    return (time.perf_counter() - start) * 1e3


class CudaClock:
    """CUDA events around a burst of calls that is long relative to their resolution."""

    def __init__(self, hide_launches: bool):
        self.hide_launches = hide_launches
        self.bursts: dict[int, tuple[int, int]] = {}  # by contender: calls, and cycles to spin before them

    def _burst(self, steps: Steps) -> tuple[int, int]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        steps()
        torch.cuda.synchronize()
        one = (time.perf_counter() - start) * 1e3
        calls = max(1, min(LONGEST_BURST, round(BURST_MILLISECONDS / one)))
        start = time.perf_counter()
        for _ in range(calls):
            steps()
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        # Twice the queueing time, at a clock that no GPU exceeds, and at most a tenth of a second.
        return calls, int(min(0.1, 2 * queued) * 2.5e9)

    def __call__(self, steps: Steps) -> float:
        if id(steps) not in self.bursts:
            self.bursts[id(steps)] = self._burst(steps)
        calls, cycles = self.bursts[id(steps)]
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.hide_launches:
            torch.cuda._sleep(cycles)
        before.record()
        for _ in range(calls):
            steps()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / calls


def clock(device: str, hide_launches: bool = True) -> Clock:
    return CudaClock(hide_launches) if device == "cuda" else cpu_clock


def interleaved(
    contenders: Mapping[str, Steps],
    clock: Clock,
    seconds: float,
    least_rounds: int = LEAST_ROUNDS,
    each_round: Callable[[], object] = lambda: None,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, Timing]:
    """Times contenders that have run before (compiled, warm).

    Each round takes every contender once, in random order, so that clocks and temperature favour none. Rounds continue
    for `seconds` per contender and number at least `least_rounds`. `each_round` is called after each. A contender that
    raises is reported to `failed`, if given, and dropped.
    """
    order = list(contenders)
    generator = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}

    def take(name: str, counted: bool) -> None:
        try:
            milliseconds = clock(contenders[name])
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            order.remove(name)
            return
        if counted:
            times[name].append(milliseconds)

    for name in list(order):
        take(name, counted=False)  # warms up
    start = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= least_rounds and time.perf_counter() - start > seconds * len(order):
            break
        generator.shuffle(order)
        for name in list(order):
            take(name, counted=True)
        each_round()
    return {name: Timing.of(times[name]) for name in contenders if name in order}


def copies(bytes_of_one: int, device: str) -> int:
    """The number of copies of the inputs that exceed twice the L2 cache; two on a CPU, whose caches are shared."""
    if device != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(MOST_COPIES, -(-2 * l2 // max(1, bytes_of_one))))


def cuda_peak(step: Callable[[], Any]) -> int:
    """Peak bytes of the allocator during one call, beyond what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes() -> int:
    """The peak memory of this process (Linux). Unlike getrusage's, it is not inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def forget_peak() -> None:
    """Resets `peak_resident_bytes` to the current memory of this process (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
