"""Counts what a tile of a matrix product costs each pipe beyond its main loop: the epilogue, up to the next main loop.

    python -m bench.compiled.tile_cost linear_hopper linear --only "46656 gelu" [--json]

`bench.compiled.sass` counts the main loop, a block of depth; this counts the rest of a tile, by the same clocks of one
warp on its quarter of a multiprocessor: its epilogue, and how the next tile starts, with the wgmma of its first block
where that stands before the loop. Of several ways through it, such as the one for tiles at an edge, it takes the one
with the fewest instructions of those that store and compute as much as any. Where the compiler has made one loop of
tiles and blocks, it is what a tile's last block costs beyond the others.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from bench.compiled.ahead_of_time import GPUS, Launch, compiling_for, sass
from bench.compiled.launches import launches_of, operation_names
from bench.compiled.sass import Loop, measure

_WORK = ("MUFU", "UTMASTG", "STS", "STG", "RED")


@dataclasses.dataclass(frozen=True)
class _Path:
    """Instructions by their numbers: how many of them are work, and all of them."""

    work: int
    length: int
    first: int
    rest: "_Path | None"

    def numbers(self) -> list[int]:
        found, path = [], self
        while path.rest is not None:
            found.append(path.first)
            path = path.rest
        return found


class _Code:
    """The instructions of a kernel, and where control goes from each."""

    def __init__(self, text: str):
        self.lines: list[str] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                self.labels[label[1]] = len(self.lines)
            elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*)", line):
                self.lines.append(found[1].strip())

    def name(self, number: int) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.lines[number])

    def target(self, number: int) -> int | None:
        """Where a branch goes."""
        branch = re.match(r"BRA.*`\((\.L_\w+)\)", self.name(number))
        return self.labels.get(branch[1]) if branch else None

    def main_loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each innermost loop with wgmma."""
        loops = [
            (target, number)
            for number in range(len(self.lines))
            if (target := self.target(number)) is not None and target <= number and self.lines[number].startswith("@")
        ]
        loops = [(a, b) for a, b in loops if any(self.name(n).startswith("HGMMA") for n in range(a, b))]
        return [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]

    def path(self, start: int, end: int, most_work: bool) -> _Path | None:
        """The shortest of the ways from start to before end, or out of the kernel, that do the most or least work."""
        found: dict[int, _Path | None] = {}
        stack = [start]
        while stack:  # depth first, without recursion; a way back to where it already was is none
            number = stack[-1]
            following = self._following(number, end)
            if number not in found:
                found[number] = None
                stack += [n for n in following if n not in found and n != end]
                continue
            stack.pop()
            rests = [_Path(0, 0, end, None) if n == end else found[n] for n in following]
            if not following and self.name(number).startswith("EXIT"):
                rests = [_Path(-len(self.lines), 0, number, None)]  # only where no way leads to the end
            work = self.name(number).startswith(_WORK)
            paths = [_Path(r.work + work, r.length + 1, number, r) for r in rests if r is not None]
            if paths:
                found[number] = min(paths, key=lambda p: (-p.work if most_work else p.work, p.length))
        return found[start]

    def _following(self, number: int, end: int) -> list[int]:
        if self.name(number).startswith(("EXIT", "BRX", "RET")) and not self.lines[number].startswith("@"):
            return []
        target = self.target(number)
        if target is None:
            return [number + 1] if number + 1 < len(self.lines) else []
        if not self.lines[number].startswith("@"):
            return [target]
        return [number + 1, target]


def epilogues(code: str) -> list[list[str]]:
    """The instructions of each main loop's epilogue."""
    parsed = _Code(code)
    found = []
    for first, last in parsed.main_loops():
        if any(parsed.name(n).startswith(("UTMASTG", "STG")) for n in range(first, last)):
            with_epilogue, without = (parsed.path(first, last, most_work) for most_work in (True, False))
            assert with_epilogue is not None and without is not None
            common = set(without.numbers())
            numbers = [n for n in with_epilogue.numbers() if n not in common]
        else:
            path = parsed.path(last + 1, first, True)
            assert path is not None
            numbers = path.numbers()
        found.append([parsed.name(n) for n in numbers])
    return found


def costs_of(launches: Iterable[Launch]) -> list[Loop]:
    """Of every matrix product that the launches start, compiled for an H200."""
    found: list[Loop] = []
    for launch in launches:

        def record(kernel: str, compiled: Any, launch: Launch = launch) -> None:
            if isinstance(compiled, Exception):
                raise compiled
            found.extend(measure(launch.name, kernel, path) for path in epilogues(sass(compiled.asm["cubin"])))

        with compiling_for(GPUS["h200"], record):
            launch.call()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the instructions of epilogues by pipe, for an H200.")
    parser.add_argument("operations", nargs="+", metavar="OPERATION", choices=operation_names())
    parser.add_argument("--only", default="", help="only launches whose name contains this")
    parser.add_argument("--json", action="store_true", help="print a list rather than a table")
    arguments = parser.parse_args()
    costs: list[Loop] = []
    for operation in arguments.operations:
        costs += costs_of(launches_of(operation, arguments.only))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(cost) for cost in costs]))
        return 0
    for cost in costs:
        clocks = "  ".join(f"{pipe} {round(count)}" for pipe, count in cost.clocks.items())
        print(f"{cost.launch:34} {cost.kernel:20} clocks: {clocks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
