"""Counts the instructions that the kernels of layer normalisation issue per row, on Hopper.

    python -m bench.compiled.row_cost layer_norm --only "x 1152" [--json]

Layer normalisation is bound by memory if its instructions, of all warps, leave time for that. A multiprocessor of an
H200 issues four per clock and moves 18 bytes (4.8 TB/s, 132 multiprocessors, 1.98 GHz): the backward's 6,912 bytes for
a row of 1152 bf16 numbers, of dy, x and dx, take as long as 1,500 instructions.

Counted are the loop over tiles of ROWS rows, or the whole kernel if it has none, and of a branch both paths.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

from bench.compiled.ahead_of_time import GPUS, arguments_of, compiling_for, sass
from bench.compiled.launch import Launch
from bench.compiled.launches import launches_of
from bench.compiled.sass import loops, parse, without_predicate


@dataclasses.dataclass
class RowCost:
    """A kernel that processes whole rows."""

    launch: str
    kernel: str
    instructions: float  # of all warps, per row

    def __str__(self) -> str:
        return f"{self.launch:44} {self.kernel:32} {self.instructions:8.0f} instructions per row"


def row_costs(launches: Iterable[Launch]) -> list[RowCost]:
    """Those of the kernels that have whole rows, with a mean, in tiles of ROWS that the launches start, for an H200."""
    found: list[RowCost] = []
    for launch in launches:

        def record(kernel: str, compiled: Any, launch: Launch = launch) -> None:
            if isinstance(compiled, Exception):
                raise compiled
            names = compiled.src.fn.arg_names
            constants = {names[path[0]]: value for path, value in compiled.src.constants.items()}
            if "mean" in names and "ROWS" in constants and not constants["WIDE"]:
                issued = compiled.metadata.num_warps * length_of_loop(sass(compiled.asm["cubin"]))
                found.append(RowCost(launch.name, kernel, issued / constants["ROWS"]))

        with compiling_for(GPUS["h200"], record):
            launch.call()
    return found


def row_instructions(code: str) -> list[str]:
    """Of the longest loop, or of all the code if it has none. code: nvdisasm's output, with labels."""
    lines, labels = parse(code)
    last = max((number for number, line in enumerate(lines) if "EXIT" in line), default=len(lines) - 1)  # then padding
    first, end = max(loops(lines, labels), key=lambda loop: loop[1] - loop[0], default=(0, last))
    return [without_predicate(line) for line in lines[first : end + 1]]


def length_of_loop(code: str) -> int:
    """The number of `row_instructions`."""
    return len(row_instructions(code))


def main() -> int:
    arguments = arguments_of("Count the instructions of kernels per row, for an H200.")
    found = row_costs(launch for name in arguments.operations for launch in launches_of(name, arguments.only))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        print("\n".join(map(str, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
