"""Tile sizes, warps and pipeline stages of a launch: measured entries of `tuned.py`, otherwise a heuristic.

No call tunes: `python -m bench tune attention` measures `candidates` on the current GPU and writes the fastest into
`tuned.py`.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_kernels.attention.tuned import TUNED
from siglip_kernels.device import Facts, facts
from siglip_kernels.errors import unsupported


@dataclass(frozen=True)
class Tile:
    """One step of a program computes `queries` × `keys` scores."""

    queries: int
    keys: int
    warps: int
    stages: int  # depth of the pipeline that loads the loop's tiles
    registers: int | None = None  # limit per thread, so that two programs fit on a multiprocessor


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(MAIN, TAIL): head_dim as a power of two and a narrower power of two, at least 16 columns each; TAIL may be 0.

    72 -> (64, 16), 88 -> (64, 32). Where both would be as wide together as the next power of two: 56 -> (64, 0).
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    tail = max(16, 1 << (rest - 1).bit_length())
    return (main, tail) if tail < main else (2 * main, 0)


def length_class(tokens: int) -> int:
    """Lengths that share a tuned entry: up to 16, 32, 64, 128, 256, 512, 1024, or longer."""
    return next((limit for limit in (16, 32, 64, 128, 256, 512, 1024) if tokens <= limit), 2048)


def typical_length(tokens: int, sequences: int, longest: int | None) -> int:
    """The class of the length whose tiles suit packed sequences: the least that their root mean square may be.

    Tiles wider than most sequences are mostly empty, while a long sequence may have many narrow ones. The host knows
    the numbers of tokens and sequences, and the longest unless it is None; the others may all be equally long.
    """
    sequences = max(1, sequences)
    mean = tokens / sequences
    if longest is None or longest <= mean:
        return length_class(math.ceil(mean if longest is None else longest))
    longest = min(longest, tokens)
    squares = longest**2 + (tokens - longest) ** 2 / max(1, sequences - 1)
    return length_class(math.ceil(math.sqrt(squares / sequences)))


@functools.cache
def tile(
    kernel: str,
    facts: Facts,
    element_bytes: int,
    head_dim: int,
    query_tokens: int,
    key_tokens: int,
    packed: bool = False,
) -> Tile:
    """The tile of `kernel` ("forward", "backward_queries" or "backward_keys") for lengths that are not both short.

    packed: of packed sequences, for which these are typical.
    """
    columns = sum(split_head_dim(head_dim))
    if packed and _holds_whole_sequences(kernel, element_bytes, columns, max(query_tokens, key_tokens)):
        return _whole_sequence(kernel, facts, element_bytes, columns, max(query_tokens, key_tokens))
    shape_class = (kernel, element_bytes, columns, length_class(query_tokens), length_class(key_tokens))
    measured = TUNED.get(facts.name, {}).get(shape_class)
    return Tile(*measured) if measured else _heuristic(kernel, facts, element_bytes, columns, packed)


def _heuristic(kernel: str, facts: Facts, element_bytes: int, columns: int, packed: bool = False) -> Tile:
    """Not measured. Of the tiles without a spill (`python -m bench.compiled.ahead_of_time attention`), those with the
    fewest clocks of the busiest pipe per product, then the fewest issue slots (`python -m bench count attention`).
    """
    if facts.interpreted:
        return Tile(128, 128, 4, 1)
    narrow = columns <= 80
    if element_bytes == 4:  # IEEE products are computed by multiply-adds, whose operands are in registers
        if kernel == "forward":
            return Tile(32, 32, 8, 1)
        if kernel == "backward_queries":
            return Tile(32, 32, 8, 1) if narrow else Tile(16, 16, 8, 1)
        return Tile(16, 32 if columns <= 96 else 16, 4 if narrow else 8, 1)
    unit = facts.matrix_unit
    # An A100 has twice the products per clock of the others, and is bound by shared memory where they are not.
    large = unit == "mma" and facts.shared_memory >= 128 * 1024
    if kernel == "forward":
        if unit == "wgmma":
            return Tile(128, 128, 8, 2) if narrow else Tile(128, 64, 8, 3)
        if unit == "mma" and columns == 80 and _triton_version() >= (3, 9):  # which spills with 64 keys
            return Tile(128, 32, 4, 2)
        if unit == "mma" and narrow and not large:
            return Tile(128, 128, 8, 2)
        return Tile(128, 64, 4, 2) if narrow else Tile(128, 64, 8, 2)
    if kernel == "backward_queries":
        if unit == "wgmma":
            return Tile(128, 128, 8, 2) if narrow else Tile(64, 64, 4, 2)
        if unit == "mma" and narrow:
            return Tile(128, 32, 4, 2)
        return Tile(64, 32, 4, 2)
    if narrow and unit != "tcgen05":
        wider = columns <= 64  # with more columns, twice the queries spill
        if unit == "wgmma":
            wider = wider and not packed and _triton_version() >= (3, 7)  # else it spills as well
            return Tile(128 if wider else 64, 128, 8, 2)
        return Tile(32 if wider and large else 16, 128, 4, 2)
    return Tile(32 if unit == "mma" else 64, 64, 4 if narrow else 8, 2)


def _holds_whole_sequences(kernel: str, element_bytes: int, columns: int, length: int) -> bool:
    """Whether a tile should hold a whole packed sequence of this length. With 64 + 32 columns the backward's would
    spill.
    """
    return length <= short_block(element_bytes) and (length <= 16 or kernel == "forward" or columns != 96)


def _whole_sequence(kernel: str, facts: Facts, element_bytes: int, columns: int, length: int) -> Tile:
    """The tile of packed sequences that are short: the smallest that holds one, since a wider one is mostly empty."""
    block = max(16, 1 << (length - 1).bit_length())
    # With mma, 64 queries spill where a program keeps the gradients of 64 keys.
    queries = min(block, 32) if kernel == "backward_keys" and facts.matrix_unit == "mma" else block
    # Delta's of 16 rows accumulates no gradients, and with two warps spills on consumer Blackwell.
    small = kernel == "delta" and block == 16 and element_bytes == 2
    backward = kernel != "forward" and not small
    if backward and element_bytes == 4:  # with four warps, 64 columns spill on Blackwell
        return Tile(queries, block, 8, 1)
    return Tile(queries, block, _short_warps(backward, facts, element_bytes, columns, block), 1)


def delta_tile(
    facts: Facts, element_bytes: int, head_dim: int, query_tokens: int, key_tokens: int, packed: bool
) -> Tile:
    """The tile of the kernel that makes delta exact; in half precision 64 rows, as newer matrix instructions need.

    The other arguments: as in `tile`.
    """
    columns = sum(split_head_dim(head_dim))
    if packed and _holds_whole_sequences("delta", element_bytes, columns, max(query_tokens, key_tokens)):
        return _whole_sequence("delta", facts, element_bytes, columns, max(query_tokens, key_tokens))
    if element_bytes == 4 or facts.interpreted:
        return _heuristic("backward_queries", facts, element_bytes, columns)
    if facts.matrix_unit == "mma":
        return Tile(64, 32, 4 if columns <= 96 else 8, 2)
    return Tile(64, 64, 4 if columns <= 80 else 8, 2)


def advances_offsets(facts: Facts, k: Tensor, v: Tensor) -> bool:
    """Whether a loop over the tokens of k and v, or of q and out_grad, advances the offsets of its loads, which fit 32
    bits, and not two 64-bit pointers.

    Before Blackwell a 64-bit addition takes two instructions, but one adds a 32-bit offset to a pointer.
    """
    return facts.capability < (10, 0) and k.shape[1] * max(k.stride(1), v.stride(1)) < 2**31


def partial_sums(facts: Facts, element_bytes: int) -> int:
    """How many sums of weights the forward keeps per row. With 8, each is of one thread until the loop is over: of
    every 8 columns of a product a thread has the same two. With tcgen05 a thread has whole rows.
    """
    return 8 if element_bytes == 2 and facts.matrix_unit != "tcgen05" else 1


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


# (queries, keys, warps) worth measuring, by the matrix unit. None spills at head dims 64 and 72.
_CANDIDATES = {
    "forward": {
        "mma": ((64, 32, 4), (64, 64, 4), (128, 32, 4), (64, 64, 8), (64, 128, 8), (128, 64, 8), (128, 128, 8)),
        "wgmma": ((64, 64, 4), (128, 32, 4), (128, 64, 4), (64, 128, 8), (128, 32, 8), (128, 64, 8), (128, 128, 8)),
        "tcgen05": ((64, 64, 4), (128, 32, 4), (128, 64, 4), (64, 128, 8), (128, 32, 8), (128, 64, 8)),
    },
    "backward_queries": {
        "mma": ((64, 32, 4), (64, 32, 8), (128, 32, 4), (128, 32, 8)),
        "wgmma": ((64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 128, 8)),
        "tcgen05": ((64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8)),
    },
    "backward_keys": {
        "mma": ((32, 64, 4), (32, 64, 8)),
        "wgmma": ((32, 64, 4), (32, 64, 8), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8)),
        "tcgen05": ((32, 64, 4), (32, 64, 8), (64, 64, 4), (64, 64, 8)),
    },
}


def candidates(kernel: str, gpu: Facts | None = None) -> list[Tile]:
    """The tiles that tuning measures besides the heuristic's for two-byte elements. gpu: the current one by default."""
    gpu = gpu or facts(torch.device("cuda"))
    tiles = [Tile(*size, stages) for size in _CANDIDATES[kernel][gpu.matrix_unit] for stages in (2, 3)]
    return [tile for tile in tiles if _loop_bytes(kernel, tile) <= gpu.shared_memory]


def _loop_bytes(kernel: str, tile: Tile) -> int:
    """Shared memory for the tiles of 80 columns that a loop loads in pairs: keys and values, queries and gradients."""
    return tile.stages * (tile.queries if kernel == "backward_keys" else tile.keys) * 2 * 80 * 2


def short_block(element_bytes: int) -> int:
    """The most tokens of a short sequence; longer ones go to the kernels that loop over tiles."""
    return 64 if element_bytes == 2 else 16


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether a whole sequence fits one tile, for the kernels of short.py."""
    return max(q.shape[1], k.shape[1]) <= short_block(q.element_size())


def short(
    kernel: str, facts: Facts, element_bytes: int, head_dim: int, block: int, sequences: int
) -> tuple[int, int, int]:
    """(programs, warps, stages) for short sequences, each a tile of `block` rows.

    As many programs as are resident at once; each loops over many sequences.
    """
    share = short_block(element_bytes) // block  # fewer rows: more programs
    room = kernel == "short_forward" or (facts.matrix_unit != "mma" and share == 1)  # to prefetch the next sequence
    stages = 2 if element_bytes == 2 and room else 1
    warps = _short_warps(kernel == "short_backward", facts, element_bytes, sum(split_head_dim(head_dim)), block)
    return min(sequences, 4 * share * facts.multiprocessors), warps, stages


def _short_warps(backward: bool, facts: Facts, element_bytes: int, columns: int, block: int) -> int:
    """Warps for a tile of `block` rows of a short sequence."""
    most_for_4_warps = 80 if facts.matrix_unit == "wgmma" else 64  # more spills in the backward, and with tcgen05
    wide = columns > most_for_4_warps and (backward or facts.matrix_unit == "tcgen05")
    return max(1, (8 if wide else 4) * block // short_block(element_bytes))


def grid(programs: int) -> int:
    """The length of a one-dimensional grid, at most 2^31 - 1. Raises UnsupportedInputError beyond."""
    if programs >= 2**31:
        raise unsupported("attention", "q", f"needs {programs} programs", "fewer than 2^31: split the batch")
    return programs
