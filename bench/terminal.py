"""Output of the commands: a progress bar on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.compiled.ahead_of_time import Row as Compiled
from bench.measure.check import Checked
from bench.measure.progress import Event, Progress
from bench.peers.registry import FAMILIES
from bench.report.tables import Group, milliseconds, share, size

if TYPE_CHECKING:
    from bench.compiled.count import Count


def say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(interval: float = 0.0) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line for each group that begins, but none within `interval` seconds of one."""
    if not sys.stderr.isatty():
        shown, began, last = "", time.monotonic(), -interval

        def show(event: Event) -> None:
            nonlocal shown, last
            elapsed = time.monotonic() - began
            if event.group and event.group != shown and elapsed - last >= interval:
                shown, last = event.group, elapsed
                times = f"{_times(event, elapsed)}: " if interval else ""
                say(f"[{event.done + 1}/{event.total}] {times}{event.group}")

        yield show
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda event: bar.update(task, completed=event.done, total=event.total, description=event.label)


def _times(event: Event, elapsed: float) -> str:
    """The time so far and, as soon as something is done, an estimate of the rest."""
    if not event.done:
        return f"{elapsed:.0f} s elapsed"
    return f"{elapsed:.0f} s elapsed, about {elapsed / event.done * (event.total - event.done):.0f} s left"


def _print(table: Any, stderr: bool = False) -> None:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=160)
    console.print(table)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "impl", "kernel", "operation", "shape") else "right")
    return table


def print_groups(found: Sequence[Group]) -> None:
    """Prints a table per group: the fastest first and in bold, failures with their reasons last."""
    from rich.text import Text

    from bench.report.tables import cosine, rate, rate_name, title

    for group in found:
        noise = "" if group.noise is None else f"; noise {group.noise:.2f}x"
        table = _table(
            f"{title(group)}{noise}",
            *("impl", "ms", "20 to 80 %", rate_name(group), "% of roofline", "memory", "error", "cosine", ""),
        )
        fastest = group.fastest()
        for row in sorted(group.rows, key=lambda row: (row.status != "ok", row.ms_median or 0)):
            error = "" if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}"
            if row.status == "ok":
                table.add_row(
                    Text(row.impl, "bold" if row in fastest else ""),
                    Text(milliseconds(row.ms_median), "bold" if row in fastest else ""),
                    f"{milliseconds(row.ms_p20)} to {milliseconds(row.ms_p80)}",
                    rate(row),
                    share(row.roofline_share),
                    size(row.peak_mem_bytes),
                    error,
                    cosine(row),
                    Text(row.reason, "dim"),
                )
            else:
                style = "red" if row.status == "error" else "yellow"
                table.add_row(
                    Text(row.impl, "dim"), Text(row.status, style), "", "", "", "", error, "", Text(row.reason)
                )
        _print(table)


def print_checks(checked: Sequence[Checked]) -> None:
    from rich.text import Text

    table = _table(
        "Relative errors to fp64", "operation", "shape", "dtype", "furthest", "error", "allowed", "eager", "sdpa", ""
    )

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    for one in checked:
        verdict = Text("ok", "green") if one.ok else Text(one.problem, "red")
        if one.ok and one.problem:
            verdict = Text(one.problem, "yellow")
        errors = [number(value) for value in (one.error, one.allowed, one.eager_error, one.sdpa_error)]
        operation = f"{one.op} for {FAMILIES[one.kernels].architecture}" if one.kernels in FAMILIES else one.op
        table.add_row(operation, str(one.shape["name"]), one.dtype, one.what, *errors, verdict)
    _print(table)


def print_counts(found: Sequence[Count]) -> None:
    from bench.compiled.count import HEADER, SAYS

    table = _table(f"{SAYS} Clocks of a warp by pipe; on the right, per 1,000 multiply-adds.", *HEADER)
    for one in found:
        table.add_row(*one.cells())
    _print(table)


def print_compiled(rows: Sequence[tuple[str, Compiled]]) -> None:
    """Prints a line per operation and architecture, then the kernels with problems."""
    from rich.text import Text

    from bench.compiled.summary import HEADER, problems, summarise

    table = _table("Compiled ahead of time", "operation", "arch", *HEADER, "")
    for one in summarise(rows):
        verdict = Text(f"{one.problems} with problems", "red") if one.problems else Text("ok", "green")
        table.add_row(one.operation, one.architecture, *one.cells(), verdict)
    _print(table)
    for problem in problems(rows):
        print(problem)
