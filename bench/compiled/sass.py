"""Counts the clocks that the inner loops of compiled kernels cost each pipe of a Hopper multiprocessor.

    python -m bench.compiled.sass attention_hopper attention --only "S=729 D=72" [--json]

For each innermost loop that issues wgmma: the clocks that one warp's pass through it takes on its quarter of the
multiprocessor, by pipe. Passes of all warps there add up, so no kernel runs faster than its busiest pipe; if that is
the tensor pipe, the kernel can reach the peak, and otherwise `share` is the fraction that it can reach. Latencies, and
waits for memory or for other warps, come on top: the result is a bound, not a prediction.

A quarter (CUDA C++ programming guide, arithmetic throughput, compute capability 9.0) takes a warp's instruction of fp32
multiply-add in 1 clock, of integers, comparisons or conversions in 2, a shuffle or memory access in 4, an exponential
in 8; and 512 multiply-adds of fp16 or bf16 per clock. Shared memory delivers wgmma's operands at 128 bytes per clock.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from bench.compiled.ahead_of_time import GPUS, arguments_of, compiling_for, sass
from bench.compiled.launch import Launch
from bench.compiled.launches import launches_of

_CLOCKS = {"fma": 1, "alu": 2, "lsu": 4, "mufu": 8}
_FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2")
_LSU = ("LD", "ST", "SHFL", "ATOM", "RED", "SYNCS", "UTMA")
_CONTROL = ("BAR", "BRA", "WARPGROUP", "WARPSYNC", "NOP", "DEPBAR", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "YIELD")


@dataclasses.dataclass
class Loop:
    """An inner loop of a kernel: instructions of one warp, and clocks of its quarter of the multiprocessor."""

    launch: str
    kernel: str
    clocks: dict[str, float]  # by pipe: tensor, shared (operands of wgmma), mufu, fma, alu, lsu, issue
    instructions: dict[str, int]  # by name: {"HGMMA.64x128x16": 5, "MUFU": 66, ...}
    waits: int  # for wgmma; if as many as HGMMA, products run one by one
    exponentials_under_way: int  # exponentials issued while wgmma are in flight

    @property
    def bound(self) -> str:
        """The busiest pipe."""
        return max(self.clocks, key=lambda pipe: self.clocks[pipe])

    @property
    def share(self) -> float:
        """The fraction of the tensor pipe's peak that the busiest pipe allows."""
        return self.clocks["tensor"] / self.clocks[self.bound]

    def __str__(self) -> str:
        clocks = "  ".join(f"{pipe} {round(count)}" for pipe, count in self.clocks.items())
        products = "  ".join(f"{name} x{n}" for name, n in self.instructions.items() if name.startswith("HGMMA"))
        return (
            f"{self.launch:34} {self.kernel:32} clocks: {clocks}  bound by {self.bound}, {self.share:.0%} of peak  "
            f"{products}  {self.waits} waits  {self.exponentials_under_way} exponentials under way"
        )


def pipe_of(instruction: str) -> str:
    """The pipe that an instruction occupies; "" for control and the uniform data path."""
    name = instruction.split(".")[0]
    if name == "HGMMA":
        return "tensor"
    if name == "MUFU":
        return "mufu"
    if name.startswith(_FMA):
        return "fma"
    if name.startswith(_LSU):
        return "lsu"
    if name.startswith(("U", *_CONTROL)):
        return ""
    return "alu"


def tensor_clocks(instruction: str) -> float:
    """Clocks of HGMMA.64xNxK on a quarter, which computes 16 of the 64 rows."""
    rows, columns, depth = (int(n) for n in re.search(r"(\d+)x(\d+)x(\d+)", instruction).groups())  # type: ignore[union-attr]
    return rows * columns * depth / 4 / 512


def shared_clocks(line: str) -> float:
    """Clocks of the operands that HGMMA reads from shared memory: always the right one, often both."""
    name, destination_and_sources = line.split(maxsplit=1)
    rows, columns, depth = (int(n) for n in re.search(r"(\d+)x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
    left_as_well = destination_and_sources.split(",")[1].strip().startswith("gdesc")
    return 2 * depth * (columns + (rows if left_as_well else 0)) / 128


def parse(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of nvdisasm's output, and the number of the instruction that each label precedes."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*)", line):
            lines.append(instruction[1].strip())
    return lines, labels


def without_predicate(line: str) -> str:
    """The instruction that a predicate such as @!P0 guards."""
    return re.sub(r"^@!?U?P\w+\s+", "", line)


def innermost_loops(lines: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each innermost loop that contains HGMMA."""
    loops = []
    for end, line in enumerate(lines):
        # Only a conditional branch closes a loop: code that was moved out of line returns by an unconditional one.
        branch = re.match(r"@!?U?P\w+\s+BRA.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append((labels[branch[1]], end))
    loops = [(a, b) for a, b in loops if any("HGMMA" in line for line in lines[a:b])]
    return [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def inner_loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop that contains HGMMA. code: nvdisasm's output, with labels."""
    lines, labels = parse(code)
    return [[without_predicate(line) for line in lines[a : b + 1]] for a, b in innermost_loops(lines, labels)]


def measure(launch: str, kernel: str, loop: list[str]) -> Loop:
    """Counts the instructions of a loop, or of another part of a kernel, and their clocks."""
    clocks = dict.fromkeys(("tensor", "shared", "mufu", "fma", "alu", "lsu", "issue"), 0.0)
    names: Counter[str] = Counter()
    waits = under_way = 0
    in_flight = False
    for line in loop:
        name = line.split()[0]
        pipe = pipe_of(name)
        clocks["issue"] += 1
        if pipe:
            clocks[pipe] += tensor_clocks(name) if pipe == "tensor" else _CLOCKS[pipe]
        names[".".join(name.split(".")[: 2 if pipe == "tensor" else 1])] += 1
        if pipe == "tensor":
            clocks["shared"] += shared_clocks(line)
            in_flight = True
        elif name.startswith("WARPGROUP.DEPBAR"):
            waits += 1
            in_flight = not line.rstrip().endswith("0x0")
        elif name == "MUFU.EX2" and in_flight:
            under_way += 1
    return Loop(launch, kernel, clocks, dict(names.most_common()), waits, under_way)


def measure_parts(launches: Iterable[Launch], parts_of: Callable[[str], list[list[str]]]) -> list[Loop]:
    """Measures parts of the machine code of every kernel that the launches start, compiled for an H200."""
    found: list[Loop] = []
    for launch in launches:

        def record(kernel: str, compiled: Any, launch: Launch = launch) -> None:
            if isinstance(compiled, Exception):
                raise compiled
            found.extend(measure(launch.name, kernel, part) for part in parts_of(sass(compiled.asm["cubin"])))

        with compiling_for(GPUS["h200"], record):
            launch.call()
    return found


def command(description: str, parts_of: Callable[[str], list[list[str]]], show: Callable[[Loop], str] = str) -> int:
    """Runs `measure_parts` on the launches that the command line names, and prints the result."""
    arguments = arguments_of(description)
    launches = (launch for name in arguments.operations for launch in launches_of(name, arguments.only))
    found = measure_parts(launches, parts_of)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        print("\n".join(map(show, found)))
    return 0


def main() -> int:
    return command("Count the instructions of inner loops by pipe, for an H200.", inner_loops)


if __name__ == "__main__":
    sys.exit(main())
