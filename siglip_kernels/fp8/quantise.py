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
from siglip_kernels.layer_norm.kernels import load_rows, normalised, row_sums, statistics, store_rows
from siglip_kernels.strides import strides_of

_FLOOR = tl.constexpr(FLOOR)
_LARGEST = tl.constexpr(LARGEST)


class Rows(NamedTuple):
    """Quantised rows. next_scales: fp32 (rows,), for what the next GEMM makes of them; None if not requested."""

    values: Tensor  # e4m3 (rows, width)
    scales: Tensor  # fp32 (rows,)
    next_scales: Tensor | None


@triton.jit
def _row_maxima(main, tail, TAIL: tl.constexpr):
    maxima = tl.max(tl.abs(main), 1)
    if TAIL > 0:
        maxima = tl.maximum(maxima, tl.max(tl.abs(tail), 1))
    return maxima


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
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    # A program owns ROWS rows, as a wide and a narrow block of columns (MAIN, TAIL), like layer normalisation's.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    FULL: tl.constexpr = MAIN <= WIDTH
    TAIL_FULL: tl.constexpr = MAIN + TAIL == WIDTH
    columns = tl.arange(0, MAIN)
    main = load_rows(x, row * x_stride * UNIT, valid, columns, WIDTH, FULL)
    tail = main
    tail_columns = columns
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail = load_rows(x, row * x_stride * UNIT, valid, tail_columns, WIDTH, TAIL_FULL)
    if NORMALISE:
        main, tail, _, rstd = statistics(main, tail, columns, tail_columns, eps, WIDTH, TAIL, FULL, TAIL_FULL)
        # Columns beyond WIDTH, where γ and β read as zeros, become zeros.
        main = normalised(main, rstd, weight, bias, columns, WIDTH, FULL)
        if TAIL > 0:
            tail = normalised(tail, rstd, weight, bias, tail_columns, WIDTH, TAIL_FULL)
    largest = tl.maximum(_row_maxima(main, tail, TAIL), _FLOOR)
    tl.store(scales + row, largest / _LARGEST, mask=valid)
    inverse = (1.0 / largest * _LARGEST)[:, None]
    main *= inverse
    tail *= inverse
    if gains is not None:
        norm = tl.sqrt_rn(row_sums(main * main, tail * tail, TAIL)) * (largest / _LARGEST)  # squares would overflow
        bound = tl.maximum(norm * tl.load(gains) + tl.load(gains + 1), _FLOOR)
        tl.store(next_scales + row, bound / _LARGEST, mask=valid)
    store_rows(values, row * WIDTH, valid, columns, main, WIDTH, FULL)
    if TAIL > 0:
        store_rows(values, row * WIDTH, valid, tail_columns, tail, WIDTH, TAIL_FULL)


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
    tile = forward_tile(width, rows, x.element_size(), facts(x.device).multiprocessors)
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
        MAIN=tile.main,
        TAIL=tile.tail,
        ROWS=tile.rows,
        UNIT=strides.unit,
        NORMALISE=norm is not None,
        num_warps=tile.warps,
        maxnreg=192,  # as in layer normalisation
    )
    return Rows(values, scales, next_scales)
