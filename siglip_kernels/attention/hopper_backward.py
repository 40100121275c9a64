"""Attention, backward, for Hopper (sm_90) in Gluon: backward.py's two kernels, warp-specialised like the forward.

Programs of one kernel own queries and compute dQ and delta, programs of the other own keys and compute dK and dV, so
that atomics are not needed. In both, a producer loads by TMA and two consumers own ROWS rows each; a consumer's
exponentials run beneath its own second product, and all its other work beneath the other consumer's products.

The first kernel writes the log-sum-exp and delta of a head as two rows, which the second loads with each tile of
queries. Rows that the forward marks have their delta from the portable kernel of exact_delta.py, launched before.
Consumers keep tiles of rows in registers, as left operands: the second kernel keys, and values up to head dim 80, and
the first both its tiles from head dim 96 on. Read from shared memory in every step, these would make that the bound.

As in the forward, the first step over the keys takes the last ones, in a box that ends with the last valid key. Where
keys are rows, an invalid key affects its own row only, whose gradients are set to zero. Beyond the last query, tiles
and statistics are zeros: there weights are 2^(0 − 0) = 1, and multiply zeros.

The two kernels compute seven products of tiles. One kernel that owned keys and added up dQ would compute five, but is
no faster by count. For 128 keys × 64 queries at head dim 72 its products take 1,600 clocks instead of 2,240, and its
shared memory 2,116: accumulators of dK, dV, dQ and two tiles of scores, 184 registers of 240, leave none for keys and
values, and dS as an operand of dQ and the fp32 sums of dQ pass through shared memory. At head dim 64 that is 1,796
instead of 1,792. In addition the sums have to reach dQ in a fixed order, once per tile of keys: for 1,024 heads of 729
tokens 1.3 GB through L2, or, kept apart and added up by a second kernel, 2.6 GB through memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from siglip_kernels.attention.backward import score_gradients as portable_score_gradients
from siglip_kernels.attention.forward import is_marked as portable_is_marked
from siglip_kernels.attention.hopper_forward import (
    ROWS,
    allocate,
    following,
    issue_products,
    issue_scores,
    load_rows,
    nothing_yet,
    operand_layout,
    parts_of,
    product_layout,
    scaled,
    store_rows,
    tile_of,
    wait_for_all,
)
from siglip_kernels.tma import async_load

CONSUMERS = gl.constexpr(2)


# The portable kernels' functions, from the same source.
score_gradients = gluon.jit(portable_score_gradients.fn)
is_marked = gluon.jit(portable_is_marked.fn)


@gluon.jit
def store_parts(tensors, staging, CONSUMER: gl.constexpr, out, batch, row, head):
    """Starts the store of each part of the columns."""
    store_rows(tensors[0], staging[0], CONSUMER, out[0], batch, row, head, 0)
    if len(out) == 2:
        store_rows(tensors[1], staging[1], CONSUMER, out[1], batch, row, head, tensors[0].block_type.shape[3])


@gluon.jit
def valid_keys(batch, lengths, key_tokens):
    """The number of valid keys of a sample."""
    limit = key_tokens
    if lengths is not None:
        limit = gl.minimum(gl.maximum(gl.load(lengths + batch), 0), key_tokens)
    return limit


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr, LOADS: gl.constexpr = 1):
    """COUNT barriers for full stages, which LOADS loads fill, and COUNT for empty ones, complete after ARRIVALS."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=LOADS)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return full, empty


@gluon.jit
def in_registers(tile, COLUMNS: gl.constexpr):
    """A tile's parts as left operands of products of COLUMNS columns: wgmma then reads them without shared memory."""
    layout: gl.constexpr = operand_layout(COLUMNS)
    if len(tile) == 1:
        return (tile[0].load(layout),)
    else:
        return tile[0].load(layout), tile[1].load(layout)


# dQ and delta: rows are queries


@gluon.jit
def load_for_queries(tensors, shared, barriers, numbers, lengths, ONLY_DELTA: gl.constexpr):
    """The producer: loads each tile's queries, output and its gradient, then all keys and values, last ones first."""
    q, out_grad, out, k, v = tensors
    q_tiles, out_grad_tiles, out_tiles, k_stages, v_stages, _staging = shared
    q_full, q_empty, grad_full, grad_empty, out_full, out_empty, k_full, k_empty, v_full, v_empty = barriers
    heads, _query_tokens, key_tokens, query_tiles, tiles, _statistics_row, _scale, _exponent_scale = numbers
    SLOTS: gl.constexpr = q_tiles[0].shape[0] // CONSUMERS
    STAGES: gl.constexpr = k_stages[0].shape[0]
    KEYS: gl.constexpr = k_stages[0].shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    slot_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // query_tiles
        batch = sequence // heads
        head = sequence % heads
        for i in gl.static_range(CONSUMERS):
            row = ((tile % query_tiles) * CONSUMERS + i) * ROWS
            mine = slot * CONSUMERS + i
            load_rows(out_grad, out_grad_tiles, mine, grad_full, grad_empty, slot_phase, batch, row, head)
            load_rows(out, out_tiles, mine, out_full, out_empty, slot_phase, batch, row, head)
            if not ONLY_DELTA:
                load_rows(q, q_tiles, mine, q_full, q_empty, slot_phase, batch, row, head)
        slot, slot_phase = following(slot, slot_phase, SLOTS)
        if not ONLY_DELTA:
            limit = valid_keys(batch, lengths, key_tokens)
            for step in range(-1, (gl.maximum(limit, 1) - 1) // KEYS):
                row = gl.where(step < 0, limit - KEYS, step * KEYS)
                load_rows(k, k_stages, stage, k_full, k_empty, phase, batch, row, head)
                load_rows(v, v_stages, stage, v_full, v_empty, phase, batch, row, head)
                stage, phase = following(stage, phase, STAGES)


@gluon.jit
def add_keys(
    q_grad, queries, out_grad, k_stages, v_stages, stage, phase, k_full, k_empty, v_full, v_empty,
    log_sum_exp, delta, exponent_scale, counted, MASKED: gl.constexpr,
):  # fmt: skip
    """q_grad + dS K for one stage of keys. If MASKED, all but its last `counted` keys are masked."""
    KEYS: gl.constexpr = k_stages[0].shape[2]
    mbarrier.wait(k_full.index(stage), phase)
    mbarrier.wait(v_full.index(stage), phase)
    scores = issue_scores(queries, k_stages, stage, 0, KEYS)
    weights_grad = issue_scores(out_grad, v_stages, stage, 0, KEYS)
    scores = warpgroup_mma_wait(len(queries), deps=(scores,))
    weights = gl.exp2(scores * exponent_scale - log_sum_exp[:, None])
    if MASKED:
        keys = gl.arange(0, KEYS, gl.SliceLayout(0, product_layout(KEYS)))
        weights = gl.where((keys >= KEYS - counted)[None, :], weights, 0.0)
    # Already complete. The branch of this wait keeps the assembler from moving the next wait before the exponentials.
    mbarrier.wait(v_full.index(stage), phase)
    weights_grad = warpgroup_mma_wait(0, deps=(weights_grad,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    scores_grad = score_gradients(weights, weights_grad, delta[:, None], False).to(k_stages[0].dtype)
    q_grad = wait_for_all(issue_products(scores_grad, k_stages, stage, q_grad, 0))
    mbarrier.arrive(k_empty.index(stage), count=1)
    return q_grad


@gluon.jit
def row_products(a, b):
    """The dot product of each row of one matrix in shared memory with the same row of the other."""
    layout: gl.constexpr = product_layout(a.shape[1])
    return gl.sum(a.load(layout).to(gl.float32) * b.load(layout).to(gl.float32), 1)


@gluon.jit
def own_queries(
    CONSUMER: gl.constexpr, q_grad_tensors, shared, barriers, numbers, of_rows, lengths,
    IN_REGISTERS: gl.constexpr, ONLY_DELTA: gl.constexpr,
):  # fmt: skip
    """A consumer of ROWS queries of each tile."""
    q_tiles, out_grad_tiles, out_tiles, k_stages, v_stages, staging = shared
    q_full, q_empty, grad_full, grad_empty, out_full, out_empty, k_full, k_empty, v_full, v_empty = barriers
    heads, query_tokens, key_tokens, query_tiles, tiles, statistics_row, scale, exponent_scale = numbers
    log_sum_exp, exact_delta, statistics = of_rows
    SLOTS: gl.constexpr = q_tiles[0].shape[0] // CONSUMERS
    STAGES: gl.constexpr = k_stages[0].shape[0]
    KEYS: gl.constexpr = k_stages[0].shape[2]
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(KEYS))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    slot_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // query_tiles
        batch = sequence // heads
        row = ((tile % query_tiles) * CONSUMERS + CONSUMER) * ROWS
        mine = slot * CONSUMERS + CONSUMER
        queries = tile_of(q_tiles, mine)
        out_grad = tile_of(out_grad_tiles, mine)
        tokens = row + gl.arange(0, ROWS, row_layout)
        exists = tokens < query_tokens
        read = sequence.to(gl.int64) * query_tokens + tokens
        row_log_sum_exp = gl.load(log_sum_exp + read, mask=exists, other=float("inf"))
        marked = exists & (is_marked(row_log_sum_exp) == 1)
        written = statistics + sequence.to(gl.int64) * 2 * statistics_row
        gl.store(written + tokens, row_log_sum_exp, mask=exists)

        mbarrier.wait(grad_full.index(mine), slot_phase)
        mbarrier.wait(out_full.index(mine), slot_phase)
        out = tile_of(out_tiles, mine)
        row_delta = gl.convert_layout(row_products(out[0], out_grad[0]), row_layout)
        if len(out) == 2:
            row_delta += gl.convert_layout(row_products(out[1], out_grad[1]), row_layout)
        mbarrier.arrive(out_empty.index(mine), count=1)
        row_delta = gl.load(exact_delta + read, mask=marked, other=row_delta)
        gl.store(written + statistics_row + tokens, row_delta, mask=exists)

        if not ONLY_DELTA:
            limit = valid_keys(batch, lengths, key_tokens)
            whole = (gl.maximum(limit, 1) - 1) // KEYS
            mbarrier.wait(q_full.index(mine), slot_phase)
            if IN_REGISTERS >= 1:
                queries = in_registers(queries, KEYS)
            if IN_REGISTERS == 2:
                out_grad = in_registers(out_grad, KEYS)
            q_grad = add_keys(
                nothing_yet(k_stages), queries, out_grad, k_stages, v_stages, stage, phase, k_full, k_empty,
                v_full, v_empty, row_log_sum_exp, row_delta, exponent_scale, limit - whole * KEYS, True,
            )  # fmt: skip
            stage, phase = following(stage, phase, STAGES)
            for _ in range(whole):
                q_grad = add_keys(
                    q_grad, queries, out_grad, k_stages, v_stages, stage, phase, k_full, k_empty, v_full,
                    v_empty, row_log_sum_exp, row_delta, exponent_scale, KEYS, False,
                )  # fmt: skip
                stage, phase = following(stage, phase, STAGES)
            mbarrier.arrive(q_empty.index(mine), count=1)
            tma.store_wait(0)
            factor = gl.full([ROWS], 1.0, gl.float32, row_layout) * scale
            store_parts(q_grad_tensors, staging, CONSUMER, scaled(q_grad, factor), batch, row, sequence % heads)
        mbarrier.arrive(grad_empty.index(mine), count=1)
        slot, slot_phase = following(slot, slot_phase, SLOTS)
    tma.store_wait(0)


_INTEGERS = ["heads", "query_tokens", "key_tokens", "query_tiles", "key_tiles", "tiles", "statistics_row"]


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_backward_queries_hopper_kernel(
    q_main,  # tensor descriptors of (B, Sq, H, D), boxes of ROWS tokens
    q_tail,  # None where the head's columns are one part; likewise below
    out_grad_main,
    out_grad_tail,
    out_main,
    out_tail,
    k_main,  # of (B, Sk, H, D), boxes of KEYS tokens
    k_tail,
    v_main,
    v_tail,
    q_grad_main,  # of (B, Sq, H, D), boxes of ROWS tokens; written unless ONLY_DELTA
    q_grad_tail,
    log_sum_exp,  # (B, H, Sq) fp32, as the forward kernel keeps it
    exact_delta,  # (B, H, Sq) fp32, of the rows that the forward marks
    statistics,  # (B · H, 2, statistics_row) fp32; written: log-sum-exp and delta, as the kernel below reads them
    lengths,  # (B,) int32, or None
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # of one head
    tiles,
    statistics_row,  # the number of queries, rounded up to whole 16 bytes
    scale,
    exponent_scale,  # scale · log2(e)
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,  # 0, 1 or 2: a consumer keeps nothing, its queries, or also its rows of out_grad
    ONLY_DELTA: gl.constexpr,  # q_grad is not required
):
    q = parts_of(q_main, q_tail)
    out_grad = parts_of(out_grad_main, out_grad_tail)
    out = parts_of(out_main, out_tail)
    k = parts_of(k_main, k_tail)
    v = parts_of(v_main, v_tail)
    q_grad = parts_of(q_grad_main, q_grad_tail)
    shared = (
        allocate(q, SLOTS * CONSUMERS),
        allocate(out_grad, SLOTS * CONSUMERS),
        allocate(out, SLOTS * CONSUMERS),
        allocate(k, STAGES),
        allocate(v, STAGES),
        allocate(q_grad, CONSUMERS),
    )
    q_full, q_empty = make_barriers(SLOTS * CONSUMERS, 1)
    grad_full, grad_empty = make_barriers(SLOTS * CONSUMERS, 1)
    out_full, out_empty = make_barriers(SLOTS * CONSUMERS, 1)
    k_full, k_empty = make_barriers(STAGES, CONSUMERS)
    v_full, v_empty = make_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    barriers = (q_full, q_empty, grad_full, grad_empty, out_full, out_empty, k_full, k_empty, v_full, v_empty)
    numbers = (heads, query_tokens, key_tokens, query_tiles, tiles, statistics_row, scale, exponent_scale)
    tensors = (q, out_grad, out, k, v)
    of_rows = (log_sum_exp, exact_delta, statistics)
    gl.warp_specialize(
        [
            (own_queries, (0, q_grad, shared, barriers, numbers, of_rows, lengths, IN_REGISTERS, ONLY_DELTA)),
            (own_queries, (1, q_grad, shared, barriers, numbers, of_rows, lengths, IN_REGISTERS, ONLY_DELTA)),
            (load_for_queries, (tensors, shared, barriers, numbers, lengths, ONLY_DELTA)),
        ],
        [4, 1],
        [240, 24],
    )


# dK and dV: rows are keys


@gluon.jit
def load_for_keys(tensors, shared, barriers, numbers, lengths):
    """The producer: loads the keys and values of each tile, then all queries and gradients of the output."""
    k, v, q, out_grad, statistics = tensors
    k_tiles, v_tiles, q_stages, out_grad_stages, statistics_stages, _k_staging, _v_staging = shared
    k_full, k_empty, v_full, v_empty, q_full, q_empty, grad_full, grad_empty = barriers
    heads, query_tokens, key_tokens, key_tiles, tiles, _scale, _exponent_scale = numbers
    SLOTS: gl.constexpr = k_tiles[0].shape[0] // CONSUMERS
    STAGES: gl.constexpr = q_stages[0].shape[0]
    QUERIES: gl.constexpr = q_stages[0].shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    slot_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // key_tiles
        batch = sequence // heads
        head = sequence % heads
        first_key = (tile % key_tiles) * CONSUMERS * ROWS
        for i in gl.static_range(CONSUMERS):
            mine = slot * CONSUMERS + i
            load_rows(k, k_tiles, mine, k_full, k_empty, slot_phase, batch, first_key + i * ROWS, head)
            load_rows(v, v_tiles, mine, v_full, v_empty, slot_phase, batch, first_key + i * ROWS, head)
        slot, slot_phase = following(slot, slot_phase, SLOTS)
        # A tile of padding only has gradients of zero.
        end = gl.where(first_key < valid_keys(batch, lengths, key_tokens), query_tokens, 0)
        for row in range(0, end, QUERIES):
            load_rows(q, q_stages, stage, q_full, q_empty, phase, batch, row, head)
            mbarrier.expect(q_full.index(stage), statistics.block_type.nbytes)
            async_load(statistics, [sequence, 0, row], q_full.index(stage), statistics_stages.index(stage))
            load_rows(out_grad, out_grad_stages, stage, grad_full, grad_empty, phase, batch, row, head)
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def where_real(out, real):
    """Each part of the columns, with zeros in the rows that are not real."""
    main = gl.where(gl.convert_layout(real, gl.SliceLayout(1, out[0].type.layout))[:, None], out[0], 0.0)
    if len(out) == 1:
        return (main,)
    else:
        return main, gl.where(gl.convert_layout(real, gl.SliceLayout(1, out[1].type.layout))[:, None], out[1], 0.0)


@gluon.jit
def own_keys(
    CONSUMER: gl.constexpr, k_grad_tensors, v_grad_tensors, shared, barriers, numbers, lengths,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A consumer of ROWS keys of each tile. Its scores are transposed."""
    k_tiles, v_tiles, q_stages, out_grad_stages, statistics_stages, k_staging, v_staging = shared
    k_full, k_empty, v_full, v_empty, q_full, q_empty, grad_full, grad_empty = barriers
    heads, query_tokens, key_tokens, key_tiles, tiles, scale, exponent_scale = numbers
    SLOTS: gl.constexpr = k_tiles[0].shape[0] // CONSUMERS
    STAGES: gl.constexpr = q_stages[0].shape[0]
    QUERIES: gl.constexpr = q_stages[0].shape[2]
    PARTS: gl.constexpr = len(q_stages)
    element: gl.constexpr = q_stages[0].dtype
    layout: gl.constexpr = product_layout(QUERIES)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    slot_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // key_tiles
        batch = sequence // heads
        first_key = (tile % key_tiles) * CONSUMERS * ROWS
        row = first_key + CONSUMER * ROWS
        mine = slot * CONSUMERS + CONSUMER
        limit = valid_keys(batch, lengths, key_tokens)
        k_grad = nothing_yet(q_stages)
        v_grad = nothing_yet(q_stages)
        keys = tile_of(k_tiles, mine)
        values = tile_of(v_tiles, mine)
        mbarrier.wait(k_full.index(mine), slot_phase)
        if IN_REGISTERS >= 1:
            keys = in_registers(keys, QUERIES)
            mbarrier.arrive(k_empty.index(mine), count=1)
        mbarrier.wait(v_full.index(mine), slot_phase)
        if IN_REGISTERS == 2:
            values = in_registers(values, QUERIES)
            mbarrier.arrive(v_empty.index(mine), count=1)
        for _ in range(0, gl.where(first_key < limit, query_tokens, 0), QUERIES):
            mbarrier.wait(q_full.index(stage), phase)
            mbarrier.wait(grad_full.index(stage), phase)
            scores = issue_scores(keys, q_stages, stage, 0, QUERIES)
            weights_grad = issue_scores(values, out_grad_stages, stage, 0, QUERIES)
            statistics = statistics_stages.index(stage).reshape([2 * QUERIES])
            column_log_sum_exp = statistics.slice(0, QUERIES).load(gl.SliceLayout(0, layout))
            column_delta = statistics.slice(QUERIES, QUERIES).load(gl.SliceLayout(0, layout))
            scores = warpgroup_mma_wait(PARTS, deps=(scores,))
            weights = gl.exp2(scores * exponent_scale - column_log_sum_exp[None, :])
            # Already complete. The branch of this wait keeps the assembler from moving the next wait before the
            # exponentials.
            mbarrier.wait(grad_full.index(stage), phase)
            v_grad = issue_products(weights.to(element), out_grad_stages, stage, v_grad, 0)
            weights_grad = warpgroup_mma_wait(PARTS, deps=(weights_grad,))
            scores_grad = score_gradients(weights, weights_grad, column_delta[None, :], False)
            k_grad = issue_products(scores_grad.to(element), q_stages, stage, k_grad, 0)
            v_grad = wait_for_all(v_grad)
            k_grad = wait_for_all(k_grad)
            mbarrier.arrive(grad_empty.index(stage), count=1)
            mbarrier.arrive(q_empty.index(stage), count=1)
            stage, phase = following(stage, phase, STAGES)
        if IN_REGISTERS < 1:
            mbarrier.arrive(k_empty.index(mine), count=1)
        if IN_REGISTERS < 2:
            mbarrier.arrive(v_empty.index(mine), count=1)
        slot, slot_phase = following(slot, slot_phase, SLOTS)

        real = row + gl.arange(0, ROWS, row_layout) < limit
        tma.store_wait(0)
        k_grad = where_real(scaled(k_grad, gl.where(real, scale, 0.0)), real)
        store_parts(k_grad_tensors, k_staging, CONSUMER, k_grad, batch, row, sequence % heads)
        store_parts(v_grad_tensors, v_staging, CONSUMER, where_real(v_grad, real), batch, row, sequence % heads)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_backward_keys_hopper_kernel(
    k_main,  # tensor descriptors of (B, Sk, H, D), boxes of ROWS tokens
    k_tail,  # None where the head's columns are one part; likewise below
    v_main,
    v_tail,
    q_main,  # of (B, Sq, H, D), boxes of QUERIES tokens
    q_tail,
    out_grad_main,
    out_grad_tail,
    k_grad_main,  # of (B, Sk, H, D), boxes of ROWS tokens; written
    k_grad_tail,
    v_grad_main,
    v_grad_tail,
    statistics,  # of (B · H, 2, Sq) fp32, as the kernel above writes them, boxes of QUERIES queries
    lengths,  # (B,) int32, or None
    heads,
    query_tokens,
    key_tokens,
    key_tiles,  # of one head
    tiles,
    scale,
    exponent_scale,  # scale · log2(e)
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,  # 0, 1 or 2: a consumer keeps nothing, its keys, or also its values
):
    k = parts_of(k_main, k_tail)
    v = parts_of(v_main, v_tail)
    q = parts_of(q_main, q_tail)
    out_grad = parts_of(out_grad_main, out_grad_tail)
    k_grad = parts_of(k_grad_main, k_grad_tail)
    v_grad = parts_of(v_grad_main, v_grad_tail)
    shared = (
        allocate(k, SLOTS * CONSUMERS),
        allocate(v, SLOTS * CONSUMERS),
        allocate(q, STAGES),
        allocate(out_grad, STAGES),
        allocate((statistics,), STAGES)[0],
        allocate(k_grad, CONSUMERS),
        allocate(v_grad, CONSUMERS),
    )
    k_full, k_empty = make_barriers(SLOTS * CONSUMERS, 1)
    v_full, v_empty = make_barriers(SLOTS * CONSUMERS, 1)
    q_full, q_empty = make_barriers(STAGES, CONSUMERS, 2)  # of the queries and of their statistics
    grad_full, grad_empty = make_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    barriers = (k_full, k_empty, v_full, v_empty, q_full, q_empty, grad_full, grad_empty)
    numbers = (heads, query_tokens, key_tokens, key_tiles, tiles, scale, exponent_scale)
    tensors = (k, v, q, out_grad, statistics)
    gl.warp_specialize(
        [
            (own_keys, (0, k_grad, v_grad, shared, barriers, numbers, lengths, IN_REGISTERS)),
            (own_keys, (1, k_grad, v_grad, shared, barriers, numbers, lengths, IN_REGISTERS)),
            (load_for_keys, (tensors, shared, barriers, numbers, lengths)),
        ],
        [4, 1],
        [240, 24],
    )
