"""The table of `python -m bench compile`: every launch of the operations, compiled ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from bench.compiled.ahead_of_time import Row, compile_launches, in_one_line
from bench.compiled.launch import Launch, architecture
from bench.compiled.launches import has_kernels_for, launches_of, published
from bench.compiled.processes import Crashed, work_on
from bench.environment import commit, version
from bench.measure.progress import Event, Progress, silent


@dataclass(frozen=True)
class Task:
    """A launch, by name, to compile for one GPU."""

    operation: str
    launch: str
    gpu: str


def tasks(operations: Sequence[str], gpus: Sequence[str], quick: bool = False) -> list[Task]:
    """Every launch of the operations for each GPU; those of published models if `quick`.

    Launches that share kernels follow each other, each for all GPUs, so that processes side by side rarely compile the
    same one.
    """
    return [
        Task(operation, launch.name, gpu)
        for operation in operations
        for launch in launches_of(operation, published(operation) if quick else "")
        for gpu in gpus
        if has_kernels_for(operation, gpu)
    ]


def use_the_compiler() -> None:
    """Unsets TRITON_INTERPRET. RuntimeError if Triton has been imported with it, which replaces the compiler."""
    if os.environ.pop("TRITON_INTERPRET", None) == "1" and "triton" in sys.modules:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1, which replaces its compiler")


@functools.cache
def _launches(operation: str) -> dict[str, Launch]:
    return {launch.name: launch for launch in launches_of(operation)}


def compile_task(task: Task) -> list[Row]:
    """The rows of one launch, each kernel once."""
    use_the_compiler()
    try:
        rows = compile_launches(iter([_launches(task.operation)[task.launch]]), task.gpu)
    except Exception as error:  # of the launcher, before any kernel
        rows = [_failed(task, error)]
    return list({row.key or str(row): row for row in rows}.values())


def _failed(task: Task, error: Exception) -> Row:
    what = str(error) if isinstance(error, Crashed) else in_one_line(error)
    return Row(task.launch, "none", task.gpu, error=what)


def compile_tasks(wanted: Sequence[Task], jobs: int = 1, progress: Progress = silent) -> list[tuple[str, Row]]:
    """(operation, row) of every kernel, in the order of the tasks, compiled in `jobs` processes."""

    def begin(done: int, number: int) -> None:
        task = wanted[number]
        progress(Event(done, len(wanted), f"{task.operation} {task.launch} for {architecture(task.gpu)}"))

    found: dict[int, list[Row]] = {}
    for number, result in work_on(compile_task, wanted, jobs, begin):
        found[number] = [_failed(wanted[number], result)] if isinstance(result, Exception) else result
    progress(Event(len(wanted), len(wanted)))
    return [(task.operation, row) for number, task in enumerate(wanted) for row in found[number]]


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Inside the context Triton's cache is empty; what is compiled there is not kept."""
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, TRITON_CACHE_DIR=directory):
        yield


def write_table(rows: Sequence[tuple[str, Row]], where: Path, quick: bool = False) -> Path:
    """Writes a line of JSON per kernel with the compiler's version and the commit; returns the path.

    where: a directory, or a .jsonl file. quick: whether a quick run compiled them. A kernel that several launches of an
    operation start has one line.
    """
    sha, dirty = commit()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    shared = {"quick": quick, "triton": version("triton"), "commit": sha, "dirty": dirty, "date": date}
    path = where if where.suffix == ".jsonl" else where / f"compile-triton-{version('triton')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for operation, row in kernels(rows):
            file.write(json.dumps({**facts(operation, row), **shared}) + "\n")
    return path


def facts(operation: str, row: Row) -> dict[str, Any]:
    """The row with its operation, architecture and problems, for JSON."""
    values = {**dataclasses.asdict(row), "key": row.key[:16]}
    return {"op": operation, "arch": architecture(row.gpu), **values, "problems": row.problems()}


def kernels(rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """The rows without those of kernels that an earlier launch of the operation starts on that GPU."""
    found: dict[tuple[str, ...], tuple[str, Row]] = {}
    for operation, row in rows:
        key = (row.key,) if row.key else (row.launch, row.kernel)
        found.setdefault((operation, row.gpu, *key), (operation, row))
    return list(found.values())
