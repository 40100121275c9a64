"""Attention, forward, for Hopper (sm_90): a warp-specialised kernel in Gluon, which portable Triton cannot express.

One persistent program per multiprocessor: a producer warp fills stages of keys and values by TMA, and two or three
consumer warpgroups own ROWS queries each of one head. The schedule is FlashAttention-3's (Shah et al., arXiv
2407.08608): a consumer issues the scores of the next keys together with the product of the last values, hands the
tensor cores to the next consumer, and computes its exponentials while they work for the others and for itself.

- Heads are the outer loop, tiles of queries the inner one: programs that run at the same time share keys and values in
  L2, and when a program starts its next tile, the first keys are already loaded.
- The first step of a tile takes the last keys, in just as many columns as they need, a multiple of 16. Its box ends
  with the last valid key instead of starting where a whole tile would, so that no invalid key is ever read; all later
  steps are whole and need no mask.
- Head dim 72 is 64 + 16 columns (config.split_head_dim): TMA fills columns beyond the head with zeros on loads, and
  drops them on stores.
- A score costs one multiply-add, with the scale and the maximum folded in, and one exponential of base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip_kernels.attention.forward import mark as portable_mark
from siglip_kernels.tma import async_load, async_store

ROWS = gl.constexpr(64)  # queries per consumer warpgroup: the height of a wgmma
SLOTS = gl.constexpr(2)  # buffers for each consumer's queries: the next tile's are loaded while it works

# The portable kernels' function, from the same source.
mark = gluon.jit(portable_mark.fn)


@gluon.constexpr_function
def product_layout(columns):
    """The layout of a wgmma's result of 64 rows and this many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """The layout of a left operand in registers, for a product of this many columns."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(columns), k_width=2)


@gluon.jit
def read_problem(tile, lengths, numbers, KEYS: gl.constexpr, LAST: gl.constexpr):
    """(sample, head, index of the tile of queries, number of valid keys, number of whole tiles of keys) of a tile."""
    heads, key_tokens, query_tiles = numbers[0], numbers[2], numbers[3]
    sequence = tile // query_tiles
    batch = sequence // heads
    limit = key_tokens
    if lengths is not None:
        limit = gl.minimum(gl.maximum(gl.load(lengths + batch), 0), key_tokens)
    whole = limit // KEYS if LAST == 0 else (gl.maximum(limit, 1) - 1) // KEYS
    return batch, sequence % heads, tile % query_tiles, limit, whole


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def load_rows(tensors, stages, index, full, empty, phase, batch, row, head):
    """Waits until a stage is empty and starts the loads of its tokens, one per part of the columns."""
    # Passes at once on a new barrier, whose previous phase counts as complete.
    mbarrier.wait(empty.index(index), phase ^ 1)
    two: gl.constexpr = len(tensors) == 2
    main_bytes: gl.constexpr = tensors[0].block_type.nbytes
    tail_bytes: gl.constexpr = tensors[1].block_type.nbytes if two else 0
    mbarrier.expect(full.index(index), main_bytes + tail_bytes)
    async_load(tensors[0], [batch, row, head, 0], full.index(index), stages[0].index(index))
    if two:
        first_column: gl.constexpr = tensors[0].block_type.shape[3]
        to = stages[1].index(index)
        async_load(tensors[1], [batch, row, head, first_column], full.index(index), to)


@gluon.jit
def load_tiles(q, k, v, shared, barriers, numbers, lengths, LAST: gl.constexpr, SLOTS: gl.constexpr):
    """The producer: loads the queries of each tile, then its keys and values, the last ones first."""
    q_tiles, k_stages, v_stages, _staging = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = barriers
    CONSUMERS: gl.constexpr = q_tiles[0].shape[0] // SLOTS
    STAGES: gl.constexpr = k_stages[0].shape[0]
    KEYS: gl.constexpr = k_stages[0].shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), numbers[4], gl.num_programs(0)):
        batch, head, query_tile, limit, whole = read_problem(tile, lengths, numbers, KEYS, LAST)
        for i in gl.static_range(CONSUMERS):
            row = (query_tile * CONSUMERS + i) * q_tiles[0].shape[2]
            load_rows(q, q_tiles, slot * CONSUMERS + i, q_full, q_empty, q_phase, batch, row, head)
        slot, q_phase = following(slot, q_phase, SLOTS)
        first_step: gl.constexpr = 0 if LAST == 0 else -1
        for step in range(first_step, whole):
            row = step * KEYS
            if LAST > 0:
                row = gl.where(step < 0, limit - KEYS, row)
            load_rows(k, k_stages, stage, k_full, k_empty, phase, batch, row, head)
            load_rows(v, v_stages, stage, v_full, v_empty, phase, batch, row, head)
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def rows_of(stages, index, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """COUNT rows of a stage from FIRST on, as a matrix [COUNT, columns]."""
    ALL: gl.constexpr = stages.shape[2]
    tile = stages.index(index).reshape([ALL, stages.shape[4]])
    return tile if COUNT == ALL else tile.slice(FIRST, COUNT)


@gluon.jit
def tile_of(tiles, index):
    """Each part of the columns of a tile in shared memory, as a matrix [ROWS, columns]."""
    if len(tiles) == 1:
        return (rows_of(tiles[0], index, 0, ROWS),)
    else:
        return rows_of(tiles[0], index, 0, ROWS), rows_of(tiles[1], index, 0, ROWS)


@gluon.jit
def issue_scores(queries, k_stages, stage, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Starts q kᵀ [ROWS, COUNT] with COUNT of the stage's keys from FIRST on. queries: a tile's parts."""
    nothing = gl.zeros([ROWS, COUNT], gl.float32, product_layout(COUNT))
    keys = rows_of(k_stages[0], stage, FIRST, COUNT).permute((1, 0))
    scores = warpgroup_mma(queries[0], keys, nothing, use_acc=False, is_async=True)
    if len(queries) == 2:
        keys = rows_of(k_stages[1], stage, FIRST, COUNT).permute((1, 0))
        scores = warpgroup_mma(queries[1], keys, scores, is_async=True)
    return scores


@gluon.jit
def multiply_add(weights, v_stages, stage, out, FIRST: gl.constexpr):
    """Starts out + weights · (the stage's values from FIRST on), [ROWS, columns]."""
    values = rows_of(v_stages, stage, FIRST, weights.shape[1])
    left = gl.convert_layout(weights, operand_layout(v_stages.shape[4]))
    return warpgroup_mma(left, values, out, is_async=True)


@gluon.jit
def issue_products(weights, v_stages, stage, out, FIRST: gl.constexpr):
    """multiply_add for each part of the columns."""
    if len(out) == 1:
        return (multiply_add(weights, v_stages[0], stage, out[0], FIRST),)
    else:
        main = multiply_add(weights, v_stages[0], stage, out[0], FIRST)
        return main, multiply_add(weights, v_stages[1], stage, out[1], FIRST)


@gluon.jit
def wait_for_all(out):
    """Each part of the columns, once all products are complete."""
    if len(out) == 1:
        return (warpgroup_mma_wait(0, deps=out),)
    else:
        return warpgroup_mma_wait(0, deps=out)


@gluon.jit
def nothing_yet(v_stages):
    """Zeros to add to, for each part of the columns."""
    MAIN: gl.constexpr = v_stages[0].shape[4]
    main = gl.zeros([ROWS, MAIN], gl.float32, product_layout(MAIN))
    if len(v_stages) == 1:
        return (main,)
    else:
        TAIL: gl.constexpr = v_stages[1].shape[4]
        return main, gl.zeros([ROWS, TAIL], gl.float32, product_layout(TAIL))


@gluon.jit
def scaled(out, factor):
    """Each row multiplied by its factor, in each part of the columns."""
    main = out[0] * gl.convert_layout(factor, gl.SliceLayout(1, out[0].type.layout))[:, None]
    if len(out) == 1:
        return (main,)
    else:
        return main, out[1] * gl.convert_layout(factor, gl.SliceLayout(1, out[1].type.layout))[:, None]


@gluon.jit
def largest_exponent(scores, exponent_scale, NEGATIVE_SCALE: gl.constexpr):
    """The largest exponent of each row."""
    return (gl.min(scores, 1) if NEGATIVE_SCALE else gl.max(scores, 1)) * exponent_scale


@gluon.jit
def finite(largest):
    """What to subtract from a row's exponents: 0 where all are -inf, without keys or from infinite inputs."""
    return gl.where(largest == float("-inf"), 0.0, largest)


@gluon.jit
def weigh(scores, exponent_scale, largest):
    """2^(score · exponent_scale - largest), a multiply-add and an exponential per element, and each row's sum."""
    largest = gl.convert_layout(largest, gl.SliceLayout(1, scores.type.layout))
    weights = gl.exp2(scores * exponent_scale - largest[:, None])
    return weights, gl.sum(weights, 1)


@gluon.jit
def attend_to_last_keys(
    queries, k_stages, v_stages, stage, phase, k_full, k_empty, v_full, v_empty, my_turn, next_turn, turn_phase,
    exponent_scale, limit, first_key, LAST: gl.constexpr, FIRST_PART: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """The first step: LAST columns of scores, in one part or two.

    Keys before first_key are masked: they belong to whole tiles or, before the first token, do not exist. All of them
    are in the first part. Returns the running maximum, sum and products.
    """
    KEYS: gl.constexpr = k_stages[0].shape[2]
    SKIPPED: gl.constexpr = KEYS - LAST
    SECOND_PART: gl.constexpr = LAST - FIRST_PART
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(KEYS))
    element: gl.constexpr = v_stages[0].dtype
    mbarrier.wait(k_full.index(stage), phase)
    mbarrier.wait(my_turn, turn_phase)
    scores = issue_scores(queries, k_stages, stage, SKIPPED, FIRST_PART)
    if SECOND_PART > 0:
        more_scores = issue_scores(queries, k_stages, stage, SKIPPED + FIRST_PART, SECOND_PART)
        mbarrier.arrive(next_turn, count=1)
        scores, more_scores = warpgroup_mma_wait(0, deps=(scores, more_scores))
    else:
        mbarrier.arrive(next_turn, count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)

    keys = limit - LAST + gl.arange(0, FIRST_PART, gl.SliceLayout(0, product_layout(FIRST_PART)))
    excluded: gl.constexpr = float("inf") if NEGATIVE_SCALE else float("-inf")
    scores = gl.where((keys >= first_key)[None, :], scores, excluded)
    largest = gl.convert_layout(largest_exponent(scores, exponent_scale, NEGATIVE_SCALE), row_layout)
    if SECOND_PART > 0:
        more = largest_exponent(more_scores, exponent_scale, NEGATIVE_SCALE)
        largest = gl.maximum(largest, gl.convert_layout(more, row_layout))
    weights, row_sum = weigh(scores, exponent_scale, finite(largest))
    row_sum = gl.convert_layout(row_sum, row_layout)
    if SECOND_PART > 0:
        more_weights, more_sum = weigh(more_scores, exponent_scale, finite(largest))
        row_sum += gl.convert_layout(more_sum, row_layout)

    mbarrier.wait(v_full.index(stage), phase)
    out = issue_products(weights.to(element), v_stages, stage, nothing_yet(v_stages), SKIPPED)
    if SECOND_PART > 0:
        out = issue_products(more_weights.to(element), v_stages, stage, out, SKIPPED + FIRST_PART)
    out = wait_for_all(out)
    mbarrier.arrive(v_empty.index(stage), count=1)
    return largest, row_sum, out


@gluon.jit
def store_rows(tensor, staging, CONSUMER: gl.constexpr, out, batch, row, head, FIRST: gl.constexpr):
    staging = staging.index(CONSUMER)
    staging.reshape(out.shape).store(out.to(tensor.dtype))
    fence_async_shared()
    async_store(tensor, [batch, row, head, FIRST], staging)


@gluon.jit
def attend(
    CONSUMER: gl.constexpr, out_tensors, shared, barriers, numbers, log_sum_exp, lengths, LAST: gl.constexpr,
    FIRST_PART: gl.constexpr, NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """A consumer of ROWS queries of each tile. In its turn it issues its products, then passes the turn on."""
    q_tiles, k_stages, v_stages, staging = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    CONSUMERS: gl.constexpr = q_tiles[0].shape[0] // SLOTS
    MAIN: gl.constexpr = q_tiles[0].shape[4]
    STAGES: gl.constexpr = k_stages[0].shape[0]
    KEYS: gl.constexpr = k_stages[0].shape[2]
    PARTS: gl.constexpr = len(v_stages)
    element: gl.constexpr = v_stages[0].dtype
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(KEYS))
    _heads, query_tokens, _key_tokens, query_tiles, _tiles, exponent_scale = numbers
    my_turn = turn.index(CONSUMER)
    next_turn = turn.index((CONSUMER + 1) % CONSUMERS)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    turn_phase = gl.to_tensor(1 if CONSUMER == 0 else 0)  # the first consumer starts with the turn
    for tile in range(gl.program_id(0), numbers[4], gl.num_programs(0)):
        batch, head, query_tile, limit, whole = read_problem(tile, lengths, numbers, KEYS, LAST)
        mine = slot * CONSUMERS + CONSUMER
        queries = tile_of(q_tiles, mine)
        mbarrier.wait(q_full.index(mine), q_phase)
        if LAST > 0:
            running_max, running_sum, out = attend_to_last_keys(
                queries, k_stages, v_stages, stage, phase, k_full, k_empty, v_full, v_empty, my_turn,
                next_turn, turn_phase, exponent_scale, limit, whole * KEYS, LAST, FIRST_PART, NEGATIVE_SCALE,
            )  # fmt: skip
            turn_phase ^= 1
            stage, phase = following(stage, phase, STAGES)
        else:
            running_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
            running_sum = gl.zeros([ROWS], gl.float32, row_layout)
            out = nothing_yet(v_stages)
        if whole > 0:
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(my_turn, turn_phase)
            scores = issue_scores(queries, k_stages, stage, 0, KEYS)
            mbarrier.arrive(next_turn, count=1)
            turn_phase ^= 1
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            new_max = gl.maximum(running_max, largest_exponent(scores, exponent_scale, NEGATIVE_SCALE))
            correction = gl.exp2(running_max - finite(new_max))
            running_max = new_max
            weights, row_sum = weigh(scores, exponent_scale, finite(running_max))
            running_sum = running_sum * correction + row_sum
            out = scaled(out, correction)
            operand = gl.convert_layout(weights.to(element), operand_layout(MAIN))
            for _ in range(1, whole):
                next_stage, next_phase = following(stage, phase, STAGES)
                mbarrier.wait(k_full.index(next_stage), next_phase)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.wait(my_turn, turn_phase)
                scores = issue_scores(queries, k_stages, next_stage, 0, KEYS)
                out = issue_products(operand, v_stages, stage, out, 0)
                mbarrier.arrive(next_turn, count=1)
                turn_phase ^= 1
                scores = warpgroup_mma_wait(PARTS, deps=(scores,))
                mbarrier.arrive(k_empty.index(next_stage), count=1)
                new_max = gl.maximum(running_max, largest_exponent(scores, exponent_scale, NEGATIVE_SCALE))
                correction = gl.exp2(running_max - finite(new_max))
                running_max = new_max
                weights, row_sum = weigh(scores, exponent_scale, finite(running_max))
                running_sum = running_sum * correction + row_sum
                # Already complete. The branch of this wait keeps the assembler from moving the next wait before the
                # exponentials.
                mbarrier.wait(v_full.index(stage), phase)
                out = wait_for_all(out)
                mbarrier.arrive(v_empty.index(stage), count=1)
                out = scaled(out, correction)
                operand = gl.convert_layout(weights.to(element), operand_layout(MAIN))
                stage = next_stage
                phase = next_phase
            mbarrier.wait(v_full.index(stage), phase)
            out = wait_for_all(issue_products(operand, v_stages, stage, out, 0))
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase = following(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(mine), count=1)
        slot, q_phase = following(slot, q_phase, SLOTS)

        row = (query_tile * CONSUMERS + CONSUMER) * ROWS
        divisor = running_sum
        if lengths is not None:
            divisor = gl.where(running_sum == 0.0, 1.0, running_sum)
        out = scaled(out, 1.0 / divisor)
        tma.store_wait(0)
        store_rows(out_tensors[0], staging[0], CONSUMER, out[0], batch, row, head, 0)
        if PARTS == 2:
            store_rows(out_tensors[1], staging[1], CONSUMER, out[1], batch, row, head, MAIN)
        if log_sum_exp is not None:
            kept = running_max + gl.log2(divisor)
            if lengths is not None:
                kept = gl.where(running_sum == 0.0, float("inf"), kept)
            kept = mark(kept, running_sum)
            tokens = row + gl.arange(0, ROWS, row_layout)
            first = (tile // query_tiles).to(gl.int64) * query_tokens
            gl.store(log_sum_exp + (first + tokens), kept, mask=tokens < query_tokens)
    tma.store_wait(0)


@gluon.jit
def parts_of(main, tail):
    """A head's columns in one part or, where there is a tail, in two."""
    if tail is None:
        return (main,)
    else:
        return main, tail


@gluon.jit
def allocate(tensors, COUNT: gl.constexpr):
    """Shared memory for COUNT boxes of each part of the columns."""
    main_shape: gl.constexpr = [COUNT] + tensors[0].block_type.shape  # noqa: RUF005 - Gluon knows no [*shape]
    main = gl.allocate_shared_memory(tensors[0].dtype, main_shape, tensors[0].layout)
    if len(tensors) == 1:
        return (main,)
    else:
        tail_shape: gl.constexpr = [COUNT] + tensors[1].block_type.shape  # noqa: RUF005
        return main, gl.allocate_shared_memory(tensors[1].dtype, tail_shape, tensors[1].layout)


_INTEGERS = ["heads", "query_tokens", "key_tokens", "query_tiles", "tiles"]


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_forward_hopper_kernel(
    q_main,  # tensor descriptors of (B, Sq, H, D), boxes of (1, ROWS, 1, MAIN) and (1, ROWS, 1, TAIL)
    q_tail,  # None where the head's columns are one part; likewise below
    k_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    k_tail,
    v_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    v_tail,
    out_main,  # of (B, Sq, H, D), as those of q
    out_tail,
    log_sum_exp,  # (B, H, Sq) fp32, or None: as the portable kernel keeps it, marks included
    lengths,  # (B,) int32, or None
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # of one head
    tiles,
    exponent_scale,  # scale · log2(e)
    LAST: gl.constexpr,  # columns of the first step, which takes the last keys; 0: all keys are in whole tiles
    FIRST_PART: gl.constexpr,  # of those, in the first of one or two parts, which holds the masked ones
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):
    q = parts_of(q_main, q_tail)
    k = parts_of(k_main, k_tail)
    v = parts_of(v_main, v_tail)
    out = parts_of(out_main, out_tail)
    q_tiles = allocate(q, SLOTS * CONSUMERS)
    k_stages = allocate(k, STAGES)
    v_stages = allocate(v, STAGES)
    staging = allocate(out, CONSUMERS)
    shared = (q_tiles, k_stages, v_stages, staging)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(SLOTS * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    numbers = (heads, query_tokens, key_tokens, query_tiles, tiles, exponent_scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (attend, (0, out, shared, barriers, numbers, log_sum_exp, lengths, LAST, FIRST_PART, NEGATIVE_SCALE)),
                (attend, (1, out, shared, barriers, numbers, log_sum_exp, lengths, LAST, FIRST_PART, NEGATIVE_SCALE)),
                (load_tiles, (q, k, v, shared, barriers, numbers, lengths, LAST, SLOTS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (attend, (0, out, shared, barriers, numbers, log_sum_exp, lengths, LAST, FIRST_PART, NEGATIVE_SCALE)),
                (attend, (1, out, shared, barriers, numbers, log_sum_exp, lengths, LAST, FIRST_PART, NEGATIVE_SCALE)),
                (attend, (2, out, shared, barriers, numbers, log_sum_exp, lengths, LAST, FIRST_PART, NEGATIVE_SCALE)),
                (load_tiles, (q, k, v, shared, barriers, numbers, lengths, LAST, SLOTS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
