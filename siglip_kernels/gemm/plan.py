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
from siglip_kernels.gemm.tiles import ADDITION_COLUMNS, ADDITION_ROWS, Shape, Tile
from siglip_kernels.strides import UNITS, stride_unit


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
        unit = max(8, 16 // self.dtype.itemsize)
        return self.row_stride if self.rows > 1 else -(-self.columns // unit) * unit

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


class Addition(NamedTuple):
    """The launch that adds the partial sums of a split depth."""

    programs: int
    arguments: dict[str, Any]  # all but the tensors, by name


@dataclass(frozen=True)
class Plan:
    """One case. Tuples are in the order a, weights, residual, pre-activation, activation, outs; None: not given."""

    transposed: bool  # all weights are transposed views: the kernel reads (in, out)
    copied: tuple[bool, ...]  # a, weights, residual, pre-activation: whether the kernel reads a copy
    sources: tuple[Blocks | None, ...]  # None: the kernel reads a pointer
    names: tuple[str, ...]  # of the kernel's parameters for the sources, the biases, and the scales of fp8
    row_blocks: int  # that have column sums
    splits: int
    programs: int
    arguments: dict[str, Any]  # of the GEMM, all but the tensors, by name: strides in units, rows, constants, options
    addition: Addition | None  # if splits > 1: it has the epilogue, and the GEMM has none


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
    unit = stride_unit([matrix.step for matrix in given], (16, 8, 1) if a.dtype.itemsize == 1 else UNITS)
    aligned = all(matrix.is_aligned for matrix in given)
    if tile is None:
        shape = Shape(
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
    split = tile.splits > 1
    descriptors = tile.descriptors and aligned
    epilogue_block = None if split else [tile.rows, tile.columns // tile.pieces]
    blocks = [
        [tile.rows, tile.depth],
        *[[tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]] * parts,
        *[epilogue_block] * (3 + parts),
    ]
    sources = tuple(
        Blocks([matrix.rows, matrix.columns], [matrix.step, 1], block) if matrix and block and descriptors else None
        for matrix, block in zip(matrices, blocks, strict=True)
    )
    names = (
        "a",
        *_side_by_side("weight")[:parts],
        "residual",
        "pre_activation",
        "activation",
        *_side_by_side("out")[:parts],
        *_side_by_side("bias")[:parts],
        "row_scales",
        "column_scales",
        "out_scales",
    )
    unused = dict.fromkeys(name for kind in ("weight", "bias", "out") for name in _side_by_side(kind)[parts:])
    strides = {
        f"{name}_stride": 0 if matrix is None else matrix.step // unit
        for name, matrix in zip(("a", "weight", "residual", "pre_activation"), (read[0], *read[parts:]), strict=True)
    }
    arguments = {
        **unused,
        **strides,
        "rows": rows,
        "COLUMNS": columns,
        "DEPTH": depth,
        "PARTS": parts,
        "SPLITS": tile.splits,
        "TRANSPOSED": transposed,
        "GELU": gelu,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "PIECES": tile.pieces,
        "GROUP": config.GROUP,
        "UNIT": unit,
        "DESCRIPTORS": descriptors,
        "FLATTEN": descriptors and not split,
        "HIDE_ZEROS": descriptors and not split and facts.matrix_unit == "wgmma",
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    row_blocks = -(-rows // tile.rows)
    tiles = row_blocks * -(-columns // tile.columns) * parts
    addition = None
    if split:
        row_blocks = -(-rows // ADDITION_ROWS)
        shared = ("residual_stride", "pre_activation_stride", "rows", "COLUMNS", "PARTS", "SPLITS", "GELU", "UNIT")
        addition = Addition(
            row_blocks * -(-columns // ADDITION_COLUMNS) * parts,
            {
                **{name: None for name in unused if not name.startswith("weight")},
                **{name: arguments[name] for name in shared},
                "BLOCK_M": ADDITION_ROWS,
                "BLOCK_N": ADDITION_COLUMNS,
                "num_warps": 4,
            },
        )
        arguments |= {**dict.fromkeys((*names[1 + parts :], "column_sums")), "GELU": ""}
    else:
        arguments["partial_sums"] = None
    return Plan(
        transposed=transposed,
        copied=tuple(copied),
        sources=sources,
        names=names,
        row_blocks=row_blocks,
        splits=tile.splits,
        programs=config.programs(tile, tiles, facts),
        arguments=arguments,
        addition=addition,
    )


def _side_by_side(kind: str) -> tuple[str, str, str]:
    """The kernel's parameters of one kind, for up to three products."""
    return kind, f"{kind}_second", f"{kind}_third"
