"""Counts the clocks that a tile of a GEMM costs each pipe outside its main loop: from there to the next main loop.

    python -m bench.compiled.tile_cost linear_hopper linear --only "46656 gelu" [--json]

`bench.compiled.sass` counts the main loop, per block of depth. This counts the rest of a tile, in the same clocks of
one warp on its quarter of a multiprocessor: the epilogue and the start of the next tile, including the wgmma of its
first block if that precedes the loop. Of several paths, such as the one of tiles at an edge, it takes the path with the
most stores and special functions, and of those the shortest. If the compiler has merged the loops over tiles and
blocks, the result is what a tile's last block costs more than the others.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable

from bench.compiled.launch import Launch
from bench.compiled.sass import Loop, command, innermost_loops, measure_parts, parse, without_predicate

_WORK = ("MUFU", "UTMASTG", "STS", "STG", "RED")


@dataclasses.dataclass(frozen=True)
class _Path:
    """A path through the code: how many of its instructions are work, its length, its first instruction, the rest."""

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
    """The instructions of a kernel and its control flow."""

    def __init__(self, text: str):
        self.lines, self.labels = parse(text)

    def name(self, number: int) -> str:
        return without_predicate(self.lines[number])

    def target(self, number: int) -> int | None:
        """The target of a branch."""
        branch = re.match(r"BRA.*`\((\.L_\w+)\)", self.name(number))
        return self.labels.get(branch[1]) if branch else None

    def path(self, start: int, end: int, most_work: bool) -> _Path | None:
        """The shortest path from start to before end, or out of the kernel, with the most or the least work."""
        found: dict[int, _Path | None] = {}
        stack = [start]
        while stack:  # depth first without recursion; a cycle is no path
            number = stack[-1]
            following = self._following(number, end)
            if number not in found:
                found[number] = None
                stack += [n for n in following if n not in found and n != end]
                continue
            stack.pop()
            rests = [_Path(0, 0, end, None) if n == end else found[n] for n in following]
            if not following and self.name(number).startswith("EXIT"):
                rests = [_Path(-len(self.lines), 0, number, None)]  # only if no path leads to the end
            # The branch of the one thread that issues tcgen05 belongs to the main loop, not to an epilogue.
            work = self.name(number).startswith(_WORK) - self.name(number).startswith(("UTCHMMA", "UTCQMMA"))
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
        is_conditional = self.lines[number].startswith("@") or re.match(r"BRA[.\w]* !?UP", self.name(number))
        if not is_conditional:
            return [target]
        return [number + 1, target]


def epilogues(code: str) -> list[list[str]]:
    """The instructions of each main loop's epilogue, as far as it can be followed."""
    parsed = _Code(code)
    found = []
    for first, last in innermost_loops(parsed.lines, parsed.labels):
        if any(parsed.name(n).startswith(("UTMASTG", "STG")) for n in range(first, last)):
            with_epilogue, without = (parsed.path(first, last, most_work) for most_work in (True, False))
            assert with_epilogue is not None and without is not None
            common = set(without.numbers())
            numbers = [n for n in with_epilogue.numbers() if n not in common]
        else:
            path = parsed.path(last + 1, first, True)
            if path is None:  # the code ends in a subroutine, which is not followed
                continue
            numbers = path.numbers()
        found.append([parsed.name(n) for n in numbers])
    return found


def main_loops(code: str) -> list[list[str]]:
    """The instructions of each main loop for a block of depth that is not a tile's last: without the epilogue."""
    parsed = _Code(code)
    found = []
    for first, last in innermost_loops(parsed.lines, parsed.labels):
        path = parsed.path(first, last, most_work=False)
        assert path is not None
        found.append([parsed.name(n) for n in (*path.numbers(), last)])
    return found


def costs_of(launches: Iterable[Launch]) -> list[Loop]:
    """The cost of a tile outside the main loop, for every GEMM that the launches start, compiled for an H200."""
    return measure_parts(launches, epilogues)


def _show(cost: Loop) -> str:
    clocks = "  ".join(f"{pipe} {round(count)}" for pipe, count in cost.clocks.items())
    return f"{cost.launch:34} {cost.kernel:20} clocks: {clocks}"


def main() -> int:
    return command("Count the instructions of epilogues by pipe, for an H200.", epilogues, _show)


if __name__ == "__main__":
    sys.exit(main())
