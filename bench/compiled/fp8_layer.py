"""Counts an encoder layer in fp8 beside the same in bf16: `python -m bench.compiled.fp8_layer [--gpu h200 ...]`.

so400m at 384 pixels, 64 images, in thousands of clocks of each multiprocessor. GEMMs are counted by
`siglip_kernels.gemm.clocks`, and those of Hopper's pipeline, on an H200, by `pipeline.py`; attention, which is the same
in all, by the portable kernel's main loop in compiled code; and normalisation and quantisation by the bytes that they
move, at the GPU's published bandwidth. Nothing is measured.
"""

import argparse
import math
import sys

from bench.compiled import pipeline
from bench.compiled.count import counts
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import WIDTHS, gemms
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import NOT_HIDDEN, clocks
from siglip_kernels.gemm.tiles import Shape

IMAGES, TOKENS, HEADS = 64, 729, 16
WIDTH, HIDDEN = WIDTHS["so400m"]
ROWS = IMAGES * TOKENS
# Published, over the clock at which `siglip_kernels.gemm.clocks` takes the rate of products.
BYTES_PER_CLOCK = {
    "rtx4090": 1.008e12 / 2.52e9,
    "h200": 4.8e12 / 1.83e9,
    "b200": 8e12 / 1.85e9,
    "rtx5090": 1.792e12 / 2.41e9,
}


def shapes(in_fp8: bool) -> dict[str, Shape]:
    """Of the GEMMs of a forward pass."""
    found = gemms(ROWS, WIDTH, HIDDEN, 1 if in_fp8 else 2)
    return {name: shape for name, shape in found.items() if shape.gelu != "backward"}


def products(gpu: str, in_fp8: bool) -> dict[str, float]:
    """The clocks of each GEMM with the portable kernel."""
    facts = GPUS[gpu]
    return {name: clocks(shape, facts, config.tile(shape, facts)).total for name, shape in shapes(in_fp8).items()}


def passes(gpu: str, in_fp8: bool) -> dict[str, float]:
    """The clocks of what only moves bytes: bf16 is read and bf16 or fp8 written."""
    bytes_per_element = 2 + (1 if in_fp8 else 2)
    each = _moved(gpu, WIDTH, bytes_per_element)
    return {"normalisations": 2 * each} | ({"quantisation of attention": each} if in_fp8 else {})


def _moved(gpu: str, width: int, bytes_per_element: int) -> float:
    return ROWS * width * bytes_per_element / BYTES_PER_CLOCK[gpu]


def attention(gpu: str) -> float:
    """All turns of the main loop, whose pipes overlap as those of a GEMM."""
    (loop,) = (row for row in counts(["attention"], [gpu], "^bf16 S=729 D=72 forward$") if row.part == "loop 1")
    busiest = loop.clocks[loop.bound]
    turn = busiest + NOT_HIDDEN * (sum(loop.clocks.values()) - loop.clocks["issue"] - busiest)
    tile = 128  # rows and keys to which the tokens are padded
    padded = math.ceil(TOKENS / tile) * tile
    multiply_adds = IMAGES * HEADS * padded**2 * 160  # 72 columns are computed as 80, in two products
    return multiply_adds / loop.multiply_adds * turn / 4 / GPUS[gpu].multiprocessors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=list(BYTES_PER_CLOCK), choices=BYTES_PER_CLOCK)
    for gpu in parser.parse_args().gpu:
        same = attention(gpu)
        _show(gpu, same, [products(gpu, in_fp8) for in_fp8 in (False, True)])
        if gpu == pipeline.GPU:
            pipelined = [pipeline.products(shapes(in_fp8), in_fp8) for in_fp8 in (False, True)]
            _show(f"{gpu} pipeline", same, pipelined)
        print(f"{gpu:13} a pass that quantises GELU's result would add {_moved(gpu, HIDDEN, 3) / 1000:.0f}")
    return 0


def _show(name: str, of_attention: float, by_gemm: list[dict[str, float]]) -> None:
    """Prints a layer in bf16 and in fp8, by the clocks of their GEMMs."""
    gpu, totals = name.split()[0], []
    for in_fp8, of_gemms in zip((False, True), by_gemm, strict=True):
        layer = of_gemms | {"attention": of_attention} | passes(gpu, in_fp8)
        totals.append(sum(layer.values()))
        parts = ", ".join(f"{part} {count / 1000:.0f}" for part, count in layer.items())
        print(f"{name:13} {'fp8' if in_fp8 else 'bf16':4} {totals[-1] / 1000:6.0f}: {parts}")
    print(f"{name:13} {totals[0] / totals[1]:.2f} times fewer in fp8")


if __name__ == "__main__":
    sys.exit(main())
