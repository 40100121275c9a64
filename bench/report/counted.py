"""Counted times beside measured ones: what calibrates every count that nothing has measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.report.rows import Row
from bench.report.tables import milliseconds

LARGEST_DIFFERENCE = 0.15  # beyond which a count is wrong, or a kernel

Shares = Mapping[tuple[str, ...], float]


def read_shares(paths: Iterable[Path]) -> Shares:
    """The share of the roofline that is counted, by the row that measures it: `bench.compiled.predicted`."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found[_key(one["op"], one["direction"], one["shape"], one["dtype"], one["impl"], one["gpu"])] = one["share"]
    return found


def _key(op: str, direction: str, shape: Mapping[str, object], dtype: str, impl: str, gpu: str) -> tuple[str, ...]:
    sizes = {name: value for name, value in shape.items() if name != "name"}
    return op, direction, json.dumps(sizes, sort_keys=True), dtype, impl, gpu


def counted_milliseconds(row: Row, shares: Shares) -> float | None:
    """The machine's roofline, as it was measured with the row, over the counted share; None if nothing is counted."""
    share = shares.get(_key(row.op, row.direction, row.shape, row.dtype, row.impl, row.gpu))
    return None if share is None or row.roofline_ms is None else row.roofline_ms / share


def comparison(rows: Sequence[Row], shares: Shares) -> str:
    """A table of the rows that are counted, those that differ most first; "" if there are none."""
    latest = {row.key: row for row in rows}.values()
    found = []
    for row in latest:
        counted = counted_milliseconds(row, shares)
        if counted is not None and row.ms_median is not None:
            found.append((row.ms_median / counted - 1, counted, row))
    if not found:
        return ""
    lines = [
        "## Counted beside measured",
        "The counted time is the measured roofline over the share of it that `python -m bench.compiled.predicted` "
        f"counts. Differences beyond {LARGEST_DIFFERENCE:.0%} are bold: there the count is wrong, or the kernel.",
        "| | shape | dtype | impl | measured, ms | counted, ms | measured is |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(_line(*one) for one in sorted(found, key=lambda one: -abs(one[0]))),
    ]
    return "\n\n".join(lines)


def _line(difference: float, counted: float, row: Row) -> str:
    says = f"{abs(difference):.0%} {'longer' if difference > 0 else 'shorter'}"
    says = f"**{says}**" if abs(difference) > LARGEST_DIFFERENCE else says
    cells = (f"{row.op} {row.direction}", str(row.shape.get("name", "")), row.dtype, f"`{row.impl}`")
    return "| " + " | ".join((*cells, milliseconds(row.ms_median), milliseconds(counted), says)) + " |"
