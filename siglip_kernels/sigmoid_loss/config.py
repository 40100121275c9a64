"""Block and tile sizes of the Triton loss, which depend on GPU, dtype and width, not on N.

No call tunes: `python -m bench tune sigmoid_loss` measures `candidates` and writes the fastest into `tuned.py`.
"""

from dataclasses import dataclass

import torch

from siglip_kernels.device import Facts
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.tuned import TUNED


@dataclass(frozen=True)
class Tile:
    """The tile that one program computes, rows × columns in steps of depth, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Folding:
    """What a thread adds up of its own values, a quarter of a tile at a time. All else is exchanged between threads.

    Threads have adjacent columns. Those of mma also have rows 8 apart, and half a tile apart, but four warps share a
    row; those of wgmma have rows 8 apart, and columns 8 apart. Of an accumulator in tensor memory two threads have a
    row, 16 adjacent columns each.
    """

    columns: int  # of the sums of a quarter
    rows: int  # so many are added: 1, 2 (8 apart) or 4 (half a tile apart as well)


@dataclass(frozen=True)
class Config:
    """The tiles of the matrix kernels, and the block of G that they share."""

    logit_grad: Tile
    weighted: Tile  # logit_grad where pairs have weights
    product: Tile
    block: int  # images and texts
    descriptors: bool  # load tiles by tensor descriptors (TMA, sm_90 and later) instead of pointers
    precision: str  # tl.dot's input_precision for fp32
    folding: Folding


# 128 × 256 reads the fewest bytes from L2 per product; without TMA, its addresses leave too few registers for it. None
# of these spills (test_sigmoid_loss_ahead_of_time.py).
_HOPPER = Tile(128, 256, 64, num_warps=8, num_stages=4)
_HOPPER_TALL = Tile(256, 128, 64, num_warps=8, num_stages=4)
_SQUARE = Tile(128, 128, 64, num_warps=8, num_stages=4)
# With the accumulator in tensor memory it takes 128 registers per thread, so that with three stages a multiprocessor
# has two programs, one of which multiplies while the other is in its epilogue, which takes longer. Not measured.
_BLACKWELL = Tile(128, 128, 64, num_warps=8, num_stages=3)
_AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=4)
_TF32 = Tile(128, 128, 32, num_warps=8, num_stages=3)
_IEEE = Tile(64, 64, 32, num_warps=8, num_stages=2)
_INTERPRETER = Tile(64, 64, 64, num_warps=4, num_stages=1)

# 5,632² bf16 values are 63 MB: a little more than the L2 of an H100, and little of its memory.
LARGEST_BLOCK = 5632


def choose(dtype: torch.dtype, width: int, gpu: Facts, precision: str) -> Config:
    """The configuration for embeddings of this dtype and width. precision: of fp32 products, "ieee" or "tf32"."""
    if gpu.interpreted:
        return Config(_INTERPRETER, _INTERPRETER, _INTERPRETER, 256, True, precision, Folding(4, 4))
    if dtype == torch.float32:
        logit_grad = product = _TF32 if precision == "tf32" else _IEEE
    elif gpu.matrix_unit == "wgmma":
        logit_grad = _HOPPER
        # 256 columns where they divide the width: so400m's 1152 are 9 × 128, but 4.5 × 256.
        product = _HOPPER if width % 256 == 0 else _HOPPER_TALL
    elif gpu.matrix_unit == "tcgen05":
        logit_grad, product = _BLACKWELL, _SQUARE
    else:
        logit_grad = product = _SQUARE if gpu.has_tma else _AMPERE
    logit_grad = _measured("logit_grad", dtype, width, gpu) or logit_grad
    product = _measured("product", dtype, width, gpu) or product
    # Weights, and a logarithm for each pair, leave too few registers for the accumulator of 128 × 256, or two programs.
    weighted = _SQUARE if gpu.has_tma and dtype != torch.float32 else logit_grad
    block = block_size(product, -(-width // product.columns), gpu.multiprocessors)
    folding = {"mma": Folding(16, 4), "wgmma": Folding(16, 2), "tcgen05": Folding(8, 1)}[gpu.matrix_unit]
    if dtype == torch.float32 and precision == "ieee":  # products without matrix instructions
        folding = Folding(16, 1)
    return Config(logit_grad, weighted, product, block, gpu.has_tma, precision, folding)


def _measured(kernel: str, dtype: torch.dtype, width: int, gpu: Facts) -> Tile | None:
    fields = TUNED.get(gpu.name, {}).get((kernel, dtype.itemsize, width))
    return None if fields is None else Tile(*fields)


def candidates(element_bytes: int, gpu: Facts) -> list[Tile]:
    """The tiles to measure for both kernels in half precision; fp32 has one tile per precision."""
    if element_bytes != 2:
        return []
    if gpu.matrix_unit == "mma":
        return [_AMPERE, Tile(128, 128, 32, 4, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 4, 4)]
    return [
        Tile(*sizes, num_warps=8, num_stages=stages)
        for sizes in ((128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 128))
        for stages in (3, 4)
    ]


def block_size(product: Tile, tiles_across: int, multiprocessors: int, largest: int = LARGEST_BLOCK) -> int:
    """The block whose products fill the last wave of programs best: 132 tiles on 132 multiprocessors, not 192."""
    step = max(product.rows, 256)  # a multiple of every tile's rows and columns

    def utilisation(block: int) -> tuple[float, int]:
        tiles = block // product.rows * tiles_across
        return tiles / round_up(tiles, multiprocessors), block

    return max(range(round_up(largest // 2, step), largest + 1, step), key=utilisation)
