"""Pooling by attention in one pass over the tokens: pooledₕ = Σₛ aₛₕ xₛ with aₛₕ = softmaxₛ(scale · xₛ·fₕ).

fₕ is a head's query folded with the projection of keys (folded.py). A tile of tokens is read once, as CHUNKS blocks of
CHUNK columns. All blocks contribute to the scores (heads × tokens, with a running softmax as in attention/forward.py);
each is then summed by these weights into its accumulator (heads × CHUNK, fp32). Backward, with the gradients gₕ of
pooledₕ,

    dscoreₛₕ = aₛₕ (xₛ·gₕ - δₕ),    dxₛ = Σₕ aₛₕ gₕ + scale · dscoreₛₕ fₕ,    dfₕ = scale · Σₛ dscoreₛₕ (xₛ - pooledₕ).

δₕ = Σₛ aₛₕ xₛ·gₕ equals pooledₕ·gₕ, but is recomputed from the same products in a separate pass: where one token has
all of the weight, its dscore is 0 because two equal numbers cancel, and any other rounding of one of them would be
multiplied by a large fₕ. All dscoreₛₕ of a sample add up to 0 up to rounding, which a large mean of the tokens would
multiply: dfₕ therefore sums the tokens' deviations from their average pooledₕ.
"""

import math

import torch

# The loops over chunks are unrolled and grow tuples by one element per chunk. The type checker does not support that,
# and Triton does not support the form that the linter prefers.
# mypy: disable-error-code="misc, assignment"
# ruff: noqa: RUF005
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.attention_pool.config import Tile, choose_tile, chunk_columns, padded_heads, split_tokens
from siglip_kernels.device import facts
from siglip_kernels.interpreter import dot, narrow
from siglip_kernels.strides import strides_of


@triton.jit
def load_chunk(pointer, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[rows, CHUNK] from column FIRST on, and zeros outside of the matrix. offsets, valid: [rows]."""
    columns = FIRST + tl.arange(0, CHUNK)
    mask = valid[:, None]
    if FIRST + CHUNK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(pointer + (offsets[:, None] + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_chunk(pointer, offsets, valid, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    columns = FIRST + tl.arange(0, CHUNK)
    mask = valid[:, None]
    if FIRST + CHUNK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    element: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + (offsets[:, None] + columns[None, :]), narrow(x, element), mask=mask)


@triton.jit(do_not_specialize=["x_batch_stride", "x_token_stride", "batch", "tokens", "heads", "splits", "span"])
def attention_pool_forward_kernel(
    x,  # (B, S, WIDTH)
    folded,  # (H, WIDTH), contiguous
    lengths,  # (B,) int32, or None
    pooled,  # (splits, B, H, WIDTH), contiguous; written: averages over the tokens of a split
    highest,  # (splits, B, H) fp32; written: largest score · exponent_scale, -inf without a token
    total,  # (splits, B, H) fp32; written: sum of 2^(score · exponent_scale - highest)
    x_batch_stride,  # strides in UNIT elements
    x_token_stride,
    batch,
    tokens,
    heads,
    splits,
    span,  # tokens of a split
    exponent_scale,  # scale · log2(e)
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEADS: tl.constexpr,  # a power of two, at least H and 16
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A program owns one split of the tokens of one sample.
    program = tl.program_id(0)
    sample = (program // splits).to(tl.int64)
    split = program % splits
    head = tl.arange(0, HEADS)
    head_is_valid = head < heads
    limit = tokens
    if lengths is not None:
        limit = tl.minimum(tl.load(lengths + sample), tokens)
    end = tl.minimum((split + 1) * span, limit)

    folds = ()
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        folds = folds + (load_chunk(folded, head * WIDTH, head_is_valid, chunk * CHUNK, WIDTH, CHUNK),)
        sums = sums + (tl.zeros([HEADS, CHUNK], tl.float32),)
    running_max = tl.full([HEADS], float("-inf"), tl.float32)
    running_sum = tl.zeros([HEADS], tl.float32)
    for first in tl.range(split * span, end, TOKENS, num_stages=STAGES):
        token = tl.arange(0, TOKENS).to(tl.int64) + first
        valid = token < end
        offsets = sample * x_batch_stride * UNIT + token * x_token_stride * UNIT
        scores = tl.zeros([HEADS, TOKENS], tl.float32)
        tiles = ()
        for chunk in tl.static_range(CHUNKS):
            tile = load_chunk(x, offsets, valid, chunk * CHUNK, WIDTH, CHUNK)
            # Added outside the products, so that these do not wait for each other.
            scores += dot(folds[chunk], tl.trans(tile), None, "ieee")
            tiles = tiles + (tile,)
        scores = tl.where(valid[None, :], scores * exponent_scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        correction = tl.exp2(running_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(weights, 1)
        running_max = new_max
        weights = narrow(weights, tiles[0].dtype)
        new_sums = ()
        for chunk in tl.static_range(CHUNKS):
            corrected = sums[chunk] * correction[:, None]
            new_sums = new_sums + (dot(weights, tiles[chunk], corrected, "ieee"),)
        sums = new_sums

    normaliser = 1.0 / tl.where(running_sum == 0.0, 1.0, running_sum)  # 0: no token; the largest score alone adds 1
    row = (tl.cast(split, tl.int64) * batch + sample) * heads + head
    for chunk in tl.static_range(CHUNKS):
        average = sums[chunk] * normaliser[:, None]
        store_chunk(pooled, row * WIDTH, head_is_valid, average, chunk * CHUNK, WIDTH, CHUNK)
    tl.store(highest + row, running_max, mask=head_is_valid)
    tl.store(total + row, running_sum, mask=head_is_valid)


@triton.jit(do_not_specialize=["rows", "splits"])
def attention_pool_combine_kernel(
    partial_pooled,  # (splits, B · H, WIDTH) fp32
    partial_highest,  # (splits, B · H) fp32
    partial_total,  # (splits, B · H) fp32
    pooled,  # (B · H, WIDTH); written
    highest,  # (B · H,) fp32; written
    total,  # (B · H,) fp32; written
    rows,  # B · H
    splits,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least `splits`
    BLOCK: tl.constexpr,  # splits that are added at a time
):
    # A program owns CHUNK columns of one head of one sample, and adds the splits in a fixed order.
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    split = tl.arange(0, SPLITS)
    offsets = split * rows + row
    all_highest = tl.load(partial_highest + offsets, mask=split < splits, other=float("-inf"))
    all_total = tl.load(partial_total + offsets, mask=split < splits, other=0.0)
    top = tl.max(all_highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # a sample without a token
    whole = tl.sum(all_total * tl.exp2(all_highest - top), 0)
    tl.store(highest + row, top)
    tl.store(total + row, whole)
    normaliser = 1.0 / tl.where(whole == 0.0, 1.0, whole)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    column_is_valid = columns < WIDTH
    sums = tl.zeros([BLOCK, CHUNK], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        some = (first + tl.arange(0, BLOCK)).to(tl.int64)
        parts = some * rows + row
        share = tl.load(partial_total + parts, mask=some < splits, other=0.0)
        share *= tl.exp2(tl.load(partial_highest + parts, mask=some < splits, other=float("-inf")) - top)
        mask = (some < splits)[:, None] & column_is_valid[None, :]
        sums += share[:, None] * tl.load(partial_pooled + (parts[:, None] * WIDTH + columns), mask=mask, other=0.0)
    element: tl.constexpr = pooled.dtype.element_ty
    out = narrow(tl.sum(sums, 0) * normaliser, element)
    tl.store(pooled + row * WIDTH + columns, out, mask=column_is_valid)


_BACKWARD_INTEGERS = (
    "x_batch_stride", "x_token_stride", "grad_batch_stride", "grad_head_stride", "tokens", "heads", "splits", "span",
    "items",
)  # fmt: skip


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def attention_pool_backward_kernel(
    pooled_grad,  # (B, H, WIDTH)
    x,  # (B, S, WIDTH)
    folded,  # (H, WIDTH), contiguous
    pooled,  # (B, H, WIDTH), contiguous
    highest,  # (B, H) fp32
    total,  # (B, H) fp32
    lengths,  # (B,) int32, or None
    delta,  # fp32: δ's part of each split (B, splits, H), written by the first pass; δ (B, H), read by the second
    x_grad,  # (B, S, WIDTH), contiguous; written, or None
    partials,  # (programs, H, WIDTH) fp32; written: sums of scale · dscore x, or None
    surplus,  # (B, splits, H) fp32; written: sums of scale · dscore, or None
    x_batch_stride,  # strides in UNIT elements
    x_token_stride,
    grad_batch_stride,
    grad_head_stride,
    tokens,
    heads,
    splits,
    span,  # tokens of a split
    items,  # B · splits
    scale,
    exponent_scale,  # scale · log2(e)
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEADS: tl.constexpr,  # a power of two, at least H and 16
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST_PASS: tl.constexpr,
):
    # A program owns every num_programs-th split of some sample's tokens.
    head = tl.arange(0, HEADS)
    head_is_valid = head < heads
    folds = ()
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        folds = folds + (load_chunk(folded, head * WIDTH, head_is_valid, chunk * CHUNK, WIDTH, CHUNK),)
        sums = sums + (tl.zeros([HEADS, CHUNK], tl.float32),)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        sample = tl.cast(item // splits, tl.int64)
        start = item % splits * span
        end = tl.minimum(start + span, tokens)
        limit = end
        if lengths is not None:
            limit = tl.minimum(tl.load(lengths + sample), end)
        row = sample * heads + head
        top = tl.load(highest + row, mask=head_is_valid, other=float("inf"))
        whole = tl.load(total + row, mask=head_is_valid, other=1.0)
        normaliser = 1.0 / tl.where(whole == 0.0, 1.0, whole)  # 0: no token
        grad_offsets = sample * grad_batch_stride * UNIT + head.to(tl.int64) * grad_head_stride * UNIT
        head_delta = tl.zeros([HEADS], tl.float32)
        if not FIRST_PASS:
            head_delta = tl.load(delta + row, mask=head_is_valid, other=0.0)
        head_surplus = tl.zeros([HEADS], tl.float32)
        grads = ()
        for chunk in tl.static_range(CHUNKS):
            grad = load_chunk(pooled_grad, grad_offsets, head_is_valid, chunk * CHUNK, WIDTH, CHUNK)
            grads = grads + (grad,)
        for first in tl.range(start, end, TOKENS, num_stages=STAGES):
            token = tl.arange(0, TOKENS).to(tl.int64) + first
            valid = token < limit
            offsets = sample * x_batch_stride * UNIT + token * x_token_stride * UNIT
            scores = tl.zeros([HEADS, TOKENS], tl.float32)
            weights_grad = tl.zeros([HEADS, TOKENS], tl.float32)
            tiles = ()
            for chunk in tl.static_range(CHUNKS):
                tile = load_chunk(x, offsets, valid, chunk * CHUNK, WIDTH, CHUNK)
                scores += dot(folds[chunk], tl.trans(tile), None, "ieee")
                weights_grad += dot(grads[chunk], tl.trans(tile), None, "ieee")
                tiles = tiles + (tile,)
            weights = tl.exp2(scores * exponent_scale - top[:, None]) * normaliser[:, None]
            weights = tl.where(valid[None, :], weights, 0.0)
            if FIRST_PASS:
                head_delta += tl.sum(weights * weights_grad, 1)
            else:
                scores_grad = weights * (weights_grad - head_delta[:, None]) * scale
                weights = narrow(weights, tiles[0].dtype)
                scores_grad = narrow(scores_grad, tiles[0].dtype)
                head_surplus += tl.sum(scores_grad.to(tl.float32), 1)
                if partials is not None:
                    new_sums = ()
                    for chunk in tl.static_range(CHUNKS):
                        new_sums = new_sums + (dot(scores_grad, tiles[chunk], sums[chunk], "ieee"),)
                    sums = new_sums
                if x_grad is not None:
                    row_offsets = (sample * tokens + token) * WIDTH
                    for chunk in tl.static_range(CHUNKS):
                        dx = dot(tl.trans(weights), grads[chunk], None, "ieee")
                        dx = dot(tl.trans(scores_grad), folds[chunk], dx, "ieee")
                        store_chunk(x_grad, row_offsets, token < end, dx, chunk * CHUNK, WIDTH, CHUNK)
        if FIRST_PASS:
            tl.store(delta + (sample * splits + item % splits) * heads + head, head_delta, mask=head_is_valid)
        if partials is not None:
            tl.store(surplus + (sample * splits + item % splits) * heads + head, head_surplus, mask=head_is_valid)
    if partials is not None:
        rows = (tl.program_id(0).to(tl.int64) * heads + head) * WIDTH
        for chunk in tl.static_range(CHUNKS):
            store_chunk(partials, rows, head_is_valid, sums[chunk], chunk * CHUNK, WIDTH, CHUNK)


def _constants(tile: Tile, width: int, heads: int) -> dict[str, object]:
    return {
        "WIDTH": width,
        "CHUNK": tile.chunk,
        "CHUNKS": -(-width // tile.chunk),
        "HEADS": padded_heads(heads),
        "TOKENS": tile.tokens,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }


def attention_pool_forward(
    x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled (B, H, width), and highest and total (B, H). x: (B, S, width) of unit last stride; folded: (H, width)."""
    batch, tokens, width = x.shape
    heads = folded.shape[0]
    pooled = torch.empty((batch, heads, width), dtype=x.dtype, device=x.device)
    highest, total = (torch.empty((batch, heads), dtype=torch.float32, device=x.device) for _ in range(2))
    if batch == 0 or tokens == 0:
        return pooled.zero_(), highest.zero_(), total.zero_()
    gpu = facts(x.device)
    tile = choose_tile("forward", gpu, heads, width)
    splits, span = split_tokens(batch, tokens, tile.tokens, 2 * gpu.multiprocessors)
    parts = results = (pooled, highest, total)
    if splits > 1:
        parts = tuple(torch.empty((splits, *one.shape), dtype=torch.float32, device=x.device) for one in results)
    strides = strides_of(x)
    attention_pool_forward_kernel[(batch * splits,)](
        x=x,
        folded=folded,
        lengths=lengths,
        pooled=parts[0],
        highest=parts[1],
        total=parts[2],
        x_batch_stride=strides.values[0],
        x_token_stride=strides.values[1],
        batch=batch,
        tokens=tokens,
        heads=heads,
        splits=splits,
        span=span,
        exponent_scale=scale * math.log2(math.e),
        UNIT=strides.unit,
        **_constants(tile, width, heads),
    )
    if splits > 1:
        chunk = chunk_columns(width)
        attention_pool_combine_kernel[(batch * heads, -(-width // chunk))](
            partial_pooled=parts[0],
            partial_highest=parts[1],
            partial_total=parts[2],
            pooled=pooled,
            highest=highest,
            total=total,
            rows=batch * heads,
            splits=splits,
            WIDTH=width,
            CHUNK=chunk,
            SPLITS=1 << (splits - 1).bit_length(),
            BLOCK=16,
            num_warps=4,
        )
    return pooled, highest, total


def attention_pool_backward(
    pooled_grad: Tensor,
    x: Tensor,
    folded: Tensor,
    pooled: Tensor,
    highest: Tensor,
    total: Tensor,
    scale: float,
    lengths: Tensor | None,
    needs_x: bool,
    needs_folded: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and folded; one that is not needed is an empty tensor. x, pooled_grad: unit last stride."""
    batch, tokens, width = x.shape
    heads = folded.shape[0]
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    if batch == 0 or tokens == 0:
        return x_grad, torch.zeros(folded.shape if needs_folded else 0, dtype=x.dtype, device=x.device)
    gpu = facts(x.device)
    tile = choose_tile("backward", gpu, heads, width)
    splits, span = split_tokens(batch, tokens, tile.tokens, gpu.multiprocessors)
    programs = min(batch * splits, gpu.multiprocessors)
    partials = torch.empty((programs, heads, width), dtype=torch.float32, device=x.device) if needs_folded else None
    strides = strides_of(x, pooled_grad)
    delta, surplus = (torch.empty((batch, splits, heads), dtype=torch.float32, device=x.device) for _ in range(2))
    for first_pass in (True, False):
        attention_pool_backward_kernel[(batch * splits if first_pass else programs,)](
            pooled_grad=pooled_grad,
            x=x,
            folded=folded,
            pooled=pooled,
            highest=highest,
            total=total,
            lengths=lengths,
            delta=delta if first_pass else delta.sum(1),
            x_grad=x_grad if needs_x and not first_pass else None,
            partials=None if first_pass else partials,
            surplus=surplus,
            x_batch_stride=strides.values[0],
            x_token_stride=strides.values[1],
            grad_batch_stride=strides.values[2],
            grad_head_stride=strides.values[3],
            tokens=tokens,
            heads=heads,
            splits=splits,
            span=span,
            items=batch * splits,
            scale=scale,
            exponent_scale=scale * math.log2(math.e),
            UNIT=strides.unit,
            FIRST_PASS=first_pass,
            **{**_constants(tile, width, heads), "maxnreg": 128 if first_pass else tile.registers},
        )
    if partials is None:
        return x_grad, torch.empty(0, dtype=x.dtype, device=x.device)
    centred = torch.einsum("bh,bhw->hw", surplus.sum(1).to(x.dtype), pooled)
    return x_grad, (partials.sum(0) - centred).to(x.dtype)
