"""A count of the clocks that a GEMM takes, from public rates and stated assumptions; nothing is measured.

Tiles are chosen by it where no measurement is in `tuned.py`. `python -m bench.compiled.small_batches` prints it, and
`bench.compiled.gemm_tiles` counts the same in compiled code: tests compare the two.
"""

import math
from typing import NamedTuple

from siglip_kernels.device import Facts
from siglip_kernels.gemm.tiles import ADDITION_COLUMNS, ADDITION_ROWS, Shape, Tile, count

# Per clock and multiprocessor.
L2_PORT_BYTES = 64
SHARED_BYTES = 128  # CUDA C++ programming guide
# Clocks; assumed.
LATENCY = 700  # of a load from the L2 or the memory
SECOND_LAUNCH = 4000  # from the last products of a kernel to the first sums of the next in a CUDA graph, about 2 µs
NOT_HIDDEN = 0.1  # of what takes less time than the busiest; assumed

# Clocks of an epilogue, counted from compiled code: per four warps, and per element of the tile by what is fused.
EPILOGUE_START = 120
EPILOGUES = {"": 0.028, "residual": 0.046, "forward": 0.098, "backward": 0.172}
OF_FP8 = {"": 0.036, "residual": 0.054, "forward": 0.102}  # with scales; conversions to fp8 after GELU
WITHOUT_TMA = 100, 0.005  # more, for addresses and masks


class Clocks(NamedTuple):
    """Of the busiest multiprocessor. Its tiles take as long as the slowest of the first four, which overlap."""

    products: float
    l2: float  # reads of operands, reads and writes of epilogues
    shared: float  # operands written to shared memory and read from it
    waits: float  # for loads that are not in flight early enough
    outside: float  # the first loads, and epilogues: all, or the last if another program's products hide the others
    addition: float  # the second launch, which adds partial sums

    @property
    def total(self) -> float:
        busiest = max(self[:4])
        return busiest + NOT_HIDDEN * (sum(self[:4]) - busiest) + self.outside + self.addition


def clocks(shape: Shape, facts: Facts, tile: Tile) -> Clocks:
    """The count for a tile; `programs` of them, one per tile and split, are spread evenly over the multiprocessors."""
    programs = count(shape, tile) * tile.splits
    residents = min(tile.residents, math.ceil(programs / facts.multiprocessors))
    turns = math.ceil(programs / facts.multiprocessors)
    depth = math.ceil(math.ceil(shape.depth / tile.depth) / tile.splits) * tile.depth  # of a program
    row = turns * depth * shape.element_bytes  # bytes, of one row or column of the tile
    rows, columns = min(tile.rows, shape.rows), min(tile.columns, shape.columns)
    moved = row * (rows + columns) + turns * rows * columns * _epilogue_bytes(shape, tile)
    exposed = turns if residents == 1 else 1
    starts = 1 if tile.descriptors and tile.splits == 1 else exposed  # a flattened loop loads the next tile's operands
    return Clocks(
        products=turns * depth * tile.rows * tile.columns / _multiply_adds(shape, facts),
        l2=moved / _l2_bytes(facts, programs),
        shared=row * _shared_rows(facts, tile) / SHARED_BYTES,
        waits=turns * depth / tile.depth * LATENCY / (tile.stages - 1) / residents,
        outside=exposed * epilogue(shape, tile) + starts * LATENCY,
        addition=_addition(shape, facts, tile.splits) if tile.splits > 1 else 0,
    )


def epilogue(shape: Shape, tile: Tile) -> float:
    """The clocks of a multiprocessor for a tile's epilogue."""
    fused = "" if tile.splits > 1 else shape.gelu or ("residual" if shape.residual_bytes else "")
    start, per_element = (0, 0) if tile.descriptors else WITHOUT_TMA
    counted = OF_FP8 if shape.element_bytes == 1 and tile.splits == 1 else EPILOGUES
    return (EPILOGUE_START + start) * tile.warps / 4 + (counted[fused] + per_element) * tile.rows * tile.columns


def _epilogue_bytes(shape: Shape, tile: Tile) -> int:
    """Read and written per element of the result: partial sums, or it and what is fused."""
    if tile.splits > 1:
        return 4
    matrices = {"": 1, "forward": 1, "backward": 3}[shape.gelu]
    return matrices * shape.result_bytes + shape.residual_bytes


def _multiply_adds(shape: Shape, facts: Facts) -> int:
    """Per clock and multiprocessor, accumulated in fp32: NVIDIA's published rates of dense products.

    Half precision: A100 312 TFLOP/s at 1.41 GHz, H100 989 at 1.83, B200 2,250 at 1.85; GeForce RTX 3090 71 at 1.7, 4090
    165 at 2.52, 5090 209 at 2.41. TF32 has half of it, and fp8 the double.
    """
    if shape.element_bytes == 4 and not shape.tf32:
        return 64 if facts.capability == (8, 0) else 128
    rate = {"wgmma": 2048, "tcgen05": 4096, "mma": 256 if _is_consumer(facts) else 1024}[facts.matrix_unit]
    return rate * 2 // shape.element_bytes


def _is_consumer(facts: Facts) -> bool:
    """GeForce, whose mma has a quarter of A100's rate. (Its professional siblings have half, and the same number.)"""
    return facts.matrix_unit == "mma" and facts.capability != (8, 0)


def _l2_bytes(facts: Facts, programs: int) -> float:
    """Per clock and multiprocessor that works.

    The L2 of A100 and H100 delivers 5120 in all (published), and B200's is counted as the same; that of GeForce is
    assumed to deliver a quarter of its ports' bytes.
    """
    total = facts.multiprocessors * L2_PORT_BYTES / 4 if _is_consumer(facts) else 5120
    return min(L2_PORT_BYTES, total / min(programs, facts.multiprocessors))


def _shared_rows(facts: Facts, tile: Tile) -> int:
    """Rows and columns of the tile that pass through shared memory for every element of depth.

    Each is written once. Each warp of mma reads its rows and columns, in a grid of warps two across. An instruction of
    wgmma reads 64 rows and all columns, of tcgen05 up to 128.
    """
    if facts.matrix_unit == "mma":
        across, down = 2, tile.warps // 2
    else:
        across, down = 1, max(1, tile.rows // (64 if facts.matrix_unit == "wgmma" else 128))
    return tile.rows * (1 + across) + tile.columns * (1 + down)


def _addition(shape: Shape, facts: Facts, splits: int) -> float:
    """The second launch, which reads every partial sum."""
    programs = math.ceil(shape.rows / ADDITION_ROWS) * math.ceil(shape.columns / ADDITION_COLUMNS) * shape.parts
    bytes_read = 4 * shape.rows * shape.columns * shape.parts * splits
    multiprocessors = min(programs, facts.multiprocessors)
    return SECOND_LAUNCH + LATENCY + bytes_read / (multiprocessors * _l2_bytes(facts, programs))
