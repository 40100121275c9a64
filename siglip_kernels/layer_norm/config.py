"""Tiles of layer normalisation: heuristics, not measured."""

import functools
from dataclasses import dataclass

WIDEST_IN_REGISTERS = 8192  # columns; a wider row is read twice
WIDE_BLOCK = 2048  # columns of such a row at a time


@dataclass(frozen=True)
class Tile:
    """`rows` rows, as one or two blocks of columns, `main` and `tail`; tail may be 0."""

    rows: int
    main: int
    tail: int
    warps: int


@functools.cache
def forward_tile(width: int, rows: int, element_bytes: int, multiprocessors: int) -> Tile:
    """Not measured. As many rows as fit 72 elements per thread, unless that leaves multiprocessors idle."""
    if width > WIDEST_IN_REGISTERS:
        return Tile(4, WIDE_BLOCK, 0, 4)
    for tile_rows in (64, 32, 16, 8, 4, 2, 1):
        main, tail = _split(width)
        if tile_rows * tail * element_bytes < 128 * 16:  # less than 16 bytes per thread
            main, tail = _power_of_two(width), 0
        if tile_rows * (main + tail) <= 72 * 128 and -(-rows // tile_rows) >= 2 * multiprocessors:
            break
    return Tile(
        tile_rows, main, tail, 4 if main + tail <= 48 * 128 else 8
    )  # a wider row with its weight and bias spills


@functools.cache
def backward_tile(width: int, rows: int, multiprocessors: int) -> Tile:
    """Not measured. 32 elements per thread, of x and of dy: with a second block of columns it would spill."""
    if width > WIDEST_IN_REGISTERS:
        return Tile(1, WIDE_BLOCK, 0, 4)
    block = _power_of_two(width)
    for tile_rows in (16, 8, 4, 2, 1):
        if tile_rows * block <= 32 * 128 and -(-rows // tile_rows) >= 3 * multiprocessors:
            break
    return Tile(tile_rows, block, 0, 4 if tile_rows * block <= 32 * 128 else 8)


def backward_stages(tile: Tile, loaded_bytes: int, shared_memory: int) -> int:
    """How deep the loads of the loop are pipelined: 3, or what shared memory holds. All stages but one have a buffer.

    loaded_bytes: of one element of each matrix that is loaded. shared_memory: bytes.
    """
    buffer = tile.rows * tile.main * loaded_bytes
    return min(3, 1 + (shared_memory - 2048) // buffer)  # some of it is for sums across warps


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _split(width: int) -> tuple[int, int]:
    """The width as a power of two and a narrower one, which may be 0: 1152 -> (1024, 128)."""
    main = _power_of_two(width) // 2
    tail = _power_of_two(width - main)
    return (main, tail) if main >= 16 and tail < main else (_power_of_two(width), 0)
