"""The main loop of every GEMM on Hopper: wgmma multiplies a and b from shared memory, which a producer refills.

A thread block has three partitions. The producer, one warp, copies blocks of both operands into a ring of stages
(ring.py). Two consumers, a warpgroup each, read the upper and the lower half of a tile's rows from the same stages.

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

from siglip_kernels.gemm.ring import make_stages

CONSUMERS = gl.constexpr(2)
THREADS = gl.constexpr(128)  # of a consumer
THREAD_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one element per thread


@gluon.constexpr_function
def accumulator_layout(columns, depth=16):
    """How wgmma distributes an accumulator of this many columns over a warpgroup. depth: of an instruction."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth])


@gluon.constexpr_function
def _of_half(layout):
    """The accumulator's layout for half of its columns."""
    return accumulator_layout(layout.instr_shape[1] // 2, layout.instr_shape[2])


@gluon.jit
def make_ring(a, b, STAGES: gl.constexpr):
    """The ring for two consumers, and the barrier `lead`: a's blocks, b's blocks, filled, emptied, lead."""
    a_blocks, b_blocks, filled, emptied = make_stages(a, b, STAGES, CONSUMERS)
    lead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(lead.index(0), count=1)
    return a_blocks, b_blocks, filled, emptied, lead


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
    BLOCK_DEPTH: gl.constexpr = a_blocks.shape[1 if A_TRANSPOSED else 2]
    blocks = gl.cdiv(depth, BLOCK_DEPTH)
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
        HALF: gl.constexpr = _of_half(x.type.layout)
        left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        left = gl.convert_layout(left, HALF, assert_trivial=True)
        right = gl.convert_layout(right, HALF, assert_trivial=True)
        return pieces_of(left, COLUMNS) + pieces_of(right, COLUMNS)
