"""Counts the clocks that the inner loops of compiled kernels cost each pipe of a multiprocessor.

    python -m bench.compiled.sass attention_hopper attention --only "S=729 D=72" [--json]

For each innermost loop that issues matrix instructions: the clocks that one warp's pass through it takes on its quarter
of the multiprocessor, by pipe. Passes of all warps there add up, so no kernel runs faster than its busiest pipe; if
that is the tensor pipe, the kernel can reach the peak, and otherwise `share` is the fraction that it can reach.
Latencies, waits for memory or for other warps, and conflicts of banks come on top: the result is a bound, not a
prediction.

A quarter (CUDA C++ programming guide, arithmetic throughput) takes a warp's instruction of integers, comparisons or
conversions in 2 clocks, a shuffle or memory access in 4, an exponential in 8, and one of fp32 in the clocks of
`RATES`, which also has the multiply-adds of fp16 and bf16 per clock; those of TF32 count twice, those of fp8 (QGMMA,
QMMA, UTCQMMA) half. Shared memory moves 128 bytes per clock for all
four quarters: what loads (LDS, LDSM), stores (STS, STSM), copies from global memory (cp.async) and wgmma, which reads
operands there, move, and what TMA writes for a loop if a warp of its own loads. One thread issues a tcgen05 for all
warps of a program; its shape is in the instruction's descriptor, which the code loads as a constant.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bench.compiled.ahead_of_time import GPUS, arguments_of, compiling_for, sass
from bench.compiled.launch import Launch
from bench.compiled.launches import launches_of


class Rates(NamedTuple):
    """Of a quarter of a multiprocessor. Its other rates are the same on every GPU that is counted."""

    fma: int  # clocks per warp's instruction of fp32: 16 or 32 of its 32 lanes per clock
    multiply_adds: int  # of fp16 and bf16 per clock, accumulated in fp32; TF32 has half of them


# Published rates of dense products, as in siglip_kernels.gemm.clocks: A100 312 TFLOP/s, H100 989,
# B200 2250. Of the GPUs with one
# architecture the fastest: A10, L40S (362 at 2.52 GHz) and RTX PRO 6000. Their GeForce siblings have half.
RATES = {
    (8, 0): Rates(2, 256),
    (8, 6): Rates(1, 128),
    (8, 9): Rates(1, 128),
    (9, 0): Rates(1, 512),
    (10, 0): Rates(1, 1024),
    (12, 0): Rates(1, 128),
}
HOPPER = RATES[9, 0]

PIPES = ("tensor", "shared", "mufu", "fma", "alu", "lsu", "issue")

_CLOCKS = {"alu": 2, "lsu": 4, "mufu": 8}
_FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2")
_MATRIX = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTCHMMA", "UTCQMMA")
_TCGEN05 = ("UTCHMMA", "UTCQMMA")
_LSU = ("LD", "ST", "SHFL", "ATOM", "RED", "SYNCS", "UTMA")
_CONTROL = ("BAR", "BRA", "WARPGROUP", "WARPSYNC", "NOP", "DEPBAR", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "YIELD")


class Clocked:
    """What has clocks by pipe."""

    clocks: dict[str, float]

    @property
    def bound(self) -> str:
        """The busiest pipe."""
        return max(self.clocks, key=lambda pipe: self.clocks[pipe])

    @property
    def share(self) -> float:
        """The fraction of the tensor pipe's peak that the busiest pipe allows."""
        return self.clocks["tensor"] / self.clocks[self.bound]


@dataclasses.dataclass
class Loop(Clocked):
    """An inner loop of a kernel: instructions of one warp, and clocks of its quarter of the multiprocessor."""

    launch: str
    kernel: str
    clocks: dict[str, float]  # by pipe: tensor, shared (memory), mufu, fma, alu, lsu, issue
    instructions: dict[str, int]  # by name: {"HGMMA.64x128x16": 5, "MUFU": 66, ...}
    waits: int  # for wgmma; if as many as HGMMA, products run one by one
    exponentials_under_way: int  # exponentials issued while wgmma are in flight
    multiply_adds: float = 0

    def __str__(self) -> str:
        clocks = "  ".join(f"{pipe} {round(count)}" for pipe, count in self.clocks.items())
        products = "  ".join(f"{name} x{n}" for name, n in self.instructions.items() if name.startswith(_MATRIX))
        return (
            f"{self.launch:34} {self.kernel:32} clocks: {clocks}  bound by {self.bound}, {self.share:.0%} of peak  "
            f"{products}  {self.instructions.get('BAR', 0)} barriers  {self.waits} waits  "
            f"{self.exponentials_under_way} exponentials under way"
        )


def pipe_of(instruction: str) -> str:
    """The pipe that an instruction occupies; "" for control and the uniform data path."""
    name = instruction.split(".")[0]
    if name in _MATRIX:
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


def multiply_adds(instruction: str, warps: int = 4) -> float:
    """Multiply-adds of one warp: of HMMA.16816, of the 16 of 64 rows that it has of HGMMA.64xNxK, or of its share of
    UTCHMMA.MxNxK, which serves all warps of a program. TF32 twice, and fp8, whose names have a Q, half."""
    if shape := re.search(r"UTC[HQ]MMA\.(\d+)x(\d+)x(\d+)", instruction):
        count: float = int(shape[1]) * int(shape[2]) * int(shape[3]) / warps
    elif shape := re.search(r"[HQ]GMMA\.64x(\d+)x(\d+)", instruction):
        count = 16 * int(shape[1]) * int(shape[2])
    else:
        count = 16 * 8 * int(re.search(r"[HQ]MMA\.168(\d+)", instruction)[1])  # type: ignore[index]
    return count * _element_bytes(instruction) / 2


def _element_bytes(instruction: str) -> int:
    """Of the operands of a matrix instruction."""
    if re.search(r"\bQG?MMA|UTCQMMA", instruction):
        return 1
    return 4 if "TF32" in instruction else 2


def shared_clocks(line: str, warps: int = 4) -> float:
    """Clocks of shared memory for an instruction that every warp of the four quarters issues."""
    name, destination_and_sources = line.split(maxsplit=1) if " " in line else (line, "")
    if name.startswith(_TCGEN05):  # of all warps together: the right operand, and the left one or tensor memory
        rows, columns, depth = (int(n) for n in re.search(r"(\d+)x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
        left = rows if destination_and_sources.startswith("gdesc") else 0
        return _element_bytes(name) * depth * (columns + left) / 128 * 4 / warps
    if name.startswith(("HGMMA", "QGMMA")):  # of four warps together: always the right operand, often both
        rows, columns, depth = (int(n) for n in re.search(r"(\d+)x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
        left_as_well = destination_and_sources.split(",")[1].strip().startswith("gdesc")
        return _element_bytes(name) * depth * (columns + (rows if left_as_well else 0)) / 128
    if matrices := re.match(r"(?:LD|ST)SM\.16\.MT?88(?:\.([24]))?", name):
        return 4 * int(matrices[1] or 1)
    if name.startswith(("LDS", "STS", "LDGSTS", "ATOMS")):  # bytes per thread · 32 threads · 4 warps / 128
        return max(4, int((re.search(r"\.(32|64|128)\b(?!B)", name) or [0, 32])[1]) // 8)
    return 0


def parse(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of nvdisasm's output, and the number of the instruction that each label precedes.

    UTCHMMA and UTCQMMA get their shape into its name, from the last constant that its descriptor's register was set to.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    constants: dict[str, int] = {}  # by uniform register
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*)", line):
            found = instruction[1].strip()
            if constant := re.search(r"UMOV (UR\d+), (0x[0-9a-f]+)", found):
                constants[constant[1]] = int(constant[2], 16)
            if descriptor := re.search(r"(UTC([HQ])MMA).*idesc\[(UR\d+)\]", found):
                shape = tcgen05_shape(constants[descriptor[3]], is_fp8=descriptor[2] == "Q")
                found = found.replace(descriptor[1], f"{descriptor[1]}.{shape}", 1)
            lines.append(found)
    return lines, labels


def tcgen05_shape(descriptor: int, is_fp8: bool = False) -> str:
    """The shape of a tcgen05.mma of fp16, bf16, TF32 or fp8 from its instruction descriptor: "128x256x16".

    PTX ISA, tcgen05 instruction descriptor: N / 8 from bit 17 on, M / 16 from bit 24 on, and the format of the left
    operand in bits 7 to 9, of which 2 is TF32. A product is 32 bytes deep.
    """
    rows, columns = 16 * (descriptor >> 24 & 31), 8 * (descriptor >> 17 & 63)
    if is_fp8:
        return f"{rows}x{columns}x32"
    return f"{rows}x{columns}x8.TF32" if descriptor >> 7 & 7 == 2 else f"{rows}x{columns}x16"


def without_predicate(line: str) -> str:
    """The instruction that a predicate such as @!P0 guards."""
    return re.sub(r"^@!?U?P\w+\s+", "", line)


def loops(lines: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each loop."""
    found = []
    for end, line in enumerate(lines):
        # Code that was moved out of line returns by an unconditional branch: that closes a loop only behind its exit.
        branch = re.match(r"(@!?U?P\w+\s+)?BRA(.*)`\((\.L_\w+)\)", line)
        conditional = branch and (branch[1] or "UP" in branch[2] or re.match(r"@!?U?P\w+\s+CALL", lines[end - 1]))
        if branch and conditional and labels.get(branch[3], end + 1) <= end:
            found.append((labels[branch[3]], end))
    return found


_MATRIX_INSTRUCTION = r"\b([HQ]G?MMA|UTC[HQ]MMA)\."


def innermost_loops(
    lines: list[str], labels: dict[str, int], with_any: str = _MATRIX_INSTRUCTION
) -> list[tuple[int, int]]:
    """First and last instruction of each innermost loop that issues matrix instructions, or others `with_any` name."""
    found = [(a, b) for a, b in loops(lines, labels) if any(re.search(with_any, line) for line in lines[a:b])]
    return [(a, b) for a, b in found if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)]


def specialised_loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop that issues tcgen05 or loads from tensor memory: one per partition."""
    lines, labels = parse(code)
    found = innermost_loops(lines, labels, r"\b(UTC[HQ]MMA|LDTM)\.")
    return [[without_predicate(line) for line in lines[a : b + 1]] for a, b in found]


def inner_loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop that issues matrix instructions. code: nvdisasm's output, with labels."""
    lines, labels = parse(code)
    return [[without_predicate(line) for line in lines[a : b + 1]] for a, b in innermost_loops(lines, labels)]


def fill_clocks(ttgir: str, loops: int) -> float:
    """Clocks of shared memory that TMA's writes cost each of the `loops` that share what a warp of its own loads.

    From Triton's IR, because the size of a load is not in its instruction: the bytes that barriers expect in a turn of
    the innermost loop with loads (of several, the deepest), one for each turn of the others. 0 where the same warps
    load and compute.
    """
    if "ttg.warp_specialize" not in ttgir:
        return 0.0
    expected = 0
    innermost: list[tuple[int, int]] = []  # depth and bytes of each loop that contains no other
    for line in ttgir.splitlines():
        if re.match(r"\s*(%\S+ = )?scf\.(for|while) ", line):
            indentation, expected = line[: -len(line.lstrip())], 0
        elif size := re.match(r"\s*ttng\.barrier_expect [^,]+, (\d+)", line):
            expected += int(size[1])
        elif expected and line.startswith(f"{indentation}}}"):
            innermost.append((len(indentation), expected))
            expected = 0
    return max(innermost, default=(0, 0))[1] / 128 / loops


def measure(
    launch: str, kernel: str, loop: list[str], rates: Rates = HOPPER, filled: float = 0.0, warps: int = 4
) -> Loop:
    """Counts the instructions of a loop, or of another part of a kernel, and their clocks.

    filled: clocks of shared memory by TMA's writes. warps: of the program, which share its tcgen05.
    """
    clocks = dict.fromkeys(PIPES, 0.0) | {"shared": filled}
    products = 0.0
    names: Counter[str] = Counter()
    waits = under_way = 0
    in_flight = False
    for line in loop:
        name = line.split()[0]
        pipe = pipe_of(name)
        clocks["issue"] += 1
        clocks["shared"] += shared_clocks(line, warps)
        if pipe == "tensor":
            clocks[pipe] += multiply_adds(name, warps) / rates.multiply_adds
            products += multiply_adds(name, warps)
        elif pipe:
            clocks[pipe] += rates.fma if pipe == "fma" else _CLOCKS[pipe]
        names[".".join(name.split(".")[: 2 if pipe == "tensor" else 1])] += 1
        if name.startswith(("HGMMA", "QGMMA")):
            in_flight = True
        elif name.startswith("WARPGROUP.DEPBAR"):
            waits += 1
            in_flight = not line.rstrip().endswith("0x0")
        elif name == "MUFU.EX2" and in_flight:
            under_way += 1
    return Loop(launch, kernel, clocks, dict(names.most_common()), waits, under_way, products)


def measure_parts(launches: Iterable[Launch], parts_of: Callable[[str], list[list[str]]]) -> list[Loop]:
    """Measures parts of the machine code of every kernel that the launches start, compiled for an H200."""
    found: list[Loop] = []
    for launch in launches:

        def record(kernel: str, compiled: Any, launch: Launch = launch) -> None:
            if isinstance(compiled, Exception):
                raise compiled
            parts = parts_of(sass(compiled.asm["cubin"]))
            filled = fill_clocks(compiled.asm["ttgir"], len(parts)) if parts_of is inner_loops else 0.0
            found.extend(measure(launch.name, kernel, part, filled=filled) for part in parts)

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
