"""Runs a call in a forked child, so that a crash, a hang or a large allocation is a result and not the end."""

import contextlib
import faulthandler
import gc
import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WALL_SECONDS = 60.0  # generous: other processes may keep the cores busy
ADDRESS_SPACE = 6 * 2**30  # bytes beyond those of the parent; protects the machine


@dataclass(frozen=True)
class Ending:
    """How a call ended: with a value, an error or a crash; and what it cost in CPU seconds and GiB of memory.

    error: names of the exception's class and of its bases, the most derived first. where: the end of its traceback.
    """

    value: Any = None
    error: tuple[str, ...] = ()
    message: str = ""
    where: str = ""
    crash: str = ""
    seconds: float = 0.0
    gib: float = 0.0


def run_forked(call: Callable[[], Any]) -> Ending:
    """The ending of `call()`, whose value must be picklable. What it prints is lost."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with open(writer, "wb") as pipe:
                pickle.dump(_measured(call), pipe)
            status = 0
        finally:
            os._exit(status)  # without the parent's cleanup
    os.close(writer)
    try:
        answer = _read_all(reader)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has answered, or hangs
        _, status = os.waitpid(child, 0)
    if answer:
        return pickle.loads(answer)
    if answer is None:
        return Ending(crash=f"hangs: killed after {WALL_SECONDS:g} s")
    name = signal.Signals(status & 127).name if status & 127 else f"exit status {status >> 8}"
    return Ending(crash=f"the process died: {name}")


def _read_all(reader: int) -> bytes | None:
    """All that the child writes; None if it does not finish."""
    answer, deadline = b"", time.monotonic() + WALL_SECONDS
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 2**20)
        if not part:
            return answer
        answer += part
    return None


def _measured(call: Callable[[], Any]) -> Ending:
    import torch

    gc.freeze()  # the parent's garbage, freed here, would make room for what the call is to be seen to take
    faulthandler.disable()
    torch.set_num_threads(1)  # a fork has none of the parent's threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _limit_address_space()
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory, start = _peak_gib(), time.process_time()
    value, error, message, where = None, (), "", ""
    try:
        value = call()
    except BaseException as raised:  # Rust's panics are not derived from Exception
        error = tuple(kind.__name__ for kind in type(raised).__mro__)
        message = str(raised)
        frames = traceback.extract_tb(raised.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return Ending(value, error, message, where, "", time.process_time() - start, _peak_gib() - memory)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB, on Linux


def _limit_address_space() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():
        limit = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
