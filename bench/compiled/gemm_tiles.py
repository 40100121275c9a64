"""The main loop and the epilogue of a GEMM with a given tile, counted from compiled code.

`siglip_kernels.gemm.clocks` chooses tiles by formulas, which this checks.
"""

from typing import Any

import torch

from bench.compiled.ahead_of_time import compiling_for, sass
from bench.compiled.launch import GPUS
from bench.compiled.sass import RATES, Loop, measure
from bench.compiled.tile_cost import epilogues, main_loops
from siglip_kernels.gemm.tiles import Shape, Tile

_DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}


def counted(gpu: str, shape: Shape, tile: Tile) -> tuple[Loop, Loop]:
    """The loop over blocks of depth, per block, and the rest of a tile; clocks of a warp, as in `bench.compiled.sass`.

    gpu: of GPUS. tile: with an undivided depth.
    """
    found: list[tuple[Loop, Loop]] = []

    def record(kernel: str, compiled: Any) -> None:
        if isinstance(compiled, Exception):
            raise compiled
        code, rates = sass(compiled.asm["cubin"]), RATES[GPUS[gpu].capability]
        (loop,), (epilogue,) = main_loops(code), epilogues(code)
        found.append((measure("", kernel, loop, rates), measure("", kernel, epilogue, rates)))

    with compiling_for(GPUS[gpu], record):
        _launch(shape, tile)
    (costs,) = found
    return costs


def _launch(shape: Shape, tile: Tile) -> None:
    from siglip_kernels.gemm.kernels import Scales, gemm

    def empty(*size: int, element_bytes: int = shape.element_bytes) -> torch.Tensor:
        return torch.empty(size, dtype=_DTYPES[element_bytes], device="meta")

    a, weight = empty(shape.rows, shape.depth), empty(shape.columns, shape.depth)
    residual = empty(shape.rows, shape.columns, element_bytes=shape.residual_bytes) if shape.residual_bytes else None
    if shape.gelu == "backward":
        kept, weight = empty(shape.rows, shape.columns), empty(shape.depth, shape.columns).T
        gemm(
            a,
            [weight],
            [None],
            gelu="backward",
            pre_activation=kept,
            keep_activation=True,
            keep_column_sums=True,
            tile=tile,
        )
        return
    biases: list[torch.Tensor | None] = [empty(shape.columns, element_bytes=max(2, shape.element_bytes))] * shape.parts
    scales = None
    if shape.element_bytes == 1:
        row_scales = empty(shape.rows, element_bytes=4)
        scales = Scales(row_scales, empty(shape.columns, element_bytes=4), row_scales if shape.gelu else None)
    gemm(
        a,
        [weight] * shape.parts,
        biases,
        residual=residual,
        gelu=shape.gelu,
        scales=scales,
        out_dtype=None if scales is None else _DTYPES[shape.result_bytes],
        tile=tile,
    )
