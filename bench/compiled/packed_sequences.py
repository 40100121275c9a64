"""Counts what attention's forward computes of packed sequences, beside the same sequences padded to the longest.

    python -m bench.compiled.packed_sequences [--gpu h200] [--head-dim 72] [--lengths 4096,64x15 256x16]

Columns: the tile's queries × keys; programs of a head, and of these without a tile; scores that the tiles hold, over
the sum of the squared lengths, at best 1; and the same of the padded batch, where the dense kernel skips padded keys
("lengths") and where it does not ("dense"). A padded batch of up to 64 tokens has one tile per sequence in both.
Nothing is measured.
"""

import argparse
import re
import sys
from dataclasses import dataclass

import torch

from bench.compiled.launch import GPUS
from siglip_kernels.attention import config
from siglip_kernels.attention.sequences import Sequences, programs_of_head
from siglip_kernels.device import Facts

# 16 images each: SigLIP 2's default of 256 patches; mixed sizes and shapes; one page among thumbnails. Then many tiny
# sequences alone, and beside one that is not, which has their tiles.
MIXES = (
    "256x16",
    "1024,784x2,576x3,400,324,256x2,196,144,100x2,64,16",
    "4096,64x15",
    "16x256",
    "50x64",
    "256,16x255",
)


def parse(text: str) -> list[int]:
    """4096,64x15: one sequence of 4,096 tokens and 15 of 64."""
    found = [re.fullmatch(r"(\d+)(?:x(\d+))?", part) for part in text.split(",")]
    lengths = [int(one[1]) for one in found if one for _ in range(int(one[2] or 1))]
    if None in found or max(lengths) == 0:
        raise ValueError(f"{text!r} is not a list such as 4096,64x15, of which one is longer than 0")
    return lengths


@dataclass(frozen=True)
class Count:
    """Of the forward over sequences of these lengths."""

    lengths: list[int]
    facts: Facts
    head_dim: int

    @property
    def programs(self) -> int:
        """Of one head."""
        boundaries = torch.empty(len(self.lengths) + 1, device="meta")
        sequences = Sequences(boundaries, boundaries, (0, 0))
        return programs_of_head(sum(self.lengths), self.tile.queries, sequences)

    @property
    def idle(self) -> int:
        """Programs of one head that have no tile."""
        return self.programs - sum(_tiles(length, self.tile.queries) for length in self.lengths)

    @property
    def packed(self) -> int:
        """Scores in the tiles of packed sequences, of one head."""
        return sum(_scores(length, length, self.tile) for length in self.lengths)

    @property
    def padded(self) -> int:
        """Of a batch padded to the longest, whose padded keys are skipped."""
        return sum(_scores(max(self.lengths), length, self._padded_tile) for length in self.lengths)

    @property
    def dense(self) -> int:
        """Of a batch padded to the longest."""
        return len(self.lengths) * _scores(max(self.lengths), max(self.lengths), self._padded_tile)

    @property
    def squares(self) -> int:
        """The scores that are needed."""
        return sum(length**2 for length in self.lengths)

    @property
    def tile(self) -> config.Tile:
        typical = config.typical_length(sum(self.lengths), len(self.lengths), max(self.lengths))
        return config.tile("forward", self.facts, 2, self.head_dim, typical, typical, packed=True)

    @property
    def _padded_tile(self) -> config.Tile:
        longest = max(self.lengths)
        short = longest <= config.short_block(2)  # the kernels of short.py have the same tiles
        return config.tile("forward", self.facts, 2, self.head_dim, longest, longest, packed=short)


def _scores(queries: int, keys: int, tile: config.Tile) -> int:
    """Those that the tiles of one sequence hold."""
    return _tiles(queries, tile.queries) * tile.queries * _tiles(keys, tile.keys) * tile.keys


def _tiles(tokens: int, block: int) -> int:
    return -(-tokens // block)


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what attention computes of packed sequences.")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h200"])
    parser.add_argument("--head-dim", type=int, choices=range(8, 129, 8), default=72, metavar="D")
    parser.add_argument("--lengths", nargs="+", default=MIXES, metavar="LENGTHS")
    arguments = parser.parse_args()
    try:
        mixes = {text: parse(text) for text in arguments.lengths}
    except ValueError as error:
        parser.error(f"--lengths: {error}")
    print("| GPU | lengths | tokens | tile | programs | idle | squared lengths | packed | lengths | dense |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for gpu in arguments.gpu:
        for text, lengths in mixes.items():
            one = Count(lengths, GPUS[gpu], arguments.head_dim)
            shares = " | ".join(f"{scores / one.squares:.2f}" for scores in (one.packed, one.padded, one.dense))
            tile = f"{one.tile.queries} × {one.tile.keys}"
            counts = f"{sum(lengths)} | {tile} | {one.programs} | {one.idle} | {one.squares}"
            print(f"| {gpu} | {text} | {counts} | {shares} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
