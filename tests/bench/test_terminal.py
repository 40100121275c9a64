"""Progress on a terminal and elsewhere."""

import io

import pytest

from bench import terminal
from bench.measure.progress import Event


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr("bench.terminal.time.monotonic", lambda: now[0])
    return now


def shown(clock, interval, events):
    """What is printed when the events come five seconds apart."""
    with terminal.progress_bar(interval) as progress:
        for event in events:
            progress(event)
            clock[0] += 5


GROUPS = [Event(number, 4, f"kernel {number}") for number in range(4)]


def test_a_line_per_group_where_there_is_no_terminal(clock, capsys):
    shown(clock, 0.0, [GROUPS[0], Event(0, 4, "kernel 0", "step"), *GROUPS[1:], Event(4, 4)])
    assert capsys.readouterr().err.splitlines() == [f"bench: [{n + 1}/4] kernel {n}" for n in range(4)]


def test_a_line_per_interval_with_the_time_that_is_left(clock, capsys):
    shown(clock, 10.0, [*GROUPS, Event(4, 4)])
    assert capsys.readouterr().err.splitlines() == [
        "bench: [1/4] 0 s elapsed: kernel 0",
        "bench: [3/4] 10 s elapsed, about 10 s left: kernel 2",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    with terminal.progress_bar(10.0) as progress:
        for event in GROUPS:
            progress(event)
    said = terminal.sys.stderr.getvalue()
    assert "3/4" in said and "kernel 3" in said and "0:00:00" in said and "bench: [" not in said
