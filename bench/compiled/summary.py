"""What `python -m bench compile` found, per operation and architecture, and as tables in Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compiled.ahead_of_time import Row
from bench.compiled.launch import GPUS, architecture
from bench.compiled.table import kernels

HEADER = ("kernels", "most registers", "spilling", "largest spill", "most shared memory", "matrix instructions")


@dataclass
class Summary:
    """The kernels of an operation, or of all, on one architecture."""

    operation: str
    gpu: str  # of GPUS
    kernels: int = 0
    registers: int = 0  # the most per thread
    spilling: int = 0  # kernels with a stack
    stack_bytes: int = 0  # the largest
    shared_bytes: int = 0  # the most per program
    shared_limit: int = 0
    matrix: set[str] = field(default_factory=set)  # of "mma", "wgmma" and "tcgen05"
    problems: int = 0  # kernels with problems

    @property
    def architecture(self) -> str:
        return architecture(self.gpu)

    def add(self, row: Row) -> None:
        self.kernels += 1
        self.registers = max(self.registers, row.registers)
        self.spilling += row.stack_bytes > 0
        self.stack_bytes = max(self.stack_bytes, row.stack_bytes)
        self.shared_bytes = max(self.shared_bytes, row.shared_bytes)
        self.shared_limit = row.shared_limit
        self.matrix |= {name.split()[0] for name in row.matrix}
        self.problems += bool(row.problems())

    def cells(self) -> list[str]:
        """The texts under HEADER."""
        kib = f"{self.shared_bytes / 1024:.0f} of {self.shared_limit / 1024:.0f} KiB"
        spill = f"{self.stack_bytes} B" if self.stack_bytes else "none"
        matrix = ", ".join(sorted(self.matrix)) or "none"
        return [str(self.kernels), str(self.registers), str(self.spilling), spill, kib, matrix]


def summarise(rows: Iterable[tuple[str, Row]], by_operation: bool = True) -> list[Summary]:
    """A summary per operation and architecture, or per architecture: operations as they come, GPUs as in GPUS."""
    found: dict[tuple[str, str], Summary] = {}
    for operation, row in kernels(list(rows)):
        name = (operation if by_operation else "all", row.gpu)
        found.setdefault(name, Summary(*name)).add(row)
    operations, gpus = list(dict.fromkeys(operation for operation, _ in found)), list(GPUS)
    return sorted(found.values(), key=lambda one: (operations.index(one.operation), gpus.index(one.gpu)))


def read_table(path: Path) -> tuple[list[tuple[str, Row]], dict[str, Any]]:
    """The rows of `write_table`'s file, and what they share: versions, commit and date.

    ValueError names the file and the line of a bad row.
    """
    fields = {one.name for one in dataclasses.fields(Row)}
    rows: list[tuple[str, Row]] = []
    shared: dict[str, Any] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            row = Row(**{name: values[name] for name in fields})
            if row.gpu not in GPUS:
                raise ValueError(f"gpu is {row.gpu!r}; supported: {', '.join(GPUS)}")
            rows.append((values["op"], row))
            shared = {name: values[name] for name in ("quick", "triton", "commit", "dirty", "date")}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows, shared


def by_operation(path: Path) -> str:
    """A table in Markdown with a line per operation and architecture, and the problems."""
    rows, shared = read_table(path)
    lines = [([f"`{one.operation}`", one.architecture], one) for one in summarise(rows)]
    found = [f"- {problem}" for problem in problems(rows)] or ["No kernel has a problem."]
    return "\n".join([_source(path, path.name, shared), "", *_table(["operation", "architecture"], lines), "", *found])


def by_architecture(path: Path, link: str) -> str:
    """A table in Markdown with a line per architecture. link: the path of the file from the page."""
    rows, shared = read_table(path)
    lines = [([one.architecture, _name(one.gpu)], one) for one in summarise(rows, by_operation=False)]
    return "\n".join([_source(path, link, shared), "", *_table(["architecture", "as on"], lines)])


def problems(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """A line per kernel with a problem."""
    return [
        f"{architecture(row.gpu)} {operation} {row.launch}, {row.kernel}: {'; '.join(row.problems())}"
        for operation, row in kernels(rows)
        if row.problems()
    ]


def _table(names: list[str], lines: list[tuple[list[str], Summary]]) -> list[str]:
    header = [*names, *HEADER, "problems"]
    cells = [[*first, *one.cells(), str(one.problems)] for first, one in lines]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def _name(gpu: str) -> str:
    return GPUS[gpu].name.removeprefix("NVIDIA ")


def _source(path: Path, link: str, shared: dict[str, Any]) -> str:
    dirty = " (with changes)" if shared["dirty"] else ""
    environment = f"triton {shared['triton']}, commit {shared['commit']}{dirty}, {shared['date']}"
    command = f"python -m bench compile{' --quick' if shared['quick'] else ''}"
    return f"Compiled without a GPU by `{command}`, {environment}: [{path.name}]({link})."
