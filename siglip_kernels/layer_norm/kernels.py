"""Layer normalisation (Ba et al., arXiv 1607.06450) of rows: y = (x - μ)·rstd·γ + β, rstd = (σ² + eps)^-1/2.

A row is read once and stays in registers as chunks of columns, 1152 as 9 · 128: the next power of two would be 2048.
All chunks have one layout, in which a thread has columns of the same rows, so that it adds them up before any exchange.
For rows too wide for that (WIDE) a separate kernel first computes the sums; the same kernels then process one chunk at
a time.

Statistics are computed in two steps: the mean m as a sum in fp32, then Σ(x - m) and Σ(x - m)². The first of these would
be 0 if m were exact; it measures the rounding error of m, which matters where the mean is large compared with the
deviation. The backward does the same with the stored mean. With x̂ = (x - μ)·rstd and g = γ·dy, and averages ⟨·⟩ over
the row,

    dx = rstd·(g - ⟨g⟩ - x̂·⟨g·x̂⟩),    dγ = Σ dy·x̂,    dβ = Σ dy    (sums over all rows).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.device import facts, interpreting
from siglip_kernels.interpreter import narrow
from siglip_kernels.layer_norm.config import (
    WIDE_BLOCK,
    WIDEST_IN_REGISTERS,
    backward_stages,
    backward_tile,
    forward_tile,
)
from siglip_kernels.strides import strides_of


@triton.jit
def load_rows(pointer, offsets, valid, columns, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """[rows, columns] in fp32. offsets, valid: [rows]. FULL: no column is beyond WIDTH, where zeros are read."""
    mask = valid[:, None]
    if not FULL:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(pointer + (offsets[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, offsets, valid, columns, x, WIDTH: tl.constexpr, FULL: tl.constexpr):
    mask = valid[:, None]
    if not FULL:
        mask = mask & (columns < WIDTH)[None, :]
    element: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + (offsets[:, None] + columns[None, :]), narrow(x, element), mask=mask)


@triton.jit
def centre(x, mean, columns, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """x - mean, and zeros beyond WIDTH."""
    if FULL:
        return x - mean[:, None]
    else:
        return tl.where((columns < WIDTH)[None, :], x - mean[:, None], 0.0)


@triton.jit
def extended(values, value):
    """The tuple with one more value."""
    return values + (value,)  # noqa: RUF005 (the compiler takes no stars)


@triton.jit
def load_chunks(
    pointer, offsets, valid, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """CHUNKS times [rows, BLOCK] in fp32, from column `first` on. FULL: of how many no column is beyond WIDTH."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        columns = first + chunk * BLOCK + tl.arange(0, BLOCK)
        chunks = extended(chunks, load_rows(pointer, offsets, valid, columns, WIDTH, chunk < FULL))
    return chunks


@triton.jit
def statistics(x, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr):
    """The mean of rows, as a sum of two, and their rstd. x: the chunks of whole rows, with zeros beyond WIDTH."""
    total = x[0]
    for chunk in tl.static_range(1, CHUNKS):
        total += x[chunk]
    average = tl.sum(total, 1) / WIDTH
    rests = tl.zeros_like(total)
    squares = tl.zeros_like(total)
    for chunk in tl.static_range(CHUNKS):
        centred = centre(x[chunk], average, chunk * BLOCK + tl.arange(0, BLOCK), WIDTH, chunk < FULL)
        rests += centred
        squares += centred * centred
    rest = tl.sum(rests, 1) / WIDTH  # the average's rounding error
    variance = tl.maximum(tl.sum(squares, 1) / WIDTH - rest * rest, 0.0)
    return average, rest, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def normalised(x, average, rest, scale, weight, bias, valid, columns, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """(x - average - rest) · scale · γ + β; weight and bias may be None, or read as zeros beyond WIDTH."""
    y = (centre(x, average, columns, WIDTH, FULL) - rest[:, None]) * scale[:, None]
    # Loaded for each row, from the cache, as in the backward: in their own layout they would be exchanged first.
    if weight is not None:
        y *= load_rows(weight, valid.to(tl.int32) * 0, valid, columns, WIDTH, FULL)
    if bias is not None:
        y += load_rows(bias, valid.to(tl.int32) * 0, valid, columns, WIDTH, FULL)
    return y


@triton.jit(do_not_specialize=["x_stride", "rows"])
def layer_norm_forward_kernel(
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,) or None
    bias,  # (WIDTH,) or None
    y,  # (rows, WIDTH), contiguous; written
    mean,  # (rows,) fp32; written, or read if WIDE
    rstd,  # (rows,) fp32; written, or read if WIDE
    x_stride,  # between rows, in UNIT elements
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a chunk
    CHUNKS: tl.constexpr,  # of a row
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A program owns ROWS rows; if they are WIDE, BLOCK columns of them.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    FULL: tl.constexpr = 0 if WIDE else WIDTH // BLOCK  # chunks that need no mask
    first = tl.program_id(1) * BLOCK
    chunks = load_chunks(x, row * x_stride * UNIT, valid, first, WIDTH, BLOCK, CHUNKS, FULL)
    if WIDE:
        average = tl.load(mean + row, mask=valid, other=0.0)
        scale = tl.load(rstd + row, mask=valid, other=0.0)
        rest = tl.zeros_like(average)
    else:
        average, rest, scale = statistics(chunks, eps, WIDTH, BLOCK, CHUNKS, FULL)
        tl.store(mean + row, average + rest, mask=valid)
        tl.store(rstd + row, scale, mask=valid)
    for chunk in tl.static_range(CHUNKS):
        columns = first + chunk * BLOCK + tl.arange(0, BLOCK)
        out = normalised(chunks[chunk], average, rest, scale, weight, bias, valid, columns, WIDTH, chunk < FULL)
        store_rows(y, row * WIDTH, valid, columns, out, WIDTH, chunk < FULL)


@triton.jit(do_not_specialize=["y_grad_stride", "x_stride", "residual_stride", "rows"])
def layer_norm_backward_kernel(
    y_grad,  # (rows, WIDTH)
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,) or None
    mean,  # (rows,) fp32
    rstd,  # (rows,) fp32
    sums,  # (3, rows) fp32, if WIDE: ⟨x̂⟩, ⟨g⟩, ⟨g·x̂⟩
    residual_grad,  # (rows, WIDTH), added to x_grad, or None
    x_grad,  # (rows, WIDTH), contiguous; written, or None
    weight_partials,  # (programs, WIDTH) fp32; written, or None
    bias_partials,  # (programs, WIDTH) fp32; written, or None
    residual_partials,  # (programs, WIDTH) fp32: sums of residual_grad; written, or None
    y_grad_stride,  # between rows, in UNIT elements
    x_stride,
    residual_stride,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a chunk
    CHUNKS: tl.constexpr,  # of a row
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,  # how deep the loads of the loop are pipelined
):
    # A program owns every num_programs-th tile of ROWS rows; if they are WIDE, BLOCK columns of them. Sums over rows
    # stay apart until the end: where warps have rows of their own, they add to them without the others.
    program = tl.program_id(0).to(tl.int64)
    FULL: tl.constexpr = 0 if WIDE else WIDTH // BLOCK  # chunks that need no mask
    nothing = tl.zeros([ROWS, BLOCK], tl.float32)
    weight_sums = (nothing,) * CHUNKS
    bias_sums = (nothing,) * CHUNKS
    residual_sums = (nothing,) * CHUNKS
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        valid = row < rows
        average = tl.load(mean + row, mask=valid, other=0.0)
        scale = tl.load(rstd + row, mask=valid, other=0.0)
        dy = ()
        g = ()
        normed = ()
        normed_sum = nothing
        g_sum = nothing
        product_sum = nothing
        for chunk in tl.static_range(CHUNKS):
            columns = (tl.program_id(1) + chunk) * BLOCK + tl.arange(0, BLOCK)
            dy_chunk = load_rows(y_grad, row * y_grad_stride * UNIT, valid, columns, WIDTH, chunk < FULL)
            centred = load_rows(x, row * x_stride * UNIT, valid, columns, WIDTH, chunk < FULL)
            centred = centre(centred, average, columns, WIDTH, chunk < FULL) * scale[:, None]
            g_chunk = dy_chunk
            if weight is not None:  # loaded again for each row, from the cache: it would take registers
                g_chunk = dy_chunk * load_rows(weight, row * 0, valid, columns, WIDTH, chunk < FULL)
            normed_sum += centred
            g_sum += g_chunk
            product_sum += g_chunk * centred
            dy = extended(dy, dy_chunk)
            g = extended(g, g_chunk)
            normed = extended(normed, centred)
        if WIDE:
            rest = tl.load(sums + row, mask=valid, other=0.0)
            g_average = tl.load(sums + rows.to(tl.int64) + row, mask=valid, other=0.0)
            projection = tl.load(sums + 2 * rows.to(tl.int64) + row, mask=valid, other=0.0)
        else:
            rest = tl.sum(normed_sum, 1) / WIDTH  # the stored mean's rounding error
            g_average = tl.sum(g_sum, 1) / WIDTH
            projection = tl.sum(product_sum, 1) / WIDTH
        projection -= rest * g_average
        new_weight_sums = ()
        new_bias_sums = ()
        new_residual_sums = ()
        for chunk in tl.static_range(CHUNKS):
            columns = (tl.program_id(1) + chunk) * BLOCK + tl.arange(0, BLOCK)
            x_hat = normed[chunk] - rest[:, None]
            if weight_partials is not None:
                new_weight_sums = extended(new_weight_sums, weight_sums[chunk] + dy[chunk] * x_hat)
            if bias_partials is not None:
                new_bias_sums = extended(new_bias_sums, bias_sums[chunk] + dy[chunk])
            if x_grad is not None:
                dx = scale[:, None] * (g[chunk] - g_average[:, None] - x_hat * projection[:, None])
                if residual_grad is not None:
                    residual = load_rows(
                        residual_grad, row * residual_stride * UNIT, valid, columns, WIDTH, chunk < FULL
                    )
                    dx += residual
                    if residual_partials is not None:
                        new_residual_sums = extended(new_residual_sums, residual_sums[chunk] + residual)
                store_rows(x_grad, row * WIDTH, valid, columns, dx, WIDTH, chunk < FULL)
        if weight_partials is not None:
            weight_sums = new_weight_sums
        if bias_partials is not None:
            bias_sums = new_bias_sums
        if residual_partials is not None:
            residual_sums = new_residual_sums
    for chunk in tl.static_range(CHUNKS):
        columns = (tl.program_id(1) + chunk) * BLOCK + tl.arange(0, BLOCK)
        partial = program * WIDTH + columns
        if weight_partials is not None:
            tl.store(weight_partials + partial, tl.sum(weight_sums[chunk], 0), mask=columns < WIDTH)
        if bias_partials is not None:
            tl.store(bias_partials + partial, tl.sum(bias_sums[chunk], 0), mask=columns < WIDTH)
        if residual_partials is not None:
            tl.store(residual_partials + partial, tl.sum(residual_sums[chunk], 0), mask=columns < WIDTH)


@triton.jit
def sum_of_partials(
    partials, grad, programs, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, programs, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        total += load_rows(partials, row * WIDTH, row < programs, columns, WIDTH, WIDTH % COLUMNS == 0)
    element: tl.constexpr = grad.dtype.element_ty
    tl.store(grad + columns, narrow(tl.sum(total, 0), element), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["programs"])
def layer_norm_parameter_gradients_kernel(
    weight_partials,  # (programs, WIDTH) fp32, or None
    bias_partials,  # (programs, WIDTH) fp32, or None
    residual_partials,  # (programs, WIDTH) fp32, or None
    weight_grad,  # (WIDTH,); written
    bias_grad,  # (WIDTH,); written
    residual_sums,  # (WIDTH,); written
    programs,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program owns COLUMNS columns, and adds in a fixed order.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if weight_partials is not None:
        sum_of_partials(weight_partials, weight_grad, programs, columns, WIDTH, ROWS, COLUMNS)
    if bias_partials is not None:
        sum_of_partials(bias_partials, bias_grad, programs, columns, WIDTH, ROWS, COLUMNS)
    if residual_partials is not None:
        sum_of_partials(residual_partials, residual_sums, programs, columns, WIDTH, ROWS, COLUMNS)


@triton.jit
def wide_statistics_kernel(
    x,  # (rows, WIDTH)
    mean,  # (rows,) fp32; written
    rstd,  # (rows,) fp32; written
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns a row. Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances".
    row = tl.program_id(0).to(tl.int64)
    average = 0.0
    squares = 0.0  # Σ(x - average)² so far
    for first in tl.range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        valid = columns < WIDTH
        count = tl.minimum(WIDTH - first, BLOCK).to(tl.float32)
        block = tl.load(x + row * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
        block_average = tl.sum(block) / count
        deviation = tl.where(valid, block - block_average, 0.0)
        block_average += tl.sum(deviation) / count
        deviation = tl.where(valid, block - block_average, 0.0)
        step = block_average - average
        average += step * (count / (first + count))
        squares += tl.sum(deviation * deviation) + step * step * (first * (count / (first + count)))
    tl.store(mean + row, average)
    tl.store(rstd + row, 1.0 / tl.sqrt_rn(squares / WIDTH + eps))


@triton.jit
def wide_sums_kernel(
    y_grad,  # (rows, WIDTH)
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,) or None
    mean,  # (rows,) fp32
    rstd,  # (rows,) fp32
    sums,  # (3, rows) fp32; written: ⟨x̂⟩, ⟨g⟩, ⟨g·x̂⟩
    y_grad_stride,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns a row.
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    average = tl.load(mean + row)
    scale = tl.load(rstd + row)
    normed_sum = tl.zeros([BLOCK], tl.float32)
    g_sum = tl.zeros([BLOCK], tl.float32)
    product_sum = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        valid = columns < WIDTH
        block = tl.load(x + row * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(y_grad + row * y_grad_stride + columns, mask=valid, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
        normed = tl.where(valid, (block - average) * scale, 0.0)
        normed_sum += normed
        g_sum += g
        product_sum += g * normed
    tl.store(sums + row, tl.sum(normed_sum) / WIDTH)
    tl.store(sums + rows + row, tl.sum(g_sum) / WIDTH)
    tl.store(sums + 2 * rows + row, tl.sum(product_sum) / WIDTH)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x (rows, width). weight, bias: (width,), contiguous. y is contiguous, in out_dtype, x's unless
    given; mean and rstd are fp32 (rows,)."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=out_dtype or x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    tile = forward_tile(width, rows, facts(x.device).multiprocessors)
    wide = width > WIDEST_IN_REGISTERS
    if wide:
        wide_statistics_kernel[(rows,)](
            x=x, mean=mean, rstd=rstd, x_stride=x.stride(0), eps=eps, WIDTH=width, BLOCK=WIDE_BLOCK, num_warps=4
        )
    strides = strides_of(x)
    layer_norm_forward_kernel[(-(-rows // tile.rows), -(-width // tile.block) if wide else 1)](
        x=x,
        weight=weight,
        bias=bias,
        y=y,
        mean=mean,
        rstd=rstd,
        x_stride=strides.values[0],
        rows=rows,
        eps=eps,
        WIDTH=width,
        BLOCK=tile.block,
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        UNIT=strides.unit,
        WIDE=wide,
        num_warps=4,
        maxnreg=192,  # otherwise ptxas sometimes spills for the sake of one more resident program
    )
    return y, mean, rstd


def layer_norm_backward(
    y_grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None = None,
    *,
    parameter_dtype: torch.dtype | None = None,
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = True,
    needs_residual_sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_grad, weight_grad, bias_grad, residual_sums). y_grad, x, residual_grad: (rows, width).

    residual_grad is added to x_grad, and residual_sums are the sums of its columns, which are only made along with
    x_grad. x_grad has x's dtype, weight_grad and bias_grad have parameter_dtype, weight's unless given, and
    residual_sums are fp32. One that is not needed is an empty tensor.
    """
    rows, width = x.shape
    if parameter_dtype is None:
        parameter_dtype = x.dtype if weight is None else weight.dtype
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    weight_grad = torch.empty(width if needs_weight else 0, dtype=parameter_dtype, device=x.device)
    bias_grad = torch.empty(width if needs_bias else 0, dtype=parameter_dtype, device=x.device)
    residual_sums = torch.empty(width if needs_residual_sums else 0, dtype=torch.float32, device=x.device)
    if rows == 0 or width == 0:
        return x_grad, weight_grad.zero_(), bias_grad.zero_(), residual_sums.zero_()
    gpu = facts(x.device)
    loaded = (y_grad, x) if residual_grad is None else (y_grad, x, residual_grad)
    strides = strides_of(*loaded)
    tile = backward_tile(width, rows, x.element_size(), gpu.multiprocessors, aligned=strides.unit > 1)
    loaded_bytes = sum(matrix.element_size() for matrix in (*loaded, weight) if matrix is not None)
    wide = width > WIDEST_IN_REGISTERS
    sums = None
    if wide:
        sums = torch.empty((3, rows), dtype=torch.float32, device=x.device)
        wide_sums_kernel[(rows,)](
            y_grad=y_grad,
            x=x,
            weight=weight,
            mean=mean,
            rstd=rstd,
            sums=sums,
            y_grad_stride=y_grad.stride(0),
            x_stride=x.stride(0),
            WIDTH=width,
            BLOCK=WIDE_BLOCK,
        )
    programs = min(-(-rows // tile.rows), tile.residents * gpu.multiprocessors)  # each processes many tiles
    weight_partials, bias_partials, residual_partials = (
        torch.empty((programs, width), dtype=torch.float32, device=x.device) if needed else None
        for needed in (needs_weight, needs_bias, needs_residual_sums)
    )
    layer_norm_backward_kernel[(programs, -(-width // tile.block) if wide else 1)](
        y_grad=y_grad,
        x=x,
        weight=weight,
        mean=mean,
        rstd=rstd,
        sums=sums,
        residual_grad=residual_grad,
        x_grad=x_grad if needs_x else None,
        weight_partials=weight_partials,
        bias_partials=bias_partials,
        residual_partials=residual_partials,
        y_grad_stride=strides.values[0],
        x_stride=strides.values[1],
        residual_stride=0 if residual_grad is None else strides.values[2],
        rows=rows,
        WIDTH=width,
        BLOCK=tile.block,
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        UNIT=strides.unit,
        WIDE=wide,
        STAGES=backward_stages(tile, loaded_bytes, gpu.shared_memory),
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    if needs_weight or needs_bias or needs_residual_sums:
        columns = 1024 if interpreting() else 32  # the interpreter's time grows with the number of programs
        layer_norm_parameter_gradients_kernel[(-(-width // columns),)](
            weight_partials=weight_partials,
            bias_partials=bias_partials,
            residual_partials=residual_partials,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
            residual_sums=residual_sums,
            programs=programs,
            WIDTH=width,
            ROWS=64,
            COLUMNS=columns,
            num_warps=4,
        )
    return x_grad, weight_grad, bias_grad, residual_sums
