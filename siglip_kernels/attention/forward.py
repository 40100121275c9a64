"""Attention, forward: out = softmax(scale · q kᵀ) v, exactly, in one pass over the keys.

Tiles keep the running maximum and sum of Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv
1805.02867), as in FlashAttention-2 (Dao, arXiv 2307.08691). Exponentials are powers of two: log2(e) is folded into the
scale, so that a score costs one multiply-add and one exp2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.sequences import Sequences, kernel_arguments, programs_of_head, tile_of_program
from siglip_kernels.attention.tiles import accumulate, inner_products, load_tile, store_tile, stride_names
from siglip_kernels.device import facts, precision
from siglip_kernels.interpreter import narrow
from siglip_kernels.strides import strides_of

_STRIDES = stride_names("q", "k", "v")
# These change from call to call: specialising on them (are they 1, do they divide by 16) would only recompile the
# kernel. UNIT already says what matters of the strides, whether they divide by 8.
_INTEGERS = [*_STRIDES, "heads", "query_tokens", "key_tokens", "query_tiles", "sequences"]
LOWEST = tl.constexpr(-(2.0 - 2**-23) * 2.0**127)  # the lowest finite number of fp32


@triton.jit
def mark(log_sum_exp, running_sum):
    """log_sum_exp with its last bit set where one key has more than an eighth of the weight, and cleared elsewhere.

    running_sum: of the weights relative to the largest, so that the largest weight is 1 / running_sum; 0 without keys.
    """
    rows = (running_sum > 0.5) & (running_sum < 8.0)
    bits = log_sum_exp.to(tl.int32, bitcast=True)
    return ((bits & -2) | rows.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def is_marked(log_sum_exp):
    """1 for rows that `mark` marked, else 0."""
    return log_sum_exp.to(tl.int32, bitcast=True) & 1


@triton.jit
def attend(
    q_main, q_tail, k, v, k_offsets, v_offsets, key_is_valid, running_max, running_sum, out_main, out_tail,
    exponent_scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """The running maximum and sums and the output after one more tile of keys. key_is_valid: None if every key is.

    running_sum: [BLOCK_Q, PARTIAL_SUMS], parts of the sum of each row.
    """
    k_main, k_tail = load_tile(k, k_offsets, key_is_valid, HEAD_DIM, MAIN, TAIL)
    scores = inner_products(q_main, q_tail, k_main, k_tail, TAIL, PRECISION)  # [BLOCK_Q, BLOCK_K]
    if key_is_valid is not None:
        scores = tl.where(key_is_valid[None, :], scores, float("inf") if NEGATIVE_SCALE else float("-inf"))
    extreme = tl.min(scores, 1) if NEGATIVE_SCALE else tl.max(scores, 1)
    new_max = tl.maximum(running_max, extreme * exponent_scale)
    correction = tl.exp2(running_max - new_max)
    weights = tl.exp2(scores * exponent_scale - new_max[:, None])
    PARTIAL_SUMS: tl.constexpr = running_sum.shape[1]
    parts = tl.reshape(weights, [weights.shape[0], weights.shape[1] // PARTIAL_SUMS, PARTIAL_SUMS])
    running_sum = running_sum * correction[:, None] + tl.sum(parts, 1)
    out_main *= correction[:, None]
    out_tail *= correction[:, None]
    v_main, v_tail = load_tile(v, v_offsets, key_is_valid, HEAD_DIM, MAIN, TAIL)
    out_main, out_tail = accumulate(narrow(weights, v_main.dtype), v_main, v_tail, out_main, out_tail, TAIL, PRECISION)
    return new_max, running_sum, out_main, out_tail


@triton.jit(do_not_specialize=_INTEGERS)
def attention_forward_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out,  # (B, Sq, H, D), contiguous
    # (B, H, Sq) fp32: log2 of the sum of 2^(score · exponent_scale), +inf for a row without keys. In half precision the
    # last bit marks rows where one key has more than an eighth of the weight.
    log_sum_exp,
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
    heads,
    query_tokens,
    key_tokens,
    query_tiles,  # programs of one head
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    SAME_STRIDE: tl.constexpr,  # from token to token, of k and v: their offsets share registers
    ADVANCE_OFFSETS: tl.constexpr,  # those of k and v from tile to tile, not the pointers; they fit 32 bits
    PARTIAL_SUMS: tl.constexpr,  # of a row's weights, which are added after the loop
    NEGATIVE_SCALE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED_SEQUENCES: tl.constexpr,
    KEEP_LOG_SUM_EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program owns BLOCK_Q queries of one head of one sample. Adjacent programs share a head and its k and v in L2.
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

    q += batch * q_batch_stride * UNIT + head * q_head_stride * UNIT + first_query.to(tl.int64) * q_token_stride * UNIT
    k += batch * k_batch_stride * UNIT + head * k_head_stride * UNIT + keys_start * k_token_stride * UNIT
    v += batch * v_batch_stride * UNIT + head * v_head_stride * UNIT + keys_start * v_token_stride * UNIT
    k_step = k_token_stride.to(tl.int64) * UNIT
    v_step = v_token_stride.to(tl.int64) * UNIT
    if WIDE:
        q_token_stride = q_token_stride.to(tl.int64)
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)

    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_tokens)

    queries = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    query_is_valid = queries < query_end - first_query
    q_main, q_tail = load_tile(q, queries * (q_token_stride * UNIT), query_is_valid, HEAD_DIM, MAIN, TAIL)
    k_offsets = keys * (k_token_stride * UNIT)
    v_offsets = k_offsets if SAME_STRIDE else keys * (v_token_stride * UNIT)

    # Finite: infinite inputs can make every score of a row -inf, and -inf - (-inf) would be NaN.
    running_max = tl.full([BLOCK_Q], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_Q, PARTIAL_SUMS], tl.float32)
    out_main = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    out_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 16], tl.float32)
    # The last tile comes first and is the only one with a mask: in the loop, the mask would cost every tile, and its
    # branch keeps the compiler from giving each warp whole rows of scores; behind the loop, it takes registers there.
    # In fp32, each copy of a tile's code takes registers.
    MASK_FIRST: tl.constexpr = q.dtype.element_ty != tl.float32
    end = limit
    if MASK_FIRST:
        end = tl.maximum(tl.cdiv(limit, BLOCK_K) - 1, 0) * BLOCK_K
        running_max, running_sum, out_main, out_tail = attend(
            q_main, q_tail, k + end * k_step, v + end * v_step, k_offsets, v_offsets, keys < limit - end,
            running_max, running_sum, out_main, out_tail, exponent_scale,
            HEAD_DIM, MAIN, TAIL, NEGATIVE_SCALE, PRECISION,
        )  # fmt: skip
    for first_key in tl.range(0, end, BLOCK_K):
        running_max, running_sum, out_main, out_tail = attend(
            q_main, q_tail, k, v, k_offsets, v_offsets, None if MASK_FIRST else (keys < limit - first_key),
            running_max, running_sum, out_main, out_tail, exponent_scale,
            HEAD_DIM, MAIN, TAIL, NEGATIVE_SCALE, PRECISION,
        )  # fmt: skip
        if ADVANCE_OFFSETS:
            k_offsets += BLOCK_K * (k_token_stride * UNIT)
            v_offsets = k_offsets if SAME_STRIDE else v_offsets + BLOCK_K * (v_token_stride * UNIT)
        else:
            k += BLOCK_K * k_step
            v += BLOCK_K * v_step

    running_sum = tl.sum(running_sum, 1)
    normaliser = tl.where(limit > 0, 1.0 / running_sum, 0.0)
    row = heads * HEAD_DIM
    if WIDE:
        row = row.to(tl.int64)
    out += (batch * query_tokens + first_query) * heads * HEAD_DIM + head * HEAD_DIM
    store_tile(
        out,
        queries * row,
        first_query + queries < query_end,  # not as above: a mask kept through the loop takes registers
        out_main * normaliser[:, None],
        out_tail * normaliser[:, None],
        HEAD_DIM,
        MAIN,
        TAIL,
    )
    if KEEP_LOG_SUM_EXP:
        kept = tl.where(limit > 0, running_max + tl.log2(running_sum), float("inf"))
        if out.dtype.element_ty != tl.float32:
            kept = mark(kept, running_sum)
        tl.store(log_sum_exp + sequence.to(tl.int64) * query_tokens + first_query + queries, kept, mask=query_is_valid)


def exponent_scale(scale: float) -> float:
    """scale · log2(e), the factor that turns q·k into an exponent of two.

    Its magnitude is at least fp32's smallest normal number, with which every score underflows and all keys have the
    same weight, as with a scale of 0; 0 itself would turn scores that a mask has set to -inf into NaN.
    """
    exponent = scale * math.log2(math.e)
    return exponent if abs(exponent) >= 2**-126 else math.copysign(2**-126, -1 if scale < 0 else 1)


def results_to_write(q: Tensor, keep_log_sum_exp: bool) -> tuple[Tensor, Tensor]:
    """out and log_sum_exp, unwritten; log_sum_exp is empty if it is not kept."""
    batch, query_tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (batch, heads, query_tokens) if keep_log_sum_exp else 0
    return out, torch.empty(shape, dtype=torch.float32, device=q.device)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    keep_log_sum_exp: bool,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. q, k, v: unit stride along D. Returns out, and log_sum_exp if kept, else an empty tensor.

    sequences: those that are packed in a batch of 1; lengths is None then.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    out, log_sum_exp = results_to_write(q, keep_log_sum_exp)
    if out.numel() == 0:
        return out, log_sum_exp
    gpu = facts(q.device)
    size = (query_tokens, key_tokens) if sequences is None else sequences.typical
    tile = config.tile("forward", gpu, q.element_size(), head_dim, *size, sequences is not None)
    main, tail = config.split_head_dim(head_dim)
    strides = strides_of(q, k, v)
    query_tiles = programs_of_head(query_tokens, tile.queries, sequences)
    attention_forward_kernel[(config.grid(batch * heads * query_tiles),)](
        q=q,
        k=k,
        v=v,
        out=out,
        log_sum_exp=log_sum_exp,
        lengths=lengths,
        **kernel_arguments(sequences),
        **dict(zip(_STRIDES, strides.values, strict=True)),
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        query_tiles=query_tiles,
        exponent_scale=exponent_scale(scale),
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        UNIT=strides.unit,
        WIDE=strides.wide or heads * head_dim * tile.queries >= 2**31,
        SAME_STRIDE=k.stride(1) == v.stride(1),
        ADVANCE_OFFSETS=config.advances_offsets(gpu, k, v),
        PARTIAL_SUMS=config.partial_sums(gpu, q.element_size()),
        NEGATIVE_SCALE=scale < 0,
        HAS_LENGTHS=lengths is not None,
        KEEP_LOG_SUM_EXP=keep_log_sum_exp,
        PRECISION=precision(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        enable_fp_fusion=q.dtype != torch.float32,  # see backward.py
    )
    return out, log_sum_exp
