"""Tiles, warps and pipeline stages of a GEMM: measured ones from `tuned.py`, and a heuristic for the rest.

No call tunes anything. `python -m bench tune linear` measures `candidates` on the GPU that it runs on and writes the
fastest into `tuned.py`.
"""

import dataclasses
import functools

from siglip_kernels.device import Facts
from siglip_kernels.gemm.clocks import clocks
from siglip_kernels.gemm.tiles import Shape, Tile, count
from siglip_kernels.gemm.tuned import TUNED

LARGEST_BLOCK = 256  # rows or columns of a tile of any matrix
GROUP = 8  # row tiles that are computed together, so that their operands stay in the L2
SPLITS = (2, 3, 4, 6, 8)  # of the depth; few, as each is compiled


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
    if measured:
        return Tile(*measured)
    return min(candidates(shape, facts), key=lambda candidate: clocks(shape, facts, candidate).total)


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
    """What tuning measures: the tiles whose epilogues fit the registers and the shared memory of the GPU.

    Where the largest make fewer than two waves, smaller ones are candidates as well, and all with their depth split, as
    far as every program is resident and has several blocks of depth.
    """
    tiles = usual_tiles(shape, facts)
    if min(count(shape, tile) for tile in tiles) >= 2 * facts.multiprocessors:
        return tiles
    tiles += small_tiles(shape, facts)
    for tile in tuple(tiles):
        most = min(facts.multiprocessors * tile.residents // count(shape, tile), shape.depth // (4 * tile.depth))
        pieces = max(tile.pieces, min(2, tile.rows // 32))  # of fp32 sums
        tiles += [dataclasses.replace(tile, pieces=pieces, splits=splits) for splits in SPLITS if splits <= most]
    return tiles


def usual_tiles(shape: Shape, facts: Facts) -> list[Tile]:
    """Those that suit many rows."""
    if not _is_pipelined(shape):
        return [_unpipelined(shape, facts, 64, 64)]
    if shape.element_bytes == 4:
        return _fitted(shape, facts, [(128, 128, 32, 8, 1), (64, 64, 32, 4, 1)])
    depth = 128 // shape.element_bytes
    if facts.matrix_unit == "mma":
        depth //= 2
        # TMA's buffers leave no room for a second program of the largest, nor do the addresses of an fp32 residual.
        alone = facts.has_tma or shape.residual_bytes == 4
        largest = (128, 128, depth, 8, 1) if alone else (128, 128, depth, 4, 2)
        return _fitted(shape, facts, [largest, (64, 128, depth, 4, 2), (64, 64, depth, 4, 3)])
    large = [(128, 256, depth, 8, 1), (256, 128, depth, 8, 1), (128, 128, depth, 8, 1)]
    return _fitted(shape, facts, [*large, (64, 128, depth, 4, 2), (64, 64, depth, 4, 3)])


def small_tiles(shape: Shape, facts: Facts) -> list[Tile]:
    """Those that suit few rows. They load less at a time, so more blocks are in flight."""
    sizes = [(32, 64), (32, 32)] if facts.matrix_unit == "mma" else [(64, 32)]  # wgmma and tcgen05 take 64 rows
    if not _is_pipelined(shape):
        return [_unpipelined(shape, facts, rows, columns) for rows, columns in sizes]
    depth = 128 // shape.element_bytes
    return _fitted(shape, facts, [(rows, columns, depth, 4, 2) for rows, columns in sizes], most_stages=8)


def _is_pipelined(shape: Shape) -> bool:
    """Whether tensor cores compute the products, and operands reach shared memory without passing registers."""
    return shape.aligned and (shape.element_bytes <= 2 or shape.tf32)


def _unpipelined(shape: Shape, facts: Facts, rows: int, columns: int) -> Tile:
    """One multiply-add at a time, or loads of one element at a time."""
    return Tile(
        rows,
        columns,
        depth=32 if shape.element_bytes <= 2 or shape.tf32 or shape.aligned else 16,
        warps=min(8, rows * columns // 256),
        stages=2,
        pieces=1 if shape.aligned else 2,
        descriptors=facts.has_tma and shape.aligned,
    )


def _fitted(
    shape: Shape, facts: Facts, sizes: list[tuple[int, int, int, int, int]], most_stages: int = 4
) -> list[Tile]:
    """The tiles of these rows, columns, depths, warps and residents that fit the GPU, in pieces and stages that do."""
    tiles = []
    for rows, columns, depth, warps, residents in sizes:
        if not facts.has_tma and shape.residual_bytes == 4 and rows * columns > 64 * 32 * warps:
            continue  # the residual's addresses would take the registers of so many sums per thread
        least = max(1, rows * columns // (32 * 32 * warps))
        if facts.has_tma and (shape.residual_bytes == 2 or shape.gelu == "forward"):
            least = max(1, least // 2)  # each piece waits for its part of the residual, and to be copied: fewer waits
        if shape.gelu == "backward":
            # It holds two results at once, and between TMA's loads and stores mma's layouts of them.
            least = min(4, 2 * least) if facts.matrix_unit == "mma" and facts.has_tma else max(2, least)
        fitting = [(_stages(shape, facts, rows, columns, depth, n, residents), n) for n in (1, 2, 4) if n >= least]
        stages, pieces = max(fitting, key=lambda fit: (min(fit[0], 3), -fit[1]))
        if stages >= 2:  # the largest tiles do not fit every GPU
            tiles.append(Tile(rows, columns, depth, warps, min(stages, most_stages), pieces, residents, facts.has_tma))
    return tiles


def _stages(shape: Shape, facts: Facts, rows: int, columns: int, depth: int, pieces: int, residents: int) -> int:
    """As many as fit beside the epilogue's tiles, which TMA loads and stores through shared memory."""
    epilogue = 0
    if facts.has_tma:
        stored = rows * columns // pieces * max(shape.result_bytes, shape.residual_bytes)
        loaded = stored if shape.residual_bytes or shape.gelu == "backward" else 0
        # A thread has a row of tcgen05's 128, but not of 64: all sums change threads to be cut into pieces.
        exchanged = 4 * rows * columns if facts.matrix_unit == "tcgen05" and rows < 128 and pieces > 1 else 0
        epilogue = stored + max(loaded, exchanged)  # the exchange is over before anything is loaded
    free = facts.shared_memory // residents - epilogue - 2048  # barriers, and what the system reserves per program
    return free // ((rows + columns) * depth * shape.element_bytes)


def programs(tile: Tile, tiles: int, facts: Facts) -> int:
    """As many programs as are resident at once; each computes many tiles, or one range of the depth of a tile."""
    return min(tiles * tile.splits, tile.residents * facts.multiprocessors)
