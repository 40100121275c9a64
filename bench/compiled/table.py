"""The table of `python -m bench compile`: every launch of the operations, compiled ahead of time."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.compiled.ahead_of_time import GPUS, Row, compile_launches
from bench.compiled.launches import HOPPER, launches_of
from bench.environment import commit, version
from bench.measure.progress import Event, Progress, silent


def use_the_compiler() -> None:
    """Unsets TRITON_INTERPRET. RuntimeError if Triton has been imported with it, which replaces the compiler."""
    if os.environ.pop("TRITON_INTERPRET", None) == "1" and "triton" in sys.modules:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1, which replaces its compiler")


def compile_operations(
    operations: Sequence[str], gpus: Sequence[str], progress: Progress = silent
) -> Iterator[tuple[str, Row]]:
    """(operation, row) of every kernel that the operations launch, for each GPU; identical rows of a launch once."""
    wanted = [
        (operation, launch, gpu)
        for operation in operations
        for launch in launches_of(operation)
        for gpu in gpus
        if not operation.endswith(HOPPER) or GPUS[gpu].capability[0] == 9
    ]
    for done, (operation, launch, gpu) in enumerate(wanted):
        progress(Event(done, len(wanted), f"{operation} {launch.name} for {gpu}"))
        try:
            rows = compile_launches(iter([launch]), gpu)
        except Exception as error:  # of the launcher, before any kernel
            rows = [Row(launch.name, "none", gpu, error=f"{type(error).__name__}: {error}"[:500])]
        for row in {str(row): row for row in rows}.values():
            yield operation, row
    progress(Event(len(wanted), len(wanted)))


def architecture(gpu: str) -> str:
    """The architecture of a GPU of GPUS, such as sm_90 of h200."""
    major, minor = GPUS[gpu].capability
    return f"sm_{major}{minor}"


def write_table(rows: Sequence[tuple[str, Row]], directory: Path) -> Path:
    """Writes the rows as JSON lines with the compiler's version and the commit; returns the path."""
    sha, dirty = commit()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    shared = {"triton": version("triton"), "commit": sha, "dirty": dirty, "date": date}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"compile-triton-{version('triton')}.jsonl"
    with path.open("w") as file:
        for operation, row in rows:
            facts = {"op": operation, "arch": architecture(row.gpu), **dataclasses.asdict(row)}
            file.write(json.dumps({**facts, "problems": row.problems(), **shared}) + "\n")
    return path
