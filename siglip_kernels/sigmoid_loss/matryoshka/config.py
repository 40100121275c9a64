"""Tiles and blocks of the losses of prefixes, from those of one loss."""

import dataclasses
import math
from typing import NamedTuple

from siglip_kernels.device import Facts
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.config import LARGEST_BLOCK, Config, Tile, block_size


def prefix_config(base: Config, ends: tuple[int, ...], gpu: Facts) -> Config:
    """The configuration for segments that end there. base: of one loss of the widest prefix."""
    product = base.product
    if product.columns > product.rows:  # few segments are a multiple of 256 columns
        product = dataclasses.replace(product, rows=product.columns, columns=product.rows)
    # The accumulator, which outlives an epilogue, leaves too few registers for that of a wider tile.
    logit_grad = weighted = base.weighted
    half = dataclasses.replace(weighted, columns=weighted.columns // 2)
    if base.precision == "tf32":
        logit_grad = weighted = half
    elif gpu.matrix_unit == "mma" and weighted.columns > 64:
        weighted = half
    block, folding = base.block, base.folding
    if gpu.matrix_unit == "wgmma":  # tiles are half as wide as those of one loss
        folding = dataclasses.replace(folding, columns=folding.columns // 2)
    if not gpu.interpreted:
        lower = dataclasses.replace(product, rows=product.rows // 2)
        tiles = (product, lower) if lower.rows >= 128 else (product,)
        _, block, product = max(
            ((*_block_for(tile, ends, gpu.multiprocessors), tile) for tile in tiles), key=lambda found: found[0]
        )
    return dataclasses.replace(
        base, logit_grad=logit_grad, weighted=weighted, product=product, block=block, folding=folding
    )


def _block_for(tile: Tile, ends: tuple[int, ...], multiprocessors: int) -> tuple[float, int]:
    """How fast a block's products are with this tile, and the block.

    Blocks of prefixes are small: of five that end at 768 columns, a tile of 256 × 128 leaves 41 % of an H200 idle, one
    of 128 × 128 nothing. But it reads 4/3 of the bytes, which are taken to bound either of them. Not measured.
    """
    # H of all prefixes takes twice the memory that G of one loss takes at most.
    largest = math.isqrt(2 * LARGEST_BLOCK**2 // len(ends))
    across = -(-columns_of(ends, tile) // tile.columns)
    block = block_size(tile, across, multiprocessors, min(largest, LARGEST_BLOCK))
    tiles = block // tile.rows * across
    return tiles / round_up(tiles, multiprocessors) / (1 / tile.rows + 1 / tile.columns), block


def columns_of(ends: tuple[int, ...], tile: Tile) -> int:
    """The columns of all tiles of a product, padded ones included."""
    tiles = column_tiles(ends, tile.columns)
    return (len(tiles.starts) + tiles.wide) * tile.columns // 2


class ColumnTiles(NamedTuple):
    """Tiles of columns, each of one segment: its segment, its first column, and its segment's end."""

    segments: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    wide: int  # so many tiles are as wide as they may be; those that follow are half as wide


def column_tiles(ends: tuple[int, ...], columns: int) -> ColumnTiles:
    """The tiles of at most this many columns. A segment's remainder of up to half of them takes half a tile.

    The narrow ones are last, so that they fill the multiprocessors that have finished their wide ones.
    """
    wide: list[tuple[int, int, int]] = []
    narrow: list[tuple[int, int, int]] = []
    for segment, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        for first in range(start, end, columns):
            (narrow if 2 * (end - first) <= columns else wide).append((segment, first, end))
    segments, starts, stops = zip(*wide, *narrow, strict=True)
    return ColumnTiles(segments, starts, stops, len(wide))


def padding_of(tile: Tile) -> int:
    """Segments begin at multiples of the depth of a step of the logits, and of 16 bytes."""
    return round_up(tile.depth, 16)
