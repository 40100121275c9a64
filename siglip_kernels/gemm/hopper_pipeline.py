"""The main loop of every GEMM on Hopper: wgmma multiplies a and b from shared memory, which a producer refills.

A thread block has three partitions. The producer, one warp, copies blocks of both operands into a ring of stages (TMA).
Two consumers, a warpgroup each, read the upper and the lower half of a tile's rows from the same stages. A stage has
two barriers: `filled` counts the bytes that have landed, `emptied` the consumers that have read it.

The consumers are staggered: the second starts each tile LAG blocks behind the first. One of them works on its epilogue
while the other has the tensor cores to itself, and the loads of the next tile are always under way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip_kernels.tma import async_load

BLOCK_K = gl.constexpr(64)  # 128 bytes of fp16 or bf16: the widest row that shared memory swizzles
PIECE = gl.constexpr(64)  # columns that an epilogue works on at a time, also 128 bytes of fp16 or bf16

CONSUMERS = gl.constexpr(2)
THREADS = gl.constexpr(128)  # of a consumer
THREAD_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one element per thread


@gluon.constexpr_function
def accumulator_layout(columns):
    """How wgmma distributes an accumulator of this many columns over a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows of tiles together, column by column, so that the L2 keeps their operands."""
    group_tiles = GROUP * column_tiles
    first = tile // group_tiles * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    return first + tile % group_tiles % rows, tile % group_tiles // rows


@gluon.jit
def choose(part, first, second, third, PARTS: gl.constexpr):
    """The argument of this part, one of PARTS (1 or 3)."""
    chosen = first
    if PARTS == 3:
        if part == 1:
            chosen = second
        elif part == 2:
            chosen = third
    return chosen


@gluon.jit
def make_ring(
    a,  # descriptor of a consumer's blocks: [rows, BLOCK_K], or [BLOCK_K, rows] where a lies transposed
    b,  # descriptor of blocks [BLOCK_K, columns], or [columns, BLOCK_K] where b lies transposed
    STAGES: gl.constexpr,
):
    """Shared memory and barriers of the ring: a's blocks, b's blocks, filled, emptied, lead."""
    a_blocks = gl.allocate_shared_memory(
        a.dtype, [STAGES * CONSUMERS, a.block_type.shape[0], a.block_type.shape[1]], a.layout
    )
    b_blocks = gl.allocate_shared_memory(b.dtype, [STAGES, b.block_type.shape[0], b.block_type.shape[1]], b.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=CONSUMERS)
    mbarrier.init(lead.index(0), count=1)
    return a_blocks, b_blocks, filled, emptied, lead


@gluon.jit
def load_tiles(
    a,
    b,
    b_second,  # PARTS operands b side by side; None beyond them
    b_third,
    a_blocks,
    b_blocks,
    filled,
    emptied,
    row_tiles,
    part_tiles,  # columns of tiles of one b
    depth,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PARTS: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The producer: all blocks of all tiles of this program."""
    step = 0
    for tile in range(gl.program_id(0), row_tiles * part_tiles * PARTS, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, part_tiles * PARTS, GROUP)
        first_row = row_tile * CONSUMERS * CONSUMER_ROWS
        column = column_tile % part_tiles * BLOCK_N
        tile_b = choose(column_tile // part_tiles, b, b_second, b_third, PARTS)
        for k in range(0, depth, BLOCK_K):
            stage = step % STAGES
            landed = filled.index(stage)
            mbarrier.wait(emptied.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(landed, CONSUMERS * a.block_type.nbytes + b.block_type.nbytes)
            for consumer in gl.static_range(CONSUMERS):
                row = first_row + consumer * CONSUMER_ROWS
                block = a_blocks.index(stage * CONSUMERS + consumer)
                if A_TRANSPOSED:
                    async_load(a, [k, row], landed, block)
                else:
                    async_load(a, [row, k], landed, block)
            if B_TRANSPOSED:
                async_load(tile_b, [column, k], landed, b_blocks.index(stage))
            else:
                async_load(tile_b, [k, column], landed, b_blocks.index(stage))
            step += 1


@gluon.jit
def multiply_block(
    accumulator,
    consumer: gl.constexpr,
    a_blocks,
    b_blocks,
    filled,
    step,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Starts accumulator += a b for one block when it has landed; all products before it are done."""
    stage = step % STAGES
    mbarrier.wait(filled.index(stage), step // STAGES & 1)
    a = a_blocks.index(stage * CONSUMERS + consumer)
    b = b_blocks.index(stage)
    if A_TRANSPOSED:
        a = a.permute((1, 0))
    if B_TRANSPOSED:
        b = b.permute((1, 0))
    accumulator = warpgroup_mma(a, b, accumulator, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1, deps=(accumulator,))


@gluon.jit
def multiply_tile(
    accumulator,  # fp32 (rows, columns): what the products are added to
    consumer: gl.constexpr,
    a_blocks,
    b_blocks,
    filled,
    emptied,
    lead,
    step,  # blocks that this consumer has used before
    tile_number,  # tiles that it has finished before
    depth,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer's share of one tile: accumulator + a b, and the new step."""
    blocks = gl.cdiv(depth, BLOCK_K)
    LAG: gl.constexpr = STAGES // 2
    # With fewer blocks than stages the first consumer could be two tiles, two phases of `lead`, ahead, and a barrier
    # cannot tell a phase from the one after the next.
    staggered = blocks >= STAGES
    if consumer == 1:
        mbarrier.wait(lead.index(0), tile_number & 1, pred=staggered)

    accumulator = multiply_block(
        accumulator, consumer, a_blocks, b_blocks, filled, step, A_TRANSPOSED, B_TRANSPOSED, STAGES
    )
    for block in range(1, blocks):
        accumulator = multiply_block(
            accumulator, consumer, a_blocks, b_blocks, filled, step + block, A_TRANSPOSED, B_TRANSPOSED, STAGES
        )
        mbarrier.arrive(emptied.index((step + block - 1) % STAGES), count=1)
        if consumer == 0:
            mbarrier.arrive(lead.index(0), count=1, pred=staggered & (block == LAG))
    accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(accumulator,))
    mbarrier.arrive(emptied.index((step + blocks - 1) % STAGES), count=1)
    return accumulator, step + blocks


@gluon.jit
def reciprocal(x):
    """1 / x for 1 <= x <= inf, by one instruction: a division handles the whole range of its operands."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sum_in_thread(x):
    """Per thread of a warpgroup the sum of its elements of an accumulator of 64 rows: (THREADS,), without exchange."""
    # Rows: warp, half, lane; columns: run of eight, lane, pair.
    x = gl.reshape(x, [4, 2, 8, x.shape[1] // 8, 4, 2])
    x = gl.reshape(gl.permute(x, (0, 2, 4, 1, 3, 5)), [THREADS, x.shape[3] * 4])
    return gl.convert_layout(gl.sum(x, 1), THREAD_LAYOUT, assert_trivial=True)


@gluon.jit
def pieces_of(x, COLUMNS: gl.constexpr):
    """The columns of an accumulator in runs of COLUMNS, from left to right, without leaving the registers."""
    if x.shape[1] == COLUMNS:
        return (x,)
    else:
        HALF: gl.constexpr = accumulator_layout(x.shape[1] // 2)
        left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        left = gl.convert_layout(left, HALF, assert_trivial=True)
        right = gl.convert_layout(right, HALF, assert_trivial=True)
        return pieces_of(left, COLUMNS) + pieces_of(right, COLUMNS)
