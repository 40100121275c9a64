"""The ring of stages through which TMA feeds the persistent GEMMs of Hopper and of Blackwell, and its producer.

The producer, one warp, copies blocks of both operands into the stages. A stage has two barriers: `filled` counts the
bytes that have landed, `emptied` the readers that are done with it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from siglip_kernels.tma import async_load

BLOCK_BYTES = 128  # of depth in a block: the widest row that shared memory swizzles
BLOCK_K = gl.constexpr(BLOCK_BYTES // 2)  # of fp16 or bf16


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
def make_stages(
    a,  # descriptor of a reader's blocks: [rows, block depth], or [block depth, rows] where a lies transposed
    b,  # descriptor of blocks [block depth, columns], or [columns, block depth] where b lies transposed
    STAGES: gl.constexpr,
    READERS: gl.constexpr,  # each has a block of a of its own, and all share b's
):
    """Shared memory and barriers of the ring: a's blocks, b's blocks, filled, emptied."""
    a_blocks = gl.allocate_shared_memory(
        a.dtype, [STAGES * READERS, a.block_type.shape[0], a.block_type.shape[1]], a.layout
    )
    b_blocks = gl.allocate_shared_memory(b.dtype, [STAGES, b.block_type.shape[0], b.block_type.shape[1]], b.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=READERS)
    return a_blocks, b_blocks, filled, emptied


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
    BLOCK_ROWS: gl.constexpr,  # of a block of a
    BLOCK_N: gl.constexpr,
    PARTS: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The producer: all blocks of all tiles of this program. A stage may hold several blocks of a, above each other."""
    BLOCKS: gl.constexpr = a_blocks.shape[0] // STAGES
    BLOCK_DEPTH: gl.constexpr = a.block_type.shape[0 if A_TRANSPOSED else 1]
    step = 0
    for tile in range(gl.program_id(0), row_tiles * part_tiles * PARTS, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, part_tiles * PARTS, GROUP)
        first_row = row_tile * BLOCKS * BLOCK_ROWS
        column = column_tile % part_tiles * BLOCK_N
        tile_b = choose(column_tile // part_tiles, b, b_second, b_third, PARTS)
        for k in range(0, depth, BLOCK_DEPTH):
            stage = step % STAGES
            landed = filled.index(stage)
            mbarrier.wait(emptied.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(landed, BLOCKS * a.block_type.nbytes + b.block_type.nbytes)
            for i in gl.static_range(BLOCKS):
                row = first_row + i * BLOCK_ROWS
                block = a_blocks.index(stage * BLOCKS + i)
                if A_TRANSPOSED:
                    async_load(a, [k, row], landed, block)
                else:
                    async_load(a, [row, k], landed, block)
            if B_TRANSPOSED:
                async_load(tile_b, [column, k], landed, b_blocks.index(stage))
            else:
                async_load(tile_b, [k, column], landed, b_blocks.index(stage))
            step += 1
