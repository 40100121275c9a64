"""Resize and normalise, one kernel: out = (round(clamp(Wy · X · Wxᵀ)) - mean) / std, for each channel X of an image.

W holds the weights of an antialiased filter: it is stretched by the scale where the image shrinks, cut at the borders
of the image, and scaled so that the weights of each output sum to 1. A tile of the result resizes one line of the image
after the other and adds it, weighed, to each of its rows, so that nothing passes through memory between both axes.

Source: Pillow's resize, which torchvision and PyTorch (aten/native/cuda/UpSampleBilinear2d.cu) follow. The spans and
the filters are computed here by PyTorch's expressions in the same precision.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.device import facts
from siglip_kernels.interpreter import narrow
from siglip_kernels.resize_normalize.config import choose_tile

REACH = {"bilinear": 1, "bicubic": 2}  # half the width of each filter, in pixels

_INTEGERS = ["height", "width", "out_height", "out_width"]


@triton.jit
def _span(output, scale, REACH: tl.constexpr, size):
    """(centre, first, end): which pixels of the image, along one axis, make each output."""
    support = REACH * tl.maximum(scale, 1.0)
    centre = scale * (output.to(tl.float32) + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), size)
    return centre, first, end


@triton.jit
def _weights(pixel, centre, first, end, scale, REACH: tl.constexpr):
    """The filter at these pixels, not yet scaled to a sum of 1; 0 outside [first, end)."""
    offset = ((pixel - first).to(tl.float32) + (first.to(tl.float32) - centre) + 0.5) * (1.0 / tl.maximum(scale, 1.0))
    x = tl.abs(offset)
    if REACH == 2:  # Keys' cubic, a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        value = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        value = tl.maximum(1.0 - x, 0.0)
    return tl.where((pixel >= first) & (pixel < end), value, 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
def resize_normalize_kernel(
    image,  # (C, height, width) uint8, contiguous
    mean,  # (C,) fp32, in levels of 0 to 255
    std,  # (C,) fp32
    out,  # (C, out_height, out_width), contiguous; written
    height,
    width,
    out_height,
    out_width,
    scale_y,  # height / out_height
    scale_x,
    REACH: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # A program owns BLOCK_Y × BLOCK_X pixels of one channel of the result.
    tiles_across = tl.cdiv(out_width, BLOCK_X)
    row = tl.program_id(0) // tiles_across * BLOCK_Y + tl.arange(0, BLOCK_Y)
    column = tl.program_id(0) % tiles_across * BLOCK_X + tl.arange(0, BLOCK_X)
    channel = tl.program_id(1)
    # Those beyond the result repeat its last, and are not stored
    centre_y, top, bottom = _span(tl.minimum(row, out_height - 1), scale_y, REACH, height)
    centre_x, left, right = _span(tl.minimum(column, out_width - 1), scale_x, REACH, width)
    first_line, end_line = tl.min(top), tl.max(bottom)

    sum_y = tl.zeros([BLOCK_Y], tl.float32)
    for line in tl.range(first_line, end_line):
        sum_y += _weights(line, centre_y, top, bottom, scale_y, REACH)

    sum_x = tl.zeros([BLOCK_X], tl.float32)
    weighed = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    pixels = image + channel.to(tl.int64) * height * width
    for tap in tl.range(0, tl.max(right - left), BLOCK_T):
        x = left[:, None] + (tap + tl.arange(0, BLOCK_T))[None, :]  # [BLOCK_X, BLOCK_T]
        weights_x = _weights(x, centre_x[:, None], left[:, None], right[:, None], scale_x, REACH)
        sum_x += tl.sum(weights_x, axis=1)
        beginning = pixels + first_line.to(tl.int64) * width  # of a line
        for line in tl.range(first_line, end_line):
            levels = tl.load(beginning + x, mask=x < right[:, None], other=0).to(tl.float32)
            beginning += width
            resized = tl.sum(levels * weights_x, axis=1)
            weighed += _weights(line, centre_y, top, bottom, scale_y, REACH)[:, None] * resized[None, :]

    levels = tl.div_rn(weighed, sum_y[:, None] * sum_x[None, :])
    levels = tl.minimum(tl.maximum(levels, 0.0), 255.0)
    levels = (levels + 8388608.0) - 8388608.0  # 2^23, whose neighbours are whole: rounds ties to even
    value = tl.div_rn(levels - tl.load(mean + channel), tl.load(std + channel) + tl.zeros_like(levels))
    place = (channel.to(tl.int64) * out_height + row[:, None]) * out_width + column[None, :]
    mask = (row < out_height)[:, None] & (column < out_width)[None, :]
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=mask)


def resize_normalize_forward(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype
) -> Tensor:
    """One launch per image. images: (C, H, W) uint8, contiguous; mean, std: (C,) fp32, contiguous.

    Returns (B, C, *size) in the dtype.
    """
    channels, (out_height, out_width) = images[0].shape[0], size
    out = torch.empty((len(images), channels, *size), dtype=dtype, device=images[0].device)
    for image, target in zip(images, out, strict=True):
        _, height, width = image.shape
        scale_y, scale_x = height / out_height, width / out_width
        tile = choose_tile(facts(image.device), 2 * REACH[mode] * max(1, -(-width // out_width)) + 1)
        resize_normalize_kernel[(triton.cdiv(out_height, tile.rows) * triton.cdiv(out_width, tile.columns), channels)](
            image=image,
            mean=mean,
            std=std,
            out=target,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            scale_y=scale_y,
            scale_x=scale_x,
            REACH=REACH[mode],
            BLOCK_Y=tile.rows,
            BLOCK_X=tile.columns,
            BLOCK_T=tile.taps,
            num_warps=tile.warps,
        )
    return out
