"""Tiles of the pooling kernels, and the inputs that they support."""

import functools
from dataclasses import dataclass

from torch import Tensor

from siglip_kernels.device import Facts, facts

LARGEST = 16 * 1152  # heads × width, each rounded up: with more accumulators the backward would spill


def fits(x: Tensor, heads: int) -> bool:
    """Whether the kernels support x and this number of heads, on this GPU."""
    columns, rows = padded_width(x.shape[2]), padded_heads(heads)
    shared_bytes = 2 * columns * (2 * rows + 16)  # of the backward without pipelining
    return x.element_size() == 2 and rows * columns <= LARGEST and shared_bytes <= 0.95 * facts(x.device).shared_memory


def padded_heads(heads: int) -> int:
    return max(16, 1 << (heads - 1).bit_length())


def padded_width(width: int) -> int:
    """The width as whole chunks of columns."""
    chunk = chunk_columns(width)
    return -(-width // chunk) * chunk


def chunk_columns(width: int) -> int:
    return min(128, max(16, 1 << (width - 1).bit_length()))


@dataclass(frozen=True)
class Tile:
    """A program's tile of tokens, and how it is processed."""

    tokens: int
    chunk: int  # columns of a block: 16 bytes per thread
    warps: int
    stages: int  # how deep the loads of the loop are pipelined
    registers: int | None  # limit per thread, so that two programs fit a multiprocessor


@functools.cache
def choose_tile(kernel: str, gpu: Facts, heads: int, width: int) -> Tile:
    """Not measured. The smallest tile, with as deep a pipeline as shared memory holds. Two programs of the forward fit
    a multiprocessor and hide each other's softmax."""
    tokens = 64 if gpu.interpreted else 16
    columns = padded_width(width)
    resident = padded_heads(heads) * columns * (1 if kernel == "forward" else 2)  # beside the tiles in shared memory
    stages = 3
    while stages > 1 and 2 * (resident + (stages - 1) * tokens * columns) > 0.95 * gpu.shared_memory:
        stages -= 1
    return Tile(tokens, chunk_columns(width), 8, stages, None if kernel == "backward" else 128)


def split_tokens(samples: int, tokens: int, tile_tokens: int, programs: int) -> tuple[int, int]:
    """(splits, tokens of a split), for about this many programs, none with fewer than 64 tokens."""
    splits = max(1, min(-(-tokens // 64), programs // max(1, samples)))
    span = -(-tokens // (splits * tile_tokens)) * tile_tokens
    return -(-tokens // span), span
