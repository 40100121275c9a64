"""Patch embedding, forward: tokens = patches · Wᵀ + bias + position, one GEMM that gathers its patches.

A pixel's address is the offset of its patch plus the offset of its channel, row and column within a patch, so a tile of
patches is addressed by a column vector plus a row vector, and no patch is copied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.device import facts, precision
from siglip_kernels.interpreter import dot, narrow
from siglip_kernels.patch_embed.config import choose_tile
from siglip_kernels.strides import strides_of

# A row of pixels often does not divide by 8: 378 divides by 2, and a thread loads two at a time.
_UNITS = (8, 4, 2, 1)

_INTEGERS = [
    "batch_stride", "channel_stride", "row_stride", "position_batch_stride", "position_token_stride", "patches",
    "tokens", "tokens_across",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def patch_embed_kernel(
    pixels,  # (B, C, H, W) of unit last stride
    weight,  # (WIDTH, C · PATCH_HEIGHT · PATCH_WIDTH), contiguous
    bias,  # (WIDTH,) or None
    position,  # (B, S, WIDTH) of unit last stride, or None
    out,  # (B · S, WIDTH), contiguous; written
    batch_stride,  # strides in UNIT elements
    channel_stride,
    row_stride,
    position_batch_stride,  # in POSITION_UNIT elements
    position_token_stride,
    patches,  # B · S
    tokens,  # S
    tokens_across,  # patches per row of the image
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,  # C · PATCH_HEIGHT · PATCH_WIDTH
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program owns BLOCK_M patches × BLOCK_N columns. Neighbours share the patches.
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    patch = (program // COLUMN_TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    patch_is_valid = patch < patches
    column_is_valid = columns < WIDTH
    sample = patch // tokens
    token = patch % tokens
    starts = sample * batch_stride * UNIT + token // tokens_across * PATCH_HEIGHT * row_stride * UNIT
    starts += token % tokens_across * PATCH_WIDTH

    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        depth_is_valid = depth < DEPTH
        channel = (depth // (PATCH_HEIGHT * PATCH_WIDTH)).to(tl.int64)
        row = (depth // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64)
        within = channel * channel_stride * UNIT + row * row_stride * UNIT + depth % PATCH_WIDTH
        patch_tile = tl.load(
            pixels + (starts[:, None] + within[None, :]),
            mask=patch_is_valid[:, None] & depth_is_valid[None, :],
            other=0.0,
        )
        weight_tile = tl.load(
            weight + (columns[:, None] * DEPTH + depth[None, :]),
            mask=column_is_valid[:, None] & depth_is_valid[None, :],
            other=0.0,
        )
        products = dot(patch_tile, tl.trans(weight_tile), products, PRECISION)

    mask = patch_is_valid[:, None] & column_is_valid[None, :]
    if bias is not None:
        products += tl.load(bias + columns, mask=column_is_valid, other=0.0).to(tl.float32)[None, :]
    if position is not None:
        offsets = sample * position_batch_stride * POSITION_UNIT + token * position_token_stride * POSITION_UNIT
        added = tl.load(position + (offsets[:, None] + columns[None, :]), mask=mask, other=0.0)
        products += added.to(tl.float32)
    element: tl.constexpr = out.dtype.element_ty
    tl.store(out + ((patch * WIDTH)[:, None] + columns[None, :]), narrow(products, element), mask=mask)


def patch_embed_forward(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Launches the kernel. pixels: (B, C, H, W) of unit last stride; weight: (width, C, p, p) and bias, contiguous;
    position: (B, S, width) of unit last stride, expanded or not. Returns (B, S, width)."""
    batch, _, height, image_width = pixels.shape
    width, _, patch_height, patch_width = weight.shape
    tokens_across = image_width // patch_width
    tokens = height // patch_height * tokens_across
    out = torch.empty((batch, tokens, width), dtype=out_dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    tf32 = precision(pixels.dtype) == "tf32"
    tile = choose_tile(facts(pixels.device), pixels.element_size(), tf32, batch * tokens, width)
    strides = strides_of(pixels, units=_UNITS)
    position_strides = strides_of(out if position is None else position, units=_UNITS)
    patch_embed_kernel[(triton.cdiv(batch * tokens, tile.rows) * triton.cdiv(width, tile.columns),)](
        pixels=pixels,
        weight=weight,
        bias=bias,
        position=position,
        out=out,
        batch_stride=strides.values[0],
        channel_stride=strides.values[1],
        row_stride=strides.values[2],
        position_batch_stride=position_strides.values[0],
        position_token_stride=position_strides.values[1],
        patches=batch * tokens,
        tokens=tokens,
        tokens_across=tokens_across,
        WIDTH=width,
        DEPTH=weight[0].numel(),
        PATCH_HEIGHT=patch_height,
        PATCH_WIDTH=patch_width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        UNIT=strides.unit,
        POSITION_UNIT=position_strides.unit,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
