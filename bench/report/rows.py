"""Rows of results: the schema, files of JSON lines, and which measurements are settled.

A file is `<gpu>-<date>.jsonl`. A row is written as soon as it is measured and is never changed; of several rows of the
same measurement the last one counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environment import ROOT, environment, in_repository, is_gpu

STATUSES = ("ok", "oom", "unsupported", "missing", "error")
AGAIN = "#2"  # after the name of a contender: its second timing in one group, for the noise


@dataclass
class Row:
    """One measurement, or the reason why there is none. The fields are the schema."""

    suite: str
    op: str
    direction: str
    shape: dict[str, Any]
    dtype: str
    impl: str  # name in the registry of peers; "#2" after it marks the second timing
    status: str = "ok"  # one of STATUSES
    reason: str = ""  # why there is no time; beside a time, a remark for the reader
    crashed: bool = False  # it broke the CUDA context, hung or ended its process: nothing could run after it
    disturbed: bool = False  # the machine was busy or throttled while it was timed
    comparable: bool = True  # it computes what the operation is defined as, not a neighbouring function
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_ms: float | None = None  # the least time that this machine allows
    roofline_share: float | None = None
    peak_mem_bytes: int | None = None  # the most that a call holds beyond inputs and weights
    error_vs_fp64: float | None = None  # relative; the worst of outputs or gradients
    precision: str = ""  # what it computes in, where that is not dtype, the inputs'
    least_cosine: float | None = None  # of an embedding to that of fp64
    gpu: str = ""
    driver: str | None = None
    cuda: str | None = None
    torch: str = ""
    triton: str | None = None
    peer_version: str | None = None
    commit: str = ""
    dirty: bool | None = None
    date: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; supported: {', '.join(STATUSES)}")

    @property
    def of_this_project(self) -> bool:
        """Whether the contender is this project's kernels, its plain algorithms or its model under any backend."""
        return self.impl.removesuffix(AGAIN).split(":")[0] in ("triton", "siglip_model", "chunked", "folded")

    @property
    def images_per_second(self) -> float | None:
        """Of bulk embedding, whose shape counts images."""
        images = self.shape.get("images")
        return 1e3 * images / self.ms_median if images and self.ms_median else None

    @property
    def on_gpu(self) -> bool:
        return is_gpu(self.gpu)

    @property
    def group(self) -> tuple[str, ...]:
        """Identifies the contenders that were measured side by side."""
        shape = json.dumps(self.shape, sort_keys=True)
        return self.suite, self.op, self.direction, shape, self.dtype

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the measurement: a later row with the same key replaces this one."""
        return (*self.group, self.impl, self.gpu)


FIELDS = tuple(item.name for item in dataclasses.fields(Row))
LATER = {"precision", "least_cosine"}  # files from before these fields lack them


def new_row(**values: Any) -> Row:
    """A row with this machine's environment."""
    return Row(**{**environment(), **values})


def results_directory() -> Path:
    """bench/results of a checkout; without a repository, bench-results in the current directory."""
    return ROOT / "bench" / "results" if in_repository() else Path.cwd() / "bench-results"


def results_file(where: Path | None = None) -> Path:
    """The file of this machine and day, in `where` or the default directory; `where` itself if it names a file."""
    if where is not None and where.suffix == ".jsonl":
        return where
    facts = environment()
    return (where or results_directory()) / f"{slug(facts['gpu'])}-{facts['date']}.jsonl"


def checks_file(where: Path | None = None) -> Path:
    """The file of what `check` found on this machine today, beside that of the rows."""
    rows = results_file(where)
    return rows.with_name(f"check-{rows.name}")


def is_of_rows(path: Path) -> bool:
    """Whether a .jsonl file of a directory of results holds rows."""
    return not path.name.startswith(("check-", "compile-", "counted-"))


def slug(gpu: str) -> str:
    """A GPU's name in a file name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"; "cpu (…)" -> "cpu"."""
    if not is_gpu(gpu):
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-") or "gpu"


def read(paths: Iterable[Path]) -> list[Row]:
    """Every row of the files; an incomplete last line is ignored. ValueError names the file and line of a bad row."""
    rows = []
    for path in paths:
        for number, line in enumerate(_whole_lines(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                unknown, lacking = set(values) - set(FIELDS), set(FIELDS) - LATER - set(values)
                if unknown or lacking:
                    raise ValueError(f"fields unknown {sorted(unknown)}, lacking {sorted(lacking)}")
                rows.append(Row(**values))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


@dataclass
class Results:
    """A file of rows that is being written, and the rows that it held before."""

    path: Path
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Results:
        results = cls(path)
        if path.exists():
            whole = _whole_lines(path)
            if whole != path.read_text():
                path.write_text(whole)
            for row in read([path]):
                results.rows[row.key] = row
        return results

    def add(self, row: Row) -> None:
        """Appends a row to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            file.flush()
        self.rows[row.key] = row

    def settled(self, row: Row) -> bool:
        """Whether this measurement was made with the same code and versions."""
        found = self.rows.get(row.key)
        return found is not None and _code(found) == _code(row) and found.peer_version == row.peer_version


def _code(row: Row) -> tuple[str, str, str | None]:
    return row.commit, row.torch, row.triton


def _whole_lines(path: Path) -> str:
    """The file without an incomplete last line, which a run that was killed or is still writing leaves."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1]
