"""The Triton kernels of the losses of prefixes; blocks.py has the mathematics, ../kernels.py a tile's loss and G.

`normalise_kernel` reads the embeddings once for all of their prefixes. `prefix_logit_grad_kernel` passes over the
columns once; at the end of each segment its accumulator has the cosines of a prefix. A tile's Gₖ are stored one after
another and turned into H from the widest to the narrowest, while they are in a cache. `prefix_product_kernel` computes
both products with H, `finish_kernel` turns their sums into the gradients of the embeddings.
"""

import triton
import triton.language as tl

from siglip_kernels.interpreter import dot, narrow
from siglip_kernels.sigmoid_loss.kernels import LOG2_E, load_tile, tile_sums

# So that none is divided by zero. A share is at most 1: what this adds to a gradient is below its rounding.
SMALLEST_SHARE = tl.constexpr(2.0**-64)


@triton.jit
def _skipped(only_if_ptr):
    """Whether there is nothing to do."""
    if only_if_ptr is None:
        return False
    else:
        return tl.load(only_if_ptr) == 0


@triton.jit
def _entry(values: tl.constexpr, index):
    """values[index] of a tuple of integers, without memory."""
    entry = values[0] + index * 0
    for number in tl.static_range(1, len(values)):
        entry = tl.where(index == number, values[number], entry)
    return entry


@triton.jit
def _source_columns(columns, WIDTHS: tl.constexpr, ENDS: tl.constexpr):
    """Of a copy's columns: those of the embeddings, and whether they exist, or are padding."""
    sources = columns
    exists = columns < WIDTHS[0]
    for number in tl.static_range(1, len(WIDTHS)):
        source = columns - (ENDS[number - 1] - WIDTHS[number - 1])
        inside = columns >= ENDS[number - 1]
        sources = tl.where(inside, source, sources)
        exists = tl.where(inside, source < WIDTHS[number], exists)
    return sources, exists


@triton.jit(do_not_specialize=["rows", "inverse_norms_stride"])
def normalise_kernel(
    source_ptr,  # (rows, at least WIDTHS[-1]), rows `stride` apart
    stride,
    normalised_ptr,  # (rows, ENDS[-1]), written: each segment divided by the norm of the prefix that it ends
    inverse_norms_ptr,  # fp32 (prefixes, inverse_norms_stride), written: a, and below aₖ/aₖ₋₁
    ratios_ptr,
    inverse_norms_stride,
    rows,
    WIDTHS: tl.constexpr,
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
):
    """Program i owns the rows i ROWS : +ROWS."""
    WIDTH: tl.constexpr = ENDS[len(ENDS) - 1]
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    valid = (o_rows < rows)[:, None] & (columns < WIDTH)
    sources, exists = _source_columns(columns, WIDTHS, ENDS)
    values = tl.load(source_ptr + o_rows[:, None] * stride + sources, mask=valid & exists, other=0.0).to(tl.float32)
    squares = values * values
    scale = tl.zeros_like(values)
    previous = tl.zeros((ROWS,), tl.float32)
    for number in tl.static_range(len(WIDTHS)):
        norms = tl.sqrt_rn(tl.sum(tl.where(columns < ENDS[number], squares, 0.0), 1))
        inverse = 1.0 / tl.maximum(norms, SMALLEST_NORM)
        o_norms = number * inverse_norms_stride.to(tl.int64) + o_rows
        tl.store(inverse_norms_ptr + o_norms, inverse, mask=o_rows < rows)
        if number == 0:
            scale += inverse[:, None]
            previous = inverse
        else:
            scale = tl.where(columns >= ENDS[number - 1], inverse[:, None], scale)
        # Where the squares overflow, both may be 0.
        ratio = inverse / tl.where(inverse > 0, previous, 1.0)
        tl.store(ratios_ptr + o_norms, ratio, mask=o_rows < rows)
        previous = inverse
    narrowed = narrow(values * scale, normalised_ptr.dtype.element_ty)
    tl.store(normalised_ptr + o_rows[:, None] * WIDTH + columns, narrowed, mask=valid)


@triton.jit(
    do_not_specialize=[
        "images", "texts", "diagonal", "image_ratio_stride", "text_ratio_stride", "image_dots_prefix_stride",
        "image_dots_stride", "text_dots_prefix_stride", "text_dots_stride", "slots",
    ]
)  # fmt: skip
def prefix_logit_grad_kernel(
    image_source,  # x̂ (images, ENDS[-1] · BLOCK_K): descriptor of blocks [BLOCK_M, BLOCK_K], or pointer
    text_source,  # ŷ (texts, ENDS[-1] · BLOCK_K): descriptor of blocks [BLOCK_N, BLOCK_K], or pointer
    logit_grad_ptr,  # H · LOGIT_GRAD_SCALE (prefixes, logit_grad_rows, logit_grad_stride), whole tiles; or None
    logit_grad_rows,
    logit_grad_stride,
    image_ratios_ptr,  # fp32 (prefixes, image_ratio_stride): aₖ/aₖ₋₁
    image_ratio_stride,
    text_ratios_ptr,  # fp32 (prefixes, text_ratio_stride): cₖ/cₖ₋₁
    text_ratio_stride,
    logit_scales_ptr,  # fp32 (prefixes,): t, b, and `blocks.Shares.own` and `.wider`
    logit_biases_ptr,
    own_shares_ptr,
    wider_shares_ptr,
    totals_ptr,  # fp64 (prefixes, 3, slots), added to: sums of the loss, of G ⊙ cos and of G, one slot per program
    slots,
    images,
    texts,
    diagonal,  # from here on as in ../kernels.py
    image_groups_ptr,
    text_groups_ptr,
    positive_weight_ptr,
    negative_weight_ptr,
    text_weight_ptr,
    image_dots_ptr,  # fp32 (prefixes, column tiles, images), added to: Σ G ⊙ cos of each image; or None
    image_dots_prefix_stride,
    image_dots_stride,
    text_dots_ptr,  # fp32 (prefixes, row tiles, texts), added to: Σ G ⊙ cos of each text; or None
    text_dots_prefix_stride,
    text_dots_stride,
    only_if_ptr,  # int32: where it is 0 there is nothing to do; or None
    ENDS: tl.constexpr,  # of the segments, in steps of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRADIENTS: tl.constexpr,
    LOGIT_GRAD_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SUMS: tl.constexpr,  # as `tile_sums`
    ROWS: tl.constexpr,
):
    """Program (m, n) owns the pairs of images m BLOCK_M : +BLOCK_M and texts n BLOCK_N : +BLOCK_N."""
    if _skipped(only_if_ptr):
        return
    PREFIXES: tl.constexpr = len(ENDS)
    WIDTH: tl.constexpr = ENDS[PREFIXES - 1] * BLOCK_K
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    logit_grad_stride = tl.multiple_of(logit_grad_stride, 16)
    slot_ptr = totals_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)

    cosines = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_block = 0
    # Offsets computed before the loop would take registers all along, and spill.
    for prefix in tl.range(0, PREFIXES, disable_licm=True):
        image_ratios = tl.load(image_ratios_ptr + tl.multiple_of(prefix * image_ratio_stride, 16) + rows)
        text_ratios = tl.load(text_ratios_ptr + tl.multiple_of(prefix * text_ratio_stride, 16) + columns)
        cosines *= image_ratios[:, None] * text_ratios[None, :]
        last_block = _entry(ENDS, prefix)
        for block in tl.range(first_block, last_block):
            k = block * BLOCK_K
            x = load_tile(image_source, first_row, k, images, WIDTH, BLOCK_M, BLOCK_K, None, DESCRIPTORS)
            y = load_tile(text_source, first_column, k, texts, WIDTH, BLOCK_N, BLOCK_K, None, DESCRIPTORS)
            cosines = dot(x, y.T, cosines, PRECISION)
        first_block = last_block

        logit_grad_target = logit_grad_ptr
        text_dots = text_dots_ptr
        if logit_grad_ptr is not None:
            logit_grad_target += prefix * logit_grad_rows.to(tl.int64) * logit_grad_stride
        if text_dots_ptr is not None:
            text_dots += prefix * text_dots_prefix_stride.to(tl.int64) + tl.program_id(0) * text_dots_stride
        share = tl.load(own_shares_ptr + prefix)
        divisor = 1.0 / (tl.where(tl.abs(share) < SMALLEST_SHARE, SMALLEST_SHARE, share) * LOGIT_GRAD_SCALE)
        loss_sum, dot_sum, logit_grad_sum = tile_sums(
            cosines, logit_grad_target, logit_grad_stride, first_row, first_column,
            tl.load(logit_scales_ptr + prefix) * LOG2_E, tl.load(logit_biases_ptr + prefix) * LOG2_E, images, texts,
            diagonal, image_groups_ptr, text_groups_ptr, positive_weight_ptr, negative_weight_ptr, text_weight_ptr,
            text_dots, divisor, GRADIENTS, False, True, PRECISION, SUMS, ROWS, False, image_dots_ptr is not None,
        )  # fmt: skip
        # As in ../kernels.py, the order of every sum is fixed.
        tl.store(slot_ptr, tl.load(slot_ptr) + tl.sum(loss_sum).to(tl.float64))
        if GRADIENTS:
            dot_ptr = slot_ptr + slots
            tl.store(dot_ptr, tl.load(dot_ptr) + (tl.sum(dot_sum) * divisor).to(tl.float64))
            sum_ptr = dot_ptr + slots
            tl.store(sum_ptr, tl.load(sum_ptr) + (tl.sum(logit_grad_sum) * divisor).to(tl.float64))
            if image_dots_ptr is not None:
                offset = prefix * image_dots_prefix_stride.to(tl.int64) + tl.program_id(1) * image_dots_stride
                dots_ptr = image_dots_ptr + offset + rows
                before = tl.load(dots_ptr, mask=rows < images, other=0.0)
                tl.store(dots_ptr, before + tl.sum(dot_sum, 1) * divisor, mask=rows < images)
        slot_ptr += 3 * slots

    if logit_grad_ptr is not None and PREFIXES > 1:
        # Hₛ = own share of Gₛ, which is stored, + wider share · ratios · Hₛ₊₁.
        tl.debug_barrier()  # other threads of this program have stored what is loaded here
        PART: tl.constexpr = BLOCK_N // 4
        o_rows = rows[:, None].to(tl.int64) * logit_grad_stride
        prefix_stride = logit_grad_rows.to(tl.int64) * logit_grad_stride
        for part in tl.range(0, 4):
            o_columns = first_column + part * PART + tl.arange(0, PART)
            tile_ptr = logit_grad_ptr + (PREFIXES - 1) * prefix_stride + o_rows + o_columns[None, :]
            total = tl.load(tile_ptr).to(tl.float32)
            for step in tl.range(1, PREFIXES, num_stages=1):
                wider = PREFIXES - step  # the index of the prefix that `total` belongs to
                image_ratios = tl.load(image_ratios_ptr + tl.multiple_of(wider * image_ratio_stride, 16) + rows)
                text_ratios = tl.load(text_ratios_ptr + tl.multiple_of(wider * text_ratio_stride, 16) + o_columns)
                tile_ptr -= prefix_stride
                text_ratios *= tl.load(wider_shares_ptr + wider - 1)
                total = total * (image_ratios[:, None] * text_ratios[None, :]) + tl.load(tile_ptr).to(tl.float32)
                tl.store(tile_ptr, narrow(total, logit_grad_ptr.dtype.element_ty))


@triton.jit
def _product_of_tile(
    logit_grad_source,  # as `prefix_product_kernel`, like most that follows
    logit_grad_stride,
    operand_source,
    out_ptr,
    rows,
    depth,
    first_row,
    first_column,
    end,  # of the segment
    first_of_prefix,
    last,  # after the last row of H
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    o_rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    o_columns = first_column + tl.arange(0, BLOCK_N)[None, :]
    offsets = o_rows.to(tl.int64) * WIDTH + o_columns
    mask = (o_rows < rows) & (o_columns < end)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ADD:
        total = tl.load(out_ptr + offsets, mask=mask, other=0.0)

    for k in tl.range(0, depth, BLOCK_K):
        if TRANSPOSED:
            h = load_tile(
                logit_grad_source, first_of_prefix + k, first_row, last, logit_grad_stride, BLOCK_K, BLOCK_M, None,
                DESCRIPTORS,
            ).T  # fmt: skip
        else:
            h = load_tile(
                logit_grad_source, first_of_prefix + first_row, k, last, logit_grad_stride, BLOCK_M, BLOCK_K, None,
                DESCRIPTORS,
            )  # fmt: skip
        operand = load_tile(operand_source, k, first_column, depth, WIDTH, BLOCK_K, BLOCK_N, WIDTH, DESCRIPTORS)
        total = dot(h, operand, total, PRECISION)
    tl.store(out_ptr + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["rows", "depth"])
def prefix_product_kernel(
    logit_grad_source,  # H (prefixes · logit_grad_rows, logit_grad_stride): descriptor of blocks [BLOCK_M, BLOCK_K], or
    #                     pointer; TRANSPOSED: descriptor of blocks [BLOCK_K, BLOCK_M]
    logit_grad_rows,
    logit_grad_stride,
    operand_source,  # ŷ or x̂ (depth, WIDTH): descriptor of blocks [BLOCK_K, BLOCK_N], or pointer
    narrow_operand_source,  # the same with half the columns
    out_ptr,  # fp32 (rows, WIDTH)
    rows,
    depth,
    only_if_ptr,  # int32: where it is 0 there is nothing to do; or None
    WIDTH: tl.constexpr,
    TILE_PREFIXES: tl.constexpr,  # for each tile of columns its prefix,
    TILE_STARTS: tl.constexpr,  # its first column, in units of 16,
    TILE_ENDS: tl.constexpr,  # and where its segment ends
    WIDE_TILES: tl.constexpr,  # that many have BLOCK_N columns, and those that follow half
    ADD: tl.constexpr,  # whether the product is added to `out`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """out[s] = Hₛ operand[s] + out[s]. Program (m, n) owns the rows m BLOCK_M : +BLOCK_M of the n-th tile of columns.

    As H has whole tiles, of which those past the last pair are zeros, its rows need no bounds.
    """
    if _skipped(only_if_ptr):
        return
    tile = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    first_column = _entry(TILE_STARTS, tile) * 16
    end = _entry(TILE_ENDS, tile)
    first_of_prefix = _entry(TILE_PREFIXES, tile) * logit_grad_rows
    last = len(TILE_PREFIXES) * logit_grad_rows
    logit_grad_stride = tl.multiple_of(logit_grad_stride, 16)
    # Neither branch, nor the other one's registers, where all tiles are alike.
    if len(TILE_PREFIXES) == WIDE_TILES:
        _product_of_tile(
            logit_grad_source, logit_grad_stride, operand_source, out_ptr, rows, depth, first_row,
            first_column, end, first_of_prefix, last, WIDTH, ADD, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED, PRECISION,
            DESCRIPTORS,
        )  # fmt: skip
    elif WIDE_TILES == 0:
        _product_of_tile(
            logit_grad_source, logit_grad_stride, narrow_operand_source, out_ptr, rows, depth,
            first_row, first_column, end, first_of_prefix, last, WIDTH, ADD, BLOCK_M, BLOCK_N // 2, BLOCK_K,
            TRANSPOSED, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    elif tile < WIDE_TILES:
        _product_of_tile(
            logit_grad_source, logit_grad_stride, operand_source, out_ptr, rows, depth, first_row,
            first_column, end, first_of_prefix, last, WIDTH, ADD, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED, PRECISION,
            DESCRIPTORS,
        )  # fmt: skip
    else:
        _product_of_tile(
            logit_grad_source, logit_grad_stride, narrow_operand_source, out_ptr, rows, depth,
            first_row, first_column, end, first_of_prefix, last, WIDTH, ADD, BLOCK_M, BLOCK_N // 2, BLOCK_K,
            TRANSPOSED, PRECISION, DESCRIPTORS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "dots_stride", "inverse_norms_stride"])
def finish_kernel(
    sums_ptr,  # fp32 (rows, ENDS[-1])
    normalised_ptr,  # (rows, ENDS[-1]): x̂
    rows,
    inverse_norms_ptr,  # fp32 (prefixes, inverse_norms_stride): a, and below aₖ/aₖ₋₁
    ratios_ptr,
    inverse_norms_stride,
    dots_ptr,  # fp32 (prefixes, dots_stride): Σ G ⊙ cos
    dots_stride,
    own_shares_ptr,  # fp32 (prefixes,): `blocks.Shares`
    wider_shares_ptr,
    units_ptr,
    factor_ptr,  # fp32
    out_ptr,  # (rows, at least WIDTHS[-1]), rows `out_stride` apart
    out_stride,
    only_if_ptr,  # int32: where it is 0 there is nothing to do; or None
    WIDTHS: tl.constexpr,
    ENDS: tl.constexpr,
    LOGIT_GRAD_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[s] = factor · τₛ aₛ (sums[s] / LOGIT_GRAD_SCALE - rₛ x̂[s]). Program i owns the rows i ROWS : +ROWS."""
    if _skipped(only_if_ptr):
        return
    PREFIXES: tl.constexpr = len(ENDS)
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    sources, exists = _source_columns(columns, WIDTHS, ENDS)
    inside = o_rows < rows
    exists = exists & inside[:, None] & (columns < ENDS[PREFIXES - 1])
    offsets = o_rows[:, None] * ENDS[PREFIXES - 1] + columns
    sums = tl.load(sums_ptr + offsets, mask=exists, other=0.0)
    normalised = tl.load(normalised_ptr + offsets, mask=exists, other=0.0).to(tl.float32)

    own = tl.zeros_like(sums)
    scale = tl.zeros_like(sums)
    own_of_prefix = tl.zeros((ROWS,), tl.float32)  # r
    for prefix in tl.static_range(PREFIXES - 1, -1, -1):
        o_norms = prefix * inverse_norms_stride.to(tl.int64) + o_rows
        if prefix < PREFIXES - 1:
            ratio = tl.load(ratios_ptr + inverse_norms_stride + o_norms, mask=inside, other=0.0)
            own_of_prefix *= tl.load(wider_shares_ptr + prefix) * ratio * ratio
        dots = tl.load(dots_ptr + prefix * dots_stride.to(tl.int64) + o_rows, mask=inside, other=0.0)
        own_of_prefix += tl.load(own_shares_ptr + prefix) * dots
        unit = tl.load(units_ptr + prefix) * tl.load(factor_ptr)
        scale_of_prefix = unit * tl.load(inverse_norms_ptr + o_norms, mask=inside, other=0.0)
        of_prefix = columns < ENDS[prefix]
        own = tl.where(of_prefix, own_of_prefix[:, None], own)
        scale = tl.where(of_prefix, scale_of_prefix[:, None], scale)
    gradient = scale * (sums / LOGIT_GRAD_SCALE - own * normalised)
    tl.store(out_ptr + o_rows[:, None] * out_stride + sources, narrow(gradient, out_ptr.dtype.element_ty), mask=exists)
