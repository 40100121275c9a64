"""Counts the clocks of the GEMMs of small batches, by `siglip_kernels.gemm.clocks`, for GPUs that need not be present.

    python -m bench.compiled.small_batches [--gpu h200 rtx5090] [--batch base:196]

Each line compares the tile that is chosen with the best of the usual tiles, which suit many rows: programs, their share
of the multiprocessors (at most 100 %), and clocks. The count uses public rates; nothing is measured.
"""

import argparse
import sys
from dataclasses import dataclass

from bench.compiled.launch import GPUS
from siglip_kernels.device import Facts
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import clocks
from siglip_kernels.gemm.tiles import Shape, Tile, count

WIDTHS = {"base": (768, 3072), "so400m": (1152, 4304)}  # of a token, and hidden in the MLP
BATCHES = (("base", 1), ("base", 64), ("base", 196), ("so400m", 256), ("so400m", 729))  # rows: pooled, a text, an image


def gemms(rows: int, width: int, hidden: int, element_bytes: int = 2) -> dict[str, Shape]:
    """The GEMMs of an encoder layer with a fused epilogue, in half precision; or those of its inference in fp8."""

    def shape(columns: int, depth: int, parts: int = 1, residual_bytes: int = 0, gelu: str = "") -> Shape:
        return Shape(rows, columns, depth, parts, element_bytes, residual_bytes, gelu, tf32=False, aligned=True)

    in_fp8 = element_bytes == 1
    found = {
        "qkv": shape(3 * width, width) if in_fp8 else shape(width, width, parts=3),
        "out_proj": shape(width, width, residual_bytes=2),
        "fc1": shape(hidden, width, gelu="forward"),
        "fc2": shape(width, hidden, residual_bytes=2),
    }
    return found if in_fp8 else found | {"gelu backward": shape(hidden, width, gelu="backward")}


@dataclass(frozen=True)
class Choice:
    """A tile of a GEMM on a GPU, and what it comes to."""

    shape: Shape
    facts: Facts
    tile: Tile

    @property
    def programs(self) -> int:
        return config.programs(self.tile, count(self.shape, self.tile), self.facts)

    @property
    def share(self) -> float:
        """Of the multiprocessors."""
        return min(1.0, self.programs / self.facts.multiprocessors)

    @property
    def clocks(self) -> float:
        return clocks(self.shape, self.facts, self.tile).total

    def __str__(self) -> str:
        size = f"{self.tile.rows}x{self.tile.columns}" + (f" / {self.tile.splits}" if self.tile.splits > 1 else "")
        return f"{size:11} {self.programs:5} programs {self.share:5.0%} {round(self.clocks):7} clocks"


def chosen(shape: Shape, facts: Facts) -> Choice:
    """What a launch uses; tile / n: n programs share the depth of a tile."""
    return Choice(shape, facts, config.tile(shape, facts))


def usual(shape: Shape, facts: Facts) -> Choice:
    """The best of the tiles that suit many rows."""
    choices = [Choice(shape, facts, tile) for tile in config.usual_tiles(shape, facts)]
    return min(choices, key=lambda choice: choice.clocks)


def _batch(text: str) -> tuple[str, int]:
    model, _, rows = text.partition(":")
    if model not in WIDTHS or not rows.isdecimal() or int(rows) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:ROWS, with one of {', '.join(WIDTHS)}")
    return model, int(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the clocks of the GEMMs of small batches.")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--batch", nargs="+", type=_batch, default=BATCHES, metavar="MODEL:ROWS")
    arguments = parser.parse_args()
    for gpu in arguments.gpu:
        for model, rows in arguments.batch:
            for name, shape in gemms(rows, *WIDTHS[model]).items():
                before, now = usual(shape, GPUS[gpu]), chosen(shape, GPUS[gpu])
                gain = f"{before.clocks / now.clocks:.2f}x"
                print(f"{gpu:8} {model:6} {rows:5} {name:13} usual {before}   chosen {now}  {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
