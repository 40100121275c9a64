"""Times of several functions side by side (interleaved, medians with 20th and 80th percentile), and of what machine."""

import dataclasses
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p20: float
    p80: float
    rounds: int


def interleaved(
    functions: dict[str, Callable[[], object]], device: str, seconds: float = 1.0, least_rounds: int = 5
) -> dict[str, Timing]:
    """Times functions that have run before (compiled, warm). Each round runs all of them once, in an order drawn anew,
    so that clocks and temperature favour none. On CUDA events are the clock, and a write of 256 MB empties the L2
    between runs. Rounds go on for `seconds` for each function, but for no fewer than `least_rounds`.
    """
    order = list(functions)
    generator = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device == "cuda" else None
    start = time.perf_counter()
    while len(times[order[0]]) < least_rounds or time.perf_counter() - start < seconds * len(order):
        generator.shuffle(order)
        for name in order:
            times[name].append(_once(functions[name], flush))
        if len(times[order[0]]) >= 200:
            break
    return {name: _timing(values) for name, values in times.items()}


def _once(function: Callable[[], object], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))


def peak_resident_bytes() -> int:
    """The most memory that this process ever had (Linux). Not getrusage's: a child inherits its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def machine() -> dict[str, str | int]:
    """What every table of times must say about where they were taken."""
    facts: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm",
            "--format=csv,noheader",
            "-i",
            "0",
        ]
        try:
            facts["driver, power limit, clock"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError:
            facts["driver, power limit, clock"] = "nvidia-smi is not installed"
    return facts


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
