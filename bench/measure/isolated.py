"""Checks and measures on a GPU in separate processes, so that a kernel which breaks the CUDA context, hangs or crashes
loses its own rows only. The process that starts them does not touch the GPU.

    python -m bench.measure.isolated '{"task": "check", "prepare", "record" or "run", …}'

is such a process. It reports its progress and results as lines of JSON on standard output.
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

from bench.cases.suites import dtype_name
from bench.environment import process_environment
from bench.measure.check import Checked, check_all, not_checked, with_models, write_checks
from bench.measure.measure import DeadDevice, Plan, blank_row, device_is_dead, free, step_of
from bench.measure.progress import Event, Progress, silent
from bench.measure.run import Outcome, Request, open_results, run
from bench.peers import Unsupported, peers_of
from bench.peers.registry import FAMILIES, selecting
from bench.report.rows import Results, Row

# Seconds after which a step counts as hung: the check of one shape, whose kernels in Gluon may compile ten seconds each
# beside others; the start of a process; the preparation of this project's kernels, in a quick and in a full run;
# anything else, such as a peer's compilation or a million pairs.
CHECK, START, KERNELS_QUICK, KERNELS, LONG = 150.0, 180.0, 150.0, 600.0, 7200.0
COMMAND = (sys.executable, "-m", "bench.measure.isolated")
GRACE = 10.0  # what a process may take to stop in order after the deadline


class _Process:
    """A process that works on a task, and its messages."""

    def __init__(self, task: dict[str, Any], **variables: str):
        command = [*COMMAND, json.dumps(task)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=process_environment(**variables)
        )
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # half a line of a process that was killed
                self.messages.put(json.loads(line))
        self.messages.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended. TimeoutError if there is none in time."""
        try:
            return self.messages.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError(f"did not end within {seconds:.0f} s") from None

    def ending(self) -> str:
        code = self.process.wait()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # the process has received it as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE)
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may take long to stop a kernel that hangs
            self.process.wait(timeout=GRACE)


def check_isolated(
    operations: Sequence[str],
    quick: bool,
    dtypes: Sequence[str] = (),
    until: float | None = None,
    progress: Progress = silent,
    request: Request | None = None,
) -> list[Checked]:
    """`check_all` in a process per operation, several at a time; kernels for one architecture have their own.

    request: what is measured next. Each of its contenders that compiles is called once, so that the run, which has one
    process, finds the code on the disk: kernels after their check, others and models in further processes.

    What is not done when `time.monotonic()` reaches `until` is returned as not checked.
    """
    # The portable kernels first, then those for one architecture, whose failure leaves the others.
    jobs = [(name, kernels) for kernels in ("triton", *FAMILIES) for name in operations if kernels in peers_of(name)]
    more = [] if request is None else _compiling(request, jobs)
    asked = None if request is None else dataclasses.asdict(request)
    at_once = max(1, (os.cpu_count() or 1) - 1) if quick else 2  # thorough ones fill the memory
    running: list[_Process] = []

    def work(task: dict[str, Any], **variables: str) -> list[Checked]:
        if until is not None and time.monotonic() >= until:
            return _late(task)
        with _Process({**task, "request": asked}, **variables) as process:
            running.append(process)
            return _prepared(process, until) if task["task"] == "prepare" else _checked(process, task, until)

    def check(name: str, kernels: str) -> list[Checked]:
        task = {"task": "check", "operation": name, "kernels": kernels, "quick": quick, "dtypes": list(dtypes)}
        return work(task, **selecting(kernels))

    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(check, *job): f"check {' '.join(job)}" for job in jobs}
        for name, peer in more:
            task = {"task": "prepare", "operation": name, "peer": peer}
            futures[pool.submit(work, task, TORCHINDUCTOR_COMPILE_THREADS="2")] = f"compile {name} {peer}"
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(Event(done - 1, len(futures), futures[future]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.process.kill()
            raise
    return [checked for future in futures for checked in future.result()]


def _compiling(request: Request, checked: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(operation, peer) of what compiles and is not checked, most important first."""
    found = [
        (setting.operation.name, entry.name)
        for suite, setting in request.settings()
        for entry in request.entries(suite, setting, waiting=True)
        if entry.compiles and not entry.quadratic  # whose memory others need meanwhile
    ]
    return [one for one in dict.fromkeys(found) if one not in checked]


def _late(task: dict[str, Any], **values: Any) -> list[Checked]:
    if task["task"] == "prepare":
        return []
    problem = "not checked: the time limit was reached"
    return [Checked(task["operation"], {"name": "", **values}, "", True, task["kernels"], problem=problem)]


def _prepared(process: _Process, until: float | None) -> list[Checked]:
    """Waits for the end, however it comes: what went wrong will be seen when it is measured."""
    with contextlib.suppress(TimeoutError):
        while (message := process.next(_patience(KERNELS_QUICK, until))) is not None and "ended" not in message:
            pass
    return []


def _patience(seconds: float, until: float | None) -> float:
    return seconds if until is None else min(seconds, until - time.monotonic())


def _checked(process: _Process, task: dict[str, Any], until: float | None) -> list[Checked]:
    name, kernels = task["operation"], task["kernels"]
    checked: list[Checked] = []
    shape, dtype, seconds = "", "", START
    while True:
        try:
            message = process.next(_patience(seconds, until))
            if message is None:
                problem = process.ending()
                break
        except TimeoutError as error:
            if until is not None and time.monotonic() >= until:
                return [*checked, *_late(task, name=shape)]
            problem = str(error)
            break
        if "checked" in message:
            checked.append(Checked(**message["checked"]))
        elif "begun" in message:
            (shape, dtype), seconds = message["begun"], message.get("seconds", CHECK)
        else:
            return checked  # all of them, or up to one that broke the CUDA context
    crash = Checked(name, {"name": shape}, dtype, False, kernels, problem=f"crashed: {problem}", crashed=True)
    return [*checked, crash]


def record_checks(checked: Sequence[Checked], where: Path | None) -> str:
    """`write_checks` in a process, which may ask the GPU for its name. Returns where they are, or the problem."""
    task = {"task": "record", "checked": list(map(dataclasses.asdict, checked)), "where": where and str(where)}
    with _Process(task) as process:
        try:
            message = process.next(START)
        except TimeoutError as error:
            return f"not written: the process {error}"
        return f"not written: the process {process.ending()}" if message is None else f"written to {message['path']}"


def run_isolated(
    request: Request, where: Path | None, plan: Plan, until: float | None, progress: Progress
) -> tuple[Outcome, Path]:
    """`run` in a process, and the path of the results. After a crash a new process resumes without the culprit."""
    outcome, failed, start = Outcome(), dict(plan.failed), 0
    path: Path | None = None
    while True:
        task = {
            "task": "run",
            "request": dataclasses.asdict(request),
            "where": None if where is None else str(where),
            "plan": {"seconds": plan.seconds, "least_rounds": plan.least_rounds},
            "failed": [[*key, reason] for key, reason in failed.items()],
            "until": until,
            "start": start,
        }
        begun: dict[str, Any] = {}
        seconds, problem, crash = START, "", None
        with _Process(task) as process:
            while not problem:
                patience = seconds if until is None else min(seconds, until + GRACE - time.monotonic())
                try:
                    message = process.next(patience)
                except TimeoutError as error:
                    problem = str(error)
                    break
                match message:
                    case None:
                        problem = process.ending()
                    case {"path": where_it_is}:
                        path = Path(where_it_is)
                    case {"begun": step}:
                        begun, seconds = message, message["seconds"]
                        progress(Event(**step))
                    case {"row": values}:
                        row = Row(**values)
                        outcome.rows.append(row)
                        crash = row if row.crashed else crash
                    case {"settled": settled, "left_out": left_out}:
                        assert path is not None
                        outcome.settled += settled
                        outcome.left_out += left_out
                        return outcome, path
                    case {"error": text}:
                        raise RuntimeError(text)
        if not begun or path is None:
            raise RuntimeError(f"the process that measures {problem} before it had begun")
        step = Event(**begun["begun"])
        if until is not None and time.monotonic() >= until:  # it could not be interrupted; no contender is to blame
            outcome.left_out += request.labels()[step.done :]
            return outcome, path
        if crash is None and begun["blank"] is not None:
            crash = Row(**{**begun["blank"], "status": "error", "crashed": True, "reason": f"crashed: {problem}"})
            Results.open(path).add(crash)
            outcome.rows.append(crash)
        if crash is None:  # while the whole group was timed
            outcome.left_out.append(f"{step.group} ({problem} while it was timed)")
        elif begun["kernels"]:
            failed |= with_models(crash.op, begun["kernels"], crash.reason)
        start = step.done + (crash is None)


def _check(task: dict[str, Any], tell: Callable[..., None]) -> None:
    name, kernels = task["operation"], task["kernels"]
    dtypes = task["dtypes"]
    if kernels in FAMILIES:
        try:
            FAMILIES[kernels].require()
        except Unsupported:
            return tell(ended=True)
        served = peers_of(name)[kernels].dtypes or ()
        dtypes = [dtype for dtype in dtypes or (["bf16"] if task["quick"] else served) if dtype in served]
        if not dtypes:
            return tell(ended=True)

    def progress(event: Event) -> None:
        if event.setting is not None:
            tell(begun=[event.setting.shape.name, dtype_name(event.setting.dtype)])

    with contextlib.suppress(DeadDevice):  # its result has been reported
        for one in check_all([name], task["quick"], dtypes, progress):
            if kernels in FAMILIES:
                one = not_checked(one)
            tell(checked=dataclasses.asdict(dataclasses.replace(one, kernels=kernels)))
        if task["request"] is not None:
            _call(Request(**task["request"]), name, kernels, tell)
    tell(ended=True)


def _prepare(task: dict[str, Any], tell: Callable[..., None]) -> None:
    _call(Request(**task["request"]), task["operation"], task["peer"], tell)
    tell(ended=True)


def _record(task: dict[str, Any], tell: Callable[..., None]) -> None:
    where = None if task["where"] is None else Path(task["where"])
    tell(path=str(write_checks([Checked(**one) for one in task["checked"]], where)))


def _call(request: Request, operation: str, peer: str, tell: Callable[..., None]) -> None:
    """Calls a contender once for every setting of the operation. Its errors are left to the measurement."""
    for suite, setting in dict.fromkeys(request.settings()):
        entry = peers_of(operation).get(peer)
        if setting.operation.name != operation or entry not in request.entries(suite, setting, waiting=True):
            continue
        tell(begun=[setting.shape.name, dtype_name(setting.dtype)], seconds=KERNELS_QUICK)
        try:
            step_of(entry.prepare(setting), setting.inputs(), setting)()
        except Exception:
            if device_is_dead():
                sys.exit(1)
        free()


def _run(task: dict[str, Any], tell: Callable[..., None]) -> None:
    request = Request(**task["request"])
    plan = Plan(**task["plan"], failed={(operation, kernels): reason for operation, kernels, reason in task["failed"]})
    settings = request.settings()

    def progress(event: Event) -> None:
        if event.done == event.total:
            return
        step = {"done": event.done, "total": event.total, "group": event.group, "step": event.step}
        entry = event.peer
        if entry is None:  # the timing of the whole group
            return tell(begun=step, blank=None, kernels=None, seconds=LONG)
        suite, setting = settings[event.done]
        soon = KERNELS_QUICK if request.quick else KERNELS
        tell(
            begun=step,
            blank=dataclasses.asdict(blank_row(suite, setting, entry)),
            kernels=entry.kernels if entry.uses_kernels else None,
            seconds=soon if entry.uses_kernels and not entry.slow else LONG,
        )

    class Reported(Results):
        def add(self, row: Row) -> None:
            super().add(row)
            tell(row=dataclasses.asdict(row))

    try:
        opened = open_results(None if task["where"] is None else Path(task["where"]))
        tell(path=str(opened.path))
        outcome = run(request, Reported(opened.path, opened.rows), plan, task["until"], progress, start=task["start"])
    except (ValueError, RuntimeError, OSError) as error:
        if device_is_dead():
            sys.exit(1)
        return tell(error=" ".join(str(error).split()))
    tell(settled=outcome.settled, left_out=outcome.left_out)


def main() -> None:
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers that print do not disturb the messages

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=messages, flush=True)

    task = json.loads(sys.argv[1])
    try:
        {"check": _check, "prepare": _prepare, "record": _record, "run": _run}[task["task"]](task, tell)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
