"""Attention, forward, for Hopper (sm_90) in Gluon: what portable Triton cannot say.

One persistent program a multiprocessor, specialised by warps: a producer fills stages of keys and values by TMA, and
two or three consumer warpgroups own ROWS queries each of one head. The scheme is FlashAttention-3's (Shah et al., arXiv
2407.08608): a consumer issues the scores of the next keys and the values' product of the last ones together, hands the
matrix units on to the next consumer, and makes its exponentials while those work for the others and for itself.

- Heads are the outer loop and tiles of queries the inner one: programs that run at the same time share keys and values
  in the L2, and a program that goes on to its next tile finds the first keys of it loaded already.
- The first step of a tile takes the last keys, and just as many columns as they need, a multiple of 16. Its box ends
  with the last valid key rather than beginning with a full tile's, so that no invalid key is ever read; all later steps
  are whole and have no mask.
- Head dim 72 is 64 + 16 columns (configuration.split_head_dim): TMA fills what the head lacks with zeros, and clips it.
- A score costs one multiply-add with the scale and the maximum folded in, then one exponential of base 2.
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

ROWS = gl.constexpr(64)  # queries of a consumer warpgroup: the height of a wgmma


@gluon.constexpr_function
def product_layout(columns):
    """Of what a warpgroup's wgmma makes: 64 rows and so many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """Of a left factor in registers, for a product with so many columns."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(columns), k_width=2)


@gluon.jit
def read_problem(tile, lengths, sizes, KEYS: gl.constexpr, LAST: gl.constexpr):
    """(sample, head, which tile of queries, number of valid keys, number of whole tiles of keys) of a tile."""
    heads, _, key_tokens, query_tiles, _ = sizes
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
def load_rows(main, tail, main_stage, tail_stage, full, empty, phase, batch, row, head, TAIL: gl.constexpr):
    """One tile of tokens, both parts of its columns, as soon as its stage is empty."""
    mbarrier.wait(empty, phase ^ 1)
    bytes: gl.constexpr = main.block_type.nbytes + (tail.block_type.nbytes if TAIL > 0 else 0)
    mbarrier.expect(full, bytes)
    tma.async_copy_global_to_shared(main, [batch, row, head, 0], full, main_stage)
    if TAIL > 0:
        first_column: gl.constexpr = main.block_type.shape[3]
        tma.async_copy_global_to_shared(tail, [batch, row, head, first_column], full, tail_stage)


@gluon.jit
def load_tiles(
    q_tensors, k_tensors, v_tensors, shared, barriers, sizes, lengths, TAIL: gl.constexpr, LAST: gl.constexpr
):
    """The producer: queries of each tile, then its keys and values, the last ones first."""
    q_main, q_tail, k_main, k_tail, v_main, v_tail, _out_main, _out_tail = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = barriers
    CONSUMERS: gl.constexpr = q_main.shape[0]
    STAGES: gl.constexpr = k_main.shape[0]
    KEYS: gl.constexpr = k_main.shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        batch, head, query_tile, limit, whole = read_problem(tile, lengths, sizes, KEYS, LAST)
        for i in gl.static_range(CONSUMERS):
            load_rows(
                q_tensors[0], q_tensors[1], q_main.index(i), q_tail.index(i), q_full.index(i), q_empty.index(i),
                q_phase, batch, (query_tile * CONSUMERS + i) * ROWS, head, TAIL,
            )  # fmt: skip
        q_phase ^= 1
        first: gl.constexpr = 0 if LAST == 0 else -1
        for step in range(first, whole):
            row = step * KEYS
            if LAST > 0:
                row = gl.where(step < 0, limit - KEYS, row)
            load_rows(
                k_tensors[0], k_tensors[1], k_main.index(stage), k_tail.index(stage), k_full.index(stage),
                k_empty.index(stage), phase, batch, row, head, TAIL,
            )  # fmt: skip
            load_rows(
                v_tensors[0], v_tensors[1], v_main.index(stage), v_tail.index(stage), v_full.index(stage),
                v_empty.index(stage), phase, batch, row, head, TAIL,
            )  # fmt: skip
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def rows_of(stages, index, FIRST: gl.constexpr, COUNT: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr):
    """Some rows of a stage, as a matrix [COUNT, WIDTH]."""
    tile = stages.index(index).reshape([KEYS, WIDTH])
    return tile if COUNT == KEYS else tile.slice(FIRST, COUNT)


@gluon.jit
def issue_scores(
    q_main, q_tail, k_main, k_tail, stage, I: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr,
    KEYS: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """q kᵀ with COUNT of the stage's keys, from FIRST on; not waited for. [ROWS, COUNT]"""
    nothing = gl.zeros([ROWS, COUNT], gl.float32, product_layout(COUNT))
    queries = q_main.index(I).reshape([ROWS, MAIN])
    keys = rows_of(k_main, stage, FIRST, COUNT, KEYS, MAIN).permute((1, 0))
    scores = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    if TAIL > 0:
        queries = q_tail.index(I).reshape([ROWS, TAIL])
        keys = rows_of(k_tail, stage, FIRST, COUNT, KEYS, TAIL).permute((1, 0))
        scores = warpgroup_mma(queries, keys, scores, is_async=True)
    return scores


@gluon.jit
def issue_products(weights, v_stages, stage, out, FIRST: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr):
    """out + weights · (the stage's values from FIRST on); not waited for. [ROWS, WIDTH]"""
    values = rows_of(v_stages, stage, FIRST, weights.shape[1], KEYS, WIDTH)
    return warpgroup_mma(gl.convert_layout(weights, operand_layout(WIDTH)), values, out, is_async=True)


@gluon.jit
def scaled_extreme(scores, exponent_scale, NEGATIVE_SCALE: gl.constexpr):
    """The largest exponent of each row."""
    return (gl.min(scores, 1) if NEGATIVE_SCALE else gl.max(scores, 1)) * exponent_scale


@gluon.jit
def rescale(out, factor, WIDTH: gl.constexpr):
    """out with each row multiplied by its factor."""
    return out * gl.convert_layout(factor, gl.SliceLayout(1, product_layout(WIDTH)))[:, None]


@gluon.jit
def weigh(scores, exponent_scale, largest):
    """2^(score · exponent_scale - largest): a multiply-add and an exponential an element."""
    return gl.exp2(scores * exponent_scale - largest[:, None])


@gluon.jit
def store_rows(tensor, staging, I: gl.constexpr, out, batch, row, head, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    staging = staging.index(I)
    staging.reshape([ROWS, WIDTH]).store(out.to(tensor.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(tensor, [batch, row, head, FIRST], staging)


@gluon.jit
def attend(
    I: gl.constexpr, out_tensors, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL: gl.constexpr,
    LAST: gl.constexpr, LAST_MAIN: gl.constexpr, NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """Consumer I: ROWS queries of each tile. At each of its turns it issues its products, then lets the next one."""
    q_main, q_tail, k_main, k_tail, v_main, v_tail, staging_main, staging_tail = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    CONSUMERS: gl.constexpr = q_main.shape[0]
    MAIN: gl.constexpr = q_main.shape[4]
    STAGES: gl.constexpr = k_main.shape[0]
    KEYS: gl.constexpr = k_main.shape[2]
    HAS_LENGTHS: gl.constexpr = lengths is not None
    my_turn = turn.index(I)
    next_turn = turn.index((I + 1) % CONSUMERS)
    element: gl.constexpr = out_tensors[0].dtype
    score_layout: gl.constexpr = product_layout(KEYS)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    excluded: gl.constexpr = float("inf") if NEGATIVE_SCALE else float("-inf")
    products_in_flight: gl.constexpr = 2 if TAIL > 0 else 1
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    turn_phase = gl.to_tensor(1 if I == 0 else 0)  # the first consumer's first turn is given to it by nobody
    for tile in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        batch, head, query_tile, limit, whole = read_problem(tile, lengths, sizes, KEYS, LAST)
        out_main = gl.zeros([ROWS, MAIN], gl.float32, product_layout(MAIN))
        if TAIL > 0:
            out_tail = gl.zeros([ROWS, TAIL], gl.float32, product_layout(TAIL))
        running_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        running_sum = gl.zeros([ROWS], gl.float32, row_layout)
        mbarrier.wait(q_full.index(I), q_phase)

        if LAST > 0:  # the last keys, in one or two parts
            LAST_TAIL: gl.constexpr = LAST - LAST_MAIN
            skipped: gl.constexpr = KEYS - LAST
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(my_turn, turn_phase)
            scores = issue_scores(
                q_main, q_tail, k_main, k_tail, stage, I, skipped, LAST_MAIN, KEYS, MAIN, TAIL
            )
            if LAST_TAIL > 0:
                more_scores = issue_scores(
                    q_main, q_tail, k_main, k_tail, stage, I, skipped + LAST_MAIN, LAST_TAIL, KEYS, MAIN, TAIL
                )
            mbarrier.arrive(next_turn, count=1)
            turn_phase ^= 1
            if LAST_TAIL > 0:
                scores, more_scores = warpgroup_mma_wait(0, deps=(scores, more_scores))
            else:
                scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            # Keys before the box's new ones belong to whole tiles, or, before the first token, to none.
            keys = limit - LAST + gl.arange(0, LAST_MAIN, gl.SliceLayout(0, product_layout(LAST_MAIN)))
            scores = gl.where((keys >= whole * KEYS)[None, :], scores, excluded)
            largest = gl.convert_layout(scaled_extreme(scores, exponent_scale, NEGATIVE_SCALE), row_layout)
            if LAST_TAIL > 0:
                more = scaled_extreme(more_scores, exponent_scale, NEGATIVE_SCALE)
                largest = gl.maximum(largest, gl.convert_layout(more, row_layout))
            running_max = gl.where(largest == float("-inf"), 0.0, largest) if HAS_LENGTHS else largest
            main_max = gl.convert_layout(running_max, gl.SliceLayout(1, product_layout(LAST_MAIN)))
            weights = weigh(scores, exponent_scale, main_max)
            running_sum = gl.convert_layout(gl.sum(weights, 1), row_layout)
            weights = weights.to(element)
            if LAST_TAIL > 0:
                tail_max = gl.convert_layout(running_max, gl.SliceLayout(1, product_layout(LAST_TAIL)))
                more_weights = weigh(more_scores, exponent_scale, tail_max)
                running_sum += gl.convert_layout(gl.sum(more_weights, 1), row_layout)
                more_weights = more_weights.to(element)
            mbarrier.wait(v_full.index(stage), phase)
            out_main = issue_products(weights, v_main, stage, out_main, skipped, KEYS, MAIN)
            if TAIL > 0:
                out_tail = issue_products(weights, v_tail, stage, out_tail, skipped, KEYS, TAIL)
            if LAST_TAIL > 0:
                out_main = issue_products(more_weights, v_main, stage, out_main, skipped + LAST_MAIN, KEYS, MAIN)
                if TAIL > 0:
                    out_tail = issue_products(more_weights, v_tail, stage, out_tail, skipped + LAST_MAIN, KEYS, TAIL)
            if TAIL > 0:
                out_main, out_tail = warpgroup_mma_wait(0, deps=(out_main, out_tail))
            else:
                out_main = warpgroup_mma_wait(0, deps=(out_main,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase = following(stage, phase, STAGES)

        if whole > 0:
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(my_turn, turn_phase)
            scores = issue_scores(q_main, q_tail, k_main, k_tail, stage, I, 0, KEYS, KEYS, MAIN, TAIL)
            mbarrier.arrive(next_turn, count=1)
            turn_phase ^= 1
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            new_max = gl.maximum(running_max, scaled_extreme(scores, exponent_scale, NEGATIVE_SCALE))
            correction = gl.exp2(running_max - new_max)
            running_max = new_max
            weights = weigh(scores, exponent_scale, running_max)
            running_sum = running_sum * correction + gl.sum(weights, 1)
            weights = gl.convert_layout(weights.to(element), operand_layout(MAIN))
            out_main = rescale(out_main, correction, MAIN)
            if TAIL > 0:
                out_tail = rescale(out_tail, correction, TAIL)
            for _ in range(1, whole):
                next_stage, next_phase = following(stage, phase, STAGES)
                mbarrier.wait(k_full.index(next_stage), next_phase)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.wait(my_turn, turn_phase)
                scores = issue_scores(q_main, q_tail, k_main, k_tail, next_stage, I, 0, KEYS, KEYS, MAIN, TAIL)
                out_main = issue_products(weights, v_main, stage, out_main, 0, KEYS, MAIN)
                if TAIL > 0:
                    out_tail = issue_products(weights, v_tail, stage, out_tail, 0, KEYS, TAIL)
                mbarrier.arrive(next_turn, count=1)
                turn_phase ^= 1
                scores = warpgroup_mma_wait(products_in_flight, deps=(scores,))
                mbarrier.arrive(k_empty.index(next_stage), count=1)
                new_max = gl.maximum(running_max, scaled_extreme(scores, exponent_scale, NEGATIVE_SCALE))
                correction = gl.exp2(running_max - new_max)
                running_max = new_max
                new_weights = weigh(scores, exponent_scale, running_max)
                running_sum = running_sum * correction + gl.sum(new_weights, 1)
                if TAIL > 0:
                    out_main, out_tail = warpgroup_mma_wait(0, deps=(out_main, out_tail))
                else:
                    out_main = warpgroup_mma_wait(0, deps=(out_main,))
                mbarrier.arrive(v_empty.index(stage), count=1)
                out_main = rescale(out_main, correction, MAIN)
                if TAIL > 0:
                    out_tail = rescale(out_tail, correction, TAIL)
                weights = gl.convert_layout(new_weights.to(element), operand_layout(MAIN))
                stage = next_stage
                phase = next_phase
            mbarrier.wait(v_full.index(stage), phase)
            out_main = issue_products(weights, v_main, stage, out_main, 0, KEYS, MAIN)
            if TAIL > 0:
                out_tail = issue_products(weights, v_tail, stage, out_tail, 0, KEYS, TAIL)
                out_main, out_tail = warpgroup_mma_wait(0, deps=(out_main, out_tail))
            else:
                out_main = warpgroup_mma_wait(0, deps=(out_main,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase = following(stage, phase, STAGES)

        mbarrier.arrive(q_empty.index(I), count=1)
        q_phase ^= 1
        row = (query_tile * CONSUMERS + I) * ROWS
        normaliser = 1.0 / (gl.where(running_sum == 0.0, 1.0, running_sum) if HAS_LENGTHS else running_sum)
        tma.store_wait(0)
        store_rows(out_tensors[0], staging_main, I, rescale(out_main, normaliser, MAIN), batch, row, head, 0, MAIN)
        if TAIL > 0:
            out_tail = rescale(out_tail, normaliser, TAIL)
            store_rows(out_tensors[1], staging_tail, I, out_tail, batch, row, head, MAIN, TAIL)
        if log_sum_exp is not None:
            kept = running_max + gl.log2(running_sum)
            if HAS_LENGTHS:
                kept = gl.where(running_sum == 0.0, float("inf"), kept)
            queries = row + gl.arange(0, ROWS, row_layout)
            first = (tile // sizes[3]).to(gl.int64) * sizes[1]
            gl.store(log_sum_exp + (first + queries), kept, mask=queries < sizes[1])
    tma.store_wait(0)


_INTEGERS = ["heads", "query_tokens", "key_tokens", "query_tiles", "tiles"]


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_forward_hopper_kernel(
    q_main,  # tensor descriptors of (B, Sq, H, D), boxes of (1, ROWS, 1, MAIN) and (1, ROWS, 1, TAIL)
    q_tail,
    k_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    k_tail,
    v_main,  # likewise
    v_tail,
    out_main,  # of (B, Sq, H, D), as those of q
    out_tail,
    log_sum_exp,  # (B, H, Sq) fp32, or None: log2 of the sum of 2^(score · exponent_scale), +inf where there is no key
    lengths,  # (B,) int32, or None
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # of one head
    tiles,
    exponent_scale,  # scale · log2(e)
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
    KEYS: gl.constexpr,  # keys of a whole tile
    LAST: gl.constexpr,  # keys of the first step, which takes the last ones; 0 where whole tiles are all there is
    LAST_MAIN: gl.constexpr,  # of those, in the first of its two parts
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):
    element: gl.constexpr = q_main.dtype
    tail_columns: gl.constexpr = TAIL if TAIL > 0 else 16
    q_main_tiles = gl.allocate_shared_memory(element, [CONSUMERS, 1, ROWS, 1, MAIN], q_main.layout)
    k_main_stages = gl.allocate_shared_memory(element, [STAGES, 1, KEYS, 1, MAIN], k_main.layout)
    v_main_stages = gl.allocate_shared_memory(element, [STAGES, 1, KEYS, 1, MAIN], v_main.layout)
    out_main_tiles = gl.allocate_shared_memory(element, [CONSUMERS, 1, ROWS, 1, MAIN], out_main.layout)
    q_tail_tiles = q_main_tiles
    k_tail_stages = k_main_stages
    v_tail_stages = v_main_stages
    out_tail_tiles = out_main_tiles
    if TAIL > 0:
        q_tail_tiles = gl.allocate_shared_memory(element, [CONSUMERS, 1, ROWS, 1, TAIL], q_tail.layout)
        k_tail_stages = gl.allocate_shared_memory(element, [STAGES, 1, KEYS, 1, TAIL], k_tail.layout)
        v_tail_stages = gl.allocate_shared_memory(element, [STAGES, 1, KEYS, 1, TAIL], v_tail.layout)
        out_tail_tiles = gl.allocate_shared_memory(element, [CONSUMERS, 1, ROWS, 1, TAIL], out_tail.layout)
    shared = (
        q_main_tiles, q_tail_tiles, k_main_stages, k_tail_stages, v_main_stages, v_tail_stages, out_main_tiles,
        out_tail_tiles,
    )  # fmt: skip
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    sizes = (heads, query_tokens, key_tokens, query_tiles, tiles)
    q = (q_main, q_tail)
    k = (k_main, k_tail)
    v = (v_main, v_tail)
    out = (out_main, out_tail)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (attend, (0, out, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL, LAST, LAST_MAIN, NEGATIVE_SCALE)),
                (attend, (1, out, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL, LAST, LAST_MAIN, NEGATIVE_SCALE)),
                (load_tiles, (q, k, v, shared, barriers, sizes, lengths, TAIL, LAST)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend, (0, out, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL, LAST, LAST_MAIN, NEGATIVE_SCALE)),
                (attend, (1, out, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL, LAST, LAST_MAIN, NEGATIVE_SCALE)),
                (attend, (2, out, log_sum_exp, shared, barriers, sizes, lengths, exponent_scale, TAIL, LAST, LAST_MAIN, NEGATIVE_SCALE)),
                (load_tiles, (q, k, v, shared, barriers, sizes, lengths, TAIL, LAST)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
