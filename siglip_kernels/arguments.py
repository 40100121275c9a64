"""What every operation asks of its tensors, as autocast casts them, and the derivatives that none of them has.

Traceable: no value is read.
"""

import math
import os
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from siglip_kernels.device import require_kernels
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
    if not isinstance(tensor, Tensor) or not torch.amp.is_autocast_available(tensor.device.type):
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


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_input(operation: str, argument: str, x: Tensor, dimensions: int | None = None) -> None:
    """x: a tensor of a supported dtype, of so many dimensions, or at least one."""
    check_tensor(operation, argument, x)
    if dimensions is not None and x.dim() != dimensions:
        raise unsupported(operation, argument, f"has {x.dim()} dimensions", f"{dimensions}: (B, S, width)")
    if x.dim() == 0:
        raise unsupported(operation, argument, "has no dimension", "(..., width)")
    if x.dtype not in _DTYPES:
        raise unsupported(operation, argument, f"has dtype {x.dtype}", "float32, float16, bfloat16")


def check_parameter(
    operation: str,
    argument: str,
    parameter: Tensor | None,
    shape: tuple[int | None, ...],
    like: Tensor,
    dtype: torch.dtype,
    *,
    optional: bool = False,
) -> None:
    """A weight or bias of this shape (None: any extent) and dtype, on the device of `like`."""
    if parameter is None and optional:
        return
    check_tensor(operation, argument, parameter)
    assert parameter is not None
    if parameter.dtype != dtype:
        raise unsupported(
            operation, argument, f"has dtype {parameter.dtype} while the input has {dtype}", "one dtype, or autocast"
        )
    if parameter.device != like.device:
        got = f"is on {parameter.device} while the input is on {like.device}"
        raise unsupported(operation, argument, got, "one device")
    fits = parameter.shape == shape or (  # the first of these is the faster
        parameter.dim() == len(shape)
        and all(wanted is None or extent == wanted for extent, wanted in zip(parameter.shape, shape, strict=True))
    )
    if not fits:
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise unsupported(operation, argument, f"has shape {tuple(parameter.shape)}", f"({expected})")


def check_norm(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, autocast: bool
) -> tuple[Tensor, Tensor]:
    """x and the parameters of its layer normalisation, which autocast makes in fp32: (weight, bias)."""
    check_input(operation, "x", x)
    check_tensor(operation, "norm_weight", weight)
    check_tensor(operation, "norm_bias", bias)
    if autocast:
        weight, bias = (p.float() if p.is_floating_point() else p for p in (weight, bias))
    for name, parameter in (("norm_weight", weight), ("norm_bias", bias)):
        dtype = torch.float32 if weight.dtype == torch.float32 else x.dtype
        check_parameter(operation, name, parameter, (x.shape[-1],), x, dtype)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise unsupported(operation, "eps", f"is {eps!r}", "finite numbers from 0 on")
    return weight, bias


def check_residual(operation: str, residual: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """The residual has the result's shape; its dtype may be another one."""
    if residual is None:
        return
    check_tensor(operation, "residual", residual)
    if residual.dtype not in _DTYPES:
        raise unsupported(operation, "residual", f"has dtype {residual.dtype}", "float32, float16, bfloat16")
    if residual.device != like.device:
        got = f"is on {residual.device} while the input is on {like.device}"
        raise unsupported(operation, "residual", got, "one device")
    if residual.shape != shape:
        got = f"has shape {tuple(residual.shape)} while the result has {tuple(shape)}"
        raise unsupported(operation, "residual", got, "the result's shape")


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def require_device(operation: str, argument: str, tensor: Tensor) -> None:
    """`require_kernels` where no kernel asks for it: traceable, and content with tensors without data."""
    if tensor.device.type in ("cuda", "meta"):
        return
    if torch.compiler.is_compiling() and tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return  # Triton itself, which knows, cannot be asked by traced code
    require_kernels(operation, argument, tensor)
