"""Counts the losses of prefixes beside the loss of the widest: `python -m bench.compiled.prefixes [--gpu h200 ...]`.

Clocks of one warp on its quarter of a multiprocessor per 1,000 pairs of image and text, in training, bf16, at the
widths of `bench.compiled.launches.matryoshka_sigmoid_loss`: the three products, by the busiest pipe of each main loop,
with the columns that tiles pad; and the epilogues of the logits, by theirs. Not counted: the epilogues of the two
products, which are the same; reading the embeddings; and turning a block's G into H, which moves 8 bytes of L2 per pair
and width.
"""

import argparse
import sys

import torch

from bench.compiled.count import COUNTED, Count, counts
from bench.compiled.launch import GPUS, architecture
from bench.compiled.launches.matryoshka_sigmoid_loss import WIDTHS
from siglip_kernels.sigmoid_loss.config import choose
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments
from siglip_kernels.sigmoid_loss.matryoshka.config import padding_of, prefix_config, tiles_across


def clocks_of(gpu: str) -> tuple[float, float, float, float]:
    """Products and epilogues of the loss of the widest prefix, and of the losses of all prefixes."""

    facts, width = GPUS[gpu], WIDTHS[-1]
    base = choose(torch.bfloat16, width, facts, "ieee")
    ends = Segments(WIDTHS, padding_of(base.weighted)).ends
    config = prefix_config(base, ends, facts)
    columns = -(-width // base.product.columns) * base.product.columns
    one = _clocks("sigmoid_loss", gpu, "logit_grad_kernel", "product_kernel", width, columns, base.logit_grad.depth)
    columns = tiles_across(ends, config.product) * config.product.columns
    kernels = "prefix_logit_grad_kernel", "prefix_product_kernel"
    every = _clocks("matryoshka_sigmoid_loss", gpu, *kernels, ends[-1], columns, config.logit_grad.depth)
    return one[0], one[1], every[0], every[1] * len(WIDTHS)


def _clocks(
    operation: str, gpu: str, logits: str, product: str, width: int, columns: int, depth: int
) -> tuple[float, float]:
    rows = list(counts([operation], [gpu], "^bf16 D=768 train"))

    def worst(kernel: str, part: str) -> Count:
        return max(
            (row for row in rows if row.kernel == kernel and row.part == part), key=lambda row: row.clocks[row.bound]
        )

    loop, epilogue = worst(logits, "loop 1"), worst(logits, "epilogue 1")
    products = width * loop.per_thousand(loop.bound)
    products += 2 * columns * worst(product, "loop 1").per_thousand(worst(product, "loop 1").bound)
    pairs = loop.multiply_adds / depth  # of a warp, in a tile
    return products, 1000 * epilogue.clocks[epilogue.bound] / pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=COUNTED, choices=COUNTED)
    separately = sum(WIDTHS) / WIDTHS[-1]
    print(f"widths {', '.join(map(str, WIDTHS))}; one call for each would be {separately:.2f} times the products")
    print(
        "| arch | widest: products | epilogue | all: products | epilogues | all / widest |\n|---|---|---|---|---|---|"
    )
    for gpu in parser.parse_args().gpu:
        one, one_epilogue, every, epilogues = clocks_of(gpu)
        ratio = (every + epilogues) / (one + one_epilogue)
        cells = *(f"{number:.0f}" for number in (one, one_epilogue, every, epilogues)), f"{ratio:.2f}"
        print(f"| {architecture(gpu)} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
