"""Runs suites: skips settled groups, writes each row as it is measured, and stops in order at the deadline."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.cases.operations import Setting
from bench.cases.suites import SUITES, by_importance, dtype_name, dtypes_of, is_decisive
from bench.environment import device
from bench.measure.measure import TIMING, Plan, blank_row, free, measure
from bench.measure.progress import Event, Progress, silent
from bench.measure.roofline import RooflineProbe
from bench.measure.timing import LEAST_ROUNDS
from bench.peers import Peer, peers_of
from bench.report.rows import Results, Row


@dataclass(frozen=True)
class Request:
    """What to measure; an empty field means the default. The command line has validated every name."""

    suites: Sequence[str]
    shapes: Sequence[str] = ()
    peers: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = ()
    quick: bool = False
    again: bool = False  # also settled groups

    def settings(self) -> list[tuple[str, Setting]]:
        """(suite, setting), most important first.

        In a quick run on a GPU, settings that have slow peers to wait for are listed a second time: after those that
        decide most, and at the end.
        """
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
        decisive = [one for one in found if is_decisive(*one)]
        return [one for part in (decisive, found[len(decisive) :]) for one in (*part, *_waiting(part))]

    def labels(self) -> list[str]:
        """Readable names of the settings, in the same order."""
        once, names = set(), []
        for one in self.settings():
            slow = f" with {', '.join(SUITES[one[0]].quick_peers)}" if one in once else ""
            names.append(label(*one) + slow)
            once.add(one)
        return names

    def without_settings(self) -> list[str]:
        """Suites without anything to measure, such as an MLP on a CPU, where it has no peer."""
        measured = {suite for suite, _ in self.settings()}
        return [suite for suite in self.suites if suite not in measured]

    def entries(self, suite: str, setting: Setting, waiting: bool = False) -> list[Peer]:
        """The peers to measure: without those that need a GPU on a CPU, and without slow ones in a quick run.

        waiting: include the slow peers that a quick run of the suite waits for.
        """
        entries = peers_of(setting.operation.name).values()
        if self.peers:
            return [entry for entry in entries if entry.name in self.peers]
        possible = [entry for entry in entries if entry.runs_on(setting.device)]
        waited_for = SUITES[suite].quick_peers if waiting else ()
        return [entry for entry in possible if not (self.quick and entry.slow) or entry.name in waited_for]


def _waiting(settings: Sequence[tuple[str, Setting]]) -> list[tuple[str, Setting]]:
    return [(suite, setting) for suite, setting in settings if SUITES[suite].quick_peers]


@dataclass
class Outcome:
    """Result of a run."""

    rows: list[Row] = field(default_factory=list)
    settled: int = 0  # groups that had been measured before
    left_out: list[str] = field(default_factory=list)


class OutOfTime(BaseException):
    """Raised at the deadline. A BaseException, so that no library's `except Exception` swallows it."""


KEPT_SECONDS = 5.0  # a finalizer, or a context that fails to close, may swallow it once


@contextlib.contextmanager
def deadline(at: float | None) -> Iterator[None]:
    """Raises OutOfTime in the main thread when `time.monotonic()` reaches `at`, and again if it was swallowed."""
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
    """A readable name of a group."""
    name = setting.operation.name
    operation = name if name == suite else f"{suite} {name}"
    return f"{operation} {setting.direction} {setting.shape.name} {dtype_name(setting.dtype)}"


def _has_crashed(results: Results, suite: str, setting: Setting, entry: Peer) -> bool:
    """Whether a contender crashed when it was measured with this code before."""
    row = blank_row(suite, setting, entry)
    return results.settled(row) and results.rows[row.key].crashed


def run(
    request: Request,
    results: Results,
    plan: Plan,
    until: float | None = None,
    progress: Progress = silent,
    measure_group: Callable[..., None] = measure,
    start: int = 0,
) -> Outcome:
    """Measures what is requested, from the group of number `start`, until `time.monotonic()` reaches `until`."""
    outcome = Outcome()
    settings, labels = request.settings(), request.labels()
    probes: dict[torch.dtype, RooflineProbe] = {}

    def write(row: Row) -> None:
        results.add(row)
        outcome.rows.append(row)

    place = start
    try:
        with deadline(until):
            for place, (suite, setting) in enumerate(settings[start:], start):
                entries = request.entries(suite, setting, waiting=(suite, setting) in settings[:place])
                entries = [entry for entry in entries if not _has_crashed(results, suite, setting, entry)]
                if not request.again and all(results.settled(blank_row(suite, setting, entry)) for entry in entries):
                    outcome.settled += 1
                    continue
                if setting.dtype not in probes:
                    probes[setting.dtype] = RooflineProbe(setting.device, setting.dtype)
                step = _step_of(progress, Event(place, len(settings), labels[place], setting=setting))
                measure_group(suite, setting, entries, probes[setting.dtype], plan, write, step)
            place = len(settings)
    except OutOfTime:
        free()
        outcome.left_out = labels[place:]
    progress(Event(place, len(settings)))
    return outcome


def _step_of(progress: Progress, group: Event) -> Callable[[Peer | None], None]:
    """Reports the steps of a group: a peer that is prepared, or None when the timing begins."""
    return lambda peer: progress(replace(group, step=TIMING if peer is None else peer.name, peer=peer))


def open_results(where: Path | None) -> Results:
    """Opens the file of this machine and day, or the named one. OSError if it cannot be written."""
    from bench.report.rows import results_file

    results = Results.open(results_file(where))
    results.path.parent.mkdir(parents=True, exist_ok=True)
    results.path.open("a").close()  # fails now rather than after the first measurement
    return results


def plan_for(quick: bool, failed: Mapping[tuple[str, str], str]) -> Plan:
    """A quick run spends a third of the time per contender; on a CPU, where a call may last seconds, fewer rounds."""
    rounds = 3 if quick and device() == "cpu" else LEAST_ROUNDS
    return Plan(seconds=0.1 if quick else 0.3, least_rounds=rounds, failed=dict(failed))
