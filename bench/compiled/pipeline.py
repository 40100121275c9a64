"""Counts the clocks of the GEMMs of an encoder layer in Hopper's pipeline (SIGLIP_KERNELS_HOPPER=1), on an H200.

As `siglip_kernels.gemm.clocks` counts those of the portable kernel, except for epilogues. These are counted in
compiled code, and mostly hidden: while one consumer is in its epilogue, the other multiplies what the ring holds.
Exposed is what an epilogue takes beyond that, for each consumer, and the last epilogue of all.
"""

import math
from collections.abc import Iterable

import torch

from bench.compiled.count import Count, counts
from bench.compiled.launch import GPUS
from siglip_kernels.gemm.clocks import LATENCY, Clocks, clocks
from siglip_kernels.gemm.tiles import Shape, Tile, count

GPU = "h200"
# GEMM of `small_batches.gemms` -> launch, in bf16 and in fp8.
_IN_BF16 = {"qkv": "qkv", "out_proj": "bias, residual", "fc1": "gelu", "fc2": "fc2, residual"}
_IN_FP8 = {"qkv": "qkv", "out_proj": "out_proj", "fc1": "gelu", "fc2": "fc2"}


def products(shapes: dict[str, Shape], in_fp8: bool) -> dict[str, float]:
    """The clocks of each of these GEMMs: those of so400m, 64 images, whose epilogues are counted."""
    costs = epilogues(shapes, in_fp8)
    return {name: pipelined(shape, costs[name]).total for name, shape in shapes.items()}


def epilogues(names: Iterable[str], in_fp8: bool) -> dict[str, float]:
    """The clocks of one consumer's epilogue, of whichever pipe is the busiest besides those of the products."""
    operation, prefix, launches = (
        ("fp8_hopper", "so400m 46656", _IN_FP8) if in_fp8 else ("linear_hopper", "bf16 46656x1152", _IN_BF16)
    )
    launches = {name: f"{prefix} {launches[name]}" for name in names}
    found = list(counts([operation], [GPU], f"^({'|'.join(launches.values())})$"))
    return {
        name: max(_busiest(row) for row in found if row.launch == launch and row.part.startswith("epilogue"))
        for name, launch in launches.items()
    }


def _busiest(row: Count) -> float:
    return max(clocks for pipe, clocks in row.clocks.items() if pipe not in ("tensor", "shared"))


def tile_of(shape: Shape) -> Tile:
    """The pipeline's tile, as the portable kernel's are described: both consumers, and blocks of 128 bytes of depth."""
    from siglip_kernels.gemm import hopper  # imports Triton
    from siglip_kernels.gemm.gluon_launch import PIECE, buffers_of
    from siglip_kernels.gemm.ring import BLOCK_BYTES

    dtype = torch.float8_e4m3fn if shape.result_bytes == 1 else torch.bfloat16
    tile = hopper.tile_for(
        shape.rows, shape.columns, shape.depth, shape.parts, shape.gelu, shape.element_bytes, dtype, GPUS[GPU]
    )
    buffers = buffers_of(shape.residual_bytes > 0, False, tile.columns // PIECE.value)
    stages = tile.stages(buffers, dtype, GPUS[GPU].shared_memory)
    return Tile(tile.rows, tile.columns, BLOCK_BYTES // shape.element_bytes, warps=8, stages=stages)


def pipelined(shape: Shape, epilogue: float) -> Clocks:
    """epilogue: the clocks of one consumer's."""
    tile, facts = tile_of(shape), GPUS[GPU]
    portable = clocks(shape, facts, tile)
    turns = math.ceil(count(shape, tile) / facts.multiprocessors)
    block = portable.products / turns / math.ceil(shape.depth / tile.depth) / 2  # of one consumer
    exposed = 2 * max(0.0, epilogue - tile.stages * block)
    return portable._replace(outside=turns * exposed + epilogue + LATENCY)
