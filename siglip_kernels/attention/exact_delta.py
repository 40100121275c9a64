"""delta = rowsum(dO ∘ O), exactly, for the rows of attention's backward that need it.

A row of dS = P ∘ (dO Vᵀ − delta) sums to zero, so with an approximate delta the sum of a computed row, divided by that
of P, is delta's error. That takes a pass over the keys, of two products of tiles.

In half precision, delta comes from the rounded O, as in FlashAttention, and suffices unless one key of a row has much
of the weight: then dS is so small beside its two terms that the rounding of O would show. The forward marks rows in
which one has more than an eighth (with a half, gradients of q had up to 2.6 times eager's error, measured in fp16). A
trained model has some in nearly every tile of queries. A program here collects the marked rows of SPAN queries of one
head, and makes the pass for tiles of these alone. In fp32 it makes the pass for all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.forward import exponent_scale, is_marked
from siglip_kernels.attention.sequences import Sequences, kernel_arguments, programs_of_head, tile_of_program
from siglip_kernels.attention.tiles import inner_products, load_tile, stride_names
from siglip_kernels.device import facts, precision
from siglip_kernels.strides import strides_of

_STRIDES = stride_names("q", "k", "v", "out_grad")
# Not specialised on: see forward.py.
_INTEGERS = [*_STRIDES, "heads", "query_tokens", "key_tokens", "spans", "sequences"]
_SPAN = 512  # queries of a program; a span's last tile of marked rows is partly empty


@triton.jit
def weights_of_tile(
    q_main, q_tail, out_grad_main, out_grad_tail, k, v, k_offsets, v_offsets, key_is_valid,
    row_log_sum_exp, normaliser, exponent_scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """P and dP [BLOCK_Q, BLOCK_K], and the tile of k. key_is_valid: None if every key is."""
    k_main, k_tail = load_tile(k, k_offsets, key_is_valid, HEAD_DIM, MAIN, TAIL)
    scores = inner_products(q_main, q_tail, k_main, k_tail, TAIL, PRECISION)
    weights = tl.exp2(scores * exponent_scale - row_log_sum_exp[:, None])
    if NORMALISE:
        weights *= normaliser[:, None]
    if key_is_valid is not None:
        weights = tl.where(key_is_valid[None, :], weights, 0.0)
    v_main, v_tail = load_tile(v, v_offsets, key_is_valid, HEAD_DIM, MAIN, TAIL)
    weights_grad = inner_products(out_grad_main, out_grad_tail, v_main, v_tail, TAIL, PRECISION)
    return weights, weights_grad, k_main, k_tail


@triton.jit
def row_products(
    out, out_offsets, out_grad_main, out_grad_tail, valid,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """rowsum(dO ∘ O) for a tile of out, fp32 [rows]."""
    out_main, out_tail = load_tile(out, out_offsets, valid, HEAD_DIM, MAIN, TAIL)
    products = tl.sum(out_main.to(tl.float32) * out_grad_main.to(tl.float32), 1)
    if TAIL > 0:
        products += tl.sum(out_tail.to(tl.float32) * out_grad_tail.to(tl.float32), 1)
    return products


@triton.jit
def collect_marked(rows, log_sum_exp, query_limit, SPAN: tl.constexpr):
    """Writes the numbers of the marked rows among the first query_limit ones, in order; returns how many they are."""
    row = tl.arange(0, SPAN)
    marked = is_marked(tl.load(log_sum_exp + row, mask=row < query_limit, other=float("inf")))
    tl.store(rows + tl.cumsum(marked, 0) - 1, row, mask=marked == 1)
    tl.debug_barrier()  # other threads of the program read them
    return tl.sum(marked, 0)


@triton.jit
def add_sums(
    excess, total, q_main, q_tail, out_grad_main, out_grad_tail, k, v, k_offsets, v_offsets, key_is_valid,
    row_log_sum_exp, row_delta, exponent_scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The sums of the rows of dS and of P after one more tile of keys. key_is_valid: None if every key is."""
    weights, weights_grad, _, _ = weights_of_tile(
        q_main, q_tail, out_grad_main, out_grad_tail, k, v, k_offsets, v_offsets, key_is_valid,
        row_log_sum_exp, None, exponent_scale,
        HEAD_DIM, MAIN, TAIL, False, PRECISION,
    )  # fmt: skip
    return excess + tl.sum(weights * (weights_grad - row_delta[:, None]), 1), total + tl.sum(weights, 1)


@triton.jit(do_not_specialize=_INTEGERS)
def attention_backward_delta_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out_grad,  # (B, Sq, H, D)
    out,  # (B, Sq, H, D), contiguous
    log_sum_exp,  # (B, H, Sq) fp32, as the forward kernel keeps it
    delta,  # (B, H, Sq) fp32; marked rows are written. If EXACT: (B, H, 2, Sq), delta and the factors that normalise P
    rows,  # (B, H, Sq) int32; overwritten. If EXACT: None
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
    spans,  # programs of one head
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    SAME_STRIDE: tl.constexpr,  # of k and v: see forward.py
    HAS_LENGTHS: tl.constexpr,
    PACKED_SEQUENCES: tl.constexpr,
    EXACT: tl.constexpr,  # all rows, not the marked ones
    PRECISION: tl.constexpr,
):
    # A program owns SPAN queries of one head of one sample.
    program = tl.program_id(0)
    sequence = program // spans
    first_query, query_end, keys_start, limit = tile_of_program(
        program % spans, starts_of_queries, starts_of_keys, sequences, query_tokens, key_tokens, SPAN, PACKED_SEQUENCES
    )
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    if PACKED_SEQUENCES and first_query == query_end:
        return
    statistics = sequence.to(tl.int64) * query_tokens + first_query
    log_sum_exp += statistics
    delta += statistics + (sequence.to(tl.int64) * query_tokens if EXACT else 0)
    count = tl.minimum(query_end - first_query, SPAN)
    if not EXACT:
        rows += statistics
        count = collect_marked(rows, log_sum_exp, count, SPAN)

    q += batch * q_batch_stride * UNIT + head * q_head_stride * UNIT
    q += first_query.to(tl.int64) * q_token_stride * UNIT
    k += batch * k_batch_stride * UNIT + head * k_head_stride * UNIT + keys_start * k_token_stride * UNIT
    v += batch * v_batch_stride * UNIT + head * v_head_stride * UNIT + keys_start * v_token_stride * UNIT
    out_grad += batch * out_grad_batch_stride * UNIT + head * out_grad_head_stride * UNIT
    out_grad += first_query.to(tl.int64) * out_grad_token_stride * UNIT
    out += (batch * query_tokens + first_query) * heads * HEAD_DIM + head * HEAD_DIM
    k_step = k_token_stride.to(tl.int64) * UNIT
    v_step = v_token_stride.to(tl.int64) * UNIT
    if WIDE:
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_tokens)
    keys = tl.arange(0, BLOCK_K)
    k_offsets = keys * (k_token_stride * UNIT)
    v_offsets = k_offsets if SAME_STRIDE else keys * (v_token_stride * UNIT)

    for first in tl.range(0, count, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        valid = row < count
        if not EXACT:
            row = tl.load(rows + row, mask=valid, other=0)
        far_row = row.to(tl.int64)  # a span has more rows than the tiles that WIDE speaks of
        row_log_sum_exp = tl.load(log_sum_exp + row, mask=valid, other=float("inf"))
        q_main, q_tail = load_tile(q, far_row * (q_token_stride * UNIT), valid, HEAD_DIM, MAIN, TAIL)
        out_grad_main, out_grad_tail = load_tile(
            out_grad, far_row * (out_grad_token_stride * UNIT), valid, HEAD_DIM, MAIN, TAIL
        )
        row_delta = row_products(
            out, far_row * (heads * HEAD_DIM), out_grad_main, out_grad_tail, valid, HEAD_DIM, MAIN, TAIL
        )
        excess = tl.zeros([BLOCK_Q], tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        # The tile with the mask first, as in forward.py.
        end = limit
        if not EXACT:
            end = tl.maximum(tl.cdiv(limit, BLOCK_K) - 1, 0) * BLOCK_K
            excess, total = add_sums(
                excess, total, q_main, q_tail, out_grad_main, out_grad_tail,
                k + end * k_step, v + end * v_step, k_offsets, v_offsets, keys < limit - end,
                row_log_sum_exp, row_delta, exponent_scale,
                HEAD_DIM, MAIN, TAIL, PRECISION,
            )  # fmt: skip
        for first_key in tl.range(0, end, BLOCK_K):
            excess, total = add_sums(
                excess, total, q_main, q_tail, out_grad_main, out_grad_tail,
                k + first_key * k_step, v + first_key * v_step, k_offsets, v_offsets,
                (keys < limit - first_key) if EXACT else None,
                row_log_sum_exp, row_delta, exponent_scale,
                HEAD_DIM, MAIN, TAIL, PRECISION,
            )  # fmt: skip
        normaliser = 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(delta + row, row_delta + excess * normaliser, mask=valid)
        if EXACT:
            tl.store(delta + query_tokens + row, normaliser, mask=valid)


def exact_delta(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    lengths: Tensor | None,
    scale: float,
    sequences: Sequences | None = None,
) -> None:
    """Launches the kernel, which writes delta: of marked rows, or in fp32 of all. At least one query and sequence.

    out_grad, q, k, v: unit stride along D. log_sum_exp: as the forward keeps it. delta: (B, H, 1, Sq) fp32, or in fp32
    (B, H, 2, Sq), delta and the factors by which P is to be multiplied. sequences: as in `attention_forward`.
    """
    batch, query_tokens, heads, head_dim = q.shape
    exact = q.dtype.itemsize == 4
    size = (query_tokens, k.shape[1]) if sequences is None else sequences.typical
    tile = config.delta_tile(facts(q.device), q.element_size(), head_dim, *size, sequences is not None)
    fits = sequences is not None and max(size) <= tile.queries  # a whole sequence, mostly
    span = tile.queries if exact or fits else _SPAN
    spans = programs_of_head(query_tokens, span, sequences)
    main, tail = config.split_head_dim(head_dim)
    strides = strides_of(q, k, v, out_grad)
    attention_backward_delta_kernel[(config.grid(batch * heads * spans),)](
        q=q,
        k=k,
        v=v,
        out_grad=out_grad,
        out=out,
        log_sum_exp=log_sum_exp,
        delta=delta,
        rows=None if exact else log_sum_exp.new_empty(log_sum_exp.shape, dtype=torch.int32),
        lengths=lengths,
        **kernel_arguments(sequences),
        **dict(zip(_STRIDES, strides.values, strict=True)),
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=k.shape[1],
        spans=spans,
        exponent_scale=exponent_scale(scale),
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        SPAN=span,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        UNIT=strides.unit,
        WIDE=strides.wide,
        SAME_STRIDE=k.stride(1) == v.stride(1),
        HAS_LENGTHS=lengths is not None,
        EXACT=exact,
        PRECISION=precision(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        enable_fp_fusion=not exact,  # in fp32, products and sums are rounded separately
    )
