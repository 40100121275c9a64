"""Attention over short sequences, such as the text tower's 64 tokens: forward and backward in one kernel each.

A tile is a whole sequence: one head of one sample. A program loops over many sequences, so that the loads of the next
overlap with the products of the current one. Sequences do not share a tile, because 0 · NaN from another would be NaN.
The softmax of a row is complete at once, so the backward needs neither `out` nor a log-sum-exp: it recomputes P, takes
delta = rowsum(P ∘ dP), and writes all three gradients after reading q, k, v and dO once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.backward import gradients_to_write, score_gradients
from siglip_kernels.attention.forward import exponent_scale
from siglip_kernels.attention.tiles import accumulate, inner_products, load_tile, store_tile, stride_names
from siglip_kernels.device import facts, precision
from siglip_kernels.interpreter import narrow
from siglip_kernels.strides import strides_of

# Not specialised on: see forward.py.
_INTEGERS = [*stride_names("q", "k", "v", "out_grad"), "sequences", "heads", "query_tokens", "key_tokens"]


@triton.jit
def locate(sequence, heads, key_tokens, lengths, HAS_LENGTHS: tl.constexpr):
    """Batch and head of a sequence (int64), and its number of valid keys."""
    batch = (sequence // heads).to(tl.int64)
    limit = key_tokens
    if HAS_LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_tokens)
    return batch, (sequence % heads).to(tl.int64), limit


@triton.jit
def probabilities(
    q_main, q_tail, k_main, k_tail, key_is_valid, limit, exponent_scale,
    TAIL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Softmax over the keys of a tile: unnormalised weights, and the factors that normalise their rows."""
    scores = inner_products(q_main, q_tail, k_main, k_tail, TAIL, PRECISION)
    scores = tl.where(key_is_valid[None, :], scores, float("inf") if NEGATIVE_SCALE else float("-inf"))
    extreme = tl.min(scores, 1) if NEGATIVE_SCALE else tl.max(scores, 1)
    highest = tl.where(limit > 0, extreme * exponent_scale, 0.0)
    weights = tl.exp2(scores * exponent_scale - highest[:, None])
    return weights, tl.where(limit > 0, 1.0 / tl.sum(weights, 1), 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
def attention_short_forward_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out,  # (B, Sq, H, D), contiguous; written
    lengths,  # (B,) int32
    q_batch_stride,  # strides in UNIT elements
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    sequences,  # B · H
    heads,
    query_tokens,
    key_tokens,
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a tile: a power of two, at least 16 and both lengths
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    NEGATIVE_SCALE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program owns every num_programs-th sequence.
    row = heads * HEAD_DIM
    if WIDE:
        q_token_stride = q_token_stride.to(tl.int64)
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)
        row = row.to(tl.int64)
    token = tl.arange(0, BLOCK)
    query_is_valid = token < query_tokens
    for sequence in tl.range(tl.program_id(0), sequences, tl.num_programs(0)):
        batch, head, limit = locate(sequence, heads, key_tokens, lengths, HAS_LENGTHS)
        key_is_valid = token < limit
        q_sequence = q + (batch * q_batch_stride + head * q_head_stride) * UNIT
        k_sequence = k + (batch * k_batch_stride + head * k_head_stride) * UNIT
        v_sequence = v + (batch * v_batch_stride + head * v_head_stride) * UNIT
        q_main, q_tail = load_tile(q_sequence, token * (q_token_stride * UNIT), query_is_valid, HEAD_DIM, MAIN, TAIL)
        k_main, k_tail = load_tile(k_sequence, token * (k_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
        v_main, v_tail = load_tile(v_sequence, token * (v_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
        weights, normaliser = probabilities(
            q_main, q_tail, k_main, k_tail, key_is_valid, limit, exponent_scale,
            TAIL, NEGATIVE_SCALE, PRECISION,
        )  # fmt: skip
        out_main, out_tail = accumulate(
            narrow(weights, v_main.dtype),
            v_main,
            v_tail,
            tl.zeros([BLOCK, MAIN], tl.float32),
            tl.zeros([BLOCK, TAIL if TAIL > 0 else 16], tl.float32),
            TAIL,
            PRECISION,
        )
        out_main *= normaliser[:, None]
        out_tail *= normaliser[:, None]
        out_sequence = out + (batch * query_tokens * heads + head) * HEAD_DIM
        store_tile(out_sequence, token * row, query_is_valid, out_main, out_tail, HEAD_DIM, MAIN, TAIL)


@triton.jit(do_not_specialize=_INTEGERS)
def attention_short_backward_kernel(
    q,  # (B, Sq, H, D)
    k,  # (B, Sk, H, D)
    v,  # (B, Sk, H, D)
    out_grad,  # (B, Sq, H, D)
    q_grad,  # (B, Sq, H, D), contiguous, or if PACKED a part of (B, Sq, 3, H, D); written
    k_grad,  # (B, Sk, H, D), likewise; written
    v_grad,  # (B, Sk, H, D), likewise; written
    lengths,  # (B,) int32
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
    sequences,  # B · H
    heads,
    query_tokens,
    key_tokens,
    scale,
    exponent_scale,  # scale · log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a tile: a power of two, at least 16 and both lengths
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a tile need 64 bits
    NEGATIVE_SCALE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,  # the gradients are parts of one tensor
    NEEDS_Q: tl.constexpr,
    NEEDS_K_OR_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program owns every num_programs-th sequence.
    row = heads * (HEAD_DIM * (3 if PACKED else 1))  # of the gradients
    if WIDE:
        q_token_stride = q_token_stride.to(tl.int64)
        k_token_stride = k_token_stride.to(tl.int64)
        v_token_stride = v_token_stride.to(tl.int64)
        out_grad_token_stride = out_grad_token_stride.to(tl.int64)
        row = row.to(tl.int64)
    token = tl.arange(0, BLOCK)
    query_is_valid = token < query_tokens
    key_exists = token < key_tokens
    # Addresses that are moved out of the loop would take registers throughout it, and spill.
    for sequence in tl.range(tl.program_id(0), sequences, tl.num_programs(0), disable_licm=True):
        batch, head, limit = locate(sequence, heads, key_tokens, lengths, HAS_LENGTHS)
        key_is_valid = token < limit
        q_sequence = q + (batch * q_batch_stride + head * q_head_stride) * UNIT
        k_sequence = k + (batch * k_batch_stride + head * k_head_stride) * UNIT
        v_sequence = v + (batch * v_batch_stride + head * v_head_stride) * UNIT
        out_grad_sequence = out_grad + (batch * out_grad_batch_stride + head * out_grad_head_stride) * UNIT
        q_main, q_tail = load_tile(q_sequence, token * (q_token_stride * UNIT), query_is_valid, HEAD_DIM, MAIN, TAIL)
        k_main, k_tail = load_tile(k_sequence, token * (k_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
        v_main, v_tail = load_tile(v_sequence, token * (v_token_stride * UNIT), key_is_valid, HEAD_DIM, MAIN, TAIL)
        out_grad_main, out_grad_tail = load_tile(
            out_grad_sequence, token * (out_grad_token_stride * UNIT), query_is_valid, HEAD_DIM, MAIN, TAIL
        )
        weights, normaliser = probabilities(
            q_main, q_tail, k_main, k_tail, key_is_valid, limit, exponent_scale,
            TAIL, NEGATIVE_SCALE, PRECISION,
        )  # fmt: skip
        weights *= normaliser[:, None]
        zeros_main = tl.zeros([BLOCK, MAIN], tl.float32)
        zeros_tail = tl.zeros([BLOCK, TAIL if TAIL > 0 else 16], tl.float32)
        key_offset = batch * key_tokens * row + head * HEAD_DIM
        if NEEDS_K_OR_V:
            grad_main, grad_tail = accumulate(
                tl.trans(narrow(weights, out_grad_main.dtype)),
                out_grad_main, out_grad_tail, zeros_main, zeros_tail, TAIL, PRECISION,
            )  # fmt: skip
            # The weights of padded keys are 0, or NaN in the row of a NaN query: their gradients are set to zero.
            grad_main = tl.where(key_is_valid[:, None], grad_main, 0.0)
            grad_tail = tl.where(key_is_valid[:, None], grad_tail, 0.0)
            store_tile(v_grad + key_offset, token * row, key_exists, grad_main, grad_tail, HEAD_DIM, MAIN, TAIL)
        weights_grad = inner_products(out_grad_main, out_grad_tail, v_main, v_tail, TAIL, PRECISION)
        delta = tl.sum(weights * weights_grad, 1)
        scores_grad = score_gradients(weights, weights_grad, delta[:, None], k_main.dtype == tl.float32)
        scores_grad = narrow(scores_grad, k_main.dtype)
        if NEEDS_Q:
            grad_main, grad_tail = accumulate(scores_grad, k_main, k_tail, zeros_main, zeros_tail, TAIL, PRECISION)
            query_offset = batch * query_tokens * row + head * HEAD_DIM
            grad_main *= scale
            grad_tail *= scale
            store_tile(q_grad + query_offset, token * row, query_is_valid, grad_main, grad_tail, HEAD_DIM, MAIN, TAIL)
        if NEEDS_K_OR_V:
            grad_main, grad_tail = accumulate(
                tl.trans(scores_grad), q_main, q_tail, zeros_main, zeros_tail, TAIL, PRECISION
            )
            grad_main = tl.where(key_is_valid[:, None], grad_main * scale, 0.0)
            grad_tail = tl.where(key_is_valid[:, None], grad_tail * scale, 0.0)
            store_tile(k_grad + key_offset, token * row, key_exists, grad_main, grad_tail, HEAD_DIM, MAIN, TAIL)


def attention_short_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Launches the kernel. q, k, v: unit stride along D."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    grid, same_in_both = _launch("short_forward", {"q": q, "k": k, "v": v}, lengths, scale)
    attention_short_forward_kernel[grid](**same_in_both, out=out)
    return out


def attention_short_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    needs_q: bool,
    needs_k_or_v: bool,
    packed_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel. out_grad, q, k, v: unit stride along D. Returns what `gradients_to_write` says."""
    q_grad, k_grad, v_grad = gradients_to_write(q, k, needs_q, needs_k_or_v, packed_grad)
    if q_grad.numel() + k_grad.numel() == 0:
        return q_grad, k_grad, v_grad
    tensors = {"q": q, "k": k, "v": v, "out_grad": out_grad}
    grid, same_in_both = _launch("short_backward", tensors, lengths, scale)
    attention_short_backward_kernel[grid](
        **same_in_both,
        q_grad=q_grad,
        k_grad=k_grad,
        v_grad=v_grad,
        scale=scale,
        PACKED=packed_grad is not None,
        NEEDS_Q=needs_q,
        NEEDS_K_OR_V=needs_k_or_v,
    )
    return q_grad, k_grad, v_grad


def _launch(
    kernel: str, tensors: dict[str, Tensor], lengths: Tensor | None, scale: float
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the arguments that both kernels have. tensors: those with strides, by the name of the parameter."""
    q, k = tensors["q"], tensors["k"]
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    main, tail = config.split_head_dim(head_dim)
    block = max(16, triton.next_power_of_2(max(query_tokens, key_tokens)))
    if kernel == "short_backward" and (main, tail) == (64, 32):
        main, tail = 128, 0  # the two blocks spill on Ampere, and memory is what takes the time
    programs, warps, stages = config.short(kernel, facts(q.device), q.element_size(), head_dim, block, batch * heads)
    config.grid(batch * heads + programs)  # kernels number sequences in 32 bits
    strides = strides_of(*tensors.values())
    arguments = dict(
        **tensors,
        lengths=lengths,
        **dict(zip(stride_names(*tensors), strides.values, strict=True)),
        sequences=batch * heads,
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        exponent_scale=exponent_scale(scale),
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        BLOCK=block,
        UNIT=strides.unit,
        WIDE=strides.wide or 3 * heads * head_dim * block >= 2**31,  # three parts, if gradients are packed
        NEGATIVE_SCALE=scale < 0,
        HAS_LENGTHS=lengths is not None,
        PRECISION=precision(q.dtype),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=q.dtype != torch.float32,  # see backward.py
    )
    return (programs,), arguments
