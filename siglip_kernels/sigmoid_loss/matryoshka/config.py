"""Tiles and blocks of the losses of prefixes, from those of one loss."""

import dataclasses
import math

from siglip_kernels.device import Facts
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.config import LARGEST_BLOCK, Config, Tile, block_size

# What a narrower tile of columns loses in the product's main loop, as columns per tile.
_TILE_OVERHEAD = 32


def prefix_config(base: Config, ends: tuple[int, ...], gpu: Facts) -> Config:
    """The configuration for segments that end there. base: of one loss of the widest prefix."""
    product = base.product
    if product.columns > product.rows:  # few segments are a multiple of 256 columns
        product = dataclasses.replace(product, rows=product.columns, columns=product.rows)
    narrow = dataclasses.replace(product, columns=product.columns // 2)
    product = min((product, narrow), key=lambda tile: tiles_across(ends, tile) * (tile.columns + _TILE_OVERHEAD))
    # The accumulator, which outlives an epilogue, leaves too few registers for that of a wider tile.
    logit_grad = base.weighted
    if base.precision == "tf32" or (gpu.matrix_unit == "mma" and gpu.has_tma and logit_grad.columns > 64):
        logit_grad = dataclasses.replace(logit_grad, columns=logit_grad.columns // 2)
    block = base.block
    if not gpu.interpreted:
        # H of all prefixes takes twice the memory that G of one loss takes at most.
        largest = math.isqrt(2 * LARGEST_BLOCK**2 // len(ends))
        block = block_size(product, tiles_across(ends, product), gpu.multiprocessors, min(largest, LARGEST_BLOCK))
    return dataclasses.replace(base, logit_grad=logit_grad, weighted=logit_grad, product=product, block=block)


def tiles_across(ends: tuple[int, ...], tile: Tile) -> int:
    """The number of tiles of columns."""
    return len(column_tiles(ends, tile.columns)[0])


def column_tiles(ends: tuple[int, ...], columns: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each tile of at most this many columns, all of one segment: its segment, first column, and segment's end."""
    tiles = [
        (segment, first, end)
        for segment, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True))
        for first in range(start, end, columns)
    ]
    segments, starts, stops = zip(*tiles, strict=True)
    return segments, starts, stops


def padding_of(tile: Tile) -> int:
    """Segments begin at multiples of the depth of a step of the logits, and of 16 bytes."""
    return round_up(tile.depth, 16)
