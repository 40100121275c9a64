"""Tables of the results, in Markdown: all of them beside the files, the main ones between two marks in the README."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.rows import AGAIN, Row

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NOT_MEASURED = "not measured yet"
# Speed is told as a ratio to the first of these that was timed: what people run today.
BASELINES = (
    "transformers:sdpa", "transformers:eager", "sdpa", "eager", "siglip_kernel", "open_clip", "siglip_model:sdpa",
)  # fmt: skip
TITLES = {
    "model": "Models, forward",
    "train": "Training step (both towers and the loss)",
    "latency": "One image at a time",
    "attention": "Attention",
    "loss": "Sigmoid loss",
    "mlp": "MLP",
    "linear": "Projections",
    "layer_norm": "LayerNorm",
    "pool": "Pooling head",
    "patch": "Patch embedding",
}
# What a row may differ by and still be called as fast, where the run has no noise of its own.
LEAST_NOISE = 1.01


@dataclass(frozen=True)
class Group:
    """Contenders that were measured side by side on one machine."""

    rows: tuple[Row, ...]  # in the order of the file, without the repeated one
    noise: float | None  # the slower by the faster of two timings of the same contender

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "ok" and row.ms_median]

    def fastest(self) -> list[Row]:
        """The least time, and every other within the noise of it."""
        if not self.timed:
            return []
        least = min(_ms(row) for row in self.timed)
        band = max(LEAST_NOISE, self.noise or 0)
        return [row for row in self.timed if _ms(row) <= least * band]

    def baseline(self) -> Row | None:
        named = {row.impl: row for row in self.timed}
        return next((named[name] for name in BASELINES if name in named), None)


def _ms(row: Row) -> float:
    assert row.ms_median is not None
    return row.ms_median


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by what was measured side by side; of rows that say the same thing the last counts."""
    latest = {row.key: row for row in rows}
    gathered: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in latest.values():
        gathered.setdefault((*row.group, row.gpu), {})[row.impl] = row
    found = []
    for named in gathered.values():
        repeated = {name: row for name, row in named.items() if name.endswith(AGAIN) and row.ms_median}
        noise = None
        for name, row in repeated.items():
            once = named.get(name.removesuffix(AGAIN))
            if once is not None and once.ms_median:
                noise = max(_ms(row), _ms(once)) / min(_ms(row), _ms(once))
        rows_of_it = tuple(row for name, row in named.items() if not name.endswith(AGAIN))
        if rows_of_it:
            found.append(Group(rows_of_it, noise))
    order = list(TITLES)
    return sorted(found, key=lambda group: order.index(group.first.suite) if group.first.suite in order else len(order))


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def group_table(group: Group) -> str:
    """Every contender of one group, with what failed and why."""
    fastest, baseline = group.fastest(), group.baseline()
    lines = [
        "| impl | ms | 20 to 80 % | speed | TFLOP/s | of the floor | peak memory | error to fp64 | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(group.rows, key=lambda row: (row.status != "ok", row.ms_median or 0)):
        cells = ["" for _ in range(9)]
        cells[0] = f"`{row.impl}`"
        cells[6], cells[7] = size(row.peak_mem_bytes), "" if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}"
        if row.status == "ok" and row.ms_median:
            cells[1] = f"**{milliseconds(row.ms_median)}**" if row in fastest else milliseconds(row.ms_median)
            cells[2] = f"{milliseconds(row.ms_p20)} to {milliseconds(row.ms_p80)}"
            cells[3] = "" if baseline is None else f"{_ms(baseline) / _ms(row):.2f}x"
            cells[4], cells[5] = f"{row.tflops:.3g}" if row.tflops else "", share(row.floor_share)
            cells[8] = row.reason
        else:
            cells[1] = row.status
            cells[8] = row.reason
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def title(group: Group) -> str:
    row = group.first
    sizes = ", ".join(f"{name} {value}" for name, value in row.shape.items() if name != "name" and value not in (0, ""))
    return f"{row.op} {row.direction}, {row.shape.get('name', '')} ({sizes}), {row.dtype}"


def full_report(rows: Sequence[Row], files: Sequence[Path], plots: Sequence[Path] = ()) -> str:
    """The page beside the files: every row."""
    parts = [
        "# Results",
        "Written by `python -m bench report` from "
        + (", ".join(f"[{path.name}]({path.name})" for path in files) or "no file yet")
        + ".\n"
        "Bold is fastest, or as fast within the noise (the same contender timed twice in the group). Speed is the "
        "ratio to what people run today, the first that was timed of "
        + ", ".join(f"`{name}`" for name in BASELINES)
        + ". How to read the rest: [the page on the bench](../README.md).",
    ]
    parts += [f"![{path.stem.replace('-', ' ')}]({path.name})" for path in plots]
    everything = sorted(groups(rows), key=lambda group: (not group.first.on_gpu, group.first.gpu))
    if not any(group.first.on_gpu for group in everything):
        parts.append(f"On a GPU: {NOT_MEASURED}.")
    for gpu, found in itertools.groupby(everything, key=lambda group: group.first.gpu):
        parts.append(f"## {gpu}")
        for suite, members in itertools.groupby(found, key=lambda group: group.first.suite):
            parts.append(f"### {TITLES.get(suite, suite)}")
            for group in members:
                noise = "" if group.noise is None else f" Noise {group.noise:.2f}x."
                parts += [f"**{title(group)}.**{noise} {_circumstances(group)}", group_table(group)]
    return "\n\n".join(parts) + "\n"


def _circumstances(group: Group) -> str:
    row = group.first
    driver = f", driver {row.driver}, CUDA {row.cuda}" if row.driver else ""
    dirty = " (with changes)" if row.dirty else ""
    return f"torch {row.torch}, triton {row.triton}{driver}, commit {row.commit}{dirty}, {row.date}."


def summary(rows: Sequence[Row], files: Sequence[Path], plots: Sequence[Path], root: Path) -> str:
    """What the README shows: for each machine and suite one line a shape."""
    found = groups(rows)
    parts = []
    on_gpu = [group for group in found if group.first.on_gpu]
    if on_gpu:
        for gpu in dict.fromkeys(group.first.gpu for group in on_gpu):
            parts.append(_machine(gpu, [group for group in on_gpu if group.first.gpu == gpu], files, root))
    else:
        parts.append(f"On a GPU: {NOT_MEASURED}. `python -m bench gpu --quick` does it in nine minutes.")
    on_cpu = [group for group in found if not group.first.on_gpu]
    if on_cpu:
        latest = on_cpu[-1].first.gpu
        parts.append(_machine(latest, [group for group in on_cpu if group.first.gpu == latest], files, root))
        parts.append("Triton kernels are checked on a CPU, in the interpreter, and never timed there.")
    parts += [f"![{path.stem.replace('-', ' ')}]({_relative(path, root)})" for path in plots]
    return "\n\n".join(parts)


def _machine(gpu: str, found: Sequence[Group], files: Sequence[Path], root: Path) -> str:
    sources = [path for path in files if any(_holds(path, group.first) for group in found)]
    named = ", ".join(f"[{path.name}]({_relative(path, root)})" for path in sources)
    lines = [
        f"On {gpu}, {_circumstances(found[0])} Rows: {named}.",
        "",
        "| | shape | dtype | ours, ms | baseline, ms | speed | best other, ms | of the floor | noise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in found:
        lines.append(_line(group))
    if any("busy" in row.reason or "throttled" in row.reason for group in found for row in group.rows):
        lines += [
            "",
            "The machine was busy or throttled meanwhile, as the rows say: the noise may be more than it shows.",
        ]
    return "\n".join(lines)


def _holds(path: Path, row: Row) -> bool:
    from bench.report.rows import slug

    return path.name.startswith(slug(row.gpu))


def is_ours(impl: str) -> bool:
    """Our kernels or our model, whatever its backend."""
    return impl.split(":")[0] in ("triton", "siglip_model", "chunked", "folded")


def _line(group: Group) -> str:
    row, baseline = group.first, group.baseline()
    mine = [one for one in group.timed if is_ours(one.impl)]
    others = [one for one in group.timed if not is_ours(one.impl) and "softmax" not in one.reason]
    ours = min(mine, key=_ms, default=None)
    best = min(others, key=_ms, default=None)
    speed = "" if ours is None or baseline is None else f"{_ms(baseline) / _ms(ours):.2f}x"
    failed = next((one.reason for one in group.rows if is_ours(one.impl) and one.status == "error"), "")
    absent = NOT_MEASURED if row.on_gpu else "checked, not timed"
    cells = (
        f"{row.op} {row.direction}",
        str(row.shape.get("name", "")),
        row.dtype,
        f"`{ours.impl}` {milliseconds(ours.ms_median)}" if ours else failed or absent,
        f"`{baseline.impl}` {milliseconds(baseline.ms_median)}" if baseline else "",
        f"**{speed}**" if ours in group.fastest() and speed else speed,
        f"`{best.impl}` {milliseconds(best.ms_median)}" if best else "",
        share(ours.floor_share) if ours else "",
        "" if group.noise is None else f"{group.noise:.2f}x",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _relative(path: Path, root: Path) -> str:
    path = path.resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.as_posix()


def insert(readme: Path, text: str) -> None:
    """Puts the text between the marks. ValueError where the file has not both, in order."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no '{BEGIN}' followed by '{END}' to write between")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
