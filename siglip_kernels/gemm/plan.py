"""What of a launch in kernels.py does not depend on the data: planned once per case, then looked up.

Inspecting sizes, strides and alignments in Python takes longer than a small GEMM on a GPU.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.device import Facts
from siglip_kernels.gemm import config
from siglip_kernels.gemm.config import Tile
from siglip_kernels.strides import stride_unit


class Layout(NamedTuple):
    """How a matrix lies in memory."""

    rows: int
    columns: int
    row_stride: int  # in elements
    column_stride: int
    dtype: torch.dtype
    offset: int  # of the first element, in bytes beyond a multiple of 16

    @property
    def step(self) -> int:
        """From row to row. A single row may have any; one that is aligned is chosen."""
        return self.row_stride if self.rows > 1 else -(-self.columns // 8) * 8

    @property
    def is_aligned(self) -> bool:
        """What TMA requires: rows that start at multiples of 16 bytes, and at least one element."""
        return self.offset == 0 and self.step * self.dtype.itemsize % 16 == 0 and self.rows * self.columns > 0

    @property
    def is_readable(self) -> bool:
        """Whether the kernel reads the matrix in place; it is copied otherwise.

        It reads rows of unit stride that do not overlap and whose offsets within a tile fit 32 bits. A matrix that a
        copy would align is copied.
        """
        unit_stride = self.column_stride == 1 or self.columns == 1
        apart = self.columns <= self.step < 2**31 // config.LARGEST_BLOCK
        aligned = self.is_aligned or self.columns * self.dtype.itemsize % 16 != 0
        return unit_stride and apart and aligned

    def transposed(self) -> "Layout":
        return Layout(self.columns, self.rows, self.column_stride, self.row_stride, self.dtype, self.offset)

    def contiguous(self) -> "Layout":
        return Layout(self.rows, self.columns, self.columns, 1, self.dtype, 0)


def layout(matrix: Tensor) -> Layout:
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    return Layout(rows, columns, row_stride, column_stride, matrix.dtype, matrix.data_ptr() % 16)


class Blocks(NamedTuple):
    """What a tensor descriptor holds besides the matrix."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]


@dataclass(frozen=True)
class Plan:
    """One case. Tuples are in the order a, weights, residual, pre-activation, activation, outs; None: not given."""

    transposed: bool  # all weights are transposed views: the kernel reads (in, out)
    copied: tuple[bool, ...]  # a, weights, residual, pre-activation: whether the kernel reads a copy
    sources: tuple[Blocks | None, ...]  # all None: the kernel reads pointers
    names: tuple[str, ...]  # of the kernel's parameters for the sources, then for the biases
    row_tiles: int
    programs: int
    arguments: dict[str, Any]  # all others but column_sums, by name: strides in units, rows, constants, options


@functools.lru_cache(maxsize=4096)
def plan(
    a: Layout,
    weights: tuple[Layout, ...],
    residual: Layout | None,
    pre_activation: Layout | None,
    out_dtype: torch.dtype,
    gelu: str,
    keep_activation: bool,
    precision: str,
    facts: Facts,
    tile: Tile | None,
) -> Plan:
    """The plan of a GEMM; weights are (N, K). tile: replaces the configuration's."""
    (rows, depth), (columns, parts) = a[:2], (weights[0].rows, len(weights))
    transposed = all(weight.row_stride == 1 and weight.column_stride != 1 for weight in weights)
    if transposed:
        weights = tuple(weight.transposed() for weight in weights)
    steps_differ = len({(weight if weight.is_readable else weight.contiguous()).step for weight in weights}) > 1
    copied = [
        not a.is_readable,
        *((not weight.is_readable or (steps_differ and weight != weight.contiguous())) for weight in weights),
        residual is not None and not residual.is_readable,
        gelu == "backward" and pre_activation is not None and not pre_activation.is_readable,  # otherwise it is written
    ]
    read = [
        matrix.contiguous() if matrix is not None and copy else matrix
        for matrix, copy in zip((a, *weights, residual, pre_activation), copied, strict=True)
    ]
    out_offset = columns * out_dtype.itemsize % 16 if parts > 1 else 0
    out = Layout(rows, columns, parts * columns, 1, out_dtype, out_offset)
    activation = Layout(rows, columns, columns, 1, a.dtype, 0) if keep_activation else None
    matrices = [*read, activation, *[out] * parts]
    given = [matrix for matrix in matrices if matrix is not None]
    unit = stride_unit([matrix.step for matrix in given])
    aligned = all(matrix.is_aligned for matrix in given)
    if tile is None:
        shape = config.Shape(
            rows=rows,
            columns=columns,
            depth=depth,
            parts=parts,
            element_bytes=a.dtype.itemsize,
            residual_bytes=0 if residual is None else residual.dtype.itemsize,
            gelu=gelu,
            tf32=precision == "tf32",
            aligned=aligned,
        )
        tile = config.tile(shape, facts)
    descriptors = tile.descriptors and aligned
    epilogue_block = [tile.rows, tile.columns // tile.pieces]
    blocks = [
        [tile.rows, tile.depth],
        *[[tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]] * parts,
        *[epilogue_block] * (3 + parts),
    ]
    sources = tuple(
        Blocks([matrix.rows, matrix.columns], [matrix.step, 1], block) if matrix is not None and descriptors else None
        for matrix, block in zip(matrices, blocks, strict=True)
    )
    row_tiles = -(-rows // tile.rows)
    return Plan(
        transposed=transposed,
        copied=tuple(copied),
        sources=sources,
        names=(
            "a",
            *_side_by_side("weight")[:parts],
            "residual",
            "pre_activation",
            "activation",
            *_side_by_side("out")[:parts],
            *_side_by_side("bias")[:parts],
        ),
        row_tiles=row_tiles,
        programs=config.programs(tile, row_tiles * -(-columns // tile.columns) * parts, facts),
        arguments={
            **dict.fromkeys(name for kind in ("weight", "bias", "out") for name in _side_by_side(kind)[parts:]),
            **{
                f"{name}_stride": 0 if matrix is None else matrix.step // unit
                for name, matrix in zip(
                    ("a", "weight", "residual", "pre_activation"), (read[0], *read[parts:]), strict=True
                )
            },
            "rows": rows,
            "COLUMNS": columns,
            "DEPTH": depth,
            "PARTS": parts,
            "TRANSPOSED": transposed,
            "GELU": gelu,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "PIECES": tile.pieces,
            "GROUP": config.GROUP,
            "UNIT": unit,
            "DESCRIPTORS": descriptors,
            "FLATTEN": descriptors,
            "PRECISION": precision,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )


def _side_by_side(kind: str) -> tuple[str, str, str]:
    """The kernel's parameters of one kind, for up to three products."""
    return kind, f"{kind}_second", f"{kind}_third"
