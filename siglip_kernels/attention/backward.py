"""Attention, backward, in two kernels without atomics: programs of one own queries, programs of the other own keys.

With P = softmax(scale · q kᵀ) and delta = rowsum(dO ∘ O) (FlashAttention-2, arXiv 2307.08691, algorithm 2):

    dV = Pᵀ dO        dS = P ∘ (dO Vᵀ − delta)        dQ = scale · dS K        dK = scale · dSᵀ Q

Both kernels recompute P from the log-sum-exp. The first completes delta, which the second reads.

dS is a difference that should vanish where one key takes all the weight or where values are nearly equal. In half
precision, a difference that is within the rounding of fp32 sums counts as zero, and for rows in which one key has more
than an eighth of the weight, a kernel before these two makes delta exact (exact_delta.py). In fp32 that kernel does so
for every row, and also gives rowsum(P), by which P is divided, because among scores of 1e4 the log-sum-exp has only
three decimals. Products and sums are also rounded separately in fp32, as eager rounds them. In total fp32 takes nine
products of tiles, half precision seven, and two more for the rows that need them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.exact_delta import exact_delta, row_products, weights_of_tile
from siglip_kernels.attention.forward import exponent_scale, is_marked
from siglip_kernels.attention.sequences import Sequences, kernel_arguments, programs_of_head, tile_of_program
from siglip_kernels.attention.tiles import accumulate, inner_products, load_tile, store_tile, stride_names
from siglip_kernels.device import facts, precision
from siglip_kernels.interpreter import INTERPRETED, narrow
from siglip_kernels.strides import strides_of

_STRIDES = stride_names("q", "k", "v", "out_grad")
# Not specialised on: see forward.py.
_INTEGERS = [*_STRIDES, "heads", "query_tokens", "key_tokens", "query_tiles", "key_tiles", "sequences"]


@triton.jit
def score_gradients(weights, weights_grad, row_delta, EXACT: tl.constexpr):
    """P ∘ (dP − delta). In half precision a difference that may be the rounding of two fp32 sums counts as zero.

    NaN and inf are kept: a loss scaler has to see that a gradient has overflowed.
    """
    difference = weights_grad - row_delta
    if not EXACT:
        difference = tl.where(tl.abs(difference) < tl.abs(row_delta) * 2**-16, 0.0, difference)
    return weights * difference


@triton.jit
def products_by_key(a_main, a_tail, b_main, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ [keys, queries], bit for bit as the first kernel computes it [queries, keys]: delta and P depend on that.

    A GPU adds the terms of a product in the order of the columns; numpy's order depends on which factor comes first.
    """
    if INTERPRETED:
        return tl.trans(inner_products(b_main, b_tail, a_main, a_tail, TAIL, PRECISION))
    else:
        return inner_products(a_main, a_tail, b_main, b_tail, TAIL, PRECISION)


@triton.jit
def add_tile(
    q_main, q_tail, out_grad_main, out_grad_tail, k, v, k_offsets, v_offsets, key_is_valid,
    row_log_sum_exp, row_delta, normaliser, exponent_scale, q_grad_main, q_grad_tail,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dQ / scale after one more tile of keys. key_is_valid: None if every key is."""
    weights, weights_grad, k_main, k_tail = weights_of_tile(
        q_main, q_tail, out_grad_main, out_grad_tail, k, v, k_offsets, v_offsets, key_is_valid,
        row_log_sum_exp, normaliser, exponent_scale,
        HEAD_DIM, MAIN, TAIL, EXACT, PRECISION,
    )  # fmt: skip
    scores_grad = narrow(score_gradients(weights, weights_grad, row_delta[:, None], EXACT), k_main.dtype)
    return accumulate(scores_grad, k_main, k_tail, q_grad_main, q_grad_tail, TAIL, PRECISION)


@triton.jit(do_not_specialize=_INTEGERS)
def attention_backward_queries_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out_grad,  # (B, Sq, H, D)
    out,  # (B, Sq, H, D), contiguous
    log_sum_exp,  # (B, H, Sq) fp32, as the forward kernel keeps it
    q_grad,  # (B, Sq, H, D), contiguous, or if PACKED a part of (B, Sq, 3, H, D); written
    delta,  # (B, H, Sq) fp32, read for marked rows, written for the others. If EXACT: (B, H, 2, Sq), see exact_delta.py
    lengths,  # (B,) int32
    starts_of_queries,  # of packed sequences, see sequences.py; B is 1
    starts_of_keys,
    sequences,
    q_batch_stride,  # strides in UNIT elements
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    out_grad_batch_stride,
    out_grad_token_stride,
    out_grad_head_stride,
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # programs of one head
    scale,
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    SAME_STRIDE: tl.constexpr,  # of k and v: see forward.py
    ADVANCE_OFFSETS: tl.constexpr,  # of k and v: see forward.py
    HAS_LENGTHS: tl.constexpr,
    PACKED_SEQUENCES: tl.constexpr,
    PACKED: tl.constexpr,  # the gradients are parts of one tensor
    ONLY_DELTA: tl.constexpr,  # q_grad is not required
    EXACT: tl.constexpr,  # delta is exact for every row, and P is divided by its sum
    PRECISION: tl.constexpr,
):
    # A program owns BLOCK_Q queries of one head of one sample and loops over the keys.
    program = tl.program_id(0)
    sequence = program // query_tiles
    first_query, query_end, keys_start, limit = tile_of_program(
        program % query_tiles,
        starts_of_queries,
        starts_of_keys,
        sequences,
        query_tokens,
        key_tokens,
        BLOCK_Q,
        PACKED_SEQUENCES,
    )
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    if PACKED_SEQUENCES and first_query == query_end:
        return

    k += batch * k_batch_stride * UNIT + head * k_head_stride * UNIT + keys_start * k_token_stride * UNIT
    v += batch * v_batch_stride * UNIT + head * v_head_stride * UNIT + keys_start * v_token_stride * UNIT
    q += batch * q_batch_stride * UNIT + head * q_head_stride * UNIT
    q += first_query.to(tl.int64) * q_token_stride * UNIT
    out_grad += batch * out_grad_batch_stride * UNIT + head * out_grad_head_stride * UNIT
    out_grad += first_query.to(tl.int64) * out_grad_token_stride * UNIT
    contiguous = (batch * query_tokens + first_query) * heads * HEAD_DIM + head * HEAD_DIM
    row = heads * HEAD_DIM
    PARTS: tl.constexpr = 3 if PACKED else 1
    k_step = k_token_stride.to(tl.int64) * UNIT
    v_step = v_token_stride.to(tl.int64) * UNIT
    if WIDE:
        q_token_stride = q_token_stride.to(tl.int64)
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)
        out_grad_token_stride = out_grad_token_stride.to(tl.int64)
        row = row.to(tl.int64)

    queries = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    query_is_valid = queries < query_end - first_query
    out_grad_offsets = queries * (out_grad_token_stride * UNIT)
    out_grad_main, out_grad_tail = load_tile(out_grad, out_grad_offsets, query_is_valid, HEAD_DIM, MAIN, TAIL)
    statistics = sequence.to(tl.int64) * query_tokens + first_query + queries
    row_log_sum_exp = tl.load(log_sum_exp + statistics, mask=query_is_valid, other=float("inf"))
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_tokens)
    q_main, q_tail = load_tile(q, queries * (q_token_stride * UNIT), query_is_valid, HEAD_DIM, MAIN, TAIL)
    k_offsets = keys * (k_token_stride * UNIT)
    v_offsets = k_offsets if SAME_STRIDE else keys * (v_token_stride * UNIT)

    if EXACT:
        delta += sequence.to(tl.int64) * query_tokens
        row_delta = tl.load(delta + statistics, mask=query_is_valid, other=0.0)
        normaliser = tl.load(delta + query_tokens + statistics, mask=query_is_valid, other=0.0)
    else:
        normaliser = None
        out_offsets = queries.to(tl.int64) * row  # not as for q_grad: those would take registers through the loop
        row_delta = row_products(
            out + contiguous, out_offsets, out_grad_main, out_grad_tail, query_is_valid, HEAD_DIM, MAIN, TAIL
        )
        exact = query_is_valid & (is_marked(row_log_sum_exp) == 1)
        row_delta = tl.load(delta + statistics, mask=exact, other=row_delta)
        tl.store(delta + statistics, row_delta, mask=query_is_valid)

    if not ONLY_DELTA:
        q_grad_main = tl.zeros([BLOCK_Q, MAIN], tl.float32)
        q_grad_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 16], tl.float32)
        # The tile with the mask first, as in forward.py; in fp32 each copy of a tile's code would take registers.
        end = limit
        if not EXACT:
            end = tl.maximum(tl.cdiv(limit, BLOCK_K) - 1, 0) * BLOCK_K
            q_grad_main, q_grad_tail = add_tile(
                q_main, q_tail, out_grad_main, out_grad_tail,
                k + end * k_step, v + end * v_step, k_offsets, v_offsets, keys < limit - end,
                row_log_sum_exp, row_delta, normaliser, exponent_scale, q_grad_main, q_grad_tail,
                HEAD_DIM, MAIN, TAIL, EXACT, PRECISION,
            )  # fmt: skip
        for first_key in tl.range(0, end, BLOCK_K):
            q_grad_main, q_grad_tail = add_tile(
                q_main, q_tail, out_grad_main, out_grad_tail,
                k, v, k_offsets, v_offsets, (keys < limit - first_key) if EXACT else None,
                row_log_sum_exp, row_delta, normaliser, exponent_scale, q_grad_main, q_grad_tail,
                HEAD_DIM, MAIN, TAIL, EXACT, PRECISION,
            )  # fmt: skip
            if ADVANCE_OFFSETS:
                k_offsets += BLOCK_K * (k_token_stride * UNIT)
                v_offsets = k_offsets if SAME_STRIDE else v_offsets + BLOCK_K * (v_token_stride * UNIT)
            else:
                k += BLOCK_K * k_step
                v += BLOCK_K * v_step
        store_tile(
            q_grad + (batch * query_tokens + first_query) * heads * (HEAD_DIM * PARTS) + head * HEAD_DIM,
            queries * (row * PARTS),
            first_query + queries < query_end,  # see attention_backward_keys_kernel
            q_grad_main * scale,
            q_grad_tail * scale,
            HEAD_DIM,
            MAIN,
            TAIL,
        )


@triton.jit(do_not_specialize=_INTEGERS)
def attention_backward_keys_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out_grad,  # (B, Sq, H, D)
    log_sum_exp,  # (B, H, Sq) fp32
    delta,  # (B, H, Sq) fp32, or (B, H, 2, Sq), as the kernel above writes it
    k_grad,  # (B, Sk, H, D), contiguous, or if PACKED a part of (B, Sk, 3, H, D); written
    v_grad,  # as k_grad; written
    lengths,  # (B,) int32
    starts_of_queries,  # of packed sequences, see sequences.py; B is 1
    starts_of_keys,
    sequences,
    q_batch_stride,  # strides in UNIT elements
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    out_grad_batch_stride,
    out_grad_token_stride,
    out_grad_head_stride,
    heads,
    query_tokens,
    key_tokens,
    key_tiles,  # programs of one head
    scale,
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    ADVANCE_OFFSETS: tl.constexpr,  # of q and out_grad: see forward.py
    HAS_LENGTHS: tl.constexpr,
    PACKED_SEQUENCES: tl.constexpr,
    PACKED: tl.constexpr,  # the gradients are parts of one tensor
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program owns BLOCK_K keys of one head of one sample and loops over the queries. Its scores are transposed.
    program = tl.program_id(0)
    sequence = program // key_tiles
    first_key, key_end, queries_start, query_count = tile_of_program(
        program % key_tiles,
        starts_of_keys,
        starts_of_queries,
        sequences,
        key_tokens,
        query_tokens,
        BLOCK_K,
        PACKED_SEQUENCES,
    )
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    if PACKED_SEQUENCES and first_key == key_end:
        return

    q += batch * q_batch_stride * UNIT + head * q_head_stride * UNIT + queries_start * q_token_stride * UNIT
    out_grad += batch * out_grad_batch_stride * UNIT + head * out_grad_head_stride * UNIT
    out_grad += queries_start * out_grad_token_stride * UNIT
    k += batch * k_batch_stride * UNIT + head * k_head_stride * UNIT + first_key.to(tl.int64) * k_token_stride * UNIT
    v += batch * v_batch_stride * UNIT + head * v_head_stride * UNIT + first_key.to(tl.int64) * v_token_stride * UNIT
    log_sum_exp += sequence.to(tl.int64) * query_tokens + queries_start
    delta += sequence.to(tl.int64) * query_tokens * (2 if EXACT else 1) + queries_start
    row = heads * (HEAD_DIM * (3 if PACKED else 1))  # of k_grad and v_grad
    q_step = q_token_stride.to(tl.int64) * UNIT
    out_grad_step = out_grad_token_stride.to(tl.int64) * UNIT
    if WIDE:
        q_token_stride = q_token_stride.to(tl.int64)
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)
        out_grad_token_stride = out_grad_token_stride.to(tl.int64)
        row = row.to(tl.int64)

    limit = key_end
    query_limit = query_count
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_tokens)
        query_limit = tl.where(first_key < limit, query_count, 0)  # a tile of padding only has gradients of zero

    queries = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    key_is_valid = keys < limit - first_key
    k_main, k_tail = load_tile(k, keys * (k_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
    v_main, v_tail = load_tile(v, keys * (v_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
    q_offsets = queries * (q_token_stride * UNIT)
    out_grad_offsets = queries * (out_grad_token_stride * UNIT)
    k_grad_main = tl.zeros([BLOCK_K, MAIN], tl.float32)
    k_grad_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 16], tl.float32)
    v_grad_main = tl.zeros([BLOCK_K, MAIN], tl.float32)
    v_grad_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 16], tl.float32)
    for first_query in tl.range(0, query_limit, BLOCK_Q):
        # Beyond the last query, q and out_grad are zeros, and every weight is 2^(0 − inf) = 0.
        query_is_valid = queries < query_count - first_query
        q_tile = q if ADVANCE_OFFSETS else q + first_query * q_step
        out_grad_tile = out_grad if ADVANCE_OFFSETS else out_grad + first_query * out_grad_step
        q_main, q_tail = load_tile(q_tile, q_offsets, query_is_valid, HEAD_DIM, MAIN, TAIL)
        row_log_sum_exp = tl.load(log_sum_exp + first_query + queries, mask=query_is_valid, other=float("inf"))
        scores = products_by_key(k_main, k_tail, q_main, q_tail, TAIL, PRECISION)  # [BLOCK_K, BLOCK_Q]
        weights = tl.exp2(scores * exponent_scale - row_log_sum_exp[None, :])
        if EXACT:
            weights *= tl.load(delta + query_tokens + first_query + queries, mask=query_is_valid, other=0.0)[None, :]
        out_grad_main, out_grad_tail = load_tile(out_grad_tile, out_grad_offsets, query_is_valid, HEAD_DIM, MAIN, TAIL)
        row_delta = tl.load(delta + first_query + queries, mask=query_is_valid, other=0.0)
        # With one block of columns, dP before the product for dV leaves registers for wider tiles; with two it spills.
        if TAIL == 0:
            weights_grad = products_by_key(v_main, v_tail, out_grad_main, out_grad_tail, TAIL, PRECISION)
        v_grad_main, v_grad_tail = accumulate(
            narrow(weights, v_main.dtype),
            out_grad_main,
            out_grad_tail,
            v_grad_main,
            v_grad_tail,
            TAIL,
            PRECISION,
        )
        if TAIL > 0:
            weights_grad = products_by_key(v_main, v_tail, out_grad_main, out_grad_tail, TAIL, PRECISION)
        scores_grad = score_gradients(weights, weights_grad, row_delta[None, :], EXACT)
        k_grad_main, k_grad_tail = accumulate(
            narrow(scores_grad, q_main.dtype),
            q_main,
            q_tail,
            k_grad_main,
            k_grad_tail,
            TAIL,
            PRECISION,
        )
        if ADVANCE_OFFSETS:
            q_offsets += BLOCK_Q * (q_token_stride * UNIT)
            out_grad_offsets += BLOCK_Q * (out_grad_token_stride * UNIT)

    k_grad_main, k_grad_tail = k_grad_main * scale, k_grad_tail * scale
    if HAS_LENGTHS:  # padded keys were loaded as zeros, and their weights are meaningless
        real = key_is_valid[:, None]
        k_grad_main, k_grad_tail = tl.where(real, k_grad_main, 0.0), tl.where(real, k_grad_tail, 0.0)
        v_grad_main, v_grad_tail = tl.where(real, v_grad_main, 0.0), tl.where(real, v_grad_tail, 0.0)
    first = (batch * key_tokens + first_key) * row + head * HEAD_DIM
    key_exists = first_key + keys < key_end  # not as above: a mask kept through the loop takes registers
    store_tile(k_grad + first, keys * row, key_exists, k_grad_main, k_grad_tail, HEAD_DIM, MAIN, TAIL)
    store_tile(v_grad + first, keys * row, key_exists, v_grad_main, v_grad_tail, HEAD_DIM, MAIN, TAIL)


def gradients_to_write(
    q: Tensor, k: Tensor, needs_q: bool, needs_k_or_v: bool, packed_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, unwritten: parts of packed_grad, (B, S, 3, H, D), if given, else of their own.

    One that is not needed is an empty tensor.
    """
    parts = (None,) * 3 if packed_grad is None else packed_grad.unbind(2)
    needed = ((q, needs_q), (k, needs_k_or_v), (k, needs_k_or_v))
    q_grad, k_grad, v_grad = (
        part if part is not None and need else torch.empty(like.shape if need else 0, dtype=q.dtype, device=q.device)
        for part, (like, need) in zip(parts, needed, strict=True)
    )
    return q_grad, k_grad, v_grad


def attention_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    lengths: Tensor | None,
    scale: float,
    needs_q: bool,
    needs_k_or_v: bool,
    packed_grad: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernels. out_grad, q, k, v: unit stride along D. Returns what `gradients_to_write` says.

    sequences: as in `attention_forward`.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    q_grad, k_grad, v_grad = gradients_to_write(q, k, needs_q, needs_k_or_v, packed_grad)
    if batch * heads == 0:
        return q_grad, k_grad, v_grad
    gpu = facts(q.device)
    exact = q.dtype == torch.float32
    parts = 1 if packed_grad is None else 3
    delta = torch.empty((batch, heads, 2 if exact else 1, query_tokens), dtype=torch.float32, device=q.device)
    main, tail = config.split_head_dim(head_dim)
    strides = strides_of(q, k, v, out_grad)
    size = (query_tokens, key_tokens) if sequences is None else sequences.typical
    sizes = (q.element_size(), head_dim, *size, sequences is not None)
    same_in_both: dict[str, Any] = dict(
        q=q,
        k=k,
        v=v,
        out_grad=out_grad,
        log_sum_exp=log_sum_exp,
        delta=delta,
        lengths=lengths,
        **kernel_arguments(sequences),
        **dict(zip(_STRIDES, strides.values, strict=True)),
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        scale=scale,
        exponent_scale=exponent_scale(scale),
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        UNIT=strides.unit,
        HAS_LENGTHS=lengths is not None,
        PACKED=packed_grad is not None,
        EXACT=exact,
        PRECISION=precision(q.dtype),
        enable_fp_fusion=not exact,  # in fp32, products and sums are rounded separately
    )
    if query_tokens > 0:
        exact_delta(out_grad, q, k, v, out, log_sum_exp, delta, lengths, scale, sequences)
    if query_tokens > 0 and (needs_q or not exact):
        tile = config.tile("backward_queries", gpu, *sizes)
        query_tiles = programs_of_head(query_tokens, tile.queries, sequences)
        attention_backward_queries_kernel[(config.grid(batch * heads * query_tiles),)](
            **same_in_both,
            out=out,
            q_grad=q_grad,
            query_tiles=query_tiles,
            BLOCK_Q=tile.queries,
            BLOCK_K=tile.keys,
            WIDE=strides.wide or parts * heads * head_dim * tile.queries >= 2**31,
            SAME_STRIDE=k.stride(1) == v.stride(1),
            ADVANCE_OFFSETS=config.advances_offsets(gpu, k, v),
            ONLY_DELTA=not needs_q,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    if needs_k_or_v and key_tokens > 0:
        tile = config.tile("backward_keys", gpu, *sizes)
        key_tiles = programs_of_head(key_tokens, tile.keys, sequences)
        attention_backward_keys_kernel[(config.grid(batch * heads * key_tiles),)](
            **same_in_both,
            k_grad=k_grad,
            v_grad=v_grad,
            key_tiles=key_tiles,
            BLOCK_Q=tile.queries,
            BLOCK_K=tile.keys,
            WIDE=strides.wide or parts * heads * head_dim * tile.keys >= 2**31,
            ADVANCE_OFFSETS=config.advances_offsets(gpu, q, out_grad),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    return q_grad, k_grad, v_grad
