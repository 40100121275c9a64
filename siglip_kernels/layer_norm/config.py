"""Tiles of layer normalisation: heuristics, not measured."""

import functools
from dataclasses import dataclass

WIDEST_IN_REGISTERS = 8192  # columns; a wider row is read twice
WIDE_BLOCK = 2048  # columns of such a row at a time
_CHUNK = 128  # columns of a row that a warp has at a time
_NARROWEST_IN_CHUNKS, _WIDEST_IN_CHUNKS = 520, 1152


@dataclass(frozen=True)
class Tile:
    """`rows` rows, each as `chunks` blocks of columns."""

    rows: int
    block: int
    chunks: int


@functools.cache
def forward_tile(width: int, rows: int, multiprocessors: int) -> Tile:
    """Not measured. As many rows as fit 72 elements per thread, unless that leaves multiprocessors idle.

    A thread has 8 columns of a chunk, 16 bytes in half precision; few rows therefore have wide chunks.
    """
    if width > WIDEST_IN_REGISTERS:
        return Tile(2, WIDE_BLOCK, 1)
    for tile_rows in (64, 32, 16, 8, 4, 2, 1):
        block = min(max(_CHUNK, 8 * 128 // tile_rows), _power_of_two(width))
        chunks = -(-width // block)
        if tile_rows * chunks * block <= 72 * 128 and -(-rows // tile_rows) >= 2 * multiprocessors:
            break
    return Tile(tile_rows, block, chunks)


@dataclass(frozen=True)
class BackwardTile:
    """`rows` rows, each as `chunks` blocks of columns."""

    rows: int
    block: int
    chunks: int
    warps: int
    registers: int  # per thread; otherwise ptxas sometimes spills for the sake of one more resident program
    residents: int  # programs per multiprocessor


@functools.cache
def backward_tile(width: int, rows: int, element_bytes: int, multiprocessors: int, aligned: bool) -> BackwardTile:
    """Not measured. A warp per row, whose columns are chunks of 4 per thread. Narrow rows are one block, of 16 elements
    per thread, or 32 of the widest, and so are rows whose chunks would spill: wide ones, fp32 on consumer GPUs, and
    those that are not `aligned`, whose elements are loaded one by one. (fp32's traffic leaves time for a block.)

    Counted for 1152 columns on sm_90, instructions of all warps per row: 848 in chunks, 1,640 as a block of 2048.
    """
    if width > WIDEST_IN_REGISTERS:
        return BackwardTile(1, WIDE_BLOCK, 1, 4, 192, 3)
    fits = aligned and element_bytes == 2 and width % 8 == 0
    if fits and _NARROWEST_IN_CHUNKS <= width <= _WIDEST_IN_CHUNKS:
        return BackwardTile(4, _CHUNK, -(-width // _CHUNK), 4, 255, 2)
    block = _power_of_two(width)
    for tile_rows in (16, 8, 4, 2, 1):
        if tile_rows * block <= 16 * 128 and -(-rows // tile_rows) >= 3 * multiprocessors:
            break
    wide = tile_rows * block > 16 * 128
    return BackwardTile(tile_rows, block, 1, 8 if wide else 4, 255 if wide else 192, 1 if wide else 2)


def backward_stages(tile: BackwardTile, loaded_bytes: int, shared_memory: int) -> int:
    """How deep the loads of the loop are pipelined: 3, or what shared memory holds. All stages but one have a buffer.

    loaded_bytes: of one element of each tensor that is loaded. shared_memory: bytes.
    """
    buffer = tile.rows * tile.block * tile.chunks * loaded_bytes
    room = shared_memory // tile.residents - 2048  # for sums across warps
    if room < buffer:
        room = shared_memory - 2048  # rather fewer programs than loads that nothing hides
    return min(3, 1 + room // buffer)


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
