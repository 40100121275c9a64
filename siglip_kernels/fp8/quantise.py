"""Rows to fp8 (e4m3): x ≈ values · scale, where scale = max |x| / 448, in one pass that may normalise the row first.

448 is the largest number of e4m3. A row of zeros has the scale that the FLOOR gives, and zeros.

The same pass bounds the row that the next GEMM makes of this one, so that its epilogue can write fp8 without a second
pass for the maximum. With h = gelu(x Wᵀ + b), by Cauchy and Schwarz, and because |gelu(z)| ≤ |z|,

    max_j |h_j| ≤ ‖x‖ · max_j ‖w_j‖ + max_j |b_j|.

The bound is about √K too large, which costs nothing: e4m3 is a floating-point format, whose relative error is the same
over fifteen binary orders of magnitude, and the bound wastes about five of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.device import facts
from siglip_kernels.fp8.reference import FLOOR, LARGEST
from siglip_kernels.layer_norm.config import forward_tile
from siglip_kernels.layer_norm.kernels import extended, load_chunks, normalised, statistics, store_rows
from siglip_kernels.strides import strides_of

_FLOOR = tl.constexpr(FLOOR)
_LARGEST = tl.constexpr(LARGEST)


class Rows(NamedTuple):
    """Quantised rows. next_scales: fp32 (rows,), for what the next GEMM makes of them; None if not requested."""

    values: Tensor  # e4m3 (rows, width)
    scales: Tensor  # fp32 (rows,)
    next_scales: Tensor | None


@triton.jit(do_not_specialize=["x_stride", "rows"])
def quantise_rows_kernel(
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,), of the normalisation
    bias,  # (WIDTH,), of the normalisation
    gains,  # fp32 (2,): the largest norm of a row of the next GEMM's weight, and the largest of its biases; or None
    values,  # e4m3 (rows, WIDTH), contiguous; written
    scales,  # fp32 (rows,); written
    next_scales,  # fp32 (rows,); written unless gains is None
    x_stride,  # between rows, in UNIT elements
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a chunk
    CHUNKS: tl.constexpr,  # of a row
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    # A program owns ROWS rows, as chunks of columns, like layer normalisation's.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    FULL: tl.constexpr = WIDTH // BLOCK  # chunks that need no mask
    chunks = load_chunks(x, row * x_stride * UNIT, valid, 0, WIDTH, BLOCK, CHUNKS, FULL)
    if NORMALISE:
        average, rest, rstd = statistics(chunks, eps, WIDTH, BLOCK, CHUNKS, FULL)
        normed = ()
        for chunk in tl.static_range(CHUNKS):
            # Columns beyond WIDTH, where γ and β read as zeros, become zeros.
            columns = chunk * BLOCK + tl.arange(0, BLOCK)
            part = normalised(chunks[chunk], average, rest, rstd, weight, bias, valid, columns, WIDTH, chunk < FULL)
            normed = extended(normed, part)
        chunks = normed
    largest = tl.abs(chunks[0])
    for chunk in tl.static_range(1, CHUNKS):
        largest = tl.maximum(largest, tl.abs(chunks[chunk]))
    largest = tl.maximum(tl.max(largest, 1), _FLOOR)
    tl.store(scales + row, largest / _LARGEST, mask=valid)
    inverse = (1.0 / largest * _LARGEST)[:, None]
    squares = tl.zeros_like(chunks[0])
    for chunk in tl.static_range(CHUNKS):
        scaled = chunks[chunk] * inverse
        squares += scaled * scaled  # of x they would overflow
        store_rows(values, row * WIDTH, valid, chunk * BLOCK + tl.arange(0, BLOCK), scaled, WIDTH, chunk < FULL)
    if gains is not None:
        norm = tl.sqrt_rn(tl.sum(squares, 1)) * (largest / _LARGEST)
        bound = tl.maximum(norm * tl.load(gains) + tl.load(gains + 1), _FLOOR)
        tl.store(next_scales + row, bound / _LARGEST, mask=valid)


def quantise_rows(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gains: Tensor | None = None,
) -> Rows:
    """x: (rows, width), up to `layer_norm.config.WIDEST_IN_REGISTERS` wide. norm: weight, bias and eps of a layer
    normalisation to apply first. gains: of the GEMM whose result will be fp8, fp32 (2,).
    """
    rows, width = x.shape
    values = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    next_scales = None if gains is None else torch.empty_like(scales)
    if values.numel() == 0:
        return Rows(values, scales.zero_(), None if next_scales is None else next_scales.zero_())
    tile = forward_tile(width, rows, facts(x.device).multiprocessors)
    strides = strides_of(x)
    weight, bias, eps = norm or (None, None, 0.0)
    quantise_rows_kernel[(-(-rows // tile.rows),)](
        x=x,
        weight=weight,
        bias=bias,
        gains=gains,
        values=values,
        scales=scales,
        next_scales=next_scales,
        x_stride=strides.values[0],
        rows=rows,
        eps=eps,
        WIDTH=width,
        BLOCK=tile.block,
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        UNIT=strides.unit,
        NORMALISE=norm is not None,
        num_warps=4,
        maxnreg=192,  # as in layer normalisation
    )
    return Rows(values, scales, next_scales)
