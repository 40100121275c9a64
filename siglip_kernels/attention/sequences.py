"""Packed sequences: which tile of which sequence a program computes.

The tokens of N sequences lie one after the other among T tokens, and only the device knows where each starts. Tokens
behind the last sequence are a sequence N of their own, which attends to nothing. So that the host can launch enough
programs without reading anything, sequence i gets the slots, one for each program of a head, from

    starts[i] // BLOCK + i

on. Those are starts[i + 1] // BLOCK - starts[i] // BLOCK + 1 slots, never fewer than its tiles of BLOCK tokens, because
⌊a⌋ + ⌊b⌋ ≤ ⌊a + b⌋, and T // BLOCK + N + 1 in all. They need no sum over the lengths before: a program finds the
sequence of its slot by a search in `starts`, and exits if the slot is one more than the sequence has tiles.

Starts are clamped to the tensor, so that wrong ones give wrong results but no access elsewhere.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_WAYS = tl.constexpr(1024)  # starts that one step of the search compares


class Sequences(NamedTuple):
    """starts_of_queries, starts_of_keys: int32 or int64 (N + 1,), contiguous: N starts, and the end of the last.

    typical: numbers of queries and of keys of a sequence, see `config.typical_length`; they only choose the tiles.
    """

    starts_of_queries: Tensor
    starts_of_keys: Tensor
    typical: tuple[int, int]


def kernel_arguments(sequences: Sequences | None) -> dict[str, Any]:
    """What every kernel that knows packed sequences is told about them."""
    queries, keys, _ = (None, None, None) if sequences is None else sequences
    return dict(
        starts_of_queries=queries,
        starts_of_keys=keys,
        sequences=0 if queries is None else len(queries) - 1,
        PACKED_SEQUENCES=sequences is not None,
    )


def programs_of_head(tokens: int, block: int, sequences: Sequences | None) -> int:
    """The programs of one head: tiles of `block` tokens of one sequence, or slots of packed ones."""
    if sequences is None:
        return triton.cdiv(tokens, block)
    return tokens // block + len(sequences.starts_of_queries)


@triton.jit
def find_sequence(starts, sequences, slot, BLOCK: tl.constexpr):
    """The sequence of a slot, 0 to `sequences`: the last whose first slot is not behind it."""
    way = tl.arange(0, _WAYS)
    first = 0
    count = sequences + 1
    while count > 1:
        step = tl.cdiv(count, _WAYS)
        candidate = first + way * step
        exists = way * step < count
        start = tl.load(starts + candidate, mask=exists, other=0)
        not_behind = exists & (start // BLOCK + candidate <= slot)
        passed = tl.maximum(tl.sum(not_behind.to(tl.int32), 0) - 1, 0) * step
        first += passed
        count = tl.minimum(step, count - passed)
    return first


@triton.jit
def clamped(starts, index, tokens):
    """starts[index] within 0 to `tokens`."""
    return tl.minimum(tl.maximum(tl.load(starts + index), 0), tokens).to(tl.int32)


@triton.jit
def tile_of_program(
    tile, starts, other_starts, sequences, tokens, other_tokens, BLOCK: tl.constexpr, PACKED_SEQUENCES: tl.constexpr
):
    """The tokens of a program, and the others that they attend to, or that attend to them.

    tile: the number of the program among those of its head; of packed sequences, its slot. Returns the first token and
    the end of its sequence, equal if the slot has no tile; and the first, in int64, and the number of the others.
    """
    if PACKED_SEQUENCES:
        sequence = find_sequence(starts, sequences, tile, BLOCK)
        following = tl.minimum(sequence + 1, sequences)
        start = clamped(starts, sequence, tokens)
        end = tl.where(sequence < sequences, clamped(starts, following, tokens), tokens)
        tile -= start // BLOCK + sequence
        first = tl.where(tile >= 0, tl.minimum(start + tile * BLOCK, end), end)
        other_start = clamped(other_starts, sequence, other_tokens)
        other_end = clamped(other_starts, following, other_tokens)
        return first, end, other_start.to(tl.int64), tl.maximum(other_end - other_start, 0)
    else:
        return tile * BLOCK, tokens, tl.full((), 0, tl.int64), other_tokens
