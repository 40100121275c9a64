"""Checks of arguments that operations with attention share. No value of a tensor is read."""

import torch
from torch import Tensor

from siglip_kernels.arguments import check_input, check_same_device, check_same_dtype
from siglip_kernels.errors import unsupported

_LARGEST_HEAD_DIM = 128
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_LARGEST_SCALE = 2.0**127  # times log2(e), it is still finite in fp32


def check_heads(operation: str, q: Tensor, k: Tensor, v: Tensor, axes: str) -> None:
    """Queries, keys and values that fit each other. axes: "(B, S, H, D)" or, of packed sequences, "(T, H, D)"."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_input(operation, name, tensor, axes)
        check_same_dtype(operation, name, tensor, "q", q.dtype)
        check_same_device(operation, name, tensor, "q", q.device)
    if k.shape[-3] != v.shape[-3]:
        raise unsupported(operation, "v", f"has {v.shape[-3]} tokens while k has {k.shape[-3]}", "as many as k")
    for name, tensor in (("k", k), ("v", v)):
        for axis, what in ((-4, "batch size"), (-2, "number of heads"), (-1, "head dim")):
            if axis >= -tensor.dim() and tensor.shape[axis] != q.shape[axis]:
                got = f"has {what} {tensor.shape[axis]} while q has {q.shape[axis]}"
                raise unsupported(operation, name, got, f"the same {what} in q, k and v")
    check_head_dim(operation, "q", q.shape[-1])


def check_head_dim(operation: str, argument: str, head_dim: int) -> None:
    """A head dim for which there are kernels."""
    if head_dim % 8 != 0 or not 8 <= head_dim <= _LARGEST_HEAD_DIM:
        raise unsupported(operation, argument, f"has head dim {head_dim}", f"multiples of 8 up to {_LARGEST_HEAD_DIM}")


def check_scale(operation: str, scale: float | None, argument: str = "scale") -> None:
    """None, or a number that is finite in fp32 as an exponent of two."""
    if scale is None:
        return
    if not isinstance(scale, _NUMBERS):
        raise unsupported(operation, argument, f"is a {type(scale).__name__}", "numbers, int or float")
    if not -_LARGEST_SCALE < scale < _LARGEST_SCALE:
        raise unsupported(operation, argument, f"is {scale}", "finite numbers, smaller than 2^127")
