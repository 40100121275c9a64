"""How a launch tells a kernel where the rows of its tensors are."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_TILE = 256  # tokens


@dataclass(frozen=True)
class Strides:
    """Strides of (batch, token, head) of each tensor in turn, in units of `unit` elements.

    Eight elements are 16 bytes, the widest access, or more. Head dims such as 72 make strides that divide by 8 but not
    by 16, so the compiler, which asks for 16, would take every row to start anywhere and load two bytes at a time.
    Counted in eights and multiplied by a constant 8 inside the kernel, it knows.
    """

    values: tuple[int, ...]
    unit: int  # 8, or 1 where some stride does not divide by 8
    wide: bool  # an offset within a tile can pass 2^31


def strides_of(*tensors: Tensor) -> Strides:
    """tensors: (B, S, H, D), read by rows of unit stride. The stride of an axis of one element does not matter: 0."""
    return _strides(tuple([(tensor.shape, tensor.stride()) for tensor in tensors]))


@functools.lru_cache(maxsize=4096)
def _strides(layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...]) -> Strides:
    values = [
        0 if size == 1 else stride
        for shape, strides in layouts
        for size, stride in zip(shape[:3], strides, strict=False)
    ]
    wide = any(_LARGEST_TILE * stride >= 2**31 for stride in values[1::3])
    if any(stride % 8 for stride in values):
        return Strides(tuple(values), 1, wide)
    return Strides(tuple(stride // 8 for stride in values), 8, wide)
