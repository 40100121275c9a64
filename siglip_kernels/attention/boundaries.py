"""Checks of cu_seqlens, where each packed sequence starts, and of max_seqlen."""

import os
from itertools import pairwise

import torch
from torch import Tensor

from siglip_kernels.arguments import check_same_device, check_tensor, given
from siglip_kernels.errors import MissingBackendError, unsupported

_DTYPES = (torch.int32, torch.int64)


def check_packing(
    operation: str, lengths: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, other: str, x: Tensor
) -> None:
    """Packed sequences, or lengths, or neither. other: the name of the argument x, which has the tokens."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise unsupported(operation, "max_seqlen", "is given without cu_seqlens", "both, or none")
        return
    if lengths is not None:
        raise unsupported(operation, "lengths", "is given with cu_seqlens", "one of them")
    check_boundaries(operation, "cu_seqlens", cu_seqlens, other, x)
    check_longest(operation, "max_seqlen", max_seqlen)


def check_boundaries(operation: str, argument: str, boundaries: Tensor, other: str, x: Tensor) -> None:
    """int32 or int64 (N + 1,), contiguous, on the device of x, the argument `other`. Reads no values."""
    check_tensor(operation, argument, boundaries)
    if boundaries.dtype not in _DTYPES:
        raise unsupported(operation, argument, f"has dtype {boundaries.dtype}", "int32, int64")
    if boundaries.dim() != 1 or boundaries.shape[0] == 0:
        got = f"has shape {tuple(boundaries.shape)}"
        raise unsupported(operation, argument, got, "(N + 1,) for N sequences: where each starts, and the last ends")
    if not boundaries.is_contiguous():
        raise unsupported(operation, argument, f"has stride {boundaries.stride(0)}", "contiguous tensors")
    check_same_device(operation, argument, boundaries, other, x.device)


def check_longest(operation: str, argument: str, longest: int | None) -> None:
    """None, or a number of tokens."""
    integer = isinstance(longest, (int, torch.SymInt)) and not isinstance(longest, bool)
    if longest is not None and not (integer and longest >= 0):
        raise unsupported(operation, argument, f"is {given(longest)}", "integers from 0 on, or None")


def check_values(
    operation: str,
    boundaries: Tensor,
    tokens: int,
    longest: int | None,
    argument: str = "cu_seqlens",
    longest_argument: str = "max_seqlen",
) -> None:
    """Boundaries that start at 0, do not decrease and do not pass the number of tokens. Reads them.

    That waits for the GPU, so it is done on the CPU, and on a GPU if the environment asks for it; the kernels clamp.
    """
    if boundaries.is_meta or (boundaries.is_cuda and not _asked_to_check()):
        return
    values = boundaries.tolist()
    supported = f"0 to the {tokens} tokens, without a decrease"
    if values[0] != 0:
        raise unsupported(operation, argument, f"starts with {values[0]}", supported)
    for index, (start, end) in enumerate(pairwise(values)):
        if end < start:
            raise unsupported(operation, argument, f"decreases from {start} to {end} at index {index + 1}", supported)
        if longest is not None and end - start > longest:
            got = f"has a sequence of {end - start} tokens while {longest_argument} is {longest}"
            raise unsupported(operation, argument, got, f"lengths up to {longest_argument}")
    if values[-1] > tokens:
        raise unsupported(operation, argument, f"ends with {values[-1]}", supported)


def _asked_to_check() -> bool:
    value = os.environ.get("SIGLIP_KERNELS_CHECK", "")
    if value not in ("", "0", "1"):
        raise MissingBackendError(f"SIGLIP_KERNELS_CHECK is {value!r}; supported: 1 (read and check), 0 or unset")
    return value == "1"
