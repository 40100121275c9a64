"""Small Gluon kernels with the techniques of the package's kernels; FAULT plants one of several faults in each.

FAULT = "none" is correct, any other value breaks one rule. `product_kernel` is a persistent product c = a bᵀ: a
producer fills two stages by TMA, a consumer multiplies them by asynchronous wgmma and stores by TMA from a staging
buffer. In `exchange_kernel` two partitions pass tiles by ordinary loads and stores, in `squares_kernel` two consumers
share each stage, `unfenced_kernel` has no partitions, and `totals_kernel` adds to numbers in global memory.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE = gl.constexpr(64)
STAGES = gl.constexpr(2)


@gluon.jit
def load_tiles(a, b, a_stages, b_stages, full, empty, row_tiles, k_tiles, FAULT: gl.constexpr):
    step = 0
    for tile in range(gl.program_id(0), row_tiles, gl.num_programs(0)):
        for k in range(k_tiles):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            if FAULT == "producer waits for the wrong phase":
                mbarrier.wait(empty.index(stage), phase)
            elif FAULT != "producer does not wait":
                mbarrier.wait(empty.index(stage), phase ^ 1)
            bytes: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
            if FAULT == "too few bytes expected":
                mbarrier.expect(full.index(stage), a.block_type.nbytes)
            elif FAULT == "too many bytes expected":
                mbarrier.expect(full.index(stage), bytes + 16)
            elif FAULT == "expected twice":
                mbarrier.expect(full.index(stage), bytes)
                mbarrier.expect(full.index(stage), bytes)
            else:
                mbarrier.expect(full.index(stage), bytes)
            tma.async_copy_global_to_shared(a, [tile * TILE, k * TILE], full.index(stage), a_stages.index(stage))
            if FAULT == "a load into the wrong stage":
                tma.async_copy_global_to_shared(b, [0, k * TILE], full.index(stage), b_stages.index(0))
            else:
                tma.async_copy_global_to_shared(b, [0, k * TILE], full.index(stage), b_stages.index(stage))
            step += 1
    if FAULT == "a load without a wait":
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), a.block_type.nbytes)
        tma.async_copy_global_to_shared(a, [0, 0], full.index(stage), a_stages.index(stage))


@gluon.jit
def multiply(c, a_stages, b_stages, c_stage, full, empty, row_tiles, k_tiles, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    step = 0
    for tile in range(gl.program_id(0), row_tiles, gl.num_programs(0)):
        accumulator = gl.zeros((TILE, TILE), gl.float32, layout)
        for _ in range(k_tiles):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            if FAULT == "consumer waits for the wrong phase":
                mbarrier.wait(full.index(stage), phase ^ 1)
            elif FAULT == "consumer waits for one phase too early":
                mbarrier.wait(full.index(stage), phase if step < STAGES else phase ^ 1)
            elif FAULT == "consumer waits for the wrong barrier":
                mbarrier.wait(full.index(0), phase)
            elif FAULT != "consumer does not wait":
                mbarrier.wait(full.index(stage), phase)
            accumulator = warpgroup_mma(
                a_stages.index(stage), b_stages.index(stage).permute((1, 0)), accumulator, is_async=True
            )
            if FAULT == "released before its wgmma":
                mbarrier.arrive(empty.index(stage), count=1)
            if FAULT == "result used before its wait":
                accumulator = accumulator * 1.0
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            if FAULT == "released twice":
                mbarrier.arrive(empty.index(stage), count=1)
            if FAULT == "released by two at once":
                mbarrier.arrive(empty.index(stage), count=2)
            elif FAULT != "never released" and FAULT != "released before its wgmma":
                mbarrier.arrive(empty.index(stage), count=1)
            if FAULT == "read after its release":
                accumulator += a_stages.index(stage).load(layout).to(gl.float32) * 0
            step += 1
        if FAULT != "staging overwritten":
            tma.store_wait(0)
        c_stage.store(accumulator.to(gl.bfloat16))
        if FAULT != "no fence before the store":
            fence_async_shared()
        tma.async_copy_shared_to_global(c, [tile * TILE, 0], c_stage)
    if FAULT == "a wgmma without a wait":
        warpgroup_mma(c_stage, c_stage, gl.zeros((TILE, TILE), gl.float32, layout), is_async=True)
    if FAULT != "a store without a wait":
        tma.store_wait(0)


@gluon.jit
def product_kernel(
    a,  # (M, K) by boxes of TILE × TILE
    b,  # (TILE, K), likewise
    c,  # (M, TILE), likewise
    row_tiles,
    k_tiles,
    FAULT: gl.constexpr,
):
    a_stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, TILE], a.layout)
    b_stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, TILE], b.layout)
    c_stage = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        if FAULT != "a barrier without init" or stage == 0:
            mbarrier.init(full.index(stage), count=1)
        if FAULT == "count too high":
            mbarrier.init(empty.index(stage), count=2)
        else:
            mbarrier.init(empty.index(stage), count=1)
    if FAULT != "no fence after init":
        fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (c, a_stages, b_stages, c_stage, full, empty, row_tiles, k_tiles, FAULT)),
            (load_tiles, (a, b, a_stages, b_stages, full, empty, row_tiles, k_tiles, FAULT)),
        ],
        [1],
        [24],
    )


def tiles_of(tensor: Tensor) -> TensorDescriptor:
    box = [TILE.value, TILE.value]
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16))


def product(a: Tensor, b: Tensor, programs: int = 1, fault: str = "none") -> Tensor:
    """Launches product_kernel: c = a bᵀ for a (M, K) and b (N, K), N at most TILE, bf16."""
    c = torch.full((a.shape[0], b.shape[0]), float("nan"), dtype=a.dtype)
    rows, k_tiles = -(-a.shape[0] // TILE.value), -(-a.shape[1] // TILE.value)
    a, b, target = tiles_of(a), tiles_of(b), tiles_of(c)
    product_kernel[(programs,)](a=a, b=b, c=target, row_tiles=rows, k_tiles=k_tiles, FAULT=fault, num_warps=4)
    return c


@gluon.jit
def write_tiles(tile, written, read, rounds, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in range(rounds):
        if FAULT != "overwritten before it is read":
            mbarrier.wait(read, (i & 1) ^ 1)
        if FAULT != "never written":
            tile.store(gl.full((TILE, TILE), 0, gl.int32, layout) + i)
        mbarrier.arrive(written, count=1)


@gluon.jit
def read_tiles(out, tile, written, read, rounds, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offsets = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    for i in range(rounds):
        if FAULT != "read without a wait":
            mbarrier.wait(written, i & 1)
        if FAULT == "released too early":
            mbarrier.arrive(read, count=1)
        values = gl.max(tile.load(layout), 0)
        if FAULT != "released too early":
            mbarrier.arrive(read, count=1)
        if FAULT == "stored outside of the tensor":
            gl.store(out + (i + 1) * TILE + offsets, values)
        else:
            gl.store(out + i * TILE + offsets, values)


@gluon.jit
def exchange_kernel(
    out,  # (rounds, TILE) int32: the number of the round
    rounds,
    FAULT: gl.constexpr,
):
    """Two partitions pass tiles through shared memory by ordinary loads and stores."""
    tile = gl.allocate_shared_memory(gl.int32, [TILE, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    written = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(written, count=1)
    mbarrier.init(read, count=1)
    gl.warp_specialize(
        [(read_tiles, (out, tile, written, read, rounds, FAULT)), (write_tiles, (tile, written, read, rounds, FAULT))],
        [4],
        [48],
    )


def exchange(rounds: int, fault: str = "none") -> Tensor:
    out = torch.full((rounds, TILE.value), -1, dtype=torch.int32)
    exchange_kernel[(1,)](out, rounds, FAULT=fault, num_warps=4)
    return out


@gluon.jit
def load_for_both(source, stages, full, empty, rounds):
    for i in range(rounds):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [i * TILE, 0], full.index(stage), stages.index(stage))


@gluon.jit
def square(READER: gl.constexpr, target, stages, staging, full, empty, rounds, FAULT: gl.constexpr):
    """Half of the columns of -x xᵀ, staged in shared memory and stored by TMA from two buffers in turn."""
    HALF: gl.constexpr = TILE // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    for i in range(rounds):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        half = stages.index(stage).slice(READER * HALF, HALF).permute((1, 0))
        nothing = gl.zeros((TILE, HALF), gl.float32, layout)
        product = warpgroup_mma(stages.index(stage), half, nothing, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=(product,))
        if FAULT == "one releases for both":
            if READER == 0:
                mbarrier.arrive(empty.index(stage), count=2)
        elif FAULT == "one releases twice":
            if READER == 0:
                mbarrier.arrive(empty.index(stage), count=1)
                mbarrier.arrive(empty.index(stage), count=1)
        elif FAULT == "one forgets the last":
            if READER == 0 or i < rounds - 1:
                mbarrier.arrive(empty.index(stage), count=1)
        else:
            mbarrier.arrive(empty.index(stage), count=1)
        buffer = staging.index(0 if FAULT == "both use one buffer" else READER * STAGES + stage)
        if FAULT == "one store too many in flight":
            tma.store_wait(STAGES)
        else:
            tma.store_wait(STAGES - 1)
        buffer.store((-product).to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(target, [i * TILE, READER * HALF], buffer)
    tma.store_wait(0)


@gluon.jit
def squares_kernel(
    source,  # (rounds · TILE, TILE) by tiles
    target,  # likewise, by half tiles
    rounds,
    FAULT: gl.constexpr,
):
    stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, TILE], source.layout)
    staging = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, TILE, TILE // 2], target.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (square, (0, target, stages, staging, full, empty, rounds, FAULT)),
            (square, (1, target, stages, staging, full, empty, rounds, FAULT)),
            (load_for_both, (source, stages, full, empty, rounds)),
        ],
        [4, 1],
        [168, 24],
    )


def squares(x: Tensor, fault: str = "none") -> Tensor:
    """-t tᵀ for each TILE × TILE tile t of x (n · TILE, TILE), with two readers of every stage."""
    out = torch.full_like(x, float("nan"))
    half = [TILE.value, TILE.value // 2]
    layout = gl.NVMMASharedLayout.get_default_for(half, gl.bfloat16)
    target = TensorDescriptor.from_tensor(out, half, layout)
    squares_kernel[(1,)](tiles_of(x), target, x.shape[0] // TILE.value, FAULT=fault, num_warps=4)
    return out


@gluon.jit
def unfenced_kernel(x, out, FAULT: gl.constexpr):
    """x xᵀ from shared memory that ordinary stores have written."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    columns = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    where = rows[:, None] * TILE + columns[None, :]
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE], gl.bfloat16)
    tile = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], shared)
    tile.store(gl.load(x + where))
    if FAULT != "no fence before the product":
        fence_async_shared()
    nothing = gl.zeros((TILE, TILE), gl.float32, layout)
    product = warpgroup_mma(tile, tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if FAULT == "overwritten under its product":
        tile.store(gl.load(x + where))
    gl.store(out + where, warpgroup_mma_wait(0, deps=(product,)))


def unfenced(x: Tensor, fault: str = "none") -> Tensor:
    out = torch.full(x.shape, float("nan"))
    unfenced_kernel[(1,)](x, out, FAULT=fault, num_warps=4)
    return out


@gluon.jit
def add_half(HALF: gl.constexpr, totals, written, FAULT: gl.constexpr):
    """Adds to its own total; the second half also sums both, after the first has written."""
    row = totals if FAULT == "programs share a total" else totals + 3 * gl.program_id(0)
    mine = row if FAULT == "partitions share a total" else row + HALF
    gl.store(mine, gl.load(mine) + 10 * gl.program_id(0) + HALF + 1)
    if HALF == 0:
        mbarrier.arrive(written, count=1)
    else:
        mbarrier.wait(written, 0)
        gl.store(row + 2, gl.load(row) + gl.load(row + 1))


@gluon.jit
def totals_kernel(
    totals,  # (programs, 3) int32
    FAULT: gl.constexpr,
):
    written = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(written, count=1)
    gl.warp_specialize([(add_half, (0, totals, written, FAULT)), (add_half, (1, totals, written, FAULT))], [4], [48])


def totals(programs: int, fault: str = "none") -> Tensor:
    out = torch.zeros(programs, 3, dtype=torch.int32)
    totals_kernel[(programs,)](out, FAULT=fault, num_warps=4)
    return out
