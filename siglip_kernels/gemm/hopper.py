"""The GEMM for Hopper (sm_90), in Gluon: out = epilogue(a wᵀ), where the epilogue is any of

    + bias    + residual    gelu(·), also storing · for the backward
    · ∘ gelu'(h), also storing gelu(h) and the column sums

Of fp8 operands, the epilogue first multiplies by a scale per row of a and one per column of w; a result of GELU in fp8
is divided by a scale per row and saturates, as in kernels.py.

It supports fp16, bf16 and fp8 (e4m3), any number of rows, and extents N and K that are multiples of 8, or of 16 where a
matrix is fp8, because TMA requires rows that start at multiples of 16 bytes. Of fp8, wgmma reads weights (N, K) only.
Anything else raises UnsupportedInputError here; kernels.py supports it.

Hopper adds products of fp8 with 14 bits. They are not promoted to a second, exact accumulator: it would take as many
registers again, and tests/kernels/fp8 finds 0.01 dB lost in a model of such sums.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from siglip_kernels.device import Facts, facts
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm.epilogue import PIECE, finish_piece, load_added
from siglip_kernels.gemm.gluon_launch import GROUP, HALF, arguments, buffers_of, check_supported, stages
from siglip_kernels.gemm.hopper_pipeline import (
    CONSUMERS,
    accumulator_layout,
    make_ring,
    multiply_tile,
    pieces_of,
)
from siglip_kernels.gemm.ring import choose, load_tiles, tile_position


@dataclass(frozen=True)
class Tile:
    """The block of the result that a program computes at a time: the rows of two consumers, one above the other."""

    consumer_rows: int
    columns: int

    @property
    def rows(self) -> int:
        return CONSUMERS.value * self.consumer_rows

    def stages(self, buffers: int, out_dtype: torch.dtype, shared_memory: int) -> int:
        return stages(self.rows, self.columns, buffers, out_dtype, shared_memory)


WIDE, TALL, SMALL = Tile(64, 256), Tile(128, 128), Tile(64, 128)


def tile_for(
    rows: int, columns: int, depth: int, parts: int, gelu: str, element_bytes: int, out_dtype: torch.dtype, gpu: Facts
) -> Tile:
    """The tile that takes the fewest clocks by a rough count: whole waves of tiles, each bound by its matrix work (2048
    multiply-adds per clock, of fp8 4096) or by its reads from the L2 (40 bytes per clock). Not measured.

    so400m, 64 images of 729 tokens: N = 4304 is 17 tiles of 256 or 34 of 128 (either way 1.1 % more than required),
    and 48 waves; N = 1152 is nine tiles of 128 but four and a half of 256, 13 waves of TALL tiles, 14 of WIDE ones.

    Counted by `python -m bench.compiled.sass` and `python -m bench.compiled.tile_cost`, each with `linear_hopper
    linear`, triton 3.7.1: clocks of one warp on its quarter of a multiprocessor, where each consumer has one. A block
    of depth takes 512 clocks of the tensor pipe per consumer, 320 (WIDE) or 384 (TALL) of shared memory for its
    operands and at most 67 of any other pipe: the tensor pipe is the bound, as in the portable loop between its
    epilogues. (TMA writes both consumers' blocks in another 384. If both share the 128 bytes per clock, WIDE is just at
    that bound and TALL 12 % beyond it: the first thing to measure.) Epilogues, here and in the portable kernel, where
    both warps of a quarter run epilogues while the tensor cores are idle:

    | epilogue          | exponentials | issue | portable: exponentials | issue |
    |-------------------|--------------|-------|------------------------|-------|
    | q, k, v           | 8            | 450   | 8                      | 537   |
    | residual          | 8            | 806   | 8                      | 943   |
    | GELU              | 2056         | 1577  | 2056                   | 2483  |
    | GELU, kept        | 2056         | 1710  | 2056                   | 2645  |
    | GELU's derivative | 2056         | 3469  | 2056                   | 4026  |

    Four stages hold 2048 clocks of work for the other consumer, which hides GELU. With K = 1152 a tile is 18 blocks,
    18,432 clocks, and this is the bound; the portable kernel's is 18,432 + 2 × 2483: 79 % of the peak. The derivative's
    three stages hold 1536: of its 3469 clocks 1933 stay exposed per consumer, at least 83 %; the portable kernel 70 %.
    """
    if out_dtype == torch.float32:  # its buffers leave no room for the stages of larger tiles
        return SMALL

    def clocks(tile: Tile) -> int:
        tiles = math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns) * parts
        matrix = tile.rows * tile.columns * element_bytes / 4096
        l2 = (tile.rows + tile.columns) * element_bytes / 40
        return math.ceil(tiles / gpu.multiprocessors) * round(depth * max(matrix, l2) + 1500)

    # The backward's epilogue holds two results at once: with 64 values per thread, of 128 rows, they would spill.
    return min((WIDE, SMALL) if gelu == "backward" else (WIDE, TALL, SMALL), key=clocks)


@gluon.constexpr_function
def _instruction_depth(dtype):
    """Of wgmma: 32 bytes."""
    return 256 // dtype.primitive_bitwidth


@gluon.jit
def _scaled(
    products,  # fp32 [rows, PIECE]
    scales,  # fp32 [rows]
    column_scales,  # pointer
    bias,  # pointer, or None
    column,
    COLUMNS: gl.constexpr,
):
    """The products of fp8 in the operands' own scale, with the bias."""
    columns = column + gl.arange(0, PIECE, gl.SliceLayout(0, products.type.layout))
    of_columns = gl.load(column_scales + columns, mask=columns < COLUMNS, other=0.0)
    value = products * scales[:, None] * of_columns[None, :]
    if bias is not None:
        value += gl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(gl.float32)[None, :]
    return value


@gluon.jit
def _consumer(
    consumer: gl.constexpr,
    a_blocks,
    b_blocks,
    filled,
    emptied,
    lead,
    buffers,
    landed,
    bias,
    bias_second,
    bias_third,
    added,
    second_out,
    out,
    out_second,
    out_third,
    row_scales,
    column_scales,
    out_scales,
    column_sums,
    rows,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    PARTS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GELU: gl.constexpr,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N, _instruction_depth(a_blocks.dtype))
    PIECE_LAYOUT: gl.constexpr = accumulator_layout(PIECE, _instruction_depth(a_blocks.dtype))
    PIECES: gl.constexpr = BLOCK_N // PIECE
    row_tiles = gl.cdiv(rows, CONSUMERS * CONSUMER_ROWS)
    PART_TILES: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    step = 0
    done = 0
    for tile in range(gl.program_id(0), row_tiles * PART_TILES * PARTS, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, PART_TILES * PARTS, GROUP)
        part = column_tile // PART_TILES
        first_row = (row_tile * CONSUMERS + consumer) * CONSUMER_ROWS
        first_column = column_tile % PART_TILES * BLOCK_N

        if added is not None:  # the load overlaps with the products
            load_added(added, landed.index(consumer), buffers, first_row, first_column, PIECES)

        scales = None
        half_scales = None
        if row_scales is not None:
            o_rows = first_row + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, PIECE_LAYOUT))
            scales = gl.load(row_scales + o_rows, mask=o_rows < rows, other=0.0)
            if out_scales is not None:
                half_scales = 0.5 / gl.load(out_scales + o_rows, mask=o_rows < rows, other=1.0)

        total = gl.zeros((CONSUMER_ROWS, BLOCK_N), gl.float32, LAYOUT)
        if bias is not None and row_scales is None:
            columns = first_column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
            tile_bias = choose(part, bias, bias_second, bias_third, PARTS)
            total += gl.load(tile_bias + columns, mask=columns < COLUMNS, other=0.0).to(gl.float32)[None, :]
        total, step = multiply_tile(
            total, consumer, a_blocks, b_blocks, filled, emptied, lead, step, done, DEPTH,
            False, not TRANSPOSED, STAGES,
        )  # fmt: skip

        if added is not None:
            mbarrier.wait(landed.index(consumer), done & 1)
        sums = column_sums
        if column_sums is not None:
            sums += (row_tile * CONSUMERS + consumer) * COLUMNS
        pieces = pieces_of(total, PIECE)
        for piece in gl.static_range(PIECES):
            column = first_column + piece * PIECE
            # The condition also keeps the pieces apart: all at once would not fit the registers. out.shape[1] equals
            # COLUMNS, which the compiler must not know.
            if column < out.shape[1]:
                value = pieces[piece]
                if row_scales is not None:
                    value = _scaled(value, scales, column_scales, bias, column, COLUMNS)
                finish_piece(
                    value, piece, buffers, added, second_out, choose(part, out, out_second, out_third, PARTS),
                    half_scales, sums, first_row, column, COLUMNS, GELU,
                )  # fmt: skip
        if added is None and second_out is None and first_column + BLOCK_N > COLUMNS:
            # The buffers alternate, and a tile at the edge may have stopped between the two.
            tma.store_wait(pendings=0)
        done += 1  # noqa: SIM113 - the range is the kernel's
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["rows"])
def gemm_kernel(
    # Each matrix is a tensor descriptor. Blocks of a are [CONSUMER_ROWS, 64], of fp8 [CONSUMER_ROWS, 128], and of
    # results [CONSUMER_ROWS, 64].
    a,  # (rows, DEPTH)
    weight,  # (COLUMNS, DEPTH), in blocks [BLOCK_N, 64 or 128]; TRANSPOSED, not of fp8: (DEPTH, COLUMNS), [64, BLOCK_N]
    weight_second,  # as weight; None unless PARTS == 3
    weight_third,
    bias,  # (COLUMNS,) pointer, or None
    bias_second,
    bias_third,
    added,  # (rows, COLUMNS): the residual; GELU "backward": the pre-activation; or None
    second_out,  # (rows, COLUMNS): GELU "forward": the pre-activation, "backward": its activation; or None
    out,  # (rows, COLUMNS)
    out_second,
    out_third,
    row_scales,  # fp32 (rows,) pointer: of a; None unless the operands are fp8
    column_scales,  # fp32 (COLUMNS,) pointer: of the weight, with PARTS == 1
    out_scales,  # fp32 (rows,) pointer: by which gelu(·) is divided, GELU "forward"; or None
    column_sums,  # fp32 (2 row tiles, COLUMNS) pointer: sums of each consumer's columns, before rounding; or None
    rows,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    PARTS: gl.constexpr,  # 1, or 3 weights side by side
    TRANSPOSED: gl.constexpr,
    GELU: gl.constexpr,  # "", "forward" or "backward"
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,  # row tiles that are computed together, column tile by column tile
    BUFFERS: gl.constexpr,  # per consumer, which `added` is loaded into and results are stored from
):
    """Persistent: program p owns the tiles p, p + programs, ... of 2 CONSUMER_ROWS by BLOCK_N."""
    a_blocks, b_blocks, filled, emptied, lead = make_ring(a, weight, STAGES)
    upper_buffers = gl.allocate_shared_memory(out.dtype, [BUFFERS, CONSUMER_ROWS, PIECE], out.layout)
    lower_buffers = gl.allocate_shared_memory(out.dtype, [BUFFERS, CONSUMER_ROWS, PIECE], out.layout)
    landed = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(landed.index(consumer), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                0, a_blocks, b_blocks, filled, emptied, lead, upper_buffers, landed, bias, bias_second, bias_third,
                added, second_out, out, out_second, out_third, row_scales, column_scales, out_scales, column_sums,
                rows, COLUMNS, DEPTH, PARTS, TRANSPOSED, GELU, CONSUMER_ROWS, BLOCK_N, STAGES, GROUP,
            )),
            (_consumer, (
                1, a_blocks, b_blocks, filled, emptied, lead, lower_buffers, landed, bias, bias_second, bias_third,
                added, second_out, out, out_second, out_third, row_scales, column_scales, out_scales, column_sums,
                rows, COLUMNS, DEPTH, PARTS, TRANSPOSED, GELU, CONSUMER_ROWS, BLOCK_N, STAGES, GROUP,
            )),
            (load_tiles, (
                a, weight, weight_second, weight_third, a_blocks, b_blocks, filled, emptied,
                gl.cdiv(rows, CONSUMERS * CONSUMER_ROWS), gl.cdiv(COLUMNS, BLOCK_N), DEPTH, CONSUMER_ROWS, BLOCK_N,
                PARTS, False, not TRANSPOSED, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    a: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    outs: list[Tensor],
    *,
    transposed: bool,
    residual: Tensor | None,
    gelu: str,
    pre_activation: Tensor | None,
    activation: Tensor | None,
    keep_column_sums: bool,
    scales: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor | None:
    """Launches the kernel on the arguments of `kernels.gemm` as it has prepared them; returns the column sums, if kept.

    a: (M, K); weights: one or three (N, K), transposed: (K, N); biases: (N,) each, or all None; residual,
    pre_activation, activation and each of outs: (M, N). gelu "forward" writes pre_activation if given; "backward" reads
    it, and writes activation if given. scales: of fp8, `kernels.Scales`, with one weight.
    """
    rows, depth = a.shape
    columns, parts = outs[0].shape[1], len(outs)
    kept = activation if gelu == "backward" else pre_activation
    dtypes = HALF if scales is None else (torch.float8_e4m3fn,)
    check_supported(a, outs[0], (9, 0), "Hopper (sm_90)", "SIGLIP_KERNELS_HOPPER=1", dtypes)
    if scales is not None and transposed:
        raise unsupported("linear", "weight", "is a transposed view of fp8", "contiguous (out, in)")
    gpu = facts(a.device)
    tile = tile_for(rows, columns, depth, parts, gelu, a.element_size(), outs[0].dtype, gpu)
    buffers = buffers_of(gelu == "backward" or residual is not None, kept is not None, tile.columns // PIECE.value)
    row_tiles = triton.cdiv(rows, tile.rows)
    tiles = row_tiles * triton.cdiv(columns, tile.columns) * parts
    partial_sums = None
    if keep_column_sums:
        shape = (CONSUMERS.value * row_tiles, columns)
        partial_sums = torch.empty(shape, dtype=torch.float32, device=a.device)
    gemm_kernel[(min(tiles, gpu.multiprocessors),)](
        **arguments(
            a,
            weights,
            biases,
            outs,
            transposed=transposed,
            residual=residual,
            gelu=gelu,
            pre_activation=pre_activation,
            activation=activation,
            partial_sums=partial_sums,
            block_rows=tile.consumer_rows,
            block_columns=tile.columns,
        ),
        **dict(zip(("row_scales", "column_scales", "out_scales"), scales or (None, None, None), strict=True)),
        CONSUMER_ROWS=tile.consumer_rows,
        BLOCK_N=tile.columns,
        STAGES=tile.stages(buffers, outs[0].dtype, gpu.shared_memory),
        GROUP=GROUP,
        BUFFERS=buffers,
        num_warps=4,
    )
    # One partial sum per consumer's rows, added in their order: the same bits every time.
    return None if partial_sums is None else partial_sums.sum(0)
