"""Tiles, warps and pipeline stages of a GEMM: measured ones from `tuned.py`, and a heuristic for the rest.

No call tunes anything. `python -m bench tune linear` measures `candidates` on the GPU that it runs on and writes the
fastest into `tuned.py`.
"""

import dataclasses
import functools
from dataclasses import dataclass

from siglip_kernels.device import Facts
from siglip_kernels.gemm.tuned import TUNED

LARGEST_BLOCK = 256  # rows or columns of a tile of any matrix
GROUP = 8  # row tiles that are computed together, so that their operands stay in the L2


@dataclass(frozen=True)
class Shape:
    """What a configuration depends on: a wᵀ and its epilogue."""

    rows: int
    columns: int  # of one weight
    depth: int
    parts: int  # weights side by side
    element_bytes: int  # of a and the weights
    residual_bytes: int  # of an element; 0 without a residual
    gelu: str  # "", "forward" or "backward"
    tf32: bool  # fp32 products may use it
    aligned: bool  # all rows start at multiples of 16 bytes, as tensor descriptors require


@dataclass(frozen=True)
class Tile:
    """The block of the result that a program computes at a time, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # how deep the loads of the loop are pipelined
    pieces: int = 1  # runs of columns that the epilogue works on in turn
    residents: int = 1  # programs that are resident on a multiprocessor at once
    descriptors: bool = True  # loads go through tensor descriptors, otherwise through pointers


def rows_class(rows: int) -> int:
    """The class of row counts that share a tuned entry: a power of two from 64 to 65,536."""
    return min(max(64, 1 << (rows - 1).bit_length()), 65_536)


@functools.lru_cache(maxsize=4096)
def tile(shape: Shape, facts: Facts) -> Tile:
    """The tile of a GEMM of this shape."""
    if facts.capability == (0, 0):
        return _interpreted(shape)
    key = (rows_class(shape.rows), *dataclasses.astuple(shape)[1:])
    measured = TUNED.get(facts.name, {}).get(key)
    return Tile(*measured) if measured else min(candidates(shape, facts), key=functools.partial(_clocks, shape, facts))


def _interpreted(shape: Shape) -> Tile:
    """The interpreter's time grows with the number of operations: few, large tiles, no larger than the matrices."""

    def size(extent: int, largest: int) -> int:
        return min(max(16, 1 << (extent - 1).bit_length()), largest)

    return Tile(
        size(shape.rows, 128),
        size(shape.columns, 256),
        size(shape.depth, 256),
        4,
        1,
        pieces=2,
        descriptors=shape.aligned,
    )


def candidates(shape: Shape, facts: Facts) -> list[Tile]:
    """What tuning measures: the tiles whose epilogues fit the registers and the shared memory of the GPU."""
    descriptors = facts.capability >= (9, 0) and shape.aligned
    if shape.element_bytes == 4 and not shape.tf32:  # no tensor core: one multiply-add at a time
        return [Tile(64, 64, 32 if shape.aligned else 16, 8, 2, descriptors=descriptors)]
    if not shape.aligned:  # loaded element by element, through registers
        return [Tile(64, 64, 32, 8, 2, pieces=2, descriptors=False)]
    if shape.element_bytes == 4:
        sizes = [(128, 128, 32, 8, 1), (64, 64, 32, 4, 1)]
    elif descriptors:
        sizes = [
            (128, 256, 64, 8, 1),
            (256, 128, 64, 8, 1),
            (128, 128, 64, 8, 1),
            (64, 128, 64, 4, 2),
            (64, 64, 64, 4, 3),
        ]
    else:
        sizes = [(128, 128, 32, 4, 2), (64, 128, 32, 4, 2), (64, 64, 32, 4, 3)]
    tiles = []
    for rows, columns, depth, warps, residents in sizes:
        pieces = max(1, rows * columns // (32 * 32 * warps))
        if shape.residual_bytes == 2 and shape.gelu == "":
            pieces = max(1, pieces // 2)  # each piece waits for its part of the residual: fewer waits
        stages = _stages(shape, facts, rows, columns, depth, pieces, residents)
        while stages < 2 and pieces < 4:
            pieces *= 2
            stages = _stages(shape, facts, rows, columns, depth, pieces, residents)
        if stages >= 2:  # the largest tiles do not fit every GPU
            tiles.append(Tile(rows, columns, depth, warps, min(stages, 4), pieces, residents, descriptors))
    return tiles


def _stages(shape: Shape, facts: Facts, rows: int, columns: int, depth: int, pieces: int, residents: int) -> int:
    """As many as fit beside the epilogue's tiles, which TMA loads and stores through shared memory."""
    epilogue = 0
    if facts.capability >= (9, 0):
        matrices = 2 if shape.residual_bytes or shape.gelu == "backward" else 1
        epilogue = matrices * rows * columns // pieces * max(shape.element_bytes, shape.residual_bytes)
    free = facts.shared_memory // residents - epilogue - 2048  # barriers, and what the system reserves per program
    return free // ((rows + columns) * depth * shape.element_bytes)


def _clocks(shape: Shape, facts: Facts, tile: Tile) -> float:
    """A rough count of a multiprocessor's clocks, not measured: whole waves of tiles, each bound by its matrix work or
    by its reads from the L2. The epilogue is added if one program is resident; those of several overlap.
    """
    tiles = -(-shape.rows // tile.rows) * -(-shape.columns // tile.columns) * shape.parts
    residents = min(tile.residents, -(-tiles // facts.multiprocessors))
    waves = -(-tiles // (facts.multiprocessors * residents)) * residents
    multiply_adds, l2_bytes = (2048, 40) if facts.capability >= (9, 0) else (1024, 48)  # a clock
    matrix = tile.rows * tile.columns / multiply_adds * (shape.element_bytes / 2)
    l2 = (tile.rows + tile.columns) * shape.element_bytes / l2_bytes
    epilogue = tile.rows * tile.columns / 16 if residents == 1 else 0
    return waves * (max(matrix, l2) * shape.depth + epilogue + 500)


def programs(tile: Tile, tiles: int, facts: Facts) -> int:
    """As many programs as are resident at once; each computes many tiles."""
    return min(tiles, tile.residents * facts.multiprocessors)
