"""Plots of the results: speed-up by batch size, attention's TFLOP/s below the roofline, the loss's memory by pairs.

This project has the one strong colour and is drawn last; peers are grey. Every line and bar carries its own label.
Linear axes begin at zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.report.rows import Row, slug
from bench.report.tables import Group, groups, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROJECT, PEER, INK, FAINT, GRID = "#1b5fd9", "#a3acb9", "#1f2733", "#6b7585", "#e6eaf0"
MOST_SHAPES = 4  # of attention, in order of importance
LABEL_HEIGHT = 0.047  # of the axes, for one line of text


def draw_all(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Writes every plot that has rows, per machine. Returns the files."""
    found = groups(rows)
    written = []
    for gpu in dict.fromkeys(group.first.gpu for group in found):
        on_it = [group for group in found if group.first.gpu == gpu]
        for name, draw in (
            ("speed-up-by-batch-size", _speed_up),
            ("attention-tflops-by-shape", _throughput),
            ("loss-memory-by-pairs", _loss_memory),
        ):
            path = directory / f"{slug(gpu)}-{name}.png"
            if draw(on_it, gpu, path):
                written.append(path)
    return written


class _Series(NamedTuple):
    """One contender's line: its points in order of x, and the text behind the last one."""

    project: bool
    points: list[tuple[float, float]]
    label: str


def _figure(title: str, subtitle: str, height: float = 4.2) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120, facecolor="white")
    axes = figure.subplots()
    # Margins in inches, whatever the height: a title and the machine above, labels of the series to the right.
    figure.subplots_adjust(left=0.1, right=0.66, top=1 - 0.7 / height, bottom=0.55 / height)
    figure.text(0.02, 1 - 0.14 / height, title, color=INK, fontsize=12, weight="bold", va="top")
    figure.text(0.02, 1 - 0.36 / height, subtitle, color=FAINT, fontsize=8.5, va="top")
    for right, name, color in ((0.98, "■ peers", PEER), (0.91, "■ this project", PROJECT)):
        figure.text(right, 1 - 0.36 / height, name, color=color, fontsize=8.5, va="top", ha="right")
    axes.tick_params(which="both", length=0, colors=FAINT, labelsize=9)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return True


def _draw_lines(axes: Axes, series: Sequence[_Series], places: Sequence[int], x_label: str) -> None:
    """Lines over powers of two, peers first, each labelled at its right end. The y axis has its limits already."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_xlim(places[0] / 2**0.15, places[-1] * 2**0.1)
    axes.set_xlabel(x_label, color=FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for one in sorted(series, key=lambda one: one.project):
        color, width = (PROJECT, 2.2) if one.project else (PEER, 1.4)
        axes.plot(*zip(*one.points, strict=True), marker="o", markersize=4.5, color=color, linewidth=width)
    ends = [axes.transAxes.inverted().transform(axes.transData.transform(one.points[-1])) for one in series]
    for one, end, height in zip(series, ends, _apart([end[1] for end in ends]), strict=True):
        color = PROJECT if one.project else FAINT
        line = dict(arrowstyle="-", color=color, linewidth=0.6, shrinkA=1, shrinkB=4, relpos=(0, 0.5))
        axes.annotate(
            one.label,
            xy=(end[0], end[1]),
            xytext=(1.03, height),
            xycoords="axes fraction",
            color=color,
            fontsize=8.5,
            weight="bold" if one.project else "normal",
            va="center",
            arrowprops=line,
            annotation_clip=False,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved up where they would overlap the next lower one."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    moved = list(heights)
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + LABEL_HEIGHT)
    excess = max(0.0, max(moved) - 1.0)  # as a whole back into the axes
    return [height - excess for height in moved]


def _speed_up(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Forward of one model by batch size, relative to transformers eager. The model with the most batch sizes."""
    by_model: dict[tuple[Any, ...], dict[int, Group]] = {}
    for group in found:
        row = group.first
        if row.suite in ("model", "latency") and row.direction == "fwd":
            key = (row.op, row.shape["model"], row.shape.get("layers", 0), row.dtype)
            by_model.setdefault(key, {})[row.shape["batch"]] = group
    by_model = {key: by_batch for key, by_batch in by_model.items() if len(by_batch) > 1}
    if not by_model:
        return False
    (op, model, layers, dtype), by_batch = max(by_model.items(), key=lambda item: len(item[1]))
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for batch, group in sorted(by_batch.items()):
        times = {row.impl: row.ms_median for row in group.timed}
        base = times.get("transformers:eager")
        for row in group.timed:
            if base and row.ms_median:
                points.setdefault((row.impl, row.of_this_project), []).append((batch, base / row.ms_median))
    series = [_Series(project, values, f"{impl}  {values[-1][1]:.2f}x") for (impl, project), values in points.items()]
    if not series:
        return False
    depth = f", {layers} layers per tower" if layers else ""
    figure, axes = _figure("Speed-up over transformers eager", f"{model} {op}{depth}, {dtype}, forward · {gpu}")
    axes.set_ylim(0, 1.1 * max(value for one in series for _, value in one.points))
    axes.yaxis.set_major_formatter("{x:g}x")
    _draw_lines(axes, series, sorted(by_batch), "batch size")
    return _save(figure, path)


def _throughput(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Attention forward: a bar per contender, fastest first, and the roofline as a line across each shape's bars."""
    chosen = [g for g in found if g.first.op == "attention" and g.first.direction == "fwd" and g.timed]
    chosen = chosen[:MOST_SHAPES]
    if not chosen:
        return False
    bars = sum(len(group.timed) + 1 for group in chosen)
    figure, axes = _figure("Throughput of attention", f"forward · {gpu}", height=1.2 + 0.24 * bars)
    figure.subplots_adjust(left=0.22, right=0.95)
    place, names, ceiling = 0.0, {}, 0.0
    for group in chosen:
        names[place] = str(group.first.shape["name"])
        first = place = place + 1
        for row in sorted(group.timed, key=lambda row: row.ms_median or 0):
            color = PROJECT if row.of_this_project else PEER
            axes.barh(place, row.tflops or 0, height=0.78, color=color)
            axes.annotate(
                f"{row.tflops or 0:.3g}", (row.tflops or 0, place), (4, 0), textcoords="offset points",
                color=INK, fontsize=8.5, va="center",
            )  # fmt: skip
            names[place] = row.impl
            place += 1
        one = group.timed[0]
        if one.tflops and one.ms_median and one.roofline_ms:
            ceiling = one.tflops * one.ms_median / one.roofline_ms
            axes.plot([ceiling, ceiling], [first - 0.5, place - 0.5], color=INK, linewidth=1.4)
            axes.annotate(
                f"roofline {ceiling:.3g}", (ceiling, first - 0.5), (0, 3), textcoords="offset points",
                color=INK, fontsize=8.5, ha="center",
            )  # fmt: skip
    axes.set_xlim(0, 1.08 * max(axes.get_xlim()[1] / 1.05, ceiling))
    axes.set_ylim(place - 0.4, -0.6)  # downwards
    axes.set_yticks(list(names), list(names.values()))
    titles = {str(group.first.shape["name"]) for group in chosen}
    for tick in axes.get_yticklabels():
        tick.set(color=INK, weight="bold") if tick.get_text() in titles else tick.set(color=FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel("TFLOP/s", color=FAINT)
    return _save(figure, path)


def _loss_memory(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Forward and backward of the loss: peak memory by the number of pairs, for the width with the most sizes."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    by_width: dict[int, list[Group]] = {}
    for group in found:
        if group.first.suite == "loss" and group.first.direction == "fwd+bwd":
            by_width.setdefault(group.first.shape["width"], []).append(group)
    if not by_width:
        return False
    width, chosen = max(by_width.items(), key=lambda item: len(item[1]))
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for group in chosen:
        for row in group.timed:
            if row.peak_mem_bytes:
                of_it = points.setdefault((row.impl, row.of_this_project), [])
                of_it.append((row.shape["pairs"], row.peak_mem_bytes))
    if len(chosen) < 2 or not points:
        return False
    series = [
        _Series(project, sorted(values), f"{impl}  {size(int(max(values)[1]))}")
        for (impl, project), values in points.items()
    ]
    figure, axes = _figure("Peak memory of the sigmoid loss", f"width {width}, forward and backward · {gpu}")
    held = [value for one in series for _, value in one.points]
    axes.set_yscale("log")
    axes.set_ylim(min(held) / 1.5, max(held) * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(round(value))))
    _draw_lines(axes, series, sorted({group.first.shape["pairs"] for group in chosen}), "pairs (both axes logarithmic)")
    return _save(figure, path)
