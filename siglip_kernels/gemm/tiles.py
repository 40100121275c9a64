"""What a GEMM's configuration depends on, and what it is."""

from dataclasses import dataclass

ADDITION_ROWS, ADDITION_COLUMNS = 8, 128  # the block of a program that adds the partial sums of a split depth


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

    @property
    def result_bytes(self) -> int:
        """Of an element of the result without a residual: fp8 gives half precision, or fp8 after GELU."""
        return 2 if self.element_bytes == 1 and not self.gelu else self.element_bytes


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
    splits: int = 1  # ranges of the depth, one per program; a second kernel adds their partial sums


def count(shape: Shape, tile: Tile) -> int:
    """The tiles of the result."""
    return -(-shape.rows // tile.rows) * -(-shape.columns // tile.columns) * shape.parts
