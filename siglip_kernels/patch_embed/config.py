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
    """Not measured. The largest tile that does not spill, unless a smaller one occupies more multiprocessors."""
    if gpu.capability == (0, 0):
        return Tile(64, 64, 64, 4, 1)
    if element_bytes == 4:
        return Tile(64, 64, 32, 8, 3) if tf32 else Tile(32, 32, 32, 8, 2)
    tiles = -(-patches // 128) * -(-width // 128)
    if tiles < gpu.multiprocessors:
        return Tile(64, 64, 64, 4, 3)
    return Tile(128, 128, 64 if gpu.capability[0] >= 9 else 32, 8, 3)
