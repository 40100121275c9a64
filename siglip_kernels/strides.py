"""Strides as kernels take them: counted in units of several elements, so that the compiler knows the alignment of rows.

The widest access is 16 bytes, eight elements of two bytes. The compiler marks an integer argument as divisible by 16 or
not at all, so a stride such as 72 or 4312, which divides by 8 alone, would leave it to assume that a row may start at
any element: it would load two bytes at a time. Counted in eights and multiplied by a constant 8 (UNIT) inside the
kernel, the stride carries its alignment in the code.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNITS = (8, 1)
_LARGEST_TILE = 256  # tokens


def stride_unit(strides: Sequence[int], units: tuple[int, ...] = UNITS) -> int:
    """The first of `units`, whose last is 1, that divides all the strides."""
    return next(unit for unit in units if all(stride % unit == 0 for stride in strides))


@dataclass(frozen=True)
class Strides:
    """For each tensor in turn the strides of all axes but the last, whose stride is 1."""

    values: tuple[int, ...]  # in units of `unit` elements
    unit: int
    wide: bool  # an offset within a tile of tokens, the second axis, can pass 2^31


def strides_of(*tensors: Tensor, units: tuple[int, ...] = UNITS) -> Strides:
    """tensors: of unit stride along the last axis. The stride of an axis of one element has no effect and counts as 0.

    units: what to count in, the largest that divides all the strides; 1 is the last.
    """
    return _strides(tuple([(tensor.shape, tensor.stride()) for tensor in tensors]), units)


@functools.lru_cache(maxsize=4096)
def _strides(layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...], units: tuple[int, ...]) -> Strides:
    values: list[int] = []
    wide = False
    for shape, strides in layouts:
        steps = [0 if size == 1 else stride for size, stride in zip(shape[:-1], strides[:-1], strict=True)]
        wide = wide or (len(steps) > 1 and _LARGEST_TILE * steps[1] >= 2**31)
        values += steps
    unit = stride_unit(values, units)
    return Strides(tuple([value // unit for value in values]), unit, wide)
