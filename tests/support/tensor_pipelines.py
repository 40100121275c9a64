"""A Gluon kernel with the techniques of the package's kernels for Blackwell; FAULT plants one of several faults in it.

One warp loads tiles x of a matrix by TMA and starts the products; four warps round the scores x xᵀ in tensor memory to
weights, which take the place of the scores, and read the result, weights · x.
"""

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_kernels.tensor_memory import register_layout

ROWS = gl.constexpr(128)
COLUMNS = gl.constexpr(64)
SCORES = gl.constexpr(TensorMemoryLayout([128, 128], col_stride=1))
RESULT = gl.constexpr(TensorMemoryLayout([128, 64], col_stride=1))


@gluon.constexpr_function
def registers(columns, layout):
    return register_layout([128, columns], layout, 4)


@gluon.jit
def weights_in(scores, FAULT: gl.constexpr):
    """The weights, of half the width, lie over the first half of the scores."""
    start: gl.constexpr = 64 if FAULT == "weights lie elsewhere" else 0
    return scores.slice(start, 64)._reinterpret(gl.bfloat16, [ROWS, ROWS], SCORES)


@gluon.jit
def multiply(source, tile, scores, result, landed, scored, weighed, added, read, rounds, FAULT: gl.constexpr):
    for i in range(rounds):
        if FAULT != "the tile is loaded under its products":
            mbarrier.wait(added, (i & 1) ^ 1)
        mbarrier.expect(landed, source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [i * ROWS, 0], landed, tile)
        if FAULT != "products start before the tile has landed":
            mbarrier.wait(landed, i & 1)
        if FAULT == "scores start from nothing":
            tcgen05_mma(tile, tile.permute((1, 0)), scores, mbarriers=[scored])
        elif FAULT == "scores are announced by an arrival":
            tcgen05_mma(tile, tile.permute((1, 0)), scores, use_acc=False, mbarriers=[])
            mbarrier.arrive(scored, count=1)
        else:
            tcgen05_mma(tile, tile.permute((1, 0)), scores, use_acc=False, mbarriers=[scored])
        if FAULT != "weights are used before they are stored":
            mbarrier.wait(weighed, i & 1)
        if FAULT != "the result is written while it is read":
            mbarrier.wait(read, (i & 1) ^ 1)
        weights = weights_in(scores, "")
        if FAULT == "a product of weights and themselves":
            tcgen05_mma(weights, weights, scores, use_acc=False, mbarriers=[])
        if FAULT == "the result is announced before its product":
            tcgen05_commit(added)
            tcgen05_mma(weights, tile, result, use_acc=False, mbarriers=[])
        else:
            tcgen05_mma(weights, tile, result, use_acc=False, mbarriers=[])
            tcgen05_commit(added)
    if FAULT == "a product without a wait":
        tcgen05_mma(tile, tile.permute((1, 0)), scores, use_acc=False, mbarriers=[])


@gluon.jit
def weigh(out, scores, result, scored, weighed, added, read, rounds, FAULT: gl.constexpr):
    layout: gl.constexpr = registers(64, RESULT)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    for i in range(rounds):
        if FAULT != "scores are read before they are computed":
            mbarrier.wait(scored, i & 1)
        weights = scores.load(registers(128, SCORES)).to(gl.bfloat16)
        if FAULT == "weights are announced before they are stored":
            mbarrier.arrive(weighed, count=1)
        weights_in(scores, FAULT).store(weights)
        if FAULT == "scores are read over their weights":
            scores.load(registers(128, SCORES))
        if FAULT != "weights are announced before they are stored":
            mbarrier.arrive(weighed, count=1)
        if FAULT == "weights change under their product":
            weights_in(scores, FAULT).store(weights)
        if FAULT == "the result's phase is wrong":
            mbarrier.wait(added, (i & 1) ^ 1)
        elif FAULT != "the result is read before its product":
            mbarrier.wait(added, i & 1)
        value = result.load(layout)
        mbarrier.arrive(read, count=1)
        gl.store(out + (i * ROWS + rows)[:, None] * COLUMNS + columns[None, :], value)


@gluon.jit
def weighted_kernel(
    source,  # (rounds · ROWS, COLUMNS) by tiles
    out,  # (rounds · ROWS, COLUMNS) fp32
    rounds,
    FAULT: gl.constexpr,
):
    tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS], source.layout)
    scores = allocate_tensor_memory(gl.float32, [ROWS, ROWS], SCORES)
    result = allocate_tensor_memory(gl.float32, [ROWS, COLUMNS], RESULT)
    if FAULT == "more columns than there are":
        allocate_tensor_memory(gl.float32, [3, ROWS, ROWS], SCORES)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    mbarrier.init(weighed, count=1)
    mbarrier.init(added, count=1)
    mbarrier.init(read, count=1)
    if FAULT != "no fence before a commit":
        mbarrier.init(scored, count=1)
    fence_async_shared()
    if FAULT == "no fence before a commit":
        mbarrier.init(scored, count=1)
    gl.warp_specialize(
        [
            (weigh, (out, scores, result, scored, weighed, added, read, rounds, FAULT)),
            (multiply, (source, tile, scores, result, landed, scored, weighed, added, read, rounds, FAULT)),
        ],
        [1],
        [48],
    )


def weighted(x: Tensor, fault: str = "none") -> Tensor:
    """bf16(t tᵀ) · t in fp32, for each ROWS × COLUMNS tile t of x (n · ROWS, COLUMNS), bf16."""
    out = torch.full(x.shape, float("nan"))
    box = [ROWS.value, COLUMNS.value]
    source = TensorDescriptor.from_tensor(x, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16))
    warps = 2 if fault == "two warps read" else 4
    weighted_kernel[(1,)](source, out, x.shape[0] // ROWS.value, FAULT=fault, num_warps=warps)
    return out
