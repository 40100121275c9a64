"""Tiles of the resize: a heuristic, not measured."""

from dataclasses import dataclass

from siglip_kernels.device import Facts


@dataclass(frozen=True)
class Tile:
    """The block of the result that a program computes, and how."""

    rows: int
    columns: int
    taps: int  # pixels of a line that each column weighs at a time
    warps: int


def choose_tile(gpu: Facts, taps: int) -> Tile:
    """taps: the most pixels of a line that make one pixel of the result.

    Neighbouring rows of the result share lines of the image, which a tile of more rows resizes less often.
    """
    if gpu.interpreted:
        return Tile(32, 32, 128, 4)
    return Tile(8, 64, 8, 4) if taps <= 8 else Tile(8, 32, 32, 4)
