"""Plots of the results: speed-up by batch size, TFLOP/s by shape under the floor, the loss's memory by N."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.rows import Row, slug
from bench.report.tables import Group, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS, INK, FAINT = "#2f6fdb", "#9aa5b4", "#1f2733", "#8a94a3"
OTHERS = ("#9aa5b4", "#c98a3c", "#5a9e7c", "#a06cb0", "#c25b5b", "#6d7c8e")


def draw_all(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Writes every plot for which there are rows; each machine has its own. Returns the files."""
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


def _figure(title: str, gpu: str) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    axes.set_title(gpu, loc="right", color=FAINT, fontsize=8)
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    axes.grid(axis="y", color="#e6eaf0", linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _color(impl: str, others: list[str]) -> str:
    return OURS if impl.split(":")[0] == "triton" else OTHERS[others.index(impl) % len(OTHERS)]


def _save(figure: Any, axes: Axes, path: Path) -> bool:
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return True


def _speed_up(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Forward of one model by batch size: transformers eager is 1. The model with the most batch sizes."""
    series: dict[tuple[Any, ...], dict[int, Group]] = {}
    for group in found:
        row = group.first
        if row.suite in ("model", "latency") and row.direction == "fwd":
            key = (row.op, row.shape["model"], row.shape.get("layers", 0), row.dtype)
            series.setdefault(key, {})[row.shape["batch"]] = group
    series = {key: by_batch for key, by_batch in series.items() if len(by_batch) > 1}
    if not series:
        return False
    (op, model, layers, dtype), by_batch = max(series.items(), key=lambda item: len(item[1]))
    figure, axes = _figure(f"{model} {op}{f', {layers} layers a tower' if layers else ''}, {dtype}: speed-up", gpu)
    impls = list(dict.fromkeys(row.impl for group in by_batch.values() for row in group.timed))
    others = [impl for impl in impls if not impl.startswith("triton")]
    for impl in impls:
        points = []
        for batch, group in sorted(by_batch.items()):
            times = {row.impl: row.ms_median for row in group.timed}
            base, mine = times.get("transformers:eager"), times.get(impl)
            if base and mine:
                points.append((batch, base / mine))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=_color(impl, others), label=impl)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(by_batch), [str(batch) for batch in sorted(by_batch)])
    axes.set_xlabel("batch size", color=FAINT)
    axes.set_ylabel("times transformers eager", color=FAINT)
    return _save(figure, axes, path)


def _throughput(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Attention forward: TFLOP/s of each contender, and the floor as a line over each shape."""
    chosen = [g for g in found if g.first.suite == "attention" and g.first.direction == "fwd" and g.timed]
    if not chosen:
        return False
    figure, axes = _figure("Attention forward: TFLOP/s, under the floor", gpu)
    impls = list(dict.fromkeys(row.impl for group in chosen for row in group.timed))
    others = [impl for impl in impls if not impl.startswith("triton")]
    width = 0.8 / len(impls)
    for number, impl in enumerate(impls):
        places, heights = [], []
        for place, group in enumerate(chosen):
            for row in group.timed:
                if row.impl == impl and row.tflops:
                    places.append(place + (number + 0.5) * width - 0.4)
                    heights.append(row.tflops)
        axes.bar(places, heights, width=0.9 * width, color=_color(impl, others), label=impl)
    for place, group in enumerate(chosen):
        one = group.timed[0]
        if one.tflops and one.ms_median and one.floor_ms:
            floor = one.tflops * one.ms_median / one.floor_ms
            axes.plot([place - 0.42, place + 0.42], [floor, floor], color=INK, label="floor" if place == 0 else None)
    axes.set_xticks(range(len(chosen)), [str(group.first.shape["name"]) for group in chosen], rotation=20, ha="right")
    return _save(figure, axes, path)


def _loss_memory(found: Sequence[Group], gpu: str, path: Path) -> bool:
    """Forward and backward of the loss: peak memory by the number of pairs, for the width with the most sizes."""
    by_width: dict[int, list[Group]] = {}
    for group in found:
        if group.first.suite == "loss" and group.first.direction == "fwd+bwd":
            by_width.setdefault(group.first.shape["width"], []).append(group)
    if not by_width:
        return False
    width, chosen = max(by_width.items(), key=lambda item: len(item[1]))
    points: dict[str, list[tuple[int, float]]] = {}
    for group in chosen:
        for row in group.timed:
            if row.peak_mem_bytes:
                points.setdefault(row.impl, []).append((row.shape["pairs"], row.peak_mem_bytes / 1e6))
    if len(chosen) < 2 or not points:
        return False
    figure, axes = _figure(f"Sigmoid loss, D = {width}: peak memory of forward and backward, MB", gpu)
    others = [impl for impl in points if not impl.startswith("triton")]
    for impl, values in points.items():
        axes.plot(*zip(*sorted(values), strict=True), marker="o", markersize=4, color=_color(impl, others), label=impl)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    pairs = sorted({group.first.shape["pairs"] for group in chosen})
    axes.set_xticks(pairs, [f"{count:,}" for count in pairs])
    axes.set_xlabel("pairs", color=FAINT)
    return _save(figure, axes, path)
