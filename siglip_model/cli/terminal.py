"""Output of the commands: tables with bars on stdout, a progress bar and messages on stderr."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def console(**options: Any) -> Any:
    """rich's console. NO_COLOR (https://no-color.org) turns off all styles, of which rich would keep bold and dim."""
    from rich.console import Console

    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto", **options)


def say(message: str) -> None:
    print(f"siglip: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with escapes for what a terminal would act on or cannot show, such as an escape code in a file name."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class ProgressReport:
    """Progress of a long run: a bar on a terminal, nothing elsewhere. Messages are always printed."""

    def __init__(self, bar: Any = None, task: Any = None, unit: str = "images") -> None:
        self.bar, self.task, self.unit, self.counted = bar, task, unit, 0

    def advance(self, counts: bool = True) -> None:
        """One image or text is finished; `counts` includes it in images/s."""
        if self.bar is not None:
            self.counted += counts
            elapsed = self.bar.tasks[self.task].elapsed or 0
            speed = f"{self.counted / elapsed:.1f} {self.unit}/s" if elapsed > 0 else ""
            self.bar.update(self.task, advance=1, speed=speed)

    def say(self, message: str) -> None:
        if self.bar is None:
            say(message)
        else:  # printed above the bar
            self.bar.console.print(f"siglip: {printable(message)}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(total: int | None, what: str, *, hidden: bool, unit: str = "images") -> Iterator[ProgressReport]:
    """total: how many there are to finish; None where that is not known before the end."""
    if hidden or not sys.stderr.isatty():
        yield ProgressReport()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        yield ProgressReport(bar, bar.add_task(what, total=total, speed=""), unit)


def print_predictions(results: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    out = console()
    for result in results:
        if "error" in result:
            continue  # already reported on stderr
        out.print(Text(printable(os.path.basename(result["image"])), style="bold"))
        out.print(_bars(result["predictions"], out.width))


def _bars(predictions: Sequence[dict[str, Any]], width: int) -> Any:
    """A table of labels, bars and scores. A full bar is a score of 1."""
    from rich.table import Table
    from rich.text import Text

    from siglip_model.plot import format_score

    cells = max(8, min(30, width // 3))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 1))
    for place, entry in enumerate(predictions):
        bar = _bar(entry["score"], cells)
        style = "bold" if place == 0 else ""
        table.add_row("", Text(printable(str(entry["label"])), style), bar, Text(format_score(entry["score"]), style))
    return table


def _bar(score: float, cells: int, style: str = "blue") -> Any:
    from rich.text import Text

    filled = round(score * cells)
    return Text("█" * filled, style) + Text("░" * (cells - filled), "dim")


def print_found(query: str, hits: Sequence[Any]) -> None:
    """The hits of one query, best first: rank, a bar of the score where there is one, cosine and name.

    Under a header on a terminal alone, so that programs read lines of hits.
    """
    from rich.text import Text

    from siglip_model.plot import format_score

    out = console(soft_wrap=True)  # a path stays in one piece
    out.print(Text(printable(query), style="bold"))
    if out.is_terminal and hits:
        score = "" if hits[0].score is None else f"{'score':<18}"
        out.print(Text(f"rank  {score}  {'cosine':>7}  name", "dim"))
    for rank, hit in enumerate(hits, start=1):
        line = Text(f"{rank:>4}  ", "dim")
        if hit.score is not None:
            line += _bar(hit.score, 10) + Text(f"  {format_score(hit.score):<6}")
        out.print(line + Text(f"  {hit.cosine:>7.4f}  ", "dim") + Text(printable(hit.name)))


def print_profile(profile: Any) -> None:
    """The share of each stage of embedding, and what bounds the run."""
    from rich.text import Text

    out = console(soft_wrap=True)
    for stage in ("list", "decode", "copy", "compute", "write", "rest"):
        share = getattr(profile, stage) / profile.total
        out.print(Text(f"  {stage:<8} ") + _bar(max(0.0, share), 20) + Text(f" {share:>4.0%}"))
    out.print(f"bound by {profile.bound_by}")


def print_demo(results: Sequence[dict[str, Any]], right: int) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", width=min(out.width, 100))
    table.add_column("image", ratio=2)
    table.add_column("")
    for title in ("best name", "second", "third"):
        table.add_column(title, ratio=3)
    for result in results:
        mark = Text("✓", "green") if result["right"] else Text("✗", "red")
        cells = [_named_bar(entry, entry["label"] == result["name"]) for entry in result["predictions"][:3]]
        table.add_row(result["name"], mark, *cells)
    out.print(table)
    out.print(f"{right} of {len(results)} right, each among {len(results[0]['predictions'])} names.")


def _named_bar(entry: dict[str, Any], right: bool, cells: int = 10) -> Any:
    from rich.text import Text

    from siglip_model.plot import format_score

    bar = _bar(entry["score"], cells, "green" if right else "blue")
    return Text(f"{entry['label']}\n", "bold" if right else "") + bar + Text(f" {format_score(entry['score'])}")


def print_scores(scores: Mapping[str, Any]) -> None:
    """Prints the result of `evaluate_on`: counts, and fractions in percent; and on stderr why retrieval may be low."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in scores.items():
        table.add_row(name.replace("_", " "), f"{value:.1%}" if isinstance(value, float) else str(value))
    console().print(table)
    texts, distinct = scores.get("texts", 0), scores.get("distinct_texts", scores.get("texts", 0))
    if distinct < texts:
        say(f"{texts} texts, {distinct} distinct: only an image's own caption counts as right, not its like elsewhere")


def print_machine(facts: Mapping[str, Mapping[str, str | None]]) -> None:
    """Prints the result of `describe_machine`, one line per entry."""
    from rich.text import Text

    out = console(soft_wrap=True)
    for title, entries in facts.items():
        out.print(Text(title, "bold"))
        for name, value in entries.items():
            if title == "backends":
                state = Text("yes", "green") if value is None else Text("no", "yellow") + Text(f": {value}")
            else:
                state = Text("not installed", "dim") if value is None else Text(value)
            out.print(Text(f"  {name:<19}") + state)
