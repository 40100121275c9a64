"""The GEMM of the MLP and the projections: out = epilogue(a wᵀ), where the epilogue is any of

    + bias    + residual    gelu(·), also storing · for the backward
    · ∘ gelu'(h), also storing gelu(h) and the column sums

Of fp8 operands, a has a scale per row and w one per column of the result, by which the epilogue first multiplies; a
result of GELU in fp8 is divided by a scale per row that is known beforehand, and saturates.

A persistent kernel: each program computes tiles of the result in an order that keeps the operands of neighbours in the
L2 (Triton's tutorial 9). Operands are loaded through tensor descriptors (TMA, sm_90 and later), elsewhere through
pointers.

Where a small batch has too few tiles for the GPU, several programs compute a tile, each in a range of the depth (split
K). They write partial sums, and a second kernel adds these in their order and applies the epilogue.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.approximate import widen
from siglip_kernels.device import blackwell_kernels_enabled, facts, hopper_kernels_enabled, precision
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm.gelu import gelu, gelu_and_derivative, scaled_gelu
from siglip_kernels.gemm.plan import layout, plan
from siglip_kernels.gemm.tiles import Tile
from siglip_kernels.interpreter import dot, narrow


@triton.jit
def _load(
    source,  # a tensor descriptor (DESCRIPTORS), which knows its own edges, or a pointer to the first element
    first_row,
    first_column,
    height,  # rows from here on read as zeros
    stride,  # of a row, in units of UNIT elements
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,  # columns from here on read as zeros; None: no tile reaches it
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """source[first_row : +ROWS, first_column : +COLUMNS]."""
    if DESCRIPTORS:
        return source.load([first_row, first_column])
    else:
        o_rows = tl.arange(0, ROWS)[:, None]
        o_columns = tl.arange(0, COLUMNS)[None, :]
        mask = o_rows < height - first_row
        if EDGE is not None:
            mask = mask & (o_columns < EDGE - first_column)
        corner = source + (tl.cast(first_row, tl.int64) * stride * UNIT + first_column)
        return tl.load(corner + (o_rows * (stride * UNIT) + o_columns), mask=mask, other=0.0)


@triton.jit
def _store(
    target,  # as `source` above
    value,  # fp32 [ROWS, COLUMNS]
    first_row,
    first_column,
    height,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,
    STRIDE: tl.constexpr,  # of a row, in elements
    DESCRIPTORS: tl.constexpr,
):
    """target[first_row : +ROWS, first_column : +COLUMNS] = value, within the target's edges."""
    if DESCRIPTORS:
        target.store([first_row, first_column], narrow(value, target.dtype))
    else:
        o_rows = tl.arange(0, ROWS)[:, None]
        o_columns = tl.arange(0, COLUMNS)[None, :]
        mask = o_rows < height - first_row
        if EDGE is not None:
            mask = mask & (o_columns < EDGE - first_column)
        corner = target + (tl.cast(first_row, tl.int64) * STRIDE + first_column)
        value = narrow(value, target.dtype.element_ty)
        tl.store(corner + (o_rows * STRIDE + o_columns), value, mask=mask)


@triton.jit
def _halves(x):
    """The left and the right columns of x, without leaving the registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _pieces(x, PIECES: tl.constexpr):
    """x in PIECES (1, 2 or 4) runs of columns, from left to right."""
    if PIECES == 1:
        return (x,)
    elif PIECES == 2:
        return _halves(x)
    else:
        left, right = _halves(x)
        first, second = _halves(left)
        third, fourth = _halves(right)
        return first, second, third, fourth


@triton.jit
def _where_it_is_needed(x, like):
    """x, held by the same threads as `like`.

    The compiler would otherwise compute what depends on x twice, in x's layout and in that of `like`. It finds out only
    after it has chosen layouts that none of like's bits are added here.
    """
    nothing = like.to(tl.uint32, bitcast=True) >> 16 >> 16
    return (x.to(tl.uint32, bitcast=True) | nothing).to(tl.float32, bitcast=True)


@triton.jit
def _choose(part, first, second, third, PARTS: tl.constexpr):
    """The argument of this part."""
    chosen = first
    if PARTS == 3:
        if part == 1:
            chosen = second
        elif part == 2:
            chosen = third
    return chosen


@triton.jit
def _store_column_sums(target, value, columns, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """target[columns] = the sums of value's columns.

    Tensor cores sum sixteen bits, rounded as in the result, in a product with ones. Shuffles between the threads that
    share a column take ten times as many instructions, but fewer registers, which without TMA are used up.
    """
    if not DESCRIPTORS or DTYPE.primitive_bitwidth == 32:
        tl.store(target + columns, tl.sum(value, 0), mask=columns < COLUMNS)
    else:
        rounded = narrow(value, DTYPE)
        ones = tl.full((16, value.shape[0]), 1.0, tl.float32).to(DTYPE)  # a product has at least sixteen rows
        sums = dot(ones, rounded, tl.zeros((16, value.shape[1]), tl.float32), "ieee")
        o_sums = tl.broadcast_to(columns[None, :], sums.shape)
        is_first_row = tl.arange(0, 16)[:, None] == 0  # all are equal
        tl.store(target + o_sums, sums, mask=is_first_row & (columns < COLUMNS)[None, :])


@triton.jit
def _partial_sums(partial_sums, split, part, rows, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The first element of the partial sums of one split and part, whose rows are PARTS * COLUMNS apart."""
    return partial_sums + (tl.cast(rows, tl.int64) * split * (PARTS * COLUMNS) + part * COLUMNS)


@triton.jit
def _finish(
    value,  # fp32 [ROWS, WIDTH]: the product in one block of the result
    part,
    row_tile,  # the block's row, in units of ROWS
    column,
    # The others are those of gemm_kernel.
    bias,
    bias_second,
    bias_third,
    residual,
    pre_activation,
    activation,
    out,
    out_second,
    out_third,
    row_scales,
    column_scales,
    out_scales,
    column_sums,
    residual_stride,
    pre_activation_stride,
    rows,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The epilogue of a block."""
    row = row_tile * ROWS
    columns = column + tl.arange(0, WIDTH)
    o_rows = row + tl.arange(0, ROWS)
    if row_scales is not None:
        value *= tl.load(row_scales + o_rows, mask=o_rows < rows, other=0.0)[:, None]
        value *= tl.load(column_scales + columns, mask=columns < COLUMNS, other=0.0)[None, :]
    if bias is not None:
        tile_bias = _choose(part, bias, bias_second, bias_third, PARTS)
        value += widen(tl.load(tile_bias + columns, mask=columns < COLUMNS, other=0.0))[None, :]
    if GELU == "forward":
        if pre_activation is not None:
            _store(pre_activation, value, row, column, rows, ROWS, WIDTH, EDGE, COLUMNS, DESCRIPTORS)
        if out_scales is not None:
            half = 0.5 / tl.load(out_scales + o_rows, mask=o_rows < rows, other=1.0)
            value = scaled_gelu(value, half[:, None])
        else:
            value = gelu(value)
    if GELU == "backward":
        kept = _load(pre_activation, row, column, rows, pre_activation_stride, ROWS, WIDTH, EDGE, UNIT, DESCRIPTORS)
        again, derivative = gelu_and_derivative(_where_it_is_needed(widen(kept), value))
        if activation is not None:
            _store(activation, again, row, column, rows, ROWS, WIDTH, EDGE, COLUMNS, DESCRIPTORS)
        value *= derivative
        if column_sums is not None:
            sums = column_sums + tl.cast(row_tile, tl.int64) * COLUMNS
            _store_column_sums(sums, value, columns, COLUMNS, kept.dtype, DESCRIPTORS)
    if residual is not None:
        added = _load(residual, row, column, rows, residual_stride, ROWS, WIDTH, EDGE, UNIT, DESCRIPTORS)
        value += widen(added)
    tile_out = _choose(part, out, out_second, out_third, PARTS)
    _store(tile_out, value, row, column, rows, ROWS, WIDTH, EDGE, PARTS * COLUMNS, DESCRIPTORS)


@triton.jit(do_not_specialize=["a_stride", "weight_stride", "residual_stride", "pre_activation_stride", "rows"])
def gemm_kernel(
    # Each matrix is a tensor descriptor (DESCRIPTORS) or a pointer. Strides are of rows, in units of UNIT elements.
    a,  # (rows, DEPTH), in blocks [BLOCK_M, BLOCK_K]
    weight,  # (COLUMNS, DEPTH), in blocks [BLOCK_N, BLOCK_K]; TRANSPOSED: (DEPTH, COLUMNS), [BLOCK_K, BLOCK_N]
    weight_second,  # as weight; None unless PARTS == 3
    weight_third,
    bias,  # (COLUMNS,) pointer, or None
    bias_second,
    bias_third,
    residual,  # (rows, COLUMNS), in blocks [BLOCK_M, BLOCK_N / PIECES], as all below; or None
    pre_activation,  # (rows, COLUMNS); GELU "forward": written unless None; "backward": read
    activation,  # (rows, COLUMNS), GELU "backward": gelu(pre_activation) is written; or None
    out,  # (rows, COLUMNS), rows are PARTS * COLUMNS apart
    out_second,
    out_third,
    row_scales,  # fp32 (rows,) pointer: of a; None unless the operands are fp8
    column_scales,  # fp32 (COLUMNS,) pointer: of the weight, with PARTS == 1
    out_scales,  # fp32 (rows,) pointer: by which gelu(·) is divided, GELU "forward"; or None
    column_sums,  # fp32 (row tiles, COLUMNS) pointer: sums of each tile's columns; or None
    partial_sums,  # fp32 (SPLITS, rows, PARTS * COLUMNS) pointer: written instead of the results; None if SPLITS == 1
    a_stride,
    weight_stride,
    residual_stride,
    pre_activation_stride,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,  # 1, or 3 weights side by side
    SPLITS: tl.constexpr,  # ranges of the depth; each tile is computed by as many programs
    TRANSPOSED: tl.constexpr,
    GELU: tl.constexpr,  # "", "forward" or "backward"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,  # runs of columns that the epilogue works on in turn, to limit registers and shared memory
    GROUP: tl.constexpr,  # row tiles that are computed together, column tile by column tile
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,  # loads of the next tile overlap with the epilogue of this one
    HIDE_ZEROS: tl.constexpr,  # the compiler would move known ones twice into every accumulator of a flattened loop
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    PART_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tiles = row_tiles * PART_TILES * PARTS
    group_tiles = GROUP * PART_TILES * PARTS
    PIECE: tl.constexpr = BLOCK_N // PIECES
    EDGE: tl.constexpr = None if COLUMNS % BLOCK_N == 0 else COLUMNS
    DEPTH_EDGE: tl.constexpr = None if DEPTH % BLOCK_K == 0 else DEPTH
    SPLIT_DEPTH: tl.constexpr = ((DEPTH + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K

    for work in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=FLATTEN):
        tile = work if SPLITS == 1 else work % tiles
        split = 0 if SPLITS == 1 else work // tiles
        first_k = split * SPLIT_DEPTH
        end_k = DEPTH if SPLITS == 1 else tl.minimum(first_k + SPLIT_DEPTH, DEPTH)
        first_of_group = tile // group_tiles * GROUP
        group = tl.minimum(row_tiles - first_of_group, GROUP)
        row_tile = first_of_group + tile % group_tiles % group
        column_tile = tile % group_tiles // group
        part = column_tile // PART_TILES
        row = row_tile * BLOCK_M
        first_column = column_tile % PART_TILES * BLOCK_N

        tile_weight = _choose(part, weight, weight_second, weight_third, PARTS)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HIDE_ZEROS:
            products += tl.minimum(rows, 0).to(tl.float32)
        for k in tl.range(first_k, end_k, BLOCK_K):
            a_block = _load(a, row, k, rows, a_stride, BLOCK_M, BLOCK_K, DEPTH_EDGE, UNIT, DESCRIPTORS)
            if TRANSPOSED:
                w_block = _load(
                    tile_weight, k, first_column, DEPTH, weight_stride, BLOCK_K, BLOCK_N, EDGE, UNIT, DESCRIPTORS
                )
            else:
                w_block = _load(
                    tile_weight,
                    first_column,
                    k,
                    COLUMNS,
                    weight_stride,
                    BLOCK_N,
                    BLOCK_K,
                    DEPTH_EDGE,
                    UNIT,
                    DESCRIPTORS,
                ).T
            products = dot(a_block, w_block, products, PRECISION)

        pieces = _pieces(products, PIECES)
        for piece in tl.static_range(PIECES):
            column = first_column + piece * PIECE
            if SPLITS == 1:
                _finish(
                    pieces[piece],
                    part,
                    row_tile,
                    column,
                    bias,
                    bias_second,
                    bias_third,
                    residual,
                    pre_activation,
                    activation,
                    out,
                    out_second,
                    out_third,
                    row_scales,
                    column_scales,
                    out_scales,
                    column_sums,
                    residual_stride,
                    pre_activation_stride,
                    rows,
                    COLUMNS,
                    PARTS,
                    GELU,
                    BLOCK_M,
                    PIECE,
                    EDGE,
                    UNIT,
                    DESCRIPTORS,
                )
            else:
                target = _partial_sums(partial_sums, split, part, rows, COLUMNS, PARTS)
                _store(target, pieces[piece], row, column, rows, BLOCK_M, PIECE, EDGE, PARTS * COLUMNS, False)


@triton.jit(do_not_specialize=["residual_stride", "pre_activation_stride", "rows"])
def add_partial_sums_kernel(
    # As in gemm_kernel; all matrices are pointers.
    bias,
    bias_second,
    bias_third,
    residual,
    pre_activation,
    activation,
    out,
    out_second,
    out_third,
    row_scales,
    column_scales,
    out_scales,
    column_sums,
    partial_sums,
    residual_stride,
    pre_activation_stride,
    rows,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out = epilogue(the partial sums, added in the order of the splits). A program has one block of the result."""
    PART_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    EDGE: tl.constexpr = None if COLUMNS % BLOCK_N == 0 else COLUMNS
    row_block = tl.program_id(0) // (PART_BLOCKS * PARTS)
    column_block = tl.program_id(0) % (PART_BLOCKS * PARTS)
    part = column_block // PART_BLOCKS
    row = row_block * BLOCK_M
    column = column_block % PART_BLOCKS * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        source = _partial_sums(partial_sums, split, part, rows, COLUMNS, PARTS)
        total += _load(source, row, column, rows, PARTS * COLUMNS, BLOCK_M, BLOCK_N, EDGE, 1, False)
    _finish(
        total,
        part,
        row_block,
        column,
        bias,
        bias_second,
        bias_third,
        residual,
        pre_activation,
        activation,
        out,
        out_second,
        out_third,
        row_scales,
        column_scales,
        out_scales,
        column_sums,
        residual_stride,
        pre_activation_stride,
        rows,
        COLUMNS,
        PARTS,
        GELU,
        BLOCK_M,
        BLOCK_N,
        EDGE,
        UNIT,
        False,
    )


def _biases_to_read(biases: list[Tensor | None], columns: int, like: Tensor) -> list[Tensor | None]:
    """All or none: a missing one beside others becomes zeros."""
    if all(bias is None for bias in biases):
        return biases
    return [like.new_zeros(columns) if bias is None else bias.contiguous() for bias in biases]


class Scales(NamedTuple):
    """Of fp8 operands and results: what a stored number is multiplied by. All are fp32."""

    rows: Tensor  # (M,), of a
    columns: Tensor  # (N,), of the weight
    out: Tensor | None = None  # (M,), of the result of GELU; None: it is not fp8


def _launch_for_one_architecture(scales: Scales | None) -> Callable[..., Tensor | None] | None:
    """The launcher of the kernel for Hopper or Blackwell that is selected, or None. Blackwell's has no fp8."""
    if hopper_kernels_enabled():
        from siglip_kernels.gemm import hopper

        return functools.partial(hopper.launch, scales=scales)
    if scales is None and blackwell_kernels_enabled():
        from siglip_kernels.gemm import blackwell

        return blackwell.launch
    return None


def gemm(
    a: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *,
    residual: Tensor | None = None,
    gelu: str = "",
    keep_pre_activation: bool = False,
    pre_activation: Tensor | None = None,
    keep_activation: bool = False,
    keep_column_sums: bool = False,
    scales: Scales | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launches the kernel. Returns (out, pre_activation, activation, column sums); None for what is not requested.

    a: (M, K); weights: one, or three for three products side by side, each (N, K), possibly a transposed view;
    biases: (N,) or None for each. out: (M, number of weights · N), in the dtype to which a and residual promote.
    gelu "forward": gelu(·), and with keep_pre_activation also ·. gelu "backward": · ∘ gelu'(pre_activation),
    with keep_activation also gelu(pre_activation), with keep_column_sums also the sums of out's columns, fp32 (N,).
    scales: of fp8 a and weight, one weight; out is in out_dtype then, which scales.out makes fp8.
    tile: replaces the configuration's, to measure or test it.
    """
    rows = a.shape[0]
    columns, parts = weights[0].shape[0], len(weights)
    dtype = out_dtype or (a.dtype if residual is None else torch.promote_types(a.dtype, residual.dtype))

    def matrix(dtype: torch.dtype = a.dtype) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=a.device)

    out = torch.empty((rows, parts * columns), dtype=dtype, device=a.device)
    if keep_pre_activation:
        pre_activation = matrix()
    activation = matrix() if keep_activation else None
    if out.numel() == 0:
        sums = torch.zeros(columns, dtype=torch.float32, device=a.device) if keep_column_sums else None
        return out, pre_activation, activation, sums
    if rows >= 2**31:
        raise unsupported("linear", "x", f"has {rows} rows", "fewer than 2^31: split the batch")

    chosen = plan(  # by position: a cache looks keywords up more slowly
        layout(a),
        tuple([layout(weight) for weight in weights]),
        None if residual is None else layout(residual),
        None if pre_activation is None else layout(pre_activation),
        dtype,
        gelu,
        keep_activation,
        precision(a.dtype),
        facts(a.device),
        tile,
    )
    if chosen.transposed:
        weights = [weight.T for weight in weights]
    inputs: list[Any] = [
        matrix.clone(memory_format=torch.contiguous_format) if copied and matrix is not None else matrix
        for matrix, copied in zip((a, *weights, residual, pre_activation), chosen.copied, strict=True)
    ]
    biases = _biases_to_read(biases, columns, a)
    outs = [out] if parts == 1 else list(out.view(rows, parts, columns).unbind(1))
    launch = _launch_for_one_architecture(scales)
    if launch is not None:
        a, *weights, residual, kept = inputs
        sums = launch(
            a,
            weights,
            biases,
            outs,
            transposed=chosen.transposed,
            residual=residual,
            gelu=gelu,
            pre_activation=kept,
            activation=activation,
            keep_column_sums=keep_column_sums,
        )
        return out, pre_activation, activation, sums

    column_sums = None
    if keep_column_sums:
        column_sums = torch.empty((chosen.row_blocks, columns), dtype=torch.float32, device=a.device)
    sources = [
        matrix if matrix is None or blocks is None else TensorDescriptor(matrix, *blocks)
        for matrix, blocks in zip((*inputs, activation, *outs), chosen.sources, strict=True)
    ]
    given = (*sources, *biases, *(scales or (None, None, None)))
    tensors = {**dict(zip(chosen.names, given, strict=True)), "column_sums": column_sums}
    if chosen.addition is None:
        gemm_kernel[(chosen.programs,)](**tensors, **chosen.arguments)
    else:
        partial_sums = torch.empty((chosen.splits, *out.shape), dtype=torch.float32, device=a.device)
        operands = {name: tensors.pop(name) for name in chosen.names[: 1 + parts]}
        gemm_kernel[(chosen.programs,)](**operands, partial_sums=partial_sums, **chosen.arguments)
        add_partial_sums_kernel[(chosen.addition.programs,)](
            **tensors, partial_sums=partial_sums, **chosen.addition.arguments
        )
    # One sum per block of rows, added in their order: the same bits every time.
    sums = None if column_sums is None else column_sums.sum(0)
    return out, pre_activation, activation, sums
