"""Tables of the results in Markdown: all rows beside the files, the main ones between two markers in the README."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.compiled.summary import by_architecture, by_operation
from bench.report.rows import AGAIN, Row, slug

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NOT_MEASURED = "not measured yet"
# Speed-ups are relative to the first of these that was timed: common practice today.
BASELINES = (
    "transformers:sdpa", "transformers:eager", "sdpa", "eager", "siglip_kernel", "open_clip", "siglip_model:sdpa",
)  # fmt: skip
TITLES = {
    "model": "Models, forward",
    "train": "Training step (both towers and the loss)",
    "latency": "One image at a time",
    "cpu": "One tower on a CPU, by precision and runtime",
    "embed": "Bulk embedding, from image files to rows on the disk",
    "attention": "Attention",
    "loss": "Sigmoid loss",
    "losses": "Sigmoid losses of every kind",
    "mlp": "MLP",
    "linear": "Projections",
    "layer_norm": "LayerNorm",
    "pool": "Pooling head",
    "patch": "Patch embedding",
    "fp8": "Encoder layers in fp8",
    "resize": "Resizing and normalising images",
}
# The README shows these groups (suite, direction, beginning of the shape's name), each in its largest size.
MAIN = (
    ("model", "fwd", "base-224"),
    ("model", "fwd", "base-naflex"),
    ("train", "fwd+bwd", ""),
    ("loss", "fwd+bwd", ""),
    ("cpu", "fwd", "base-224-b"),
    ("cpu", "fwd", "base-224-text"),
    ("cpu", "fwd", "so400m-224-b"),
    ("cpu", "fwd", "so400m-224-text"),
    ("embed", "fwd", "demo"),
    ("embed", "fwd", "base-224"),
)
MAIN_PLOTS = ("loss-memory-by-pairs", "speed-up-by-batch-size", "attention-tflops-by-shape")  # the first that exists
# Rows within this ratio count as equally fast where the noise was not measured.
LEAST_NOISE = 1.01


@dataclass(frozen=True)
class Group:
    """Contenders that were measured side by side on one machine."""

    rows: tuple[Row, ...]  # in the order of the file, without the repeated timing
    noise: float | None  # ratio of two timings of the same contender, slower to faster

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "ok" and row.ms_median]

    @property
    def precisions(self) -> list[str]:
        """What its contenders compute in; the dtype of their inputs first."""
        return list(dict.fromkeys([self.first.dtype, *(row.precision or row.dtype for row in self.rows)]))

    def of_precision(self, precision: str) -> list[Row]:
        return [row for row in self.timed if (row.precision or row.dtype) == precision]

    def fastest(self) -> list[Row]:
        """The rows whose times are within the noise of the least."""
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
    """Gathers rows that were measured side by side; of several rows of one measurement the last counts."""
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
    """A readable number of bytes."""
    if count is None:
        return ""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def cosine(row: Row) -> str:
    """The least cosine of an embedding; blank for operations without."""
    return "" if row.least_cosine is None else f"{row.least_cosine:.6f}"


def rate(row: Row) -> str:
    value = row.images_per_second or row.tflops
    return f"{value:.3g}" if value else ""


def rate_name(group: Group) -> str:
    return "images/s" if "images" in group.first.shape else "TFLOP/s"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def group_table(group: Group) -> str:
    """Every contender of one group, failures with their reasons."""
    fastest, baseline = group.fastest(), group.baseline()
    with_cosines = any(row.least_cosine is not None for row in group.rows)
    lines = [
        f"| impl | ms | 20 to 80 % | speed-up | {rate_name(group)} | % of roofline | peak memory | error to fp64 "
        f"|{' cosine |' * with_cosines} |",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * with_cosines,
    ]
    for row in sorted(group.rows, key=lambda row: (row.status != "ok", row.ms_median or 0)):
        cells = ["" for _ in range(9)]
        cells[0] = f"`{row.impl}`"
        cells[6], cells[7] = size(row.peak_mem_bytes), "" if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}"
        if row.status == "ok" and row.ms_median:
            cells[1] = f"**{milliseconds(row.ms_median)}**" if row in fastest else milliseconds(row.ms_median)
            cells[2] = f"{milliseconds(row.ms_p20)} to {milliseconds(row.ms_p80)}"
            cells[3] = "" if baseline is None else f"{_ms(baseline) / _ms(row):.2f}x"
            cells[4], cells[5] = rate(row), share(row.roofline_share)
            cells[8] = row.reason
        else:
            cells[1] = row.status
            cells[8] = row.reason
        if with_cosines:
            cells.insert(8, cosine(row))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def title(group: Group) -> str:
    row = group.first
    sizes = ", ".join(f"{name} {value}" for name, value in row.shape.items() if name != "name" and value not in (0, ""))
    return f"{row.op} {row.direction}, {row.shape.get('name', '')} ({sizes}), {row.dtype}"


def full_report(
    rows: Sequence[Row],
    files: Sequence[Path],
    plots: Sequence[Path] = (),
    compiled: Sequence[Path] = (),
    sections: Sequence[str] = (),
) -> str:
    """The page beside the files: an overview of each machine, then every row, then the tables of compiled kernels.

    sections: what comes between, such as `bench.report.counted.comparison`; empty ones are left out.
    """
    sources = ", ".join(f"[{path.name}]({path.name})" for path in files) or "no file yet"
    baselines = ", ".join(f"`{name}`" for name in BASELINES)
    parts = [
        "# Results",
        f"Written by `python -m bench report` from {sources}.\n"
        "The fastest rows are bold, with all that are within the noise (the ratio of two timings of the same "
        f"contender). Speed-ups are relative to the baseline, the first that was timed of {baselines}. "
        "[How times are taken](../README.md).",
    ]
    parts += [_image(path, path.name) for path in plots]
    everything = sorted(groups(rows), key=lambda group: (not group.first.on_gpu, group.first.gpu))
    if not any(group.first.on_gpu for group in everything):
        parts.append(f"On a GPU: {NOT_MEASURED}.")
    for gpu, on_it in itertools.groupby(everything, key=lambda group: group.first.gpu):
        found = list(on_it)
        parts += [f"## {gpu}", _overview(found)]
        for suite, members in itertools.groupby(found, key=lambda group: group.first.suite):
            parts.append(f"### {TITLES.get(suite, suite)}")
            for group in members:
                noise = "" if group.noise is None else f" Noise {group.noise:.2f}x."
                parts += [f"**{title(group)}.**{noise} {_environment(group)}", group_table(group)]
    parts += filter(None, sections)
    parts += [f"## Compiled kernels\n\n{by_operation(path)}" for path in compiled]
    return "\n\n".join(parts) + "\n"


def _image(path: Path, target: str) -> str:
    return f"![{path.stem.replace('-', ' ')}]({target})"


def _environment(group: Group) -> str:
    row = group.first
    driver = f", driver {row.driver}, CUDA {row.cuda}" if row.driver else ""
    dirty = " (with changes)" if row.dirty else ""
    return f"torch {row.torch}, triton {row.triton}{driver}, commit {row.commit}{dirty}, {row.date}."


def summary(
    rows: Sequence[Row], files: Sequence[Path], plots: Sequence[Path], root: Path, compiled: Sequence[Path] = ()
) -> str:
    """The section of the README: the main groups of each GPU and of the last CPU, one plot, the compiled kernels."""
    found = groups(rows)
    parts = []
    on_gpu = [group for group in found if group.first.on_gpu]
    machines = list(dict.fromkeys(group.first.gpu for group in on_gpu))
    if not on_gpu:
        parts.append(f"On a GPU: {NOT_MEASURED}. `python -m bench gpu --quick` measures it within nine minutes.")
    on_cpu = [group for group in found if not group.first.on_gpu]
    if on_cpu:
        machines.append(on_cpu[-1].first.gpu)
    parts += [_machine(gpu, [group for group in found if group.first.gpu == gpu], files, root) for gpu in machines]
    if on_cpu:
        parts.append("On a CPU, Triton kernels are checked in the interpreter and never timed there.")
    named = {path.stem: path for path in plots}
    of_choice = (f"{slug(gpu)}-{name}" for gpu in machines for name in MAIN_PLOTS)
    parts += [_image(named[name], _relative(named[name], root)) for name in of_choice if name in named][:1]
    parts += [by_architecture(path, _relative(path, root)) for path in compiled[-1:]]  # the latest compiler
    return "\n\n".join(parts)


def main_groups(found: Sequence[Group]) -> list[Group]:
    """The groups of MAIN; all groups if none of those was measured."""
    chosen = []
    for suite, direction, model in MAIN:
        of_it = [
            group
            for group in found
            if (group.first.suite, group.first.direction) == (suite, direction)
            and str(group.first.shape.get("name", "")).startswith(model)
        ]
        chosen += sorted(of_it, key=lambda group: group.first.shape.get("pairs") or group.first.shape["batch"])[-1:]
    return chosen or list(found)


def _machine(gpu: str, found: Sequence[Group], files: Sequence[Path], root: Path) -> str:
    sources = [path for path in files if any(_holds(path, group.first) for group in found)]
    named = ", ".join(f"[{path.name}]({_relative(path, root)})" for path in sources)
    shown = main_groups(found)
    environments = "; ".join(dict.fromkeys(_environment(group).removesuffix(".") for group in shown))
    return f"On {gpu}, {environments}. Rows: {named}.\n\n{_overview(shown)}"


def _overview(found: Sequence[Group]) -> str:
    """One line per group: this project beside the baseline and the best peer; per precision where it has several."""
    one = [group for group in found if len(group.precisions) == 1]
    several = [group for group in found if len(group.precisions) > 1]
    lines = []
    if one or not several:
        lines += [
            "| | shape | dtype | this project, ms | baseline, ms | speed-up | best peer, ms | memory: this, baseline "
            "| % of roofline | noise |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(_line, one),
        ]
    if several:
        lines += [""] * bool(lines) + [
            "| | shape | precision | this project, ms | cosine | baseline in fp32, ms | speed-up | best peer, ms "
            "| cosine | memory: this, best peer | noise |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_line_of_precision(group, precision) for group in several for precision in group.precisions),
        ]
    if any(row.disturbed for group in found for row in group.rows):
        lines += [
            "",
            "The machine was busy or throttled during some rows (see their remarks); noise may be larger.",
        ]
    return "\n".join(lines)


def _holds(path: Path, row: Row) -> bool:
    return path.name.startswith(slug(row.gpu))


def _line(group: Group) -> str:
    row, baseline = group.first, group.baseline()
    own = min((one for one in group.timed if one.of_this_project), key=_ms, default=None)
    peers = [one for one in group.timed if not one.of_this_project and one.comparable]
    best = min(peers, key=_ms, default=None)
    speed = "" if own is None or baseline is None else f"{_ms(baseline) / _ms(own):.2f}x"
    failed = next((one.reason for one in group.rows if one.of_this_project and one.status == "error"), "")
    absent = NOT_MEASURED if row.on_gpu else "checked, not timed"
    cells = (
        f"{row.op} {row.direction}",
        str(row.shape.get("name", "")),
        row.dtype,
        f"`{own.impl}` {milliseconds(own.ms_median)}" if own else failed or absent,
        f"`{baseline.impl}` {milliseconds(baseline.ms_median)}" if baseline else "",
        f"**{speed}**" if own in group.fastest() and speed else speed,
        f"`{best.impl}` {milliseconds(best.ms_median)}" if best else "",
        ", ".join(filter(None, (size(one.peak_mem_bytes) for one in (own, baseline) if one))),
        share(own.roofline_share) if own else "",
        "" if group.noise is None else f"{group.noise:.2f}x",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _line_of_precision(group: Group, precision: str) -> str:
    row, baseline, rows = group.first, group.baseline(), group.of_precision(precision)
    own = min((one for one in rows if one.of_this_project), key=_ms, default=None)
    best = min((one for one in rows if not one.of_this_project), key=_ms, default=None)
    cells = (
        f"{row.op} {row.direction}",
        str(row.shape.get("name", "")),
        precision,
        f"`{own.impl}` {milliseconds(own.ms_median)}" if own else "",
        cosine(own) if own else "",
        f"`{baseline.impl}` {milliseconds(baseline.ms_median)}" if baseline else "",
        f"{_ms(baseline) / _ms(own):.2f}x" if own and baseline else "",
        f"`{best.impl}` {milliseconds(best.ms_median)}" if best else "",
        cosine(best) if best else "",
        ", ".join(filter(None, (size(one.peak_mem_bytes) for one in (own, best) if one))),
        "" if group.noise is None else f"{group.noise:.2f}x",
    )
    return "| " + " | ".join(cells) + " |"


def _relative(path: Path, root: Path) -> str:
    path = path.resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.as_posix()


def insert(readme: Path, text: str) -> None:
    """Replaces the text between the markers. ValueError if the file does not have both, in order."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no '{BEGIN}' followed by '{END}' to write between")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
