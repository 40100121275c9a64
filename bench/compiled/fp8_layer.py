"""Counts an encoder layer in fp8 beside the same in bf16: `python -m bench.compiled.fp8_layer [--gpu h200 ...]`.

so400m at 384 pixels, 64 images, on the portable kernels, in thousands of clocks of each multiprocessor. GEMMs are
counted by `siglip_kernels.gemm.clocks`; attention, which is the same in both, by its main loop in compiled code; and
normalisation and quantisation by the bytes that they move, at the GPU's published bandwidth. Nothing is measured.
"""

import argparse
import math
import sys

from bench.compiled.count import counts
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import WIDTHS, gemms
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import NOT_HIDDEN, clocks

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


def products(gpu: str, in_fp8: bool) -> dict[str, float]:
    """The clocks of each GEMM."""
    shapes = gemms(ROWS, WIDTH, HIDDEN, 1 if in_fp8 else 2)
    forward = {name: shape for name, shape in shapes.items() if shape.gelu != "backward"}
    return {name: clocks(shape, GPUS[gpu], config.tile(shape, GPUS[gpu])).total for name, shape in forward.items()}


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
        same = {"attention": attention(gpu)}
        layers = [products(gpu, in_fp8) | same | passes(gpu, in_fp8) for in_fp8 in (False, True)]
        for name, layer in zip(("bf16", "fp8"), layers, strict=True):
            parts = ", ".join(f"{part} {count / 1000:.0f}" for part, count in layer.items())
            print(f"{gpu:8} {name:4} {sum(layer.values()) / 1000:6.0f}: {parts}")
        gain, one_pass = sum(layers[0].values()) / sum(layers[1].values()), _moved(gpu, HIDDEN, 3) / 1000
        print(f"{gpu:8} {gain:.2f} times fewer in fp8; a pass that quantises GELU's result would add {one_pass:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
