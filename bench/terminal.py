"""Output of the commands: a progress bar on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.compiled.ahead_of_time import Row as Compiled
from bench.measure.check import Checked
from bench.measure.progress import Event, Progress
from bench.report.tables import Group, milliseconds, share, size


def say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line for each group that begins."""
    if not sys.stderr.isatty():
        shown = ""

        def show(event: Event) -> None:
            nonlocal shown
            if event.group and event.group != shown:
                shown = event.group
                say(f"[{event.done + 1}/{event.total}] {event.group}")

        yield show
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda event: bar.update(task, completed=event.done, total=event.total, description=event.label)


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

    from bench.report.tables import title

    for group in found:
        noise = "" if group.noise is None else f"; noise {group.noise:.2f}x"
        table = _table(
            f"{title(group)}{noise}", "impl", "ms", "20 to 80 %", "TFLOP/s", "% of roofline", "memory", "error", ""
        )
        fastest = group.fastest()
        for row in sorted(group.rows, key=lambda row: (row.status != "ok", row.ms_median or 0)):
            error = "" if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}"
            if row.status == "ok":
                table.add_row(
                    Text(row.impl, "bold" if row in fastest else ""),
                    Text(milliseconds(row.ms_median), "bold" if row in fastest else ""),
                    f"{milliseconds(row.ms_p20)} to {milliseconds(row.ms_p80)}",
                    "" if row.tflops is None else f"{row.tflops:.3g}",
                    share(row.roofline_share),
                    size(row.peak_mem_bytes),
                    error,
                    Text(row.reason, "dim"),
                )
            else:
                style = "red" if row.status == "error" else "yellow"
                table.add_row(Text(row.impl, "dim"), Text(row.status, style), "", "", "", "", error, Text(row.reason))
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
        operation = f"{one.op} for Hopper" if one.kernels == "triton:hopper" else one.op
        table.add_row(operation, str(one.shape["name"]), one.dtype, one.what, *errors, verdict)
    _print(table)


def print_compiled(rows: Sequence[tuple[str, Compiled]]) -> None:
    from rich.text import Text

    from bench.compiled.table import architecture

    table = _table(
        "Compiled ahead of time",
        "operation", "shape", "kernel", "arch", "warps", "registers", "spilled B", "shared B", "matrix", "16 B",
        "other", "",
    )  # fmt: skip
    for operation, row in rows:
        problems = row.problems()
        wide = sum(count for name, count in row.accesses.items() if name == "tma" or name.endswith(" 16"))
        narrow = sum(row.accesses.values()) - wide
        matrix = " ".join(f"{name}×{count}" for name, count in row.matrix.items())
        verdict = Text("; ".join(problems), "red") if problems else Text("ok", "green")
        numbers = (row.warps, row.registers, row.stack_bytes, row.shared_bytes)
        kernel = row.kernel.removesuffix("_kernel")
        table.add_row(
            operation, row.launch, kernel, architecture(row.gpu), *map(str, numbers), matrix, str(wide), str(narrow),
            verdict,
        )  # fmt: skip
    _print(table)
