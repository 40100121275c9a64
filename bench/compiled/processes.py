"""Works on tasks in several processes. A process that crashes costs the task that it worked on, and is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Crashed(RuntimeError):
    """A process ended before it had worked off its task."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process(Generic[Task, Result]):
    """A process that works on one task after another, and the number of the task that it works on."""

    def __init__(self, work: Callable[[Task], Result]):
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, work), daemon=True)
        # Ctrl-C reaches the parent as well, which ends this process. Until _serve ignores it, it stays blocked. The
        # tracker, which starts with the first process unless it runs, would unblock it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        other_end.close()
        self.number = -1

    def give(self, number: int, task: Task) -> None:
        self.number = number
        with contextlib.suppress(BrokenPipeError):  # it has crashed, as `result` reports
            self.connection.send(task)

    def result(self) -> Result | Exception:
        try:
            result: Result | Exception = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Crashed(f"the process {how}")
        return result

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = connection.recv()
            try:
                result = work(task)
            except Exception as error:
                result = RuntimeError(f"{type(error).__name__}: {error}")
            connection.send(result)


def work_on(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    jobs: int,
    begin: Callable[[int, int], None] = lambda done, number: None,
) -> Iterator[tuple[int, Result | Exception]]:
    """Yields (number of the task, result or exception) in the order in which tasks are done, at most `jobs` at a time.

    work: a function of a module, which the processes import. begin(done, number) is called when a task begins.
    """
    waiting = iter(enumerate(tasks))
    idle = [_Process(work) for _ in range(min(jobs, len(tasks)))]
    busy: dict[Any, _Process[Task, Result]] = {}
    done = 0
    try:
        while True:
            while idle and (following := next(waiting, None)) is not None:
                process = idle.pop()
                busy[process.connection] = process
                begin(done, following[0])
                process.give(*following)
            if not busy:
                return
            for connection in wait(list(busy)):
                process = busy.pop(connection)
                result = process.result()
                if isinstance(result, Crashed):
                    process.end()
                    idle.append(_Process(work))
                else:
                    idle.append(process)
                done += 1
                yield process.number, result
    finally:
        for process in [*idle, *busy.values()]:
            process.end()
