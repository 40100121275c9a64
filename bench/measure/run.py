"""Runs suites: skips what is settled, writes at once what is measured, and ends in order when time is up."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.cases.operations import Setting
from bench.cases.suites import SUITES, by_importance, dtype_name, dtypes_of
from bench.environment import device
from bench.measure.measure import DEADLY, Plan, blank_row, free, measure
from bench.measure.roofline import FloorProbe
from bench.measure.timing import LEAST_ROUNDS
from bench.peers import Peer, peers_of
from bench.report.rows import Results, Row


@dataclass(frozen=True)
class Request:
    """What to measure; empty means what is usual. The command line has checked every name."""

    suites: Sequence[str]
    shapes: Sequence[str] = ()
    peers: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = ()
    quick: bool = False
    again: bool = False  # also what is settled

    def settings(self) -> list[tuple[str, Setting]]:
        """What to measure, by suite, most important first. What a quick run on a GPU waits for in minutes comes last:
        those settings stand there once more, to be measured with it."""
        place = device()
        dtypes = list(self.dtypes) or dtypes_of(place)
        found = by_importance(
            {
                name: SUITES[name].settings(place, dtypes, self.quick, self.shapes, self.directions)
                for name in self.suites
            }
        )
        if place != "cuda" or not self.quick or self.peers:
            return found
        return found + [(suite, setting) for suite, setting in found if SUITES[suite].quick_peers]

    def labels(self) -> list[str]:
        """The settings' names for people, in their order."""
        once, names = set(), []
        for one in self.settings():
            slow = f" with {', '.join(SUITES[one[0]].quick_peers)}" if one in once else ""
            names.append(label(*one) + slow)
            once.add(one)
        return names

    def without_settings(self) -> list[str]:
        """Suites of which nothing is measured, such as an MLP on a CPU, where there is nobody to compare with."""
        measured = {suite for suite, _ in self.settings()}
        return [suite for suite in self.suites if suite not in measured]

    def entries(self, suite: str, setting: Setting, waiting: bool = False) -> list[Peer]:
        """Whom to measure: on a CPU not the peers that only a GPU has, in a quick run not the slow ones, or only those
        that the suite waits for."""
        entries = peers_of(setting.operation.name).values()
        if self.peers:
            return [entry for entry in entries if entry.name in self.peers]
        possible = [entry for entry in entries if setting.device == "cuda" or not entry.cuda]
        waited_for = SUITES[suite].quick_peers if waiting else ()
        return [entry for entry in possible if not (self.quick and entry.slow) or entry.name in waited_for]


@dataclass
class Outcome:
    """What a run came to."""

    rows: list[Row] = field(default_factory=list)
    settled: int = 0  # groups that were measured before
    left_out: list[str] = field(default_factory=list)


class OutOfTime(BaseException):
    """Raised where time is up, whatever is running: no library's `except Exception` keeps it."""


KEPT_SECONDS = 5.0  # a finalizer, or a context that fails to close, may swallow it once


@contextlib.contextmanager
def deadline(at: float | None) -> Iterator[None]:
    """Raises OutOfTime in the main thread when `time.monotonic()` reaches `at`, and again where somebody kept it."""
    if at is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, at - time.monotonic()), KEPT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def label(suite: str, setting: Setting) -> str:
    """A group's name for people."""
    name = setting.operation.name
    operation = name if name == suite else f"{suite} {name}"
    return f"{operation} {setting.direction} {setting.shape.name} {dtype_name(setting.dtype)}"


def _is_deadly(results: Results, suite: str, setting: Setting, entry: Peer) -> bool:
    """Whether a contender took the process down when this code met it before."""
    row = blank_row(suite, setting, entry)
    return results.settled(row) and results.rows[row.key].reason.startswith(DEADLY)


def run(
    request: Request,
    results: Results,
    plan: Plan,
    until: float | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    measure_group: Callable[..., None] = measure,
    start: int = 0,
) -> Outcome:
    """Measures what is requested, from the group of number `start`, until `time.monotonic()` reaches `until`."""
    outcome = Outcome()
    settings, labels = request.settings(), request.labels()
    probes: dict[torch.dtype, FloorProbe] = {}

    def write(row: Row) -> None:
        results.add(row)
        outcome.rows.append(row)

    place = start
    try:
        with deadline(until):
            for place, (suite, setting) in enumerate(settings[start:], start):
                entries = request.entries(suite, setting, waiting=(suite, setting) in settings[:place])
                entries = [entry for entry in entries if not _is_deadly(results, suite, setting, entry)]
                if not request.again and all(results.settled(blank_row(suite, setting, entry)) for entry in entries):
                    outcome.settled += 1
                    continue
                if setting.dtype not in probes:
                    probes[setting.dtype] = FloorProbe(setting.device, setting.dtype)
                step = _under(progress, place, len(settings), labels[place])
                measure_group(suite, setting, entries, probes[setting.dtype], plan, write, step)
            place = len(settings)
    except OutOfTime:
        free()
        outcome.left_out = labels[place:]
    progress(place, len(settings), "")
    return outcome


def _under(progress: Callable[[int, int, str], None], place: int, total: int, name: str) -> Callable[[str], None]:
    return lambda what: progress(place, total, f"{name}: {what}")


def open_results(where: Path | None) -> Results:
    """The file of this machine and day, or the one that is named. OSError, before anything is measured, where it
    cannot be written."""
    from bench.report.rows import results_file

    results = Results.open(results_file(where))
    results.path.parent.mkdir(parents=True, exist_ok=True)
    results.path.open("a").close()
    return results


def plan_for(quick: bool, red: Mapping[tuple[str, str], str]) -> Plan:
    """A quick run takes a third of the time on each contender, and on a CPU, where a call may last seconds, fewer."""
    rounds = 3 if quick and device() == "cpu" else LEAST_ROUNDS
    return Plan(seconds=0.1 if quick else 0.3, least_rounds=rounds, red=dict(red))
