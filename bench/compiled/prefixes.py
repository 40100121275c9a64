"""Counts the losses of prefixes beside the loss of the widest: `python -m bench.compiled.prefixes [--gpu h200 ...]`.

Clocks of one warp on its quarter of a multiprocessor per 1,000 pairs of image and text, in training, bf16, at the
widths of `bench.compiled.launches.matryoshka_sigmoid_loss`: the three products, by the busiest pipe of each main loop,
with the columns that tiles pad; and the epilogues of the logits, by theirs. The epilogue of a shorter prefix ends where
the products of the next begin: it rescales the cosines, and starts the next loads. "alone" is a call with the widest
alone, and "bound" that and the epilogues of the shorter ones. "loss" is `sigmoid_loss` of the widest, which takes
normalised embeddings and leaves the gradient of the normalisation to its caller.

Not counted: the epilogues of the two products, which are the same; reading the embeddings; the start of a tile; and
turning a block's G into H, which moves 8 bytes of L2 per pair and width.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch

from bench.compiled.count import COUNTED, Count, counts
from bench.compiled.launch import GPUS, architecture
from bench.compiled.launches.matryoshka_sigmoid_loss import PUBLISHED, WIDTHS
from siglip_kernels.sigmoid_loss.config import choose
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments
from siglip_kernels.sigmoid_loss.matryoshka.config import column_tiles, padding_of, prefix_config


class Clocks(NamedTuple):
    """Products of the widest and of all prefixes; epilogues of `sigmoid_loss`, of a prefix alone, of a shorter one."""

    one_products: float
    products: float
    loss_epilogue: float
    alone_epilogue: float
    shorter_epilogue: float

    @property
    def loss(self) -> float:
        return self.one_products + self.loss_epilogue

    @property
    def alone(self) -> float:
        return self.one_products + self.alone_epilogue

    @property
    def every(self) -> float:
        return self.products + self._epilogues

    @property
    def bound(self) -> float:
        return self.one_products + self._epilogues

    @property
    def _epilogues(self) -> float:
        return self.alone_epilogue + (len(WIDTHS) - 1) * self.shorter_epilogue


def clocks_of(gpu: str) -> Clocks:
    facts, width = GPUS[gpu], WIDTHS[-1]
    base = choose(torch.bfloat16, width, facts, "ieee")
    ends = Segments(WIDTHS, padding_of(base.weighted)).ends
    config = prefix_config(base, ends, facts)

    rows = list(counts(["sigmoid_loss"], [gpu], "^bf16 D=768 train"))
    columns = -(-width // base.product.columns) * base.product.columns
    one_products = width * _loop(rows, "logit_grad_kernel") + 2 * columns * _loop(rows, "product_kernel")
    loss_epilogue = _epilogue(rows, "logit_grad_kernel", base.logit_grad.depth)
    rows = list(counts(["matryoshka_sigmoid_loss"], [gpu], "^bf16 D=768 train, one width"))
    alone_epilogue = _epilogue(rows, "prefix_logit_grad_kernel", config.logit_grad.depth)

    rows = list(counts(["matryoshka_sigmoid_loss"], [gpu], PUBLISHED))
    tiles, columns = column_tiles(ends, config.product.columns), config.product.columns
    products = ends[-1] * _loop(rows, "prefix_logit_grad_kernel")
    products += 2 * tiles.wide * columns * _loop(rows, "prefix_product_kernel")
    narrow = _loop(rows, "prefix_product_kernel", half=True) if len(tiles.starts) > tiles.wide else 0
    products += (len(tiles.starts) - tiles.wide) * columns * narrow
    shorter_epilogue = _epilogue(rows, "prefix_logit_grad_kernel", config.logit_grad.depth)
    return Clocks(one_products, products, loss_epilogue, alone_epilogue, shorter_epilogue)


def _worst(rows: Iterable[Count]) -> Count:
    return max(rows, key=lambda row: row.clocks[row.bound])


def _loop(rows: list[Count], kernel: str, half: bool = False) -> float:
    """Clocks of the kernel's main loop per 1,000 multiply-adds. half: of that for tiles of half the columns."""
    loops = [row for row in rows if row.kernel == kernel and row.part.startswith("loop")]
    wide = max(row.multiply_adds for row in loops)
    loop = _worst(row for row in loops if (row.multiply_adds < wide) == half)
    return loop.per_thousand(loop.bound)


def _epilogue(rows: list[Count], kernel: str, depth: int) -> float:
    """Clocks of the kernel's epilogue per 1,000 pairs. depth: of a step of its main loop."""
    of_kernel = [row for row in rows if row.kernel == kernel]
    epilogue = _worst(row for row in of_kernel if row.part == "epilogue 1")
    pairs = _worst(row for row in of_kernel if row.part == "loop 1").multiply_adds / depth  # of a warp, in a tile
    return 1000 * epilogue.clocks[epilogue.bound] / pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=COUNTED, choices=COUNTED)
    separately = sum(WIDTHS) / WIDTHS[-1]
    print(f"widths {', '.join(map(str, WIDTHS))}; one call for each would be {separately:.2f} times the products")
    products = ("products: widest", "all")
    epilogues = ("epilogue: loss", "alone", "of a shorter prefix")
    header = ("arch", *products, *epilogues, "loss", "alone", "all", "bound", "all / loss", "all / bound")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for gpu in parser.parse_args().gpu:
        clocks = clocks_of(gpu)
        sums = (*clocks, clocks.loss, clocks.alone, clocks.every, clocks.bound)
        cells = [f"{number:.0f}" for number in sums]
        cells += [f"{clocks.every / other:.2f}" for other in (clocks.loss, clocks.bound)]
        print(f"| {architecture(gpu)} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
