"""Which tiles, warps and pipeline stages a product gets: a table of measured ones, and below it a heuristic.

Nothing is tuned inside a call. `candidates` is what there is to measure on a GPU, `tuned.py` keeps the winners.
"""

import functools
import math
from dataclasses import dataclass

import torch

from siglip_kernels.device import Facts
from siglip_kernels.linear.tuned import TUNED

LARGEST_BLOCK = 256  # rows or columns of a tile of any matrix
GROUP = 8  # row tiles whose results are computed together, so that their operands stay in the L2


@dataclass(frozen=True)
class Shape:
    """One product a wᵀ with its epilogue: what a configuration depends on."""

    rows: int
    columns: int  # of one weight
    depth: int
    parts: int  # weights side by side
    dtype: torch.dtype
    gelu: str  # "", "forward" or "backward"
    residual: bool


@dataclass(frozen=True)
class Tile:
    """The work of one program at a time, and how it is done."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # how deep the loads of the loop are pipelined
    pieces: int = 1  # the epilogue takes the columns in that many runs
    residents: int = 1  # programs that a multiprocessor holds at once
    descriptors: bool = True  # tiles come through tensor descriptors where strides allow, else through pointers


def rows_class(rows: int) -> int:
    """Numbers of rows that share a tuned entry: a power of two from 64 to 65,536."""
    return min(max(64, 1 << (rows - 1).bit_length()), 65_536)


@functools.lru_cache(maxsize=4096)
def tile(shape: Shape, facts: Facts) -> Tile:
    """The tile for a product of this shape."""
    if facts.capability == (0, 0):
        return _interpreted(shape)
    key = (rows_class(shape.rows), shape.columns, shape.depth, shape.parts, shape.gelu, shape.dtype.itemsize)
    measured = TUNED.get(facts.name, {}).get(key)
    return Tile(*measured) if measured else min(candidates(shape, facts), key=functools.partial(_clocks, shape, facts))


def _interpreted(shape: Shape) -> Tile:
    """The interpreter takes its time by the operation: few, large tiles, but no larger than the matrices."""

    def size(extent: int, largest: int) -> int:
        return min(max(16, 1 << (extent - 1).bit_length()), largest)

    return Tile(size(shape.rows, 128), size(shape.columns, 256), size(shape.depth, 256), 4, 1, pieces=2)


def candidates(shape: Shape, facts: Facts) -> list[Tile]:
    """The tiles that fit the registers and shared memory of the GPU with every epilogue. Not measured yet."""
    if shape.dtype == torch.float32:
        if precision(shape.dtype) == "ieee":  # one multiply-add at a time, out of registers
            return [Tile(64, 64, 32, 8, 2, descriptors=facts.capability >= (9, 0))]
        return [Tile(128, 128, 32, 8, 3, 4, descriptors=facts.capability >= (9, 0)), Tile(64, 64, 32, 4, 3, 2, 2)]
    if facts.capability >= (9, 0):
        return [
            Tile(128, 256, 64, 8, 3, 4),
            Tile(256, 128, 64, 8, 3, 4),
            Tile(128, 128, 64, 8, 4, 4),
            Tile(64, 128, 64, 4, 4, 2, residents=2),
            Tile(64, 64, 64, 4, 4, 2, residents=3),
        ]
    return [
        Tile(128, 128, 32, 8, 4, 4, descriptors=False),
        Tile(64, 128, 32, 4, 4, 4, residents=2, descriptors=False),
        Tile(64, 64, 32, 4, 4, 2, residents=3, descriptors=False),
    ]


def _clocks(shape: Shape, facts: Facts, tile: Tile) -> float:
    """A rough count of a multiprocessor's clocks, not measured: whole waves of tiles, each bound by its matrix work or
    by what it reads from the L2, and by filling the pipeline and the epilogue once."""
    tiles = -(-shape.rows // tile.rows) * -(-shape.columns // tile.columns) * shape.parts
    waves = math.ceil(tiles / facts.multiprocessors)
    multiply_adds_per_clock, l2_bytes_per_clock = (2048, 40) if facts.capability >= (9, 0) else (1024, 48)
    matrix = tile.rows * tile.columns / multiply_adds_per_clock
    l2 = (tile.rows + tile.columns) * shape.dtype.itemsize / l2_bytes_per_clock
    epilogue = 1000 + tile.rows * tile.columns / 16
    return waves * (max(matrix, l2) * shape.depth + epilogue)


def programs(tile: Tile, tiles: int, facts: Facts) -> int:
    """As many programs as are resident at once, each with many tiles."""
    return min(tiles, tile.residents * facts.multiprocessors)


def stride_unit(strides: list[int]) -> int:
    """8 where all strides divide by it, else 1: strides are passed in these units.

    Eight elements are 16 bytes or more, the widest access. The compiler asks for multiples of 16, and would take the
    rows of a stride such as 4312 to start anywhere; counted in eights and multiplied inside the kernel, it knows.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 inputs are made: as torch.backends.cuda.matmul.allow_tf32 says. Without effect on others."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
