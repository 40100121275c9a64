"""Counts what the kernels should reach of an H200's roofline: `python -m bench.compiled.predicted [--results PATH]`.

`bench report` puts it beside measured rows, which calibrates what is counted. A row is the share of the roofline of one
call in bf16: the clocks of its arithmetic or of its traffic, whichever takes longer, at the GPU's published rates, over
those that are counted. Both scale with the clock, so that the share says how long a call should take on a GPU whose
roofline was measured. Nothing here is measured.

Counted are the GEMMs by `siglip_kernels.gemm.clocks` or, for Hopper's kernels, by their tiles; loops of attention and
epilogues of the loss in compiled code (`bench.compiled.count`); and passes over memory by their bytes. Not counted:
launches, what precedes and follows attention's loops, and the pooling head.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.cases import shapes
from bench.cases.operations import Setting
from bench.cases.shapes import MODELS, AttentionShape, LinearShape, MLPShape, PreNormAttentionShape
from bench.cases.suites import SUITES
from bench.compiled.count import Count, counts
from bench.compiled.fp8_layer import BYTES_PER_CLOCK
from bench.compiled.launch import GPUS
from bench.environment import commit, version
from siglip_kernels.attention import config as attention_config
from siglip_kernels.gemm import config as gemm_config
from siglip_kernels.gemm.clocks import LATENCY, NOT_HIDDEN, SHARED_BYTES, clocks
from siglip_kernels.gemm.tiles import Shape

NAME, FACTS = "h200", GPUS["h200"]
MULTIPLY_ADDS = 2048  # of bf16, per clock and multiprocessor: see `siglip_kernels.gemm.clocks`
BYTES = BYTES_PER_CLOCK[NAME]  # of the memory, per clock
L2_BYTES = 5120  # per clock, published: as in `siglip_kernels.gemm.clocks`
KERNELS = ("triton", "triton:hopper")


def floor(shape: shapes.Shape, direction: str) -> float:
    """The clocks of the roofline."""
    rate = 2 * MULTIPLY_ADDS * FACTS.multiprocessors
    return max(shape.flops(direction) / rate, shape.bytes(direction, 2) / BYTES)


def _turns(tiles: int) -> int:
    return math.ceil(tiles / FACTS.multiprocessors)


# Products -------------------------------------------------------------------------------------------------------------


def _step(rows: int, columns: int) -> float:
    """The clocks of a tile for one element of depth: its products, or the reads of its operands from the L2."""
    return max(rows * columns / MULTIPLY_ADDS, 2 * (rows + columns) * FACTS.multiprocessors / L2_BYTES)


def gemm(
    rows: int, columns: int, depth: int, hopper: bool, parts: int = 1, residual: bool = False, gelu: str = ""
) -> float:
    """The clocks of a GEMM with a fused epilogue."""
    if not hopper:
        shape = Shape(rows, columns, depth, parts, 2, 2 * residual, gelu, tf32=False, aligned=True)
        return clocks(shape, FACTS, gemm_config.tile(shape, FACTS)).total
    from siglip_kernels.gemm.hopper import tile_for

    tile = tile_for(rows, columns, depth, parts, gelu, 2, torch.bfloat16, FACTS)
    tiles = math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns) * parts
    # Per step of depth. TMA writes every row and column; an instruction reads 64 rows and all columns.
    moved = 2 * ((tile.rows + tile.columns) + (tile.rows + tile.columns * tile.rows // 64))
    step = max(_step(tile.rows, tile.columns), moved / SHARED_BYTES)
    return _turns(tiles) * depth * step + LATENCY  # the other consumer's products hide epilogues


def memory_pass(rows: int, width: int, tensors: int = 2) -> float:
    """The clocks of reading and writing so many bf16 matrices."""
    return 2 * tensors * rows * width / BYTES


# Attention ------------------------------------------------------------------------------------------------------------


@functools.cache
def _counted(operation: str, only: str) -> tuple[Count, ...]:
    return tuple(counts([operation], [NAME], only))


def _loop(kernel: str, direction: str, head_dim: int, hopper: bool) -> Count:
    tokens = {64: 1024, 72: 729}[head_dim]
    rows = _counted(f"attention{'_hopper' * hopper}", f"^bf16 S={tokens} D={head_dim} {direction}$")
    return next(row for row in rows if row.kernel == kernel and row.part == "loop 1")


def _pipes(one: Count) -> float:
    """The clocks of a loop's turn, whose pipes overlap as those of a GEMM."""
    busiest = one.clocks[one.bound]
    return busiest + NOT_HIDDEN * (sum(one.clocks.values()) - one.clocks["issue"] - busiest)


def _padded(tokens: int, tile: int) -> int:
    return math.ceil(tokens / tile) * tile


def _attention_kernel(kernel: str, shape: AttentionShape, hopper: bool) -> float:
    """All turns of one kernel's loop."""
    from siglip_kernels.attention.hopper import ROWS, backward_tile, forward_tile, last_keys

    size, head_dim = shape.tokens, shape.head_dim
    columns = sum(attention_config.split_head_dim(head_dim))
    products = {"forward": 2, "backward_queries": 3, "backward_keys": 4}[kernel]
    if not hopper:
        tile = attention_config.tile(kernel, FACTS, 2, head_dim, size, size)
        queries, keys = _padded(size, tile.queries), _padded(size, tile.keys)
        across = math.ceil(size / (tile.keys if kernel == "backward_keys" else tile.queries))
    elif kernel == "forward":
        last, _ = last_keys(size, 128, False)
        rows = ROWS.value * forward_tile(head_dim, size, last, False).consumers
        queries, keys, across = _padded(size, rows), size // 128 * 128 + last, math.ceil(size / rows)
    else:
        own, other = 2 * ROWS.value, backward_tile(kernel.removeprefix("backward_"), head_dim).columns
        queries, keys, across = _padded(size, own), _padded(size, other), math.ceil(size / own)
    loop = _loop(f"attention_{kernel}{'_hopper' * hopper}_kernel", kernel.partition("_")[0], head_dim, hopper)
    tiles = shape.batch * shape.heads * across
    multiply_adds = shape.batch * shape.heads * queries * keys * columns * products
    uneven = _turns(tiles) * FACTS.multiprocessors / tiles
    return uneven * multiply_adds / loop.multiply_adds * _pipes(loop) / 4 / FACTS.multiprocessors


def attention(shape: AttentionShape, direction: str, hopper: bool) -> float:
    kernels = {"fwd": ["forward"], "bwd": ["backward_queries", "backward_keys"]}
    return sum(_attention_kernel(kernel, shape, hopper) for kernel in kernels[direction])


# Operations -----------------------------------------------------------------------------------------------------------


def _linear(shape: LinearShape, hopper: bool) -> float:
    return gemm(shape.rows, shape.outputs, shape.inputs, hopper, residual=shape.residual)


def _mlp(shape: MLPShape, hopper: bool) -> float:
    fc1 = gemm(shape.rows, shape.hidden, shape.width, hopper, gelu="forward")
    return fc1 + gemm(shape.rows, shape.width, shape.hidden, hopper, residual=True)


def _qkv(shape: shapes.QKVShape, hopper: bool) -> float:
    return memory_pass(shape.rows, shape.width) + gemm(shape.rows, shape.width, shape.width, hopper, parts=3)


def _pre_norm_mlp(shape: MLPShape, hopper: bool) -> float:
    return memory_pass(shape.rows, shape.width) + _mlp(shape, hopper)


def _pre_norm_attention(shape: PreNormAttentionShape, hopper: bool) -> float:
    rows = shape.batch * shape.tokens
    inner = AttentionShape("", shape.batch, shape.tokens, shape.heads, shape.head_dim)
    projections = _qkv(shapes.QKVShape("", rows, shape.width, shape.heads), hopper)
    return projections + attention(inner, "fwd", hopper) + gemm(rows, shape.width, shape.width, hopper, residual=True)


def _vision_tower(shape: shapes.ModelShape, hopper: bool) -> float:
    (tower,) = shape.towers()
    rows = shape.batch * tower.tokens
    attended = PreNormAttentionShape("", shape.batch, tower.tokens, tower.heads, tower.head_dim)
    layer = _pre_norm_attention(attended, hopper) + _pre_norm_mlp(MLPShape("", rows, tower.width, tower.hidden), hopper)
    patches = floor(shapes.PatchShape("", shape.batch, tower.image, tower.patch, tower.width), "fwd")
    return tower.layers * layer + patches + memory_pass(rows, tower.width)


def _loss(shape: shapes.LossShape, hopper: bool) -> float:
    """Training: a block of logits with their gradients, and its two products, for every block."""
    from siglip_kernels.sigmoid_loss.config import choose

    chosen = choose(torch.bfloat16, shape.width, FACTS, "ieee")
    blocks = shape.pairs * shape.texts / chosen.block**2
    tile, product = chosen.logit_grad, chosen.product
    tiles = math.ceil(chosen.block / tile.rows) * math.ceil(chosen.block / tile.columns)
    of_tile = shape.width * _step(tile.rows, tile.columns)
    if not hopper:  # whose other consumer hides it
        epilogue = next(
            row
            for row in _counted("sigmoid_loss", f"^bf16 D={768 if shape.width % 256 == 0 else 1152} train, blocks$")
            if row.kernel == "logit_grad_kernel" and row.part == "epilogue 1"
        )
        of_tile += tile.num_warps / 4 * epilogue.clocks["issue"]
    across = math.ceil(chosen.block / product.rows) * math.ceil(shape.width / product.columns)
    of_product = chosen.block * _step(product.rows, product.columns)
    return blocks * (_turns(tiles) * of_tile + 2 * _turns(across) * of_product + 3 * LATENCY)


_FORWARD: dict[str, Callable[[Any, bool], float]] = {
    "attention": lambda shape, hopper: attention(shape, "fwd", hopper),
    "linear": _linear,
    "mlp": _mlp,
    "pre_norm_mlp": _pre_norm_mlp,
    "pre_norm_qkv": _qkv,
    "pre_norm_attention": _pre_norm_attention,
    "vision_tower": _vision_tower,
}
_OTHERS: dict[tuple[str, str], Callable[[Any, bool], float]] = {
    ("attention", "bwd"): lambda shape, hopper: attention(shape, "bwd", hopper),
    ("sigmoid_loss", "fwd+bwd"): _loss,
}
SUITES_COUNTED = ("model", "attention", "loss", "mlp", "linear")


def predict(setting: Setting, hopper: bool) -> float | None:
    """The counted clocks of a call; None where nothing is counted."""
    name, shape = setting.operation.name, setting.shape
    if isinstance(shape, AttentionShape) and (shape.peaked or shape.tokens <= 64):
        return None  # rows whose delta is made exact, and short sequences
    if isinstance(shape, shapes.LossShape) and (shape.captions or shape.negatives or shape.weighted):
        return None
    if isinstance(shape, shapes.ModelShape) and MODELS[shape.model].vision.head_dim not in (64, 72):
        return None
    count = _FORWARD.get(name) if setting.direction == "fwd" else _OTHERS.get((name, setting.direction))
    return None if count is None else count(shape, hopper)


def predictions() -> Iterator[dict[str, Any]]:
    """A line per setting of a quick run and kernels."""
    sha, _ = commit()
    about = {"gpu": FACTS.name, "triton": version("triton"), "commit": sha, "date": f"{date.today()}"}
    for suite in SUITES_COUNTED:
        for setting in SUITES[suite].settings("cuda", ["bf16"], quick=True):
            for kernels in KERNELS:
                counted = predict(setting, kernels == "triton:hopper")
                if counted is not None:
                    yield {
                        "op": setting.operation.name,
                        "direction": setting.direction,
                        "shape": setting.shape.sizes(),
                        "dtype": "bf16",
                        "impl": kernels,
                        "share": round(floor(setting.shape, setting.direction) / counted, 4),
                        **about,
                    }


def main() -> int:
    from bench.compiled.table import use_the_compiler
    from bench.report.rows import results_directory

    parser = argparse.ArgumentParser(description="Count what the kernels should reach of an H200's roofline.")
    parser.add_argument("--results", type=Path, help="a directory or a .jsonl file; bench/results by default")
    where = parser.parse_args().results or results_directory()
    use_the_compiler()
    found = list(predictions())
    for one in found:
        print(f"{one['op']:20} {one['direction']:8} {one['shape']['name']:24} {one['impl']:14} {one['share']:.0%}")
    path = where if where.suffix == ".jsonl" else where / f"counted-{NAME}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    print(f"Written to {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
