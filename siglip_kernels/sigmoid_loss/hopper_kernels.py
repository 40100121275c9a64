"""The two matrix kernels of the sigmoid loss for Hopper (sm_90), in Gluon; see `kernels.py` for the mathematics.

Both are persistent GEMMs with the main loop of `siglip_kernels.gemm.hopper_pipeline`. `logit_grad_kernel` computes G
and the sums from logits that never leave the accumulator, `product_kernel` computes G y and Gᵀ x.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from siglip_kernels.gemm.epilogue import reciprocal
from siglip_kernels.gemm.hopper_pipeline import (
    CONSUMERS,
    THREAD_LAYOUT,
    THREADS,
    accumulator_layout,
    make_ring,
    multiply_tile,
    pieces_of,
    sum_in_thread,
)
from siglip_kernels.gemm.ring import load_tiles, tile_position
from siglip_kernels.sigmoid_loss.kernels import log1p
from siglip_kernels.tma import async_store

LOG2_E = gl.constexpr(1.4426950408889634)
LOG_2 = gl.constexpr(0.6931471805599453)
PIECE = gl.constexpr(64)  # columns of G per TMA store
CHUNK = gl.constexpr(16)  # columns computed at a time: temporaries of more would not fit in registers
BUFFERS = gl.constexpr(2)  # per consumer: while one piece of G is stored, the next is written


_log1p_to_1 = gluon.jit(log1p.fn)  # the portable kernel's function, from the same source


@gluon.jit
def _log1p(e):
    """log(1 + e) for e >= 0 to a relative 3e-7. Beyond 1, the rounding of 1 + e is harmless."""
    return gl.where(e <= 1.0, _log1p_to_1(e), gl.log2(1.0 + e) * LOG_2)


@gluon.jit
def _logit_grad_piece(
    products,  # x yᵀ of some images and PIECE texts
    buffers,
    buffer: gl.constexpr,  # the index of the buffer for its G
    logit_grad_target,
    first_row,
    first_column,
    scale,  # t and b, times log₂ e
    bias,
    images,
    texts,
    diagonal,
    right_sum,  # each thread's sums of max(-z s, 0), of G ⊙ x yᵀ and of G
    dot_sum,
    logit_grad_sum,
    softplus,  # the product of 1 + e^-|s| over pairs CHUNK columns apart, minus 1
    GRADIENTS: gl.constexpr,
    LOGIT_GRAD_SCALE: gl.constexpr,
    SPECIAL: gl.constexpr,  # whether there may be positives, or pairs past the last image or text
):
    """Adds a piece to the sums and starts the store of its G."""
    LAYOUT: gl.constexpr = accumulator_layout(CHUNK)
    chunks = pieces_of(products, CHUNK)
    if logit_grad_target is not None:
        # The store that last read this buffer must be done.
        tma.store_wait(pendings=BUFFERS - 1)
    for chunk in gl.static_range(PIECE // CHUNK):
        # wrong = -z s: how far a pair is on the wrong side. -inf past the edge: such pairs have no loss and no G.
        if SPECIAL:
            rows = first_row + gl.arange(0, products.shape[0], gl.SliceLayout(1, LAYOUT))
            columns = first_column + chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))
            inside = (rows < images)[:, None] & (columns < texts)[None, :]
            positive = rows[:, None] + diagonal == columns[None, :]
            offset = gl.where(inside, gl.where(positive, -bias, bias), float("-inf"))
            wrong = chunks[chunk] * gl.where(positive, -scale, scale) + offset
        else:
            # Not `wrong` first with corrections if SPECIAL: the compiler hoists what both branches of the kernel have
            # in common out of them, for a whole tile, and spills.
            wrong = chunks[chunk] * scale + bias
        e = gl.exp2(-gl.abs(wrong))
        # Σ log(1 + e) = log Π (1 + e): one logarithm for many pairs. Π - 1 is kept, because Π would lose a small e.
        softplus = softplus * e + (softplus + e)
        right_sum += sum_in_thread(gl.maximum(wrong, 0.0))
        if GRADIENTS:
            logit_grad = gl.where(wrong >= 0.0, 1.0, e) * reciprocal(1.0 + e)  # σ(-z s)
            if SPECIAL:
                logit_grad = gl.where(positive, -logit_grad, logit_grad)
            dot_sum += sum_in_thread(logit_grad * chunks[chunk])
            logit_grad_sum += sum_in_thread(logit_grad)
            if logit_grad_target is not None:
                stored = (logit_grad * LOGIT_GRAD_SCALE).to(logit_grad_target.dtype)
                buffers.index(buffer).slice(chunk * CHUNK, CHUNK, 1).store(stored)
    if logit_grad_target is not None:
        # Ordinary stores are not visible to TMA without a fence.
        fence_async_shared()
        async_store(logit_grad_target, [first_row, first_column], buffers.index(buffer))
    return right_sum, dot_sum, logit_grad_sum, softplus


@gluon.jit
def _logit_grad_tile(
    products,  # x yᵀ of the consumer's rows
    buffers,
    consumer: gl.constexpr,
    logit_grad_target,
    first_row,
    first_column,
    scale,
    bias,
    images,
    texts,
    diagonal,
    GRADIENTS: gl.constexpr,
    LOGIT_GRAD_SCALE: gl.constexpr,
    SPECIAL: gl.constexpr,
):
    """Each thread's sums of the loss, of G ⊙ x yᵀ and of G over a tile."""
    right_sum = gl.zeros([THREADS], gl.float32, THREAD_LAYOUT)
    dot_sum = gl.zeros([THREADS], gl.float32, THREAD_LAYOUT)
    logit_grad_sum = gl.zeros([THREADS], gl.float32, THREAD_LAYOUT)
    softplus = gl.zeros((products.shape[0], CHUNK), gl.float32, accumulator_layout(CHUNK))
    pieces = pieces_of(products, PIECE)
    for piece in gl.static_range(products.shape[1] // PIECE):
        # The branch also keeps the compiler from interleaving pieces, which would spill.
        column = first_column + piece * PIECE
        if column < texts:
            right_sum, dot_sum, logit_grad_sum, softplus = _logit_grad_piece(
                pieces[piece], buffers, consumer * BUFFERS + piece % BUFFERS, logit_grad_target, first_row, column,
                scale, bias, images, texts, diagonal, right_sum, dot_sum, logit_grad_sum, softplus,
                GRADIENTS, LOGIT_GRAD_SCALE, SPECIAL,
            )  # fmt: skip
    if SPECIAL and logit_grad_target is not None:
        # The buffers take turns, and a tile at the edge may have stopped in the middle of a turn.
        tma.store_wait(pendings=0)
    return right_sum * LOG_2 + sum_in_thread(_log1p(softplus)), dot_sum, logit_grad_sum


@gluon.jit
def _logit_grad_consumer(
    consumer: gl.constexpr,
    a_blocks,
    b_blocks,
    filled,
    emptied,
    lead,
    buffers,
    logit_grad_target,
    logit_scale_ptr,
    logit_bias_ptr,
    totals_ptr,
    slots,
    images,
    texts,
    diagonal,
    WIDTH: gl.constexpr,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GRADIENTS: gl.constexpr,
    LOGIT_GRAD_SCALE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    # e^x = 2^(x log₂ e): logits are computed in units of log₂ e; sums are converted back.
    scale = gl.load(logit_scale_ptr) * LOG2_E
    bias = gl.load(logit_bias_ptr) * LOG2_E
    loss_total = gl.zeros([THREADS], gl.float64, THREAD_LAYOUT)
    dot_total = gl.zeros([THREADS], gl.float64, THREAD_LAYOUT)
    logit_grad_total = gl.zeros([THREADS], gl.float64, THREAD_LAYOUT)
    row_tiles = gl.cdiv(images, CONSUMERS * CONSUMER_ROWS)
    column_tiles = gl.cdiv(texts, BLOCK_N)
    step = 0
    done = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        first_row = (row_tile * CONSUMERS + consumer) * CONSUMER_ROWS
        first_column = column_tile * BLOCK_N
        products = gl.zeros((CONSUMER_ROWS, BLOCK_N), gl.float32, LAYOUT)
        products, step = multiply_tile(
            products, consumer, a_blocks, b_blocks, filled, emptied, lead, step, done, WIDTH, False, True, STAGES
        )

        has_positives = (first_row + diagonal < first_column + BLOCK_N) & (
            first_row + diagonal + CONSUMER_ROWS > first_column
        )
        at_edge = (first_row + CONSUMER_ROWS > images) | (first_column + BLOCK_N > texts)
        if has_positives | at_edge:
            loss_sum, dot_sum, logit_grad_sum = _logit_grad_tile(
                products, buffers, consumer, logit_grad_target, first_row, first_column, scale, bias, images, texts,
                diagonal, GRADIENTS, LOGIT_GRAD_SCALE, True,
            )  # fmt: skip
        else:
            loss_sum, dot_sum, logit_grad_sum = _logit_grad_tile(
                products, buffers, consumer, logit_grad_target, first_row, first_column, scale, bias, images, texts,
                diagonal, GRADIENTS, LOGIT_GRAD_SCALE, False,
            )  # fmt: skip
        # Within a tile sums are fp32, over tiles fp64.
        loss_total += loss_sum.to(gl.float64)
        dot_total += dot_sum.to(gl.float64)
        logit_grad_total += logit_grad_sum.to(gl.float64)
        done += 1  # noqa: SIM113 - the range is the kernel's
    if logit_grad_target is not None:
        tma.store_wait(pendings=0)

    # A slot belongs to one thread of one program, and launches run one after another: the order of every sum is fixed.
    thread = (gl.program_id(0) * CONSUMERS + consumer) * THREADS + gl.arange(0, THREADS, THREAD_LAYOUT)
    totals = totals_ptr + thread
    gl.store(totals, gl.load(totals) + loss_total)
    if GRADIENTS:
        gl.store(totals + slots, gl.load(totals + slots) + dot_total)
        gl.store(totals + 2 * slots, gl.load(totals + 2 * slots) + logit_grad_total)


@gluon.jit(do_not_specialize=["slots", "images", "texts", "diagonal"])
def logit_grad_kernel(
    image_source,  # x (images, WIDTH): descriptor of blocks [CONSUMER_ROWS, 64]
    text_source,  # y (texts, WIDTH): descriptor of blocks [BLOCK_N, 64]
    logit_grad_target,  # G · LOGIT_GRAD_SCALE (images, texts): descriptor of blocks [CONSUMER_ROWS, 64], or None
    logit_scale_ptr,  # fp32: t
    logit_bias_ptr,  # fp32: b
    totals_ptr,  # fp64 (3, slots), added to: sums of the loss, of G ⊙ x yᵀ and of G
    slots,  # at least one per thread of each consumer
    images,
    texts,
    diagonal,  # image i and text i + diagonal are a positive pair
    WIDTH: gl.constexpr,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GRADIENTS: gl.constexpr,  # whether anything beyond the loss is required
    LOGIT_GRAD_SCALE: gl.constexpr,  # a power of two
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Persistent: program p owns the tiles p, p + programs, ... of 2 CONSUMER_ROWS images by BLOCK_N texts."""
    a_blocks, b_blocks, filled, emptied, lead = make_ring(image_source, text_source, STAGES)
    if logit_grad_target is None:
        buffers: gl.constexpr = None
    else:
        buffers = gl.allocate_shared_memory(
            logit_grad_target.dtype, [CONSUMERS * BUFFERS, CONSUMER_ROWS, PIECE], logit_grad_target.layout
        )
    fence_async_shared()
    gl.warp_specialize(
        [
            (_logit_grad_consumer, (
                0, a_blocks, b_blocks, filled, emptied, lead, buffers, logit_grad_target, logit_scale_ptr,
                logit_bias_ptr, totals_ptr, slots, images, texts, diagonal, WIDTH, CONSUMER_ROWS, BLOCK_N, GRADIENTS,
                LOGIT_GRAD_SCALE, STAGES, GROUP,
            )),
            (_logit_grad_consumer, (
                1, a_blocks, b_blocks, filled, emptied, lead, buffers, logit_grad_target, logit_scale_ptr,
                logit_bias_ptr, totals_ptr, slots, images, texts, diagonal, WIDTH, CONSUMER_ROWS, BLOCK_N, GRADIENTS,
                LOGIT_GRAD_SCALE, STAGES, GROUP,
            )),
            (load_tiles, (
                image_source, text_source, None, None, a_blocks, b_blocks, filled, emptied,
                gl.cdiv(images, CONSUMERS * CONSUMER_ROWS), gl.cdiv(texts, BLOCK_N), WIDTH, CONSUMER_ROWS, BLOCK_N,
                1, False, True, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _product_consumer(
    consumer: gl.constexpr,
    a_blocks,
    b_blocks,
    filled,
    emptied,
    lead,
    previous_ptr,
    out_ptr,
    logit_scale_ptr,
    factor,
    rows,
    depth,
    WIDTH: gl.constexpr,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    PIECE_LAYOUT: gl.constexpr = accumulator_layout(PIECE)
    row_tiles = gl.cdiv(rows, CONSUMERS * CONSUMER_ROWS)
    column_tiles = gl.cdiv(WIDTH, BLOCK_N)
    step = 0
    done = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        total = gl.zeros((CONSUMER_ROWS, BLOCK_N), gl.float32, LAYOUT)
        total, step = multiply_tile(
            total, consumer, a_blocks, b_blocks, filled, emptied, lead, step, done, depth, TRANSPOSED, False, STAGES
        )
        rows_of_tile = (row_tile * CONSUMERS + consumer) * CONSUMER_ROWS + gl.arange(
            0, CONSUMER_ROWS, gl.SliceLayout(1, PIECE_LAYOUT)
        )
        pieces = pieces_of(total, PIECE)
        for piece in gl.static_range(BLOCK_N // PIECE):
            value = pieces[piece]
            columns = column_tile * BLOCK_N + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, PIECE_LAYOUT))
            offsets = rows_of_tile[:, None] * WIDTH + columns[None, :]  # 32 bits: rows are those of one block of G
            mask = (rows_of_tile < rows)[:, None] & (columns < WIDTH)[None, :]
            if previous_ptr is not None:
                value += gl.load(previous_ptr + offsets, mask=mask, other=0.0)
            if logit_scale_ptr is not None:
                value *= gl.load(logit_scale_ptr) * factor
            gl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)
        done += 1  # noqa: SIM113 - the range is the kernel's


@gluon.jit(do_not_specialize=["rows", "depth"])
def product_kernel(
    logit_grad_source,  # G (rows, depth): descriptor of blocks [CONSUMER_ROWS, 64];
    #                   TRANSPOSED: G (depth, rows): descriptor of blocks [64, CONSUMER_ROWS]
    operand_source,  # y or x (depth, WIDTH): descriptor of blocks [64, BLOCK_N]
    previous_ptr,  # fp32 (rows, WIDTH), added to the product; None: nothing is added
    out_ptr,  # (rows, WIDTH)
    logit_scale_ptr,  # fp32; the sum is multiplied by it and by `factor`. None: by neither
    factor,
    rows,
    depth,
    WIDTH: gl.constexpr,
    CONSUMER_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """out = (previous + G y) t factor. Program p owns the tiles p, p + programs, ... of 2 CONSUMER_ROWS by BLOCK_N."""
    a_blocks, b_blocks, filled, emptied, lead = make_ring(logit_grad_source, operand_source, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_product_consumer, (
                0, a_blocks, b_blocks, filled, emptied, lead, previous_ptr, out_ptr, logit_scale_ptr, factor, rows,
                depth, WIDTH, CONSUMER_ROWS, BLOCK_N, TRANSPOSED, STAGES, GROUP,
            )),
            (_product_consumer, (
                1, a_blocks, b_blocks, filled, emptied, lead, previous_ptr, out_ptr, logit_scale_ptr, factor, rows,
                depth, WIDTH, CONSUMER_ROWS, BLOCK_N, TRANSPOSED, STAGES, GROUP,
            )),
            (load_tiles, (
                logit_grad_source, operand_source, None, None, a_blocks, b_blocks, filled, emptied,
                gl.cdiv(rows, CONSUMERS * CONSUMER_ROWS), gl.cdiv(WIDTH, BLOCK_N), depth, CONSUMER_ROWS, BLOCK_N,
                1, TRANSPOSED, False, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
