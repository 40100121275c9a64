"""Checks and measures on a GPU in processes of their own, so that a kernel which breaks the CUDA context, does not end
or crashes costs its own rows and no others. The process that starts them touches no GPU.

    python -m bench.measure.isolated '{"task": "check" or "run", …}'

is such a process. It tells what it does in lines of JSON on its standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.measure.check import Checked, check_all, spread
from bench.measure.measure import DEADLY, DeadDevice, Plan, blank_row, device_is_dead
from bench.measure.run import Outcome, OutOfTime, Request, open_results, run
from bench.peers import Unsupported, peers_of
from bench.peers.registry import HOPPER, require_hopper
from bench.report.rows import Results, Row

Progress = Callable[[int, int, str], None]

# Seconds after which something hangs: the check of one shape; a start; a contender of ours until it is judged, in a
# quick run and in any; whatever may last, such as a peer's compilation or the timing of a million pairs.
CHECK, START, OURS_QUICK, OURS, LONG = 75.0, 180.0, 150.0, 600.0, 7200.0
COMMAND = (sys.executable, "-m", "bench.measure.isolated")
GRACE = 10.0  # what a process may take to end in order when time is up


class _Process:
    """One that is started with a task, and what it tells."""

    def __init__(self, task: dict[str, Any], **variables: str):
        command = [*COMMAND, json.dumps(task)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(**variables))
        self.told: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed
                self.told.put(json.loads(line))
        self.told.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """What it tells next; None when it has ended. TimeoutError where it tells nothing."""
        try:
            return self.told.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError(f"did not end within {seconds:.0f} s") from None

    def ending(self) -> str:
        code = self.process.wait()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # which it has been sent, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE)
        self.process.kill()
        self.process.wait()


def check_apart(
    operations: Sequence[str],
    quick: bool,
    dtypes: Sequence[str] = (),
    until: float | None = None,
    progress: Progress = lambda done, total, what: None,
) -> list[Checked]:
    """`check_all` with a process for each operation, several at a time; kernels for Hopper alone in theirs.

    OutOfTime where `time.monotonic()` reaches `until` before.
    """
    jobs = [(name, kernels) for name in operations for kernels in ("triton", "triton:hopper")]
    jobs = [(name, kernels) for name, kernels in jobs if kernels in peers_of(name)]
    at_once = max(1, (os.cpu_count() or 1) - 1) if quick else 2  # thorough ones fill the memory
    running: list[_Process] = []

    def one(name: str, kernels: str) -> list[Checked]:
        task = {"task": "check", "operation": name, "kernels": kernels, "quick": quick, "dtypes": list(dtypes)}
        with _Process(task, **(HOPPER if kernels == "triton:hopper" else {})) as process:
            running.append(process)
            return _checked(process, name, kernels, until)

    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(one, *job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done - 1, len(jobs), "check " + " ".join(futures[future]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.process.kill()
            raise
    return [checked for future in futures for checked in future.result()]


def _checked(process: _Process, name: str, kernels: str, until: float | None) -> list[Checked]:
    checked: list[Checked] = []
    shape, dtype, seconds = "", "", START
    while True:
        try:
            told = process.next(seconds if until is None else min(seconds, until - time.monotonic()))
            if told is None:
                problem = process.ending()
                break
        except TimeoutError as error:
            if until is not None and time.monotonic() >= until:
                raise OutOfTime from None
            problem = str(error)
            break
        if "checked" in told:
            checked.append(Checked(**told["checked"]))
        elif "begun" in told:
            (shape, dtype), seconds = told["begun"], CHECK
        else:
            return checked  # all of them, or up to one that broke the CUDA context
    red = Checked(name, {"name": shape}, dtype, ok=False, kernels=kernels, problem=DEADLY + problem)
    return [*checked, red]


def run_apart(
    request: Request, where: Path | None, plan: Plan, until: float | None, progress: Progress
) -> tuple[Outcome, Path]:
    """`run` in a process; after one that was taken down another goes on behind the culprit. Also the results' file."""
    outcome, red, start = Outcome(), dict(plan.red), 0
    path: Path | None = None
    while True:
        task = {
            "task": "run",
            "request": dataclasses.asdict(request),
            "where": None if where is None else str(where),
            "plan": {"seconds": plan.seconds, "least_rounds": plan.least_rounds},
            "red": [[*key, reason] for key, reason in red.items()],
            "until": until,
            "start": start,
        }
        begun: dict[str, Any] = {}
        seconds, problem, deadly = START, "", None
        with _Process(task) as process:
            while not problem:
                patience = seconds if until is None else min(seconds, until + GRACE - time.monotonic())
                try:
                    told = process.next(patience)
                except TimeoutError as error:
                    problem = str(error)
                    break
                match told:
                    case None:
                        problem = process.ending()
                    case {"path": where_it_is}:
                        path = Path(where_it_is)
                    case {"begun": [place, total, what]}:
                        begun, seconds = told, told["seconds"]
                        progress(place, total, what)
                    case {"row": values}:
                        row = Row(**values)
                        outcome.rows.append(row)
                        deadly = row if row.reason.startswith(DEADLY) else deadly
                    case {"settled": settled, "left_out": left_out}:
                        assert path is not None
                        outcome.settled += settled
                        outcome.left_out += left_out
                        return outcome, path
                    case {"error": message}:
                        raise RuntimeError(message)
        if not begun or path is None:
            raise RuntimeError(f"the process that measures {problem} before it had begun")
        place, _, what = begun["begun"]
        if until is not None and time.monotonic() >= until:  # it could not be interrupted; nobody is to blame
            outcome.left_out += request.labels()[place:]
            return outcome, path
        if deadly is None and begun["blank"] is not None:
            deadly = Row(**{**begun["blank"], "status": "error", "reason": DEADLY + problem})
            Results.open(path).add(deadly)
            outcome.rows.append(deadly)
        if deadly is None:  # while all were timed
            outcome.left_out.append(f"{what.rpartition(': ')[0]} ({problem} while it was timed)")
        elif begun["kernels"]:
            red |= spread(deadly.op, begun["kernels"], deadly.reason)
        start = place + (deadly is None)


def _check(task: dict[str, Any], tell: Callable[..., None]) -> None:
    name, kernels = task["operation"], task["kernels"]
    dtypes = task["dtypes"]
    if kernels == "triton:hopper":
        try:
            require_hopper()
        except Unsupported:
            return tell(ended=True)
        served = peers_of(name)[kernels].dtypes or ()
        dtypes = [dtype for dtype in dtypes or (["bf16"] if task["quick"] else served) if dtype in served]
        if not dtypes:
            return tell(ended=True)

    def progress(done: int, total: int, what: str) -> None:
        shape, _, dtype = what.removeprefix(f"{name} ").rpartition(" ")
        tell(begun=[shape, dtype])

    with contextlib.suppress(DeadDevice):  # after its row
        for one in check_all([name], task["quick"], dtypes, progress):
            if kernels == "triton:hopper" and one.problem.startswith("UnsupportedInputError"):
                one = dataclasses.replace(one, ok=True, problem=f"not checked: {one.problem}")
            tell(checked=dataclasses.asdict(dataclasses.replace(one, kernels=kernels)))
    tell(ended=True)


def _run(task: dict[str, Any], tell: Callable[..., None]) -> None:
    request = Request(**task["request"])
    plan = Plan(**task["plan"], red={(operation, kernels): reason for operation, kernels, reason in task["red"]})
    settings = request.settings()

    def progress(place: int, total: int, what: str) -> None:
        if place == total:
            return
        suite, setting = settings[place]
        entry = peers_of(setting.operation.name).get(what.rpartition(": ")[2])
        if entry is None:
            return tell(begun=[place, total, what], blank=None, kernels=None, seconds=LONG)
        soon = OURS_QUICK if request.quick else OURS
        tell(
            begun=[place, total, what],
            blank=dataclasses.asdict(blank_row(suite, setting, entry)),
            kernels=entry.kernels if entry.ours else None,
            seconds=soon if entry.ours and not entry.slow else LONG,
        )

    class Told(Results):
        def add(self, row: Row) -> None:
            super().add(row)
            tell(row=dataclasses.asdict(row))

    try:
        opened = open_results(None if task["where"] is None else Path(task["where"]))
        tell(path=str(opened.path))
        outcome = run(request, Told(opened.path, opened.rows), plan, task["until"], progress, start=task["start"])
    except (ValueError, RuntimeError, OSError) as error:
        if device_is_dead():
            sys.exit(1)
        return tell(error=" ".join(str(error).split()))
    tell(settled=outcome.settled, left_out=outcome.left_out)


def main() -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever peers print belongs elsewhere

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=told, flush=True)

    task = json.loads(sys.argv[1])
    try:
        {"check": _check, "run": _run}[task["task"]](task, tell)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
