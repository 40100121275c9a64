"""What every operation asks of its tensors, as autocast casts them, and the derivatives that none of them has.

Traceable: no value is read.
"""

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from siglip_kernels.errors import unsupported


def check_tensor(operation: str, argument: str, value: object) -> None:
    """A tensor whose elements lie in memory at strides, as kernels read them."""
    if not isinstance(value, Tensor):
        raise unsupported(operation, argument, f"is {type(value).__name__}", "a tensor")
    if value.is_nested:
        raise unsupported(operation, argument, "is a nested tensor", "dense tensors")
    if value.layout != torch.strided:
        raise unsupported(operation, argument, f"has layout {value.layout}", "torch.strided")


def refuse_tangents(operation: str, **arguments: Tensor | None) -> None:
    """Forward-mode differentiation is an error: PyTorch drops tangents of what a registered operator takes, silently.

    arguments: all that the operator takes.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:  # nobody differentiates forward; asking each tensor takes longer
        return
    for argument, tensor in arguments.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise unsupported(
                operation,
                argument,
                "has a tangent (forward-mode differentiation)",
                "reverse mode; for tangents, use siglip_kernels.reference",
            )


def refuse_second_derivatives(operation: str) -> Callable[..., None]:
    """The derivative of a backward operator: an error."""

    def refuse(ctx, *gradients):
        raise unsupported(
            operation,
            "create_graph",
            "asks for second derivatives",
            "first derivatives; for more, use the backend 'eager'",
        )

    return refuse


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of products where the tensor is, or None where autocast is off."""
    if not isinstance(tensor, Tensor) or tensor.device.type not in ("cuda", "cpu"):
        return None
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return None


@overload
def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def cast(tensor: None, dtype: torch.dtype | None) -> None: ...
def cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """As autocast casts the inputs of torch.nn.functional.linear: floating point, fp64 excepted. None: not at all."""
    if dtype is None or not isinstance(tensor, Tensor):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """(..., width) as (rows, width), with unit stride along a row; a copy only where that cannot be a view."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def unit_stride(tensor: Tensor) -> Tensor:
    """Kernels read rows of unit stride. Anything else, such as the expanded gradient of a sum, is copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
