"""The GEMM for data-centre Blackwell (sm_100), in Gluon, with the epilogues and the limits of hopper.py.

A persistent program has three partitions. The producer, one warp, fills a ring of stages by TMA (ring.py). A second
warp issues the products: tcgen05 reads both operands from shared memory and adds to one of two accumulators of 128 rows
in tensor memory. Eight warps finish the other one (epilogue.py), which holds the previous tile: the tensor cores wait
for an epilogue only if it takes longer than a tile's products.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
)

from siglip_kernels.device import Facts, facts
from siglip_kernels.gemm.epilogue import PIECE, finish_piece, load_added
from siglip_kernels.gemm.gluon_launch import GROUP, arguments, buffers_of, check_supported, stages
from siglip_kernels.gemm.ring import BLOCK_K, choose, load_tiles, make_stages, tile_position
from siglip_kernels.tensor_memory import register_layout

ROWS = gl.constexpr(128)  # of a tile: the lanes of tensor memory
ACCUMULATORS = gl.constexpr(2)
WARPS = gl.constexpr(8)  # of the epilogues: four would each hold twice as many values, and spill in the backward


@gluon.constexpr_function
def piece_layout():
    """How a piece of an accumulator lies in registers: as mma's results do.

    With a row per thread, each would hold every bias of the piece, and sums over rows take six times as many shuffles.
    """
    layout = TensorMemoryLayout([128, PIECE.value], col_stride=1)
    return register_layout([128, PIECE.value], layout, WARPS.value, "16x256b")


@gluon.jit
def _multiply(
    a_blocks,
    b_blocks,
    filled,
    emptied,
    accumulators,
    finished,
    drained,
    tiles,
    DEPTH: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Issues the products of every tile. A stage is handed back, and a tile announced, when its products are done."""
    step = 0
    done = 0
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        which = done % ACCUMULATORS
        mbarrier.wait(drained.index(which), (done // ACCUMULATORS & 1) ^ 1)
        for k in range(0, DEPTH, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(filled.index(stage), step // STAGES & 1)
            b = b_blocks.index(stage)
            if not TRANSPOSED:
                b = b.permute((1, 0))
            tcgen05_mma(
                a_blocks.index(stage), b, accumulators.index(which), use_acc=k > 0, mbarriers=[emptied.index(stage)]
            )
            step += 1
        tcgen05_commit(finished.index(which))
        done += 1  # noqa: SIM113 - the range is the kernel's


@gluon.jit
def _finish(
    accumulators,
    finished,
    drained,
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
    column_sums,
    rows,
    COLUMNS: gl.constexpr,
    PARTS: gl.constexpr,
    GELU: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The epilogues of all tiles."""
    LAYOUT: gl.constexpr = piece_layout()
    PIECES: gl.constexpr = BLOCK_N // PIECE
    row_tiles = gl.cdiv(rows, ROWS)
    PART_TILES: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    done = 0
    for tile in range(gl.program_id(0), row_tiles * PART_TILES * PARTS, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, PART_TILES * PARTS, GROUP)
        part = column_tile // PART_TILES
        first_row = row_tile * ROWS
        first_column = column_tile % PART_TILES * BLOCK_N
        if added is not None:  # the load overlaps with the products
            load_added(added, landed.index(0), buffers, first_row, first_column, PIECES)
        sums = column_sums
        if column_sums is not None:
            sums += row_tile * COLUMNS
        which = done % ACCUMULATORS
        mbarrier.wait(finished.index(which), done // ACCUMULATORS & 1)
        if added is not None:
            mbarrier.wait(landed.index(0), done & 1)
        for piece in gl.static_range(PIECES):
            column = first_column + piece * PIECE
            # The condition also keeps the pieces apart: all at once would not fit the registers. out.shape[1] equals
            # COLUMNS, which the compiler must not know.
            if column < out.shape[1]:
                value = accumulators.index(which).slice(piece * PIECE, PIECE).load(LAYOUT)
                if bias is not None:
                    columns = column + gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))
                    tile_bias = choose(part, bias, bias_second, bias_third, PARTS)
                    value += gl.load(tile_bias + columns, mask=columns < COLUMNS, other=0.0).to(gl.float32)[None, :]
                finish_piece(
                    value, piece, buffers, added, second_out, choose(part, out, out_second, out_third, PARTS),
                    None, sums, first_row, column, COLUMNS, GELU,
                )  # fmt: skip
        mbarrier.arrive(drained.index(which), count=1)
        if added is None and second_out is None and first_column + BLOCK_N > COLUMNS:
            # The buffers alternate, and a tile at the edge may have stopped between the two.
            tma.store_wait(pendings=0)
        done += 1  # noqa: SIM113 - the range is the kernel's
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["rows"])
def gemm_blackwell_kernel(
    # Each matrix is a tensor descriptor. Blocks of a are [ROWS, 64], of results [ROWS, 64].
    a,  # (rows, DEPTH)
    weight,  # (COLUMNS, DEPTH), in blocks [BLOCK_N, 64]; TRANSPOSED: (DEPTH, COLUMNS), [64, BLOCK_N]
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
    column_sums,  # fp32 (row tiles, COLUMNS) pointer: sums of each tile's columns, before rounding; or None
    rows,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    PARTS: gl.constexpr,  # 1, or 3 weights side by side
    TRANSPOSED: gl.constexpr,
    GELU: gl.constexpr,  # "", "forward" or "backward"
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,  # row tiles that are computed together, column tile by column tile
    BUFFERS: gl.constexpr,  # which `added` is loaded into and results are stored from
):
    """Persistent: program p owns the tiles p, p + programs, ... of ROWS by BLOCK_N."""
    a_blocks, b_blocks, filled, emptied = make_stages(a, weight, STAGES, 1)
    buffers = gl.allocate_shared_memory(out.dtype, [BUFFERS, ROWS, PIECE], out.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    accumulators = allocate_tensor_memory(
        gl.float32, [ACCUMULATORS, ROWS, BLOCK_N], TensorMemoryLayout([ROWS, BLOCK_N], col_stride=1)
    )
    finished = gl.allocate_shared_memory(gl.int64, [ACCUMULATORS, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [ACCUMULATORS, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(ACCUMULATORS):
        mbarrier.init(finished.index(which), count=1)
        mbarrier.init(drained.index(which), count=1)
    fence_async_shared()
    row_tiles = gl.cdiv(rows, ROWS)
    part_tiles = gl.cdiv(COLUMNS, BLOCK_N)
    gl.warp_specialize(
        [
            (_finish, (
                accumulators, finished, drained, buffers, landed, bias, bias_second, bias_third, added, second_out,
                out, out_second, out_third, column_sums, rows, COLUMNS, PARTS, GELU, BLOCK_N, GROUP,
            )),
            (_multiply, (
                a_blocks, b_blocks, filled, emptied, accumulators, finished, drained, row_tiles * part_tiles * PARTS,
                DEPTH, TRANSPOSED, STAGES,
            )),
            (load_tiles, (
                a, weight, weight_second, weight_third, a_blocks, b_blocks, filled, emptied, row_tiles, part_tiles,
                DEPTH, ROWS, BLOCK_N, PARTS, False, not TRANSPOSED, STAGES, GROUP,
            )),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """The block of the result that a program computes at a time: 128 rows and this many columns."""

    columns: int

    def stages(self, buffers: int, out_dtype: torch.dtype, shared_memory: int) -> int:
        return stages(ROWS.value, self.columns, buffers, out_dtype, shared_memory)


WIDE, NARROW = Tile(256), Tile(128)


def tile_for(rows: int, columns: int, depth: int, parts: int, out_dtype: torch.dtype, gpu: Facts) -> Tile:
    """The tile that takes the fewest clocks by a rough count: whole waves of tiles, each bound by its matrix work (4096
    multiply-adds per clock) or by its reads from the L2 (64 bytes per clock). Not measured."""
    if out_dtype == torch.float32:  # its buffers leave no room for the stages of a wide tile
        return NARROW

    def clocks(tile: Tile) -> int:
        tiles = math.ceil(rows / ROWS.value) * math.ceil(columns / tile.columns) * parts
        matrix = ROWS.value * tile.columns / 4096
        l2 = (ROWS.value + tile.columns) * 2 / 64
        return math.ceil(tiles / gpu.multiprocessors) * round(depth * max(matrix, l2) + 1500)

    return min((WIDE, NARROW), key=clocks)


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
) -> Tensor | None:
    """Launches the kernel, with the contract of `hopper.launch`, on a data-centre Blackwell (sm_100)."""
    rows, depth = a.shape
    columns, parts = outs[0].shape[1], len(outs)
    kept = activation if gelu == "backward" else pre_activation
    check_supported(a, outs[0], (10, 0), "data-centre Blackwell (sm_100)", "SIGLIP_KERNELS_BLACKWELL=1")
    gpu = facts(a.device)
    tile = tile_for(rows, columns, depth, parts, outs[0].dtype, gpu)
    buffers = buffers_of(gelu == "backward" or residual is not None, kept is not None, tile.columns // PIECE.value)
    row_tiles = triton.cdiv(rows, ROWS.value)
    tiles = row_tiles * triton.cdiv(columns, tile.columns) * parts
    partial_sums = None
    if keep_column_sums:
        partial_sums = torch.empty((row_tiles, columns), dtype=torch.float32, device=a.device)
    gemm_blackwell_kernel[(min(tiles, gpu.multiprocessors),)](
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
            block_rows=ROWS.value,
            block_columns=tile.columns,
        ),
        BLOCK_N=tile.columns,
        STAGES=tile.stages(buffers, outs[0].dtype, gpu.shared_memory),
        GROUP=GROUP,
        BUFFERS=buffers,
        num_warps=WARPS.value,
    )
    # One partial sum per tile's rows, added in their order: the same bits every time.
    return None if partial_sums is None else partial_sums.sum(0)
