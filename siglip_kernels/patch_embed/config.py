"""Tiles of the patch embedding's GEMM: a heuristic, not measured."""

import functools
from dataclasses import dataclass

from siglip_kernels.device import Facts


@dataclass(frozen=True)
class Tile:
    """The block of the result that a program computes, and how."""

    rows: int  # patches
    columns: int
    depth: int
    warps: int
    stages: int  # how deep the loads of the loop are pipelined


@functools.cache
def choose_tile(gpu: Facts, element_bytes: int, tf32: bool, patches: int, width: int) -> Tile:
    """Not measured. The largest tile that does not spill, unless it leaves multiprocessors idle."""
    if gpu.interpreted:
        return Tile(64, 64, 64, 4, 1)
    if element_bytes == 4:
        return Tile(64, 64, 32, 8, 3) if tf32 else Tile(32, 32, 32, 8, 2)
    depth = 32 if gpu.matrix_unit == "mma" else 64
    for tile in (Tile(128, 128, depth, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3)):
        if -(-patches // tile.rows) * -(-width // tile.columns) >= gpu.multiprocessors:
            break
    return tile
