"""Tiles of the pooling kernels, and their launchers."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_kernels.device import Facts, facts, interpreting

LARGEST = 16 * 1152  # heads × width, each rounded up: more accumulators than that, and backward would spill


def fits(x: Tensor, heads: int) -> bool:
    """Whether the kernels take this, on this GPU."""
    columns, rows = padded_width(x.shape[2]), padded_heads(heads)
    shared_bytes = 2 * columns * (2 * rows + 16)  # of backward without any pipelining
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
    """A program's tile of tokens, and how it goes through it."""

    tokens: int
    chunk: int  # columns of a block: 16 bytes a thread
    warps: int
    stages: int  # how deep the loads of the loop are pipelined
    registers: int | None  # the most a thread may have, so that two programs fit a multiprocessor


@functools.cache
def choose_tile(kernel: str, gpu: Facts, heads: int, width: int) -> Tile:
    """Not measured. The smallest tile, as deep a pipeline as shared memory holds; forward then has two programs on a
    multiprocessor, which hide each other's softmax."""
    tokens = 64 if gpu.capability == (0, 0) else 16
    columns = padded_width(width)
    resident = padded_heads(heads) * columns * (1 if kernel == "forward" else 2)  # beside the tiles in shared memory
    stages = 3
    while stages > 1 and 2 * (resident + (stages - 1) * tokens * columns) > 0.95 * gpu.shared_memory:
        stages -= 1
    return Tile(tokens, chunk_columns(width), 8, stages, None if kernel == "backward" else 128)


def _split(samples: int, tokens: int, tile_tokens: int, programs: int) -> tuple[int, int]:
    """(splits, tokens of a split) that give about so many programs, none with fewer than 64 tokens."""
    splits = max(1, min(-(-tokens // 64), programs // max(1, samples)))
    span = -(-tokens // (splits * tile_tokens)) * tile_tokens
    return -(-tokens // span), span


def _strides(*strides: int) -> tuple[list[int], int]:
    """In units of `unit` elements: 8 where that divides them all, so that the compiler knows of the alignment."""
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def _constants(tile: Tile, width: int, heads: int) -> dict[str, object]:
    return {
        "WIDTH": width,
        "CHUNK": tile.chunk,
        "CHUNKS": -(-width // tile.chunk),
        "HEADS": padded_heads(heads),
        "TOKENS": tile.tokens,
        "STAGES": tile.stages,
        "INTERPRETED": interpreting(),
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }


def attention_pool_forward(
    x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled (B, H, width), and highest and total (B, H). x: (B, S, width) of unit last stride; folded: (H, width)."""
    batch, tokens, width = x.shape
    heads = folded.shape[0]
    pooled = torch.empty((batch, heads, width), dtype=x.dtype, device=x.device)
    highest, total = (torch.empty((batch, heads), dtype=torch.float32, device=x.device) for _ in range(2))
    if batch == 0 or tokens == 0:
        return pooled.zero_(), highest.zero_(), total.zero_()
    from siglip_kernels.attention_pool.kernels import attention_pool_combine_kernel, attention_pool_forward_kernel

    gpu = facts(x.device)
    tile = choose_tile("forward", gpu, heads, width)
    splits, span = _split(batch, tokens, tile.tokens, 2 * gpu.multiprocessors)
    results = parts = [pooled, highest, total]
    if splits > 1:
        parts = [torch.empty((splits, *one.shape), dtype=torch.float32, device=x.device) for one in results]
    strides, unit = _strides(x.stride(0), x.stride(1))
    attention_pool_forward_kernel[(batch * splits,)](
        x,
        folded,
        lengths,
        *parts,
        *strides,
        batch,
        tokens,
        heads,
        splits,
        span,
        scale * math.log2(math.e),
        UNIT=unit,
        **_constants(tile, width, heads),
    )
    if splits > 1:
        chunk = chunk_columns(width)
        attention_pool_combine_kernel[(batch * heads, -(-width // chunk))](
            *parts,
            *results,
            batch * heads,
            splits,
            WIDTH=width,
            CHUNK=chunk,
            SPLITS=1 << (splits - 1).bit_length(),
            BLOCK=16,
            INTERPRETED=interpreting(),
            num_warps=4,
        )
    return pooled, highest, total


def attention_pool_backward(
    pooled_grad: Tensor,
    x: Tensor,
    folded: Tensor,
    pooled: Tensor,
    highest: Tensor,
    total: Tensor,
    scale: float,
    lengths: Tensor | None,
    needs_x: bool,
    needs_folded: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and folded; one that is not needed is an empty tensor. x, pooled_grad: unit last stride."""
    batch, tokens, width = x.shape
    heads = folded.shape[0]
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    if batch == 0 or tokens == 0:
        return x_grad, torch.zeros(folded.shape if needs_folded else 0, dtype=x.dtype, device=x.device)
    from siglip_kernels.attention_pool.kernels import attention_pool_backward_kernel

    gpu = facts(x.device)
    tile = choose_tile("backward", gpu, heads, width)
    splits, span = _split(batch, tokens, tile.tokens, gpu.multiprocessors)
    programs = min(batch * splits, gpu.multiprocessors)
    partials = torch.empty((programs, heads, width), dtype=torch.float32, device=x.device) if needs_folded else None
    strides, unit = _strides(x.stride(0), x.stride(1), pooled_grad.stride(0), pooled_grad.stride(1))
    delta, surplus = (torch.empty((batch, splits, heads), dtype=torch.float32, device=x.device) for _ in range(2))
    for first_pass in (True, False):
        attention_pool_backward_kernel[(batch * splits if first_pass else programs,)](
            pooled_grad,
            x,
            folded,
            pooled,
            highest,
            total,
            lengths,
            delta if first_pass else delta.sum(1),
            x_grad if needs_x and not first_pass else None,
            None if first_pass else partials,
            surplus,
            *strides,
            tokens,
            heads,
            splits,
            span,
            batch * splits,
            scale,
            scale * math.log2(math.e),
            UNIT=unit,
            FIRST_PASS=first_pass,
            **{**_constants(tile, width, heads), "maxnreg": 128 if first_pass else tile.registers},
        )
    if partials is None:
        return x_grad, torch.empty(0, dtype=x.dtype, device=x.device)
    centred = torch.einsum("bh,bhw->hw", surplus.sum(1).to(x.dtype), pooled)
    return x_grad, (partials.sum(0) - centred).to(x.dtype)
