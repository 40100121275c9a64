"""What compiled kernels cost each pipe of a multiprocessor, beside public Triton kernels: `python -m bench count`.

A row is a loop or an epilogue of a kernel: clocks by pipe (`bench.compiled.sass`), the busiest pipe, and the share of
the tensor cores' peak that it allows. Nothing is run, so nothing is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bench.compiled.ahead_of_time import STACK_LIMIT, compiling_for, resources, sass
from bench.compiled.launch import GPUS, Launch, architecture
from bench.compiled.launches import family_of, has_kernels_for, launches_of, operation_names, portable, published
from bench.compiled.public import PUBLIC, launches_of_public
from bench.compiled.row_cost import row_instructions
from bench.compiled.sass import PIPES, RATES, Clocked, fill_clocks, inner_loops, measure, specialised_loops
from bench.compiled.tile_cost import epilogues, main_loops
from bench.environment import commit, version

COUNTED = tuple(gpu for gpu in GPUS if GPUS[gpu].capability in RATES)
TUTORIAL = "triton_tutorial_attention"
WITH_EPILOGUES = ("linear", "fp8", "patch_embed", "sigmoid_loss", "matryoshka_sigmoid_loss", "siglip_kernel_loss")
# Kernels without products, which work row by row.
BY_ROWS = re.compile("_?layer_norm_(forward|backward)_kernel|quantise_rows_kernel")
SAYS = "Counted from compiled code, not measured."
HEADER = (
    "arch",
    "operation",
    "launch",
    "kernel",
    "part",
    "registers",
    "stack",
    *PIPES,
    "bound",
    "of peak",
    "issue",
    "busiest",
)


@dataclasses.dataclass
class Count(Clocked):
    """A loop or an epilogue of a kernel for one GPU, in clocks of one warp on its quarter of a multiprocessor; of a
    kernel that works row by row, a row, in clocks of all its warps.
    """

    operation: str
    launch: str
    gpu: str
    kernel: str
    part: str  # "loop 1", "epilogue 1", "row"
    registers: int  # per thread
    stack_bytes: int  # per thread
    clocks: dict[str, float]
    multiply_adds: float  # of the warp, with those for columns of zeros
    missing: str = ""  # the package that must be installed to count its kernels; there are no clocks then

    @property
    def hint(self) -> str:
        """How to install the missing package."""
        return f"missing: pip install {self.missing}"

    def per_thousand(self, pipe: str) -> float:
        """Clocks of the pipe per 1,000 multiply-adds."""
        return 1000 * self.clocks[pipe] / self.multiply_adds

    def cells(self) -> list[str]:
        """The texts under HEADER."""
        if self.missing:
            texts = [architecture(self.gpu), self.operation, self.hint]
            return texts + [""] * (len(HEADER) - len(texts))
        clocks = [f"{self.clocks[pipe]:.0f}" for pipe in PIPES]
        share, rates = "", ["", ""]
        if self.part.startswith("loop"):
            share = f"{self.share:.0%}"
            rates = [f"{self.per_thousand(pipe):.2f}" for pipe in ("issue", self.bound)]
        name = [architecture(self.gpu), self.operation, self.launch, self.kernel, self.part]
        return [*name, str(self.registers), str(self.stack_bytes), *clocks, self.bound, share, *rates]


def operations() -> list[str]:
    """This project's, and the public kernels."""
    return [*operation_names(), TUTORIAL, *PUBLIC]


def counts(names: Iterable[str], gpus: Iterable[str], only: str = "") -> Iterator[Count]:
    """Compiles and counts launches: of published models, or those whose names contain the regular expression `only`.

    names: of `operations()`. gpus: of COUNTED; kernels for one architecture are only counted for it.
    """
    for name, gpu in itertools.product(names, gpus):
        if name == TUTORIAL:
            from bench.compiled import tutorial  # imports Triton

            launches = tutorial.launches(only)
        elif name in PUBLIC:
            try:
                launches = iter(list(launches_of_public(name, only)))
            except ImportError:
                yield Count(name, "", gpu, "", "", 0, 0, dict.fromkeys(PIPES, 0.0), 0, PUBLIC[name].package)
                continue
        elif not has_kernels_for(name, gpu):
            continue
        else:
            launches = launches_of(name, only or published(name))
        for launch in launches:
            yield from _count(name, launch, gpu)


def _count(operation: str, launch: Launch, gpu: str) -> list[Count]:
    found: list[Count] = []

    def record(kernel: str, compiled: Any) -> None:
        if isinstance(compiled, Exception):
            raise compiled
        usage = resources(compiled.asm["cubin"])
        code = sass(compiled.asm["cubin"])
        constants = _constants(compiled)
        if BY_ROWS.fullmatch(kernel) and not constants.get("WIDE"):
            cost = measure(launch.name, kernel, row_instructions(code), RATES[GPUS[gpu].capability])
            per_row = compiled.metadata.num_warps / constants.get("ROWS", 1)
            clocks = {pipe: per_row * count for pipe, count in cost.clocks.items()}
            found.append(Count(operation, launch.name, gpu, kernel, "row", *usage, clocks, 0))
            return
        has_epilogue = portable(operation) in WITH_EPILOGUES
        warps = compiled.metadata.num_warps
        if family_of(operation) == "blackwell":  # partitions turn together; of those that issue, one has the products
            loops, has_epilogue, warps = _turns(specialised_loops(code)), False, 4
        else:
            loops = main_loops(code) if has_epilogue else inner_loops(code)
        filled = fill_clocks(compiled.asm["ttgir"], len(loops)) if loops else 0.0
        parts = [("loop", number, lines, filled) for number, lines in enumerate(loops, 1)]
        if has_epilogue:
            parts += [("epilogue", number, lines, 0.0) for number, lines in enumerate(epilogues(code), 1)]
        for name, number, lines, fills in parts:
            cost = measure(launch.name, kernel, lines, RATES[GPUS[gpu].capability], fills, warps)
            part = f"{name} {number}"
            found.append(Count(operation, launch.name, gpu, kernel, part, *usage, cost.clocks, cost.multiply_adds))

    with compiling_for(GPUS[gpu], record):
        launch.call()
    return found


def _constants(compiled: Any) -> dict[str, Any]:
    """The kernel's constant arguments by name."""
    names = compiled.src.fn.arg_names
    return {names[place]: value for (place, *_), value in compiled.src.constants.items()}


def _turns(loops: list[list[str]]) -> list[list[str]]:
    """The loops of a kernel for Blackwell: what all partitions execute for one turn of that with the products.

    A partition that stores has a whole tile in its loop, which belongs to an epilogue and is left out.
    """
    inner = [loop for loop in loops if not any(line.startswith("UTMASTG") for line in loop)]
    return [[line for loop in inner for line in loop]]


def best(found: Iterable[Count]) -> Count:
    """Of loops without a spill, the one with the fewest clocks of the busiest pipe per multiply-add, then of issue."""
    loops = [one for one in found if one.stack_bytes <= STACK_LIMIT]
    return min(loops, key=lambda one: (round(one.per_thousand(one.bound), 2), one.per_thousand("issue")))


def markdown(found: Sequence[Count]) -> str:
    """The page in bench/results."""
    sha, changed = commit()
    dirty = " (with changes)" if changed else ""
    lines = [HEADER, ["---"] * len(HEADER), *(one.cells() for one in found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# Counted kernels

{SAYS} By `python -m bench count`, triton {version("triton")}, commit {sha}{dirty}, {date.today()}.

Clocks of one warp on its quarter of a multiprocessor, by pipe, in a loop or an epilogue; the busiest pipe bounds
a loop. "of peak" is the share of the tensor cores' peak that this bound allows; "issue" and "busiest" on the right are
clocks per 1,000 multiply-adds. A row of LayerNorm is in clocks of all warps. Public Triton kernels to compare with:
`{TUTORIAL}`, {", ".join(f"`{name}` ({public.package})" for name, public in PUBLIC.items())}.
[What is counted, and what is not](../compiled/README.md).

{table}
"""


def write(found: Sequence[Count], where: Path) -> Path:
    """Writes the page; returns its path. where: a directory, or a .md file."""
    path = where if where.suffix == ".md" else where / f"counted-triton-{version('triton')}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(found))
    return path
