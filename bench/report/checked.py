"""What `check` found on GPUs, from the files that it writes beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def checks(paths: Iterable[Path]) -> str:
    """A line per GPU and commit, then what is wrong and what was not checked; "" without files.

    Of several checks of the same shape the last counts.
    """
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            one = json.loads(line)
            what = (one["gpu"], one["commit"], one["op"], one["kernels"], one["dtype"], str(one["shape"]["name"]))
            latest[what] = one
    if not latest:
        return ""
    parts = ["## Checks", "By `python -m bench check`: outputs and gradients against fp64, twice with the same bits."]
    for gpu, commit in dict.fromkeys(what[:2] for what in latest):
        found = [one for what, one in latest.items() if what[:2] == (gpu, commit)]
        correct = sum(one["ok"] and not one["problem"] for one in found)
        lines = [f"{gpu}, commit {commit}, {found[-1]['date']}: {correct} of {len(found)} correct."]
        for one in found:
            if one["problem"]:
                name = f"`{one['op']}` {one['shape']['name']} {one['dtype']}".rstrip()
                lines.append(f"- {'' if one['ok'] else '**wrong** '}{name}, `{one['kernels']}`: {one['problem']}")
        parts.append("\n".join(lines[:1] + [""] * (len(lines) > 1) + lines[1:]))
    return "\n\n".join(parts)
