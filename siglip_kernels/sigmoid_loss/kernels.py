"""The three Triton kernels of the sigmoid loss; a launch computes one block of image-text pairs.

For images x and texts y, with s = t·x yᵀ + b and zᵢⱼ = +1 on positives, -1 elsewhere (arXiv 2303.15343, eq. 1):

    loss = Σ softplus(-z s),    G = σ(s) - [positive],    db = Σ G,    dt = Σ G ⊙ x yᵀ,    dx = t G y,    dy = t Gᵀ x

Options, which are compiled in where given (pairs.py): pairs are positive by their groups instead of on a diagonal, and
a pair's loss and G are multiplied by its weight.

`logit_grad_kernel` computes everything that needs logits, which exist in fp32 in the accumulator only; of the large
matrices G alone is stored. `product_kernel` computes both products with G, `scale_kernel` multiplies by t / N or by the
upstream gradient in fp32.
"""

import triton
import triton.language as tl

from siglip_kernels.approximate import log2, reciprocal
from siglip_kernels.interpreter import dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    source,  # a tensor descriptor (DESCRIPTORS), which has bounds of its own, or a pointer to the first element
    first_row,
    first_column,
    rows,  # later rows read as zeros
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # later columns read as zeros; None: all may be read
    DESCRIPTORS: tl.constexpr,
):
    """source[first_row : +ROWS, first_column : +COLUMNS]."""
    if DESCRIPTORS:
        return source.load([first_row, first_column])
    else:
        o_rows = first_row + tl.arange(0, ROWS)[:, None]
        o_columns = first_column + tl.arange(0, COLUMNS)[None, :]
        mask = o_rows < rows
        if WIDTH is not None:
            mask = mask & (o_columns < WIDTH)
        return tl.load(source + o_rows.to(tl.int64) * stride + o_columns, mask=mask, other=0.0)


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1 to a relative 2e-7: e times a minimax polynomial of degree 8.

    The rounding of 1 + e would lose a small e. And a polynomial runs on the FMA pipe, while the special-function units
    are busy with the exponentials and the reciprocal.
    """
    p = 0.005232684779912233
    p = p * e - 0.029505206272006035
    p = p * e + 0.07822591066360474
    p = p * e - 0.13663242757320404
    p = p * e + 0.19106006622314453
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return p * e


@triton.jit
def _log1p_of_any(e):
    """log(1 + e) for e >= 0 to a relative 3e-7. Beyond 1, the rounding of 1 + e is harmless."""
    return tl.where(e <= 1.0, log1p(e), log2(1.0 + e) * LOG_2)


@triton.jit
def _halves(x):
    """The left and the right columns of x, without leaving the registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x):
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _adjacent(x):
    """The even and the odd columns of x. Every accumulator's threads have both of two."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _four_apart(x):
    """The first and the last four of every eight columns of x: of every 16 before `_adjacent`."""
    x = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 2, 4)), (0, 1, 3, 2))
    left, right = tl.split(x)
    return tl.reshape(left, (x.shape[0], x.shape[1] * 4)), tl.reshape(right, (x.shape[0], x.shape[1] * 4))


@triton.jit
def _fold(x, COLUMNS: tl.constexpr):
    """Sums of up to four columns: (rows, COLUMNS), without an exchange between threads (`config.Folding`)."""
    if x.shape[1] > COLUMNS:
        left, right = _adjacent(x)
        x = left + right
    if x.shape[1] > COLUMNS:
        left, right = _four_apart(x)
        x = left + right
    return x


@triton.jit
def _multiply(a, b):
    """(1 + a) (1 + b) - 1."""
    return a * b + (a + b)


@triton.jit
def _fold_softplus(x, COLUMNS: tl.constexpr):
    """Π (1 + x) - 1 over the same columns."""
    if x.shape[1] > COLUMNS:
        left, right = _adjacent(x)
        x = _multiply(left, right)
    if x.shape[1] > COLUMNS:
        left, right = _four_apart(x)
        x = _multiply(left, right)
    return x


@triton.jit
def _row_halves(x):
    """The rows of x whose numbers have the fourth bit, and the others."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), (0, 2, 3, 1)))


@triton.jit
def _upper_and_lower(x):
    """The first and the second half of the rows of x."""
    return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))


@triton.jit
def _fold_rows(x, COUNT: tl.constexpr):
    """Sums of COUNT rows: 1, 2 or 4."""
    if COUNT > 2:
        upper, lower = _upper_and_lower(x)
        x = upper + lower
    if COUNT > 1:
        upper, lower = _row_halves(x)
        return upper + lower
    else:
        return x


@triton.jit
def _fold_rows_softplus(x, COUNT: tl.constexpr):
    """Π (1 + x) - 1 over the same rows."""
    if COUNT > 2:
        upper, lower = _upper_and_lower(x)
        x = _multiply(upper, lower)
    if COUNT > 1:
        upper, lower = _row_halves(x)
        return _multiply(upper, lower)
    else:
        return x


@triton.jit
def _beside(left, right):
    """The inverse of `_halves`."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _add_column_sums(target_ptr, values, factor, PRECISION: tl.constexpr):
    """Adds factor · Σ values over the rows to memory, to which no other program of the launch adds.

    In half precision by a product with ones: threads that exchange an accumulator's values take three times as long.
    """
    if values.dtype == tl.float32:
        sums = tl.sum(values, 0)
    elif values.shape[1] < values.shape[0]:
        # 16 rows are the fewest that tl.dot takes; all are alike.
        ones = tl.full((16, values.shape[0]), 1.0, tl.float32).to(values.dtype)
        sums = tl.sum(dot(ones, values, tl.zeros((16, values.shape[1]), tl.float32), PRECISION), 0) / 16
    else:  # likewise, with values that Blackwell stores in whole words
        ones = tl.full((values.shape[0], 16), 1.0, tl.float32).to(values.dtype)
        sums = tl.sum(dot(values.T, ones, tl.zeros((values.shape[1], 16), tl.float32), PRECISION), 1) / 16
    # Unlike a load, an atomic does not make every thread of a row add for itself.
    tl.atomic_add(target_ptr + tl.arange(0, values.shape[1]), sums * factor, sem="relaxed")


@triton.jit
def _sums(
    products,  # x yᵀ of some images and texts
    logit_grad_target,
    logit_grad_stride,
    first_row,
    first_column,
    scale,  # t and b, times log₂ e
    bias,
    images,
    texts,
    diagonal,
    image_groups_ptr,
    text_groups_ptr,
    positive_weight_ptr,
    negative_weight_ptr,
    text_weight_ptr,
    divisor,  # of G
    GRADIENTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    SUMS: tl.constexpr,
    SPECIAL: tl.constexpr,  # whether there may be positives on the diagonal, or pairs past the last image or text
):
    """Σ max(-z s, 0) / log 2, Π (1 + e^-|s|) - 1, Σ G ⊙ x yᵀ and Σ G, each `_fold`ed, and G ⊙ x yᵀ. Stores G.

    With weights the first is the sum of whole losses, and the product is 1 - 1.
    """
    MAY_BE_POSITIVE: tl.constexpr = SPECIAL or image_groups_ptr is not None
    rows = first_row + tl.arange(0, products.shape[0])[:, None]
    columns = first_column + tl.arange(0, products.shape[1])[None, :]
    # wrong = -z s: how far a pair is on the wrong side. -inf past the edge: such pairs have no loss and no G.
    wrong = products * scale + bias
    if image_groups_ptr is not None:
        image_groups = tl.load(image_groups_ptr + rows, mask=rows < images, other=-1)
        positive = image_groups == tl.load(text_groups_ptr + columns, mask=columns < texts, other=-2)
    elif SPECIAL:
        positive = rows + diagonal == columns
    if MAY_BE_POSITIVE:
        wrong = tl.where(positive, -wrong, wrong)
    if SPECIAL:
        wrong = tl.where((rows < images) & (columns < texts), wrong, float("-inf"))
    e = tl.exp2(-tl.abs(wrong))
    if positive_weight_ptr is not None:
        weight = tl.load(negative_weight_ptr + rows, mask=rows < images, other=0.0)
        if MAY_BE_POSITIVE:
            weight = tl.where(positive, tl.load(positive_weight_ptr + rows, mask=rows < images, other=0.0), weight)
        weight = weight * tl.load(text_weight_ptr + columns, mask=columns < texts, other=0.0)
        right_sum = _fold(weight * (tl.maximum(wrong, 0.0) + log1p(e) * LOG2_E), SUMS)
        softplus = tl.zeros_like(right_sum)
    else:
        # Σ log(1 + e) = log Π (1 + e): one logarithm for many pairs. Π - 1 is kept, because Π would lose a small e.
        softplus = _fold_softplus(e, SUMS)
        right_sum = _fold(tl.maximum(wrong, 0.0), SUMS)
    dot_sum = tl.zeros_like(right_sum)
    logit_grad_sum = tl.zeros_like(right_sum)
    dots = products
    if GRADIENTS:
        logit_grad = tl.where(wrong >= 0.0, 1.0, e) * reciprocal(divisor + e * divisor)  # σ(-z s) / divisor
        if MAY_BE_POSITIVE:
            logit_grad = tl.where(positive, -logit_grad, logit_grad)
        if positive_weight_ptr is not None:
            logit_grad *= weight
        dots = logit_grad * products
        dot_sum = _fold(dots, SUMS)
        logit_grad_sum = _fold(logit_grad, SUMS)
        if logit_grad_target is not None:
            if DESCRIPTORS:
                stored = narrow(logit_grad, logit_grad_target.dtype)
                logit_grad_target.store([first_row, first_column], stored)
            else:
                # Zeros past the last text are stored as well, because the products read whole tiles.
                o_logit_grad = rows.to(tl.int64) * tl.multiple_of(logit_grad_stride, 16) + columns
                stored = narrow(logit_grad, logit_grad_target.dtype.element_ty)
                tl.store(logit_grad_target + o_logit_grad, stored, mask=None if WHOLE_TILES else rows < images)
    return right_sum, softplus, dot_sum, logit_grad_sum, dots


@triton.jit
def tile_sums(
    products,  # x yᵀ of some images and texts
    logit_grad_target,  # as `logit_grad_kernel` and `_sums`, like all that follows
    logit_grad_stride,
    first_row,
    first_column,
    scale,
    bias,
    images,
    texts,
    diagonal,
    image_groups_ptr,
    text_groups_ptr,
    positive_weight_ptr,
    negative_weight_ptr,
    text_weight_ptr,
    text_dots_ptr,  # fp32 (texts,), whole tiles, added to: Σ G ⊙ x yᵀ over the rows; or None
    divisor,  # of G, in all that is computed of it
    GRADIENTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # whether G has rows past the last image
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,  # `config.Folding`: the columns of the sums,
    ROWS: tl.constexpr,  # and how many rows are added up,
    IMAGE_LOSSES: tl.constexpr,  # unless the loss of each image is asked for,
    IMAGE_DOTS: tl.constexpr,  # or Σ G ⊙ x yᵀ of each
):
    """Sums of the loss, of G ⊙ x yᵀ and of G: (rows, or fewer by ROWS, SUMS) each. Stores G."""
    # A quarter at a time: the temporaries of a whole tile would not fit in the registers beside its accumulator.
    PART: tl.constexpr = products.shape[1] // 4
    parts = _quarters(products)
    for part in tl.static_range(4):
        column = first_column + part * PART
        if image_groups_ptr is None:
            has_positives = (first_row + diagonal < column + PART) & (first_row + diagonal + products.shape[0] > column)
        else:
            has_positives = False  # SPECIAL or not
        at_edge = (first_row + products.shape[0] > images) | (column + PART > texts)
        # The branch also keeps the compiler from interleaving the parts, which would spill.
        if has_positives | at_edge:
            right, soft, dots, grads, all_dots = _sums(
                parts[part], logit_grad_target, logit_grad_stride, first_row, column, scale, bias, images, texts,
                diagonal, image_groups_ptr, text_groups_ptr, positive_weight_ptr, negative_weight_ptr,
                text_weight_ptr, divisor, GRADIENTS, DESCRIPTORS, WHOLE_TILES, SUMS, True,
            )  # fmt: skip
        else:
            right, soft, dots, grads, all_dots = _sums(
                parts[part], logit_grad_target, logit_grad_stride, first_row, column, scale, bias, images, texts,
                diagonal, image_groups_ptr, text_groups_ptr, positive_weight_ptr, negative_weight_ptr,
                text_weight_ptr, divisor, GRADIENTS, DESCRIPTORS, WHOLE_TILES, SUMS, False,
            )  # fmt: skip
        if text_dots_ptr is not None:
            narrowed = narrow(all_dots, logit_grad_target.dtype.element_ty)
            # At once for the whole tile, unless that takes too many registers.
            if SUMS > 8 or positive_weight_ptr is not None or narrowed.dtype == tl.float32:
                _add_column_sums(text_dots_ptr + column, narrowed, divisor, PRECISION)
            elif part == 0:
                first = narrowed
            elif part == 1:
                left = _beside(first, narrowed)
            elif part == 2:
                third = narrowed
            else:
                whole = _beside(left, _beside(third, narrowed))
                _add_column_sums(text_dots_ptr + first_column, whole, divisor, PRECISION)
        rights = _fold_rows(right, 1 if IMAGE_LOSSES else ROWS)
        softs = _fold_rows_softplus(soft, 1 if IMAGE_LOSSES else ROWS)
        dot_sums = _fold_rows(dots, 1 if IMAGE_DOTS else ROWS)
        grad_sums = _fold_rows(grads, ROWS)
        if part == 0:
            right_sum, softplus, dot_sum, logit_grad_sum = rights, softs, dot_sums, grad_sums
        else:
            right_sum += rights
            softplus = _multiply(softplus, softs)
            dot_sum += dot_sums
            logit_grad_sum += grad_sums
    return right_sum * LOG_2 + _log1p_of_any(softplus), dot_sum, logit_grad_sum


@triton.jit(do_not_specialize=["images", "texts", "diagonal", "image_losses_stride"])
def logit_grad_kernel(
    image_source,  # x (images, WIDTH): descriptor of blocks [BLOCK_M, BLOCK_K], or pointer
    text_source,  # y (texts, WIDTH): descriptor of blocks [BLOCK_N, BLOCK_K], or pointer
    logit_grad_target,  # G · LOGIT_GRAD_SCALE (images, texts): descriptor of [BLOCK_M, BLOCK_N / 4], pointer, or None
    logit_grad_stride,
    logit_scale_ptr,  # fp32: t
    logit_bias_ptr,  # fp32: b
    totals_ptr,  # fp64 (3, slots), added to: sums of the loss, of G ⊙ x yᵀ and of G, one slot per program
    slots,
    images,
    texts,
    diagonal,  # image i and text i + diagonal are a positive pair, unless there are groups
    image_groups_ptr,  # int64 (images,) and (texts,): equal ids are positive; or None
    text_groups_ptr,
    positive_weight_ptr,  # fp32 (images,), (images,) and (texts,), below 1: of an image's positives, of its negatives,
    negative_weight_ptr,  # and of a text's pairs; or None
    text_weight_ptr,
    image_losses_ptr,  # fp64 (column tiles, image_losses_stride), added to: each image's loss; or None
    image_losses_stride,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRADIENTS: tl.constexpr,  # whether anything beyond the loss is required
    LOGIT_GRAD_SCALE: tl.constexpr,  # a power of two
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SUMS: tl.constexpr,  # as `tile_sums`
    ROWS: tl.constexpr,
):
    """Program (m, n) owns the pairs of images m BLOCK_M : +BLOCK_M and texts n BLOCK_N : +BLOCK_N."""
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N

    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, WIDTH, BLOCK_K):
        x = load_tile(image_source, first_row, k, images, WIDTH, BLOCK_M, BLOCK_K, WIDTH, DESCRIPTORS)
        y = load_tile(text_source, first_column, k, texts, WIDTH, BLOCK_N, BLOCK_K, WIDTH, DESCRIPTORS)
        products = dot(x, y.T, products, PRECISION)

    # e^x = 2^(x log₂ e): logits are computed in units of log₂ e.
    scale = tl.load(logit_scale_ptr) * LOG2_E
    bias = tl.load(logit_bias_ptr) * LOG2_E
    loss_sum, dot_sum, logit_grad_sum = tile_sums(
        products, logit_grad_target, logit_grad_stride, first_row, first_column, scale, bias, images, texts, diagonal,
        image_groups_ptr, text_groups_ptr, positive_weight_ptr, negative_weight_ptr, text_weight_ptr, None,
        1.0 / LOGIT_GRAD_SCALE, GRADIENTS, DESCRIPTORS, False, PRECISION, SUMS, ROWS, image_losses_ptr is not None,
        False,
    )  # fmt: skip
    if image_losses_ptr is not None:
        o_images = first_row + tl.arange(0, BLOCK_M)
        losses_ptr = image_losses_ptr + tl.program_id(1).to(tl.int64) * image_losses_stride + o_images
        before = tl.load(losses_ptr, mask=o_images < images)
        tl.store(losses_ptr, before + tl.sum(loss_sum, 1).to(tl.float64), mask=o_images < images)

    # Within a tile sums are fp32, a tree with at most 16 terms in a row, over tiles fp64. A slot belongs to one program
    # per launch, and launches run one after another, so the order of every sum is fixed.
    slot_ptr = totals_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(slot_ptr, tl.load(slot_ptr) + tl.sum(loss_sum).to(tl.float64))
    if GRADIENTS:
        dot_ptr = slot_ptr + slots
        tl.store(dot_ptr, tl.load(dot_ptr) + (tl.sum(dot_sum) / LOGIT_GRAD_SCALE).to(tl.float64))
        sum_ptr = dot_ptr + slots
        tl.store(sum_ptr, tl.load(sum_ptr) + (tl.sum(logit_grad_sum) / LOGIT_GRAD_SCALE).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "depth"])
def product_kernel(
    logit_grad_source,  # G (rows, depth): descriptor of blocks [BLOCK_M, BLOCK_K], or pointer;
    #                   TRANSPOSED: G (depth, rows): descriptor of blocks [BLOCK_K, BLOCK_M], or pointer
    logit_grad_stride,
    operand_source,  # y or x (depth, WIDTH): descriptor of blocks [BLOCK_K, BLOCK_N], or pointer
    previous_ptr,  # fp32 (rows, WIDTH), added to the product; None: nothing is added
    out_ptr,  # (rows, WIDTH)
    logit_scale_ptr,  # fp32; the sum is multiplied by it and by `factor`. None: by neither
    factor,
    rows,
    depth,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """out = (previous + G y) t factor. Program (m, n) owns out[m BLOCK_M : +BLOCK_M, n BLOCK_N : +BLOCK_N]."""
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    logit_grad_stride = tl.multiple_of(logit_grad_stride, 16)

    o_rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    o_columns = first_column + tl.arange(0, BLOCK_N)[None, :]
    offsets = o_rows.to(tl.int64) * WIDTH + o_columns
    mask = (o_rows < rows) & (o_columns < WIDTH)
    if previous_ptr is not None:
        total = tl.load(previous_ptr + offsets, mask=mask, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for k in tl.range(0, depth, BLOCK_K):
        if TRANSPOSED:
            g = load_tile(
                logit_grad_source, k, first_row, depth, logit_grad_stride, BLOCK_K, BLOCK_M, None, DESCRIPTORS
            ).T
        else:
            g = load_tile(logit_grad_source, first_row, k, rows, logit_grad_stride, BLOCK_M, BLOCK_K, None, DESCRIPTORS)
        operand = load_tile(operand_source, k, first_column, depth, WIDTH, BLOCK_K, BLOCK_N, WIDTH, DESCRIPTORS)
        total = dot(g, operand, total, PRECISION)

    if logit_scale_ptr is not None:
        total *= tl.load(logit_scale_ptr) * factor
    tl.store(out_ptr + offsets, narrow(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    source_ptr,  # (size,)
    out_ptr,  # (size,)
    scale_ptr,  # fp32
    factor,
    size,
    BLOCK: tl.constexpr,
):
    """out = source · scale · factor in fp32. Program i owns elements i BLOCK : +BLOCK."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    values = tl.load(source_ptr + offsets, mask=mask).to(tl.float32) * (tl.load(scale_ptr) * factor)
    tl.store(out_ptr + offsets, narrow(values, out_ptr.dtype.element_ty), mask=mask)
