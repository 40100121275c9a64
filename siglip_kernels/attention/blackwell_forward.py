"""Attention, forward, for data-centre Blackwell (sm_100): a warp-specialised kernel in Gluon.

The schedule is FlashAttention-4's: a program has two tiles of 128 queries of one head in flight, whose scores and
outputs lie in tensor memory, and the tensor cores work for one while the other's weights are computed. The
partitions:

- `load_tiles`, a warp, loads queries, keys and values by TMA, as on Hopper;
- `multiply`, a warp, issues both products of both tiles in turn. The tensor cores run them in this order;
- `weigh`, four warps for each tile: a thread has a whole row of scores, so that no maximum or sum crosses threads.
  The weights take the place of their scores;
- `rescale`, four warps, multiplies the outputs in tensor memory when a row's maximum has grown, beneath the
  exponentials, and at the end normalises and stores them.

As on Hopper, the first step of a tile takes the last keys, in a box that ends with the last valid one, and is the only
one with a mask; head dim 72 is 64 + 16 columns; a score costs one multiply-add and one exponential of base 2.
"""

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

from siglip_kernels.attention.forward import mark
from siglip_kernels.attention.hopper_forward import (
    allocate,
    finite,
    following,
    largest_exponent,
    load_tiles,
    parts_of,
    read_problem,
    rows_of,
    weigh,
)
from siglip_kernels.tensor_memory import OLDER, register_layout
from siglip_kernels.tma import async_store

ROWS = gl.constexpr(128)  # queries of a tile: the lanes of tensor memory
TILES = gl.constexpr(2)  # in flight
KEYS = gl.constexpr(128)  # per step
HALF = gl.constexpr(64)

_mark = gluon.jit(mark.fn)  # the portable kernel's function, from the same source


@gluon.constexpr_function
def tensor_layout(columns):
    """The layout of a tile of this many columns in tensor memory."""
    return TensorMemoryLayout([128, columns], col_stride=1)


@gluon.constexpr_function
def row_layout(columns):
    """The layout of such a tile of fp32 in registers: a row per thread."""
    return register_layout([128, columns], tensor_layout(columns), 4)


@gluon.jit
def apart(numbers):
    """The numbers of the problem for one partition. What it computes from the number of keys would otherwise be moved
    before all partitions, and occupy registers in each."""
    heads, query_tokens, key_tokens, query_tiles, tiles, exponent_scale = numbers
    key_tokens = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [key_tokens], dtype=gl.int32, is_pure=False, pack=1
    )
    return heads, query_tokens, key_tokens, query_tiles, tiles, exponent_scale


@gluon.jit
def read_tile(tile, lengths, numbers):
    """What a pair of tiles is: (sample, head, index of the pair, number of whole tiles of keys, first valid column).

    The last is of the first step, which takes the last keys: the columns before it are keys of whole tiles, or none.
    """
    batch, head, query_tile, limit, whole = read_problem(tile, lengths, numbers, KEYS, KEYS)
    return batch, head, query_tile, whole, (whole + 1) * KEYS - limit


@gluon.jit
def weights_of(scores, element: gl.constexpr):
    """Where the weights of a tile of scores lie: in the first half of its columns."""
    half = scores.slice(0, KEYS // 2)
    if OLDER:
        return half._reinterpret(element, [ROWS, KEYS], tensor_layout(KEYS))
    else:
        return half.reinterpret(element, [ROWS, KEYS], tensor_layout(KEYS))


@gluon.jit
def issue_scores(q_tiles, k_stages, scores, TILE: gl.constexpr, stage, scored):
    """Starts q kᵀ of a tile, which `scored` announces."""
    keys = rows_of(k_stages[0], stage, 0, KEYS).permute((1, 0))
    tcgen05_mma(rows_of(q_tiles[0], TILE, 0, ROWS), keys, scores.index(TILE), use_acc=False, mbarriers=[])
    if len(q_tiles) == 2:
        keys = rows_of(k_stages[1], stage, 0, KEYS).permute((1, 0))
        tcgen05_mma(rows_of(q_tiles[1], TILE, 0, ROWS), keys, scores.index(TILE), mbarriers=[])
    tcgen05_commit(scored.index(TILE))


@gluon.jit
def multiply(shared, scores, out, barriers, handshakes, numbers, lengths):
    """Issues all products: those of a tile's weights and values, then the scores that take the place of the weights."""
    q_tiles, k_stages, v_stages, _staging = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = barriers
    scored, weighed, rescaled, summed, _factored, _spent = handshakes
    STAGES: gl.constexpr = k_stages[0].shape[0]
    element: gl.constexpr = v_stages[0].dtype
    numbers = apart(numbers)
    tile = gl.program_id(0)
    _batch, _head, _query_tile, next_whole, _first_valid = read_tile(tile, lengths, numbers)
    stage = gl.to_tensor(0)  # of the next values
    phase = gl.to_tensor(0)
    k_stage = gl.to_tensor(0)
    k_phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    step_phase = gl.to_tensor(0)
    mbarrier.wait(k_full.index(k_stage), k_phase)
    for i in gl.static_range(TILES):
        mbarrier.wait(q_full.index(i), q_phase)
        issue_scores(q_tiles, k_stages, scores, i, k_stage, scored)
        if next_whole == 0:
            tcgen05_commit(q_empty.index(i))
    tcgen05_commit(k_empty.index(k_stage))
    k_stage, k_phase = following(k_stage, k_phase, STAGES)
    q_phase ^= 1
    for tile in range(gl.program_id(0), numbers[4], gl.num_programs(0)):
        whole = next_whole
        next_tile = tile + gl.num_programs(0)
        _batch, _head, _query_tile, next_whole, _first_valid = read_tile(
            gl.minimum(next_tile, numbers[4] - 1), lengths, numbers
        )
        for step in range(0, whole + 1):
            ends = step == whole
            goes_on = (step < whole) | (next_tile < numbers[4])
            q_is_done = gl.where(ends, next_whole == 0, step + 1 == whole)
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.wait(k_full.index(k_stage), k_phase, pred=goes_on)
            for i in gl.static_range(TILES):
                mbarrier.wait(weighed.index(i), step_phase)
                mbarrier.wait(rescaled.index(i), step_phase)
                weights = weights_of(scores.index(i), element)
                for part in gl.static_range(len(v_stages)):
                    values = rows_of(v_stages[part], stage, 0, KEYS)
                    tcgen05_mma(weights, values, out[part].index(i), use_acc=step > 0, mbarriers=[])
                tcgen05_commit(summed.index(i))
                if goes_on:
                    mbarrier.wait(q_full.index(i), q_phase, pred=ends)
                    issue_scores(q_tiles, k_stages, scores, i, k_stage, scored)
                    if q_is_done:
                        tcgen05_commit(q_empty.index(i))
            tcgen05_commit(v_empty.index(stage))
            if goes_on:
                tcgen05_commit(k_empty.index(k_stage))
            stage, phase = following(stage, phase, STAGES)
            k_stage, k_phase = following(k_stage, k_phase, STAGES)
            step_phase ^= 1
        q_phase ^= 1


@gluon.jit
def send(factor, factors, TILE: gl.constexpr, factored, spent, phase):
    """Hands a factor per row to `rescale`, once that has read the one before; returns the next phase."""
    mbarrier.wait(spent.index(TILE), phase ^ 1)
    factors.index(TILE).store(factor)
    mbarrier.arrive(factored.index(TILE), count=1)
    return phase ^ 1


@gluon.jit
def masked(products, first_column: gl.constexpr, first_valid, NEGATIVE_SCALE: gl.constexpr):
    """Scores without those of the columns before first_valid."""
    columns = first_column + gl.arange(0, HALF, gl.SliceLayout(0, products.type.layout))
    excluded: gl.constexpr = float("inf") if NEGATIVE_SCALE else float("-inf")
    return gl.where((columns >= first_valid)[None, :], products, excluded)


@gluon.jit
def store_weights(left, right, weights, exponent_scale, largest):
    """The weights of both halves of the scores; returns each row's sum. In halves, to take fewer registers."""
    left, left_sum = weigh(left, exponent_scale, finite(largest))
    weights.slice(0, HALF).store(left.to(weights.dtype))
    right, right_sum = weigh(right, exponent_scale, finite(largest))
    weights.slice(HALF, HALF).store(right.to(weights.dtype))
    return left_sum + right_sum


@gluon.jit
def weigh_tile(
    TILE: gl.constexpr, scores, factors, handshakes, numbers, lengths, element: gl.constexpr, KEEP: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """The weights of a tile of queries, the factors of its output, and its log-sum-exp."""
    scored, weighed, _rescaled, _summed, factored, spent = handshakes
    LAYOUT: gl.constexpr = row_layout(HALF)
    numbers = apart(numbers)
    exponent_scale = numbers[5]
    mine = scores.index(TILE)
    weights = weights_of(mine, element)
    phase = gl.to_tensor(0)  # of the steps
    sent = gl.to_tensor(0)
    for tile in range(gl.program_id(0), numbers[4], gl.num_programs(0)):
        _batch, _head, _query_tile, whole, first_valid = read_tile(tile, lengths, numbers)
        mbarrier.wait(scored.index(TILE), phase)
        phase ^= 1
        left = masked(mine.slice(0, HALF).load(LAYOUT), 0, first_valid, NEGATIVE_SCALE)
        right = masked(mine.slice(HALF, HALF).load(LAYOUT), HALF, first_valid, NEGATIVE_SCALE)
        running_max = gl.maximum(
            largest_exponent(left, exponent_scale, NEGATIVE_SCALE),
            largest_exponent(right, exponent_scale, NEGATIVE_SCALE),
        )
        running_sum = store_weights(left, right, weights, exponent_scale, running_max)
        mbarrier.arrive(weighed.index(TILE), count=1)
        for _ in range(whole):
            mbarrier.wait(scored.index(TILE), phase)
            phase ^= 1
            left = mine.slice(0, HALF).load(LAYOUT)
            right = mine.slice(HALF, HALF).load(LAYOUT)
            new_max = gl.maximum(
                largest_exponent(left, exponent_scale, NEGATIVE_SCALE),
                largest_exponent(right, exponent_scale, NEGATIVE_SCALE),
            )
            new_max = gl.maximum(running_max, new_max)
            factor = gl.exp2(running_max - finite(new_max))
            running_max = new_max
            sent = send(factor, factors, TILE, factored, spent, sent)
            row_sum = store_weights(left, right, weights, exponent_scale, running_max)
            running_sum = running_sum * factor + row_sum
            mbarrier.arrive(weighed.index(TILE), count=1)
        divisor = running_sum
        if lengths is not None:
            divisor = gl.where(running_sum == 0.0, 1.0, running_sum)
        sent = send(1.0 / divisor, factors, TILE, factored, spent, sent)
        if KEEP:
            kept = running_max + gl.log2(divisor)
            if lengths is not None:
                kept = gl.where(running_sum == 0.0, float("inf"), kept)
            kept = _mark(kept, running_sum)
            sent = send(kept, factors, TILE, factored, spent, sent)


@gluon.jit
def receive(factors, TILE: gl.constexpr, factored, spent, phase, LAYOUT: gl.constexpr):
    mbarrier.wait(factored.index(TILE), phase)
    factor = factors.index(TILE).load(LAYOUT)
    mbarrier.arrive(spent.index(TILE), count=1)
    return factor


@gluon.constexpr_function
def chunk_of(columns):
    """How many of so many columns of the output `rescale` has in registers at a time."""
    return min(columns, 16)


@gluon.jit
def scaled(out, factor, first: gl.constexpr, COUNT: gl.constexpr):
    """COUNT columns of an output in tensor memory, each row multiplied by its factor."""
    LAYOUT: gl.constexpr = row_layout(COUNT)
    return out.slice(first, COUNT).load(LAYOUT) * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def scale_rows(out, factor):
    COLUMNS: gl.constexpr = out.shape[1]
    COUNT: gl.constexpr = chunk_of(COLUMNS)
    for first in gl.static_range(0, COLUMNS, COUNT):
        out.slice(first, COUNT).store(scaled(out, factor, first, COUNT))


@gluon.jit
def store_scaled(tensor, staging, out, factor, batch, row, head, FIRST: gl.constexpr):
    COLUMNS: gl.constexpr = out.shape[1]
    COUNT: gl.constexpr = chunk_of(COLUMNS)
    for first in gl.static_range(0, COLUMNS, COUNT):
        value = scaled(out, factor, first, COUNT).to(tensor.dtype)
        staging.reshape(out.shape).slice(first, COUNT, 1).store(value)
    fence_async_shared()
    async_store(tensor, [batch, row, head, FIRST], staging)


@gluon.jit
def rescale(out_tensors, log_sum_exp, out, staging, factors, handshakes, numbers, lengths):
    """Multiplies the rows of both tiles' outputs by their factors; stores them at the end of each tile."""
    _scored, _weighed, rescaled, summed, factored, spent = handshakes
    numbers = apart(numbers)
    MAIN: gl.constexpr = out[0].shape[2]
    FACTOR: gl.constexpr = gl.SliceLayout(1, row_layout(chunk_of(MAIN)))
    phase = gl.to_tensor(0)  # of the steps
    sent = gl.to_tensor(0)
    for tile in range(gl.program_id(0), numbers[4], gl.num_programs(0)):
        batch, head, query_tile, whole, _first_valid = read_tile(tile, lengths, numbers)
        for i in gl.static_range(TILES):  # the outputs of the tiles before have been read
            mbarrier.arrive(rescaled.index(i), count=1)
        for _ in range(whole):
            for i in gl.static_range(TILES):
                factor = receive(factors, i, factored, spent, sent, FACTOR)
                mbarrier.wait(summed.index(i), phase)
                for part in gl.static_range(len(out)):
                    scale_rows(out[part].index(i), factor)
                mbarrier.arrive(rescaled.index(i), count=1)
            phase ^= 1
            sent ^= 1
        for i in gl.static_range(TILES):
            factor = receive(factors, i, factored, spent, sent, FACTOR)
            mbarrier.wait(summed.index(i), phase)
            tma.store_wait(0)
            row = (query_tile * TILES + i) * ROWS
            store_scaled(out_tensors[0], staging[0].index(0), out[0].index(i), factor, batch, row, head, 0)
            if len(out) == 2:
                store_scaled(out_tensors[1], staging[1].index(0), out[1].index(i), factor, batch, row, head, MAIN)
        phase ^= 1
        sent ^= 1
        if log_sum_exp is not None:
            for i in gl.static_range(TILES):
                kept = receive(factors, i, factored, spent, sent, FACTOR)
                queries = (query_tile * TILES + i) * ROWS + gl.arange(0, ROWS, FACTOR)
                first = (tile // numbers[3]).to(gl.int64) * numbers[1]
                gl.store(log_sum_exp + (first + queries), kept, mask=queries < numbers[1])
            sent ^= 1
    tma.store_wait(0)


@gluon.jit
def accumulators(tensors):
    """Tensor memory for both tiles' outputs, for each part of the columns."""
    MAIN: gl.constexpr = tensors[0].block_type.shape[3]
    main = allocate_tensor_memory(gl.float32, [TILES, ROWS, MAIN], tensor_layout(MAIN))
    if len(tensors) == 1:
        return (main,)
    else:
        TAIL: gl.constexpr = tensors[1].block_type.shape[3]
        return main, allocate_tensor_memory(gl.float32, [TILES, ROWS, TAIL], tensor_layout(TAIL))


@gluon.jit
def barriers_of(COUNT: gl.constexpr):
    """COUNT barriers that one arrival completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


_INTEGERS = ["heads", "query_tokens", "key_tokens", "query_tiles", "tiles"]


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_forward_blackwell_kernel(
    q_main,  # tensor descriptors of (B, Sq, H, D), boxes of (1, ROWS, 1, MAIN) and (1, ROWS, 1, TAIL)
    q_tail,  # None where the head's columns are one part; likewise below
    k_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    k_tail,
    v_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    v_tail,
    out_main,  # of (B, Sq, H, D), as those of q
    out_tail,
    log_sum_exp,  # (B, H, Sq) fp32, or None; as in forward.py, with its marks
    lengths,  # (B,) int32, or None
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # pairs of tiles of one head
    tiles,  # pairs of tiles
    exponent_scale,  # scale · log2(e)
    STAGES: gl.constexpr,
    WEIGH_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):
    q = parts_of(q_main, q_tail)
    k = parts_of(k_main, k_tail)
    v = parts_of(v_main, v_tail)
    out = parts_of(out_main, out_tail)
    staging = allocate(out, 1)
    shared = (allocate(q, TILES), allocate(k, STAGES), allocate(v, STAGES), staging)
    factors = gl.allocate_shared_memory(gl.float32, [TILES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    scores = allocate_tensor_memory(gl.float32, [TILES, ROWS, KEYS], tensor_layout(KEYS))
    totals = accumulators(out)
    q_full = barriers_of(TILES)
    q_empty = barriers_of(TILES)
    k_full = barriers_of(STAGES)
    k_empty = barriers_of(STAGES)
    v_full = barriers_of(STAGES)
    v_empty = barriers_of(STAGES)
    scored = barriers_of(TILES)  # multiply to weigh_tile: the scores
    weighed = barriers_of(TILES)  # weigh_tile to multiply: the weights in their place
    rescaled = barriers_of(TILES)  # rescale to multiply: the output, which the next product is added to
    summed = barriers_of(TILES)  # multiply to rescale: the output with the latest product
    factored = barriers_of(TILES)  # weigh_tile to rescale: the factor
    spent = barriers_of(TILES)  # rescale to weigh_tile: room for the next
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, q_full)
    handshakes = (scored, weighed, rescaled, summed, factored, spent)
    numbers = (heads, query_tokens, key_tokens, query_tiles, tiles, exponent_scale)
    element: gl.constexpr = v_main.dtype
    KEEP: gl.constexpr = log_sum_exp is not None
    gl.warp_specialize(
        [
            (rescale, (out, log_sum_exp, totals, staging, factors, handshakes, numbers, lengths)),
            (weigh_tile, (0, scores, factors, handshakes, numbers, lengths, element, KEEP, NEGATIVE_SCALE)),
            (weigh_tile, (1, scores, factors, handshakes, numbers, lengths, element, KEEP, NEGATIVE_SCALE)),
            (multiply, (shared, scores, totals, barriers, handshakes, numbers, lengths)),
            (load_tiles, (q, k, v, shared, barriers, numbers, lengths, KEYS, 1)),
        ],
        [4, 4, 1, 1],
        [WEIGH_REGISTERS, WEIGH_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )
