"""Pooling by attention in one pass over the tokens: pooledₕ = Σₛ aₛₕ xₛ with aₛₕ = softmaxₛ(scale · xₛ·fₕ).

fₕ is a head's query folded with the projection of keys (folded.py). A tile of tokens is read once, as CHUNKS blocks of
CHUNK columns: all of them make the scores (heads × tokens, a softmax in running form as in attention/forward.py), and
all of them are then summed by these weights into as many accumulators (heads × CHUNK, fp32). Backward, with the
gradients gₕ of pooledₕ,

    dscoreₛₕ = aₛₕ (xₛ·gₕ - pooledₕ·gₕ),    dxₛ = Σₕ aₛₕ gₕ + scale · dscoreₛₕ fₕ,    dfₕ = scale · Σₛ dscoreₛₕ xₛ.
"""

# Tuples that grow by an element a chunk, as the loops over chunks are unrolled, are beyond the type checker, and
# beyond Triton in the form that the linter prefers.
# mypy: disable-error-code="misc, assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from siglip_kernels.interpreted import dot, narrow


@triton.jit
def load_chunk(pointer, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[rows, CHUNK] from column FIRST on. offsets, valid: [rows]. Zeros where a row or a column is not there."""
    columns = FIRST + tl.arange(0, CHUNK)
    mask = valid[:, None]
    if FIRST + CHUNK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(pointer + (offsets[:, None] + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_chunk(
    pointer, offsets, valid, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr
):
    columns = FIRST + tl.arange(0, CHUNK)
    mask = valid[:, None]
    if FIRST + CHUNK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    element: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + (offsets[:, None] + columns[None, :]), narrow(x, element, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["x_batch_stride", "x_token_stride", "batch", "tokens", "heads", "splits", "span"])
def attention_pool_forward_kernel(
    x,  # (B, S, WIDTH)
    folded,  # (H, WIDTH), contiguous
    lengths,  # (B,) int32, or None
    pooled,  # (splits, B, H, WIDTH), contiguous; written: averages over the tokens of a split
    log_sum_exp,  # (splits, B, H) fp32; written: log2 of the sum of 2^(score · exponent_scale), -inf without a token
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
    INTERPRETED: tl.constexpr,
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
            # Added up outside the products: they then need not wait for each other.
            scores += dot(folds[chunk], tl.trans(tile), None, "ieee", INTERPRETED)
            tiles = tiles + (tile,)
        scores = tl.where(valid[None, :], scores * exponent_scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        correction = tl.exp2(running_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(weights, 1)
        running_max = new_max
        weights = narrow(weights, tiles[0].dtype, INTERPRETED)
        new_sums = ()
        for chunk in tl.static_range(CHUNKS):
            corrected = sums[chunk] * correction[:, None]
            new_sums = new_sums + (dot(weights, tiles[chunk], corrected, "ieee", INTERPRETED),)
        sums = new_sums

    no_token = running_sum == 0.0  # only then: the largest score alone adds 1
    normaliser = 1.0 / tl.where(no_token, 1.0, running_sum)
    row = (tl.cast(split, tl.int64) * batch + sample) * heads + head
    for chunk in tl.static_range(CHUNKS):
        average = sums[chunk] * normaliser[:, None]
        store_chunk(pooled, row * WIDTH, head_is_valid, average, chunk * CHUNK, WIDTH, CHUNK, INTERPRETED)
    kept = tl.where(no_token, float("-inf"), running_max + tl.log2(running_sum))
    tl.store(log_sum_exp + row, kept, mask=head_is_valid)


@triton.jit(do_not_specialize=["rows", "splits"])
def attention_pool_combine_kernel(
    partial_pooled,  # (splits, B · H, WIDTH) fp32
    partial_log_sum_exp,  # (splits, B · H) fp32
    pooled,  # (B · H, WIDTH); written
    log_sum_exp,  # (B · H,) fp32; written
    rows,  # B · H
    splits,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least `splits`
    BLOCK: tl.constexpr,  # splits that are added up at a time
    INTERPRETED: tl.constexpr,
):
    # A program owns CHUNK columns of one head of one sample, and adds splits up in one order always.
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    split = tl.arange(0, SPLITS)
    parts = tl.load(partial_log_sum_exp + split * rows + row, mask=split < splits, other=float("-inf"))
    highest = tl.max(parts, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a sample without a token
    total = tl.sum(tl.exp2(parts - highest), 0)
    tl.store(log_sum_exp + row, highest + tl.log2(total))
    normaliser = 1.0 / tl.where(total == 0.0, 1.0, total)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = columns < WIDTH
    sums = tl.zeros([BLOCK, CHUNK], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        some = (first + tl.arange(0, BLOCK)).to(tl.int64)
        part = tl.load(partial_log_sum_exp + some * rows + row, mask=some < splits, other=float("-inf"))
        offsets = (some * rows + row)[:, None] * WIDTH + columns[None, :]
        averages = tl.load(partial_pooled + offsets, mask=(some < splits)[:, None] & there[None, :], other=0.0)
        sums += averages * tl.exp2(part - highest)[:, None]
    element: tl.constexpr = pooled.dtype.element_ty
    out = narrow(tl.sum(sums, 0) * normaliser, element, INTERPRETED)
    tl.store(pooled + row * WIDTH + columns, out, mask=there)


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
    log_sum_exp,  # (B, H) fp32
    lengths,  # (B,) int32, or None
    x_grad,  # (B, S, WIDTH), contiguous; written, or None
    partials,  # (programs, H, WIDTH) fp32; written: sums of the gradient of `folded`, or None
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
    INTERPRETED: tl.constexpr,
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
        log_total = tl.load(log_sum_exp + row, mask=head_is_valid, other=float("inf"))
        grad_offsets = sample * grad_batch_stride * UNIT + head.to(tl.int64) * grad_head_stride * UNIT
        delta = tl.zeros([HEADS], tl.float32)  # pooled · its gradient
        grads = ()
        for chunk in tl.static_range(CHUNKS):
            grad = load_chunk(pooled_grad, grad_offsets, head_is_valid, chunk * CHUNK, WIDTH, CHUNK)
            average = load_chunk(pooled, row * WIDTH, head_is_valid, chunk * CHUNK, WIDTH, CHUNK)
            delta += tl.sum(grad.to(tl.float32) * average.to(tl.float32), 1)
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
                scores += dot(folds[chunk], tl.trans(tile), None, "ieee", INTERPRETED)
                weights_grad += dot(grads[chunk], tl.trans(tile), None, "ieee", INTERPRETED)
                tiles = tiles + (tile,)
            weights = tl.exp2(scores * exponent_scale - log_total[:, None])
            weights = tl.where(valid[None, :], weights, 0.0)
            scores_grad = weights * (weights_grad - delta[:, None]) * scale
            weights = narrow(weights, tiles[0].dtype, INTERPRETED)
            scores_grad = narrow(scores_grad, tiles[0].dtype, INTERPRETED)
            new_sums = ()
            for chunk in tl.static_range(CHUNKS):
                if x_grad is not None:
                    dx = dot(tl.trans(weights), grads[chunk], None, "ieee", INTERPRETED)
                    dx = dot(tl.trans(scores_grad), folds[chunk], dx, "ieee", INTERPRETED)
                    row_offsets = (sample * tokens + token) * WIDTH
                    store_chunk(x_grad, row_offsets, token < end, dx, chunk * CHUNK, WIDTH, CHUNK, INTERPRETED)
                if partials is not None:
                    new_sums = new_sums + (dot(scores_grad, tiles[chunk], sums[chunk], "ieee", INTERPRETED),)
            if partials is not None:
                sums = new_sums
    if partials is not None:
        rows = (tl.program_id(0).to(tl.int64) * heads + head) * WIDTH
        for chunk in tl.static_range(CHUNKS):
            store_chunk(partials, rows, head_is_valid, sums[chunk], chunk * CHUNK, WIDTH, CHUNK, INTERPRETED)
