"""One matrix product for all of the MLP and the projections: out = epilogue(a wᵀ), the epilogue being any of

    + bias    + residual    gelu(·), keeping · for the backward    · ∘ gelu'(h), giving gelu(h) and the column sums, too

A persistent kernel: each program takes tiles of the result in an order that keeps the operands of neighbours in the L2
(Triton's tutorial 9), through tensor descriptors (the copy engine of sm_90 and later) or, elsewhere, through pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.device import facts, hopper_kernels_enabled, interpreting, precision
from siglip_kernels.errors import unsupported
from siglip_kernels.interpreted import dot, narrow
from siglip_kernels.linear import configuration
from siglip_kernels.linear.gelu import gelu, gelu_and_derivative

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _load(
    source,  # a tensor descriptor (DESCRIPTORS), which knows its own edges, or a pointer to the first element
    first_row,
    first_column,
    height,  # rows from here on read as zeros
    stride,  # of a row, in units of UNIT elements
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,  # columns from here on read as zeros; None: no tile reaches so far
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
    """target[first_row : +ROWS, first_column : +COLUMNS] = value, as far as there is a target."""
    if DESCRIPTORS:
        target.store([first_row, first_column], narrow(value, target.dtype, INTERPRETED))
    else:
        o_rows = tl.arange(0, ROWS)[:, None]
        o_columns = tl.arange(0, COLUMNS)[None, :]
        mask = o_rows < height - first_row
        if EDGE is not None:
            mask = mask & (o_columns < EDGE - first_column)
        corner = target + (tl.cast(first_row, tl.int64) * STRIDE + first_column)
        value = narrow(value, target.dtype.element_ty, INTERPRETED)
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
def _choose(part, first, second, third, PARTS: tl.constexpr):
    """The argument of this part."""
    chosen = first
    if PARTS == 3:
        if part == 1:
            chosen = second
        elif part == 2:
            chosen = third
    return chosen


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
    column_sums,  # fp32 (row tiles, COLUMNS) pointer: sums of each tile's columns, before rounding; or None
    a_stride,
    weight_stride,
    residual_stride,
    pre_activation_stride,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,  # 1, or 3 weights side by side
    TRANSPOSED: tl.constexpr,
    GELU: tl.constexpr,  # "", "forward" or "backward"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,  # the epilogue works on that many runs of columns in turn, for registers and shared memory
    GROUP: tl.constexpr,  # row tiles that are done together, column tile by column tile
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,  # loads of the next tile start under the epilogue of this one
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    PART_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group_tiles = GROUP * PART_TILES * PARTS
    PIECE: tl.constexpr = BLOCK_N // PIECES
    EDGE: tl.constexpr = None if COLUMNS % BLOCK_N == 0 else COLUMNS
    DEPTH_EDGE: tl.constexpr = None if DEPTH % BLOCK_K == 0 else DEPTH

    for tile in tl.range(tl.program_id(0), row_tiles * PART_TILES * PARTS, tl.num_programs(0), flatten=FLATTEN):
        first_of_group = tile // group_tiles * GROUP
        group = tl.minimum(row_tiles - first_of_group, GROUP)
        row_tile = first_of_group + tile % group_tiles % group
        column_tile = tile % group_tiles // group
        part = column_tile // PART_TILES
        row = row_tile * BLOCK_M
        first_column = column_tile % PART_TILES * BLOCK_N

        tile_weight = _choose(part, weight, weight_second, weight_third, PARTS)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, DEPTH, BLOCK_K):
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
            products = dot(a_block, w_block, products, PRECISION, INTERPRETED)

        tile_out = _choose(part, out, out_second, out_third, PARTS)
        pieces = _pieces(products, PIECES)
        for piece in tl.static_range(PIECES):
            value = pieces[piece]  # [BLOCK_M, PIECE]
            column = first_column + piece * PIECE
            columns = column + tl.arange(0, PIECE)
            if bias is not None:
                tile_bias = _choose(part, bias, bias_second, bias_third, PARTS)
                value += tl.load(tile_bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
            if GELU == "forward":
                if pre_activation is not None:
                    _store(pre_activation, value, row, column, rows, BLOCK_M, PIECE, EDGE, COLUMNS, DESCRIPTORS)
                value = gelu(value)
            if GELU == "backward":
                kept = _load(
                    pre_activation, row, column, rows, pre_activation_stride, BLOCK_M, PIECE, EDGE, UNIT, DESCRIPTORS
                )
                again, derivative = gelu_and_derivative(kept.to(tl.float32))
                if activation is not None:
                    _store(activation, again, row, column, rows, BLOCK_M, PIECE, EDGE, COLUMNS, DESCRIPTORS)
                value *= derivative
                if column_sums is not None:
                    o_sums = tl.cast(row_tile, tl.int64) * COLUMNS + columns
                    tl.store(column_sums + o_sums, tl.sum(value, 0), mask=columns < COLUMNS)
            if residual is not None:
                added = _load(residual, row, column, rows, residual_stride, BLOCK_M, PIECE, EDGE, UNIT, DESCRIPTORS)
                value += added.to(tl.float32)
            _store(tile_out, value, row, column, rows, BLOCK_M, PIECE, EDGE, PARTS * COLUMNS, DESCRIPTORS)


def _row_stride(matrix: Tensor) -> int:
    """Of a single row it does not matter, and aligned is best."""
    return matrix.stride(0) if matrix.shape[0] > 1 else -(-matrix.shape[1] // 8) * 8


def _is_aligned(matrix: Tensor) -> bool:
    """What the copy engine asks: rows that start at multiples of 16 bytes, and at least one element."""
    aligned = matrix.data_ptr() % 16 == 0 and _row_stride(matrix) * matrix.element_size() % 16 == 0
    return aligned and matrix.numel() > 0


def _rows_to_read(matrix: Tensor) -> Tensor:
    """The kernel reads rows of unit stride that do not overlap, at most so far apart that offsets within a tile have 32
    bits. Anything else is copied, and what a copy would align."""
    unit_stride = matrix.stride(1) == 1 or matrix.shape[1] == 1
    apart = matrix.shape[1] <= _row_stride(matrix) < 2**31 // configuration.LARGEST_BLOCK
    aligned = _is_aligned(matrix) or matrix.shape[1] * matrix.element_size() % 16 != 0
    return matrix if unit_stride and apart and aligned else matrix.clone(memory_format=torch.contiguous_format)


def _weights_to_read(weights: list[Tensor]) -> tuple[list[Tensor], bool]:
    """The weights (out, in) as the matrices that lie in memory, and whether those are (in, out): transposed views."""
    transposed = all(weight.stride(0) == 1 and weight.stride(1) != 1 for weight in weights)
    if transposed:
        weights = [weight.T for weight in weights]
    weights = [_rows_to_read(weight) for weight in weights]
    if len({_row_stride(weight) for weight in weights}) > 1:
        weights = [weight.contiguous() for weight in weights]
    return weights, transposed


def _biases_to_read(biases: list[Tensor | None], columns: int, like: Tensor) -> list[Tensor | None]:
    """Either all or none: one that is missing beside others is zeros."""
    if all(bias is None for bias in biases):
        return biases
    return [like.new_zeros(columns) if bias is None else bias.contiguous() for bias in biases]


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
    tile: configuration.Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launches the kernel: out, and what else was asked for: the pre-activation, the activation, the column sums.

    a: (M, K); weights: one, or three for three products side by side, each (N, K), also as a transposed view;
    biases: (N,) or None for each. Returns out (M, number of weights · N), in a's dtype or what adding residual makes.
    gelu "forward": gelu(·), with keep_pre_activation · itself, too. gelu "backward": · ∘ gelu'(pre_activation),
    with keep_activation gelu(pre_activation), with keep_column_sums out's columns summed up, fp32 (N,).
    tile: another than the configuration's, to measure or test it.
    """
    rows, depth = a.shape
    columns, parts = weights[0].shape[0], len(weights)
    dtype = a.dtype if residual is None else torch.promote_types(a.dtype, residual.dtype)

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

    a = _rows_to_read(a)
    weights, transposed = _weights_to_read(weights)
    biases = _biases_to_read(biases, columns, a)
    residual = None if residual is None else _rows_to_read(residual)
    outs = list(out.unflatten(1, (parts, columns)).unbind(1))
    if hopper_kernels_enabled():
        from siglip_kernels.linear import hopper

        sums = hopper.launch(
            a, weights, transposed, biases, residual, gelu, pre_activation, activation, outs, keep_column_sums
        )
        return out, pre_activation, activation, sums

    matrices = [m for m in (a, *weights, residual, pre_activation, activation, *outs) if m is not None]
    unit = configuration.stride_unit([_row_stride(matrix) for matrix in matrices])
    aligned = all(map(_is_aligned, matrices))
    if tile is None:
        shape = configuration.Shape(
            rows=rows,
            columns=columns,
            depth=depth,
            parts=parts,
            element_bytes=a.element_size(),
            residual_bytes=0 if residual is None else residual.element_size(),
            gelu=gelu,
            tf32=precision(a.dtype) == "tf32",
            aligned=aligned,
        )
        tile = configuration.tile(shape, facts(a.device))
    descriptors = tile.descriptors and aligned

    def source(matrix: Tensor | None, block_rows: int, block_columns: int) -> Tensor | TensorDescriptor | None:
        if matrix is None or not descriptors:
            return matrix
        return TensorDescriptor(matrix, list(matrix.shape), [_row_stride(matrix), 1], [block_rows, block_columns])

    weight_block = (tile.depth, tile.columns) if transposed else (tile.columns, tile.depth)
    epilogue_block = (tile.rows, tile.columns // tile.pieces)
    weight_sources = [source(weight, *weight_block) for weight in weights]
    out_targets = [source(part, *epilogue_block) for part in outs]
    row_tiles = triton.cdiv(rows, tile.rows)
    tiles = row_tiles * triton.cdiv(columns, tile.columns) * parts
    partial_sums = None
    if keep_column_sums:
        partial_sums = torch.empty((row_tiles, columns), dtype=torch.float32, device=a.device)
    nothing = [None] * (3 - parts)
    gemm_kernel[(configuration.programs(tile, tiles, facts(a.device)),)](
        source(a, tile.rows, tile.depth),
        *weight_sources,
        *nothing,
        *biases,
        *nothing,
        source(residual, *epilogue_block),
        source(pre_activation, *epilogue_block),
        source(activation, *epilogue_block),
        *out_targets,
        *nothing,
        partial_sums,
        _row_stride(a) // unit,
        _row_stride(weights[0]) // unit,
        0 if residual is None else _row_stride(residual) // unit,
        0 if pre_activation is None else _row_stride(pre_activation) // unit,
        rows,
        COLUMNS=columns,
        DEPTH=depth,
        PARTS=parts,
        TRANSPOSED=transposed,
        GELU=gelu,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        PIECES=tile.pieces,
        GROUP=configuration.GROUP,
        UNIT=unit,
        DESCRIPTORS=descriptors,
        FLATTEN=descriptors,
        PRECISION=precision(a.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    # One partial sum for each row tile, in their order: the same bits every time.
    sums = None if partial_sums is None else partial_sums.sum(0)
    return out, pre_activation, activation, sums
