"""Tiles of layer normalisation, and the launchers, which other operations of this package call, too.

They take rows as they come: tensors (rows, width) of unit stride along a row.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_kernels.device import facts, interpreting

WIDEST_IN_REGISTERS = 8192  # columns; a wider row is read twice
_WIDE_BLOCK = 2048


@dataclass(frozen=True)
class Tile:
    """`rows` rows in one or two blocks of columns; tail may be 0."""

    rows: int
    main: int
    tail: int
    warps: int


@functools.cache
def forward_tile(width: int, rows: int, element_bytes: int, multiprocessors: int) -> Tile:
    """Not measured. As many rows as 72 elements a thread hold, unless that leaves multiprocessors without work."""
    if width > WIDEST_IN_REGISTERS:
        return Tile(4, _WIDE_BLOCK, 0, 4)
    for tile_rows in (64, 32, 16, 8, 4, 2, 1):
        main, tail = _split(width)
        if tile_rows * tail * element_bytes < 128 * 16:  # a thread would not read 16 bytes of it at a time
            main, tail = _power_of_two(width), 0
        if tile_rows * (main + tail) <= 72 * 128 and -(-rows // tile_rows) >= 2 * multiprocessors:
            break
    return Tile(tile_rows, main, tail, 4)


@functools.cache
def backward_tile(width: int, rows: int, multiprocessors: int) -> Tile:
    """Not measured. 32 elements a thread, of x and of dy: with a second block of columns it would spill."""
    if width > WIDEST_IN_REGISTERS:
        return Tile(1, _WIDE_BLOCK, 0, 4)
    block = _power_of_two(width)
    for tile_rows in (16, 8, 4, 2, 1):
        if tile_rows * block <= 32 * 128 and -(-rows // tile_rows) >= 3 * multiprocessors:
            break
    return Tile(tile_rows, block, 0, 4 if tile_rows * block <= 32 * 128 else 8)


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _split(width: int) -> tuple[int, int]:
    """The width as a power of two and a narrower one, which may be 0: 1152 -> (1024, 128)."""
    main = _power_of_two(width) // 2
    tail = _power_of_two(width - main)
    return (main, tail) if main >= 16 and tail < main else (_power_of_two(width), 0)


def _row_strides(*tensors: Tensor | None) -> tuple[list[int], int]:
    """Strides between rows in units of `unit` elements: 8 where that divides them all, so that the compiler knows."""
    strides = [0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) for tensor in tensors]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x (rows, width). weight, bias: (width,), contiguous. y is contiguous, in x's dtype unless
    out_dtype says otherwise; mean and rstd are fp32 (rows,)."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=out_dtype or x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    from siglip_kernels.layer_norm.kernels import layer_norm_forward_kernel, wide_statistics_kernel

    tile = forward_tile(width, rows, x.element_size(), facts(x.device).multiprocessors)
    wide = width > WIDEST_IN_REGISTERS
    if wide:
        wide_statistics_kernel[(rows,)](x, mean, rstd, x.stride(0), eps, WIDTH=width, BLOCK=_WIDE_BLOCK, num_warps=4)
    (x_stride,), unit = _row_strides(x)
    layer_norm_forward_kernel[(-(-rows // tile.rows), -(-width // tile.main) if wide else 1)](
        x,
        weight,
        bias,
        y,
        mean,
        rstd,
        x_stride,
        rows,
        eps,
        WIDTH=width,
        MAIN=tile.main,
        TAIL=tile.tail,
        ROWS=tile.rows,
        UNIT=unit,
        WIDE=wide,
        INTERPRETED=interpreting(),
        num_warps=tile.warps,
        maxnreg=192,  # left alone, ptxas now and then spills a little for one more program
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_grad, weight_grad, bias_grad). y_grad, x, residual_grad: (rows, width); residual_grad is added to x_grad.

    x_grad has x's dtype, the others parameter_dtype: unless given, weight's. One not needed is an empty tensor.
    """
    rows, width = x.shape
    if parameter_dtype is None:
        parameter_dtype = x.dtype if weight is None else weight.dtype
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    weight_grad = torch.empty(width if needs_weight else 0, dtype=parameter_dtype, device=x.device)
    bias_grad = torch.empty(width if needs_bias else 0, dtype=parameter_dtype, device=x.device)
    if rows == 0 or width == 0:
        return x_grad, weight_grad.zero_(), bias_grad.zero_()
    from siglip_kernels.layer_norm import kernels

    multiprocessors = facts(x.device).multiprocessors
    tile = backward_tile(width, rows, multiprocessors)
    wide = width > WIDEST_IN_REGISTERS
    sums = None
    if wide:
        sums = torch.empty((3, rows), dtype=torch.float32, device=x.device)
        kernels.wide_sums_kernel[(rows,)](
            y_grad, x, weight, mean, rstd, sums, y_grad.stride(0), x.stride(0), WIDTH=width, BLOCK=_WIDE_BLOCK
        )
    programs = min(-(-rows // tile.rows), 3 * multiprocessors)  # resident at once, each with many tiles
    weight_partials, bias_partials = (
        torch.empty((programs, width), dtype=torch.float32, device=x.device) if needed else None
        for needed in (needs_weight, needs_bias)
    )
    strides, unit = _row_strides(y_grad, x, residual_grad)
    kernels.layer_norm_backward_kernel[(programs, -(-width // tile.main) if wide else 1)](
        y_grad,
        x,
        weight,
        mean,
        rstd,
        sums,
        residual_grad,
        x_grad if needs_x else None,
        weight_partials,
        bias_partials,
        *strides,
        rows,
        WIDTH=width,
        BLOCK=tile.main,
        ROWS=tile.rows,
        UNIT=unit,
        WIDE=wide,
        STAGES=3,
        INTERPRETED=interpreting(),
        num_warps=tile.warps,
        maxnreg=192,  # left alone, ptxas now and then spills a little for one more program
    )
    if needs_weight or needs_bias:
        columns = 1024 if interpreting() else 32  # the interpreter takes its time by the program
        kernels.layer_norm_parameter_gradients_kernel[(-(-width // columns),)](
            weight_partials,
            bias_partials,
            weight_grad,
            bias_grad,
            programs,
            WIDTH=width,
            ROWS=64,
            COLUMNS=columns,
            INTERPRETED=interpreting(),
            num_warps=4,
        )
    return x_grad, weight_grad, bias_grad
