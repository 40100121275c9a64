"""What all operations share about their arguments: checks, autocast's casts, layouts.

Everything here is traceable by torch.compile: no value of a tensor is read. A check raises UnsupportedInputError, whose
message names the operation, the argument, what was given and what is supported.
"""

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor

from siglip_kernels.errors import unsupported

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNEL_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)


class Affine(NamedTuple):
    """The parameters of a projection x Wᵀ + b, or of a normalisation."""

    weight: Tensor
    bias: Tensor | None


def given(value: object) -> str:
    """A number as a message shows it. Of anything else the type: the repr of a tensor would read its values."""
    return repr(value) if value is None or isinstance(value, (int, float, str)) else type(value).__name__


def check_tensor(operation: str, argument: str, value: object) -> None:
    """A dense tensor, whose elements lie in memory at strides."""
    if not isinstance(value, Tensor):
        raise unsupported(operation, argument, f"is {type(value).__name__}", "a tensor")
    if value.is_nested:
        raise unsupported(operation, argument, "is a nested tensor", "dense tensors")
    if value.layout != torch.strided:
        raise unsupported(operation, argument, f"has layout {value.layout}", "torch.strided")


def check_dtype(operation: str, argument: str, tensor: Tensor) -> None:
    """A dtype for which kernels are compiled."""
    if tensor.dtype not in KERNEL_DTYPES:
        raise unsupported(operation, argument, f"has dtype {tensor.dtype}", _KERNEL_DTYPES)


def check_same_dtype(
    operation: str,
    argument: str,
    tensor: Tensor,
    other: str,
    dtype: torch.dtype,
    supported: str = "one dtype, or autocast",
) -> None:
    """The dtype that `other`, an argument or autocast, has."""
    if tensor.dtype != dtype:
        check_dtype(operation, argument, tensor)  # which autocast does not change either
        got = f"has dtype {tensor.dtype} while {other} has {dtype}"
        raise unsupported(operation, argument, got, supported)


def check_same_device(operation: str, argument: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """The device that the argument `other` is on."""
    if tensor.device != device:
        got = f"is on {tensor.device} while {other} is on {device}"
        raise unsupported(operation, argument, got, "one device")


def check_shape(operation: str, argument: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """This shape; None stands for any extent."""
    fits = tensor.dim() == len(shape)
    for extent, wanted in zip(tensor.shape, shape, strict=False):
        fits = fits and (wanted is None or extent == wanted)
    if not fits:
        extents = ["any" if extent is None else str(extent) for extent in shape]
        supported = f"({extents[0]},)" if len(extents) == 1 else f"({', '.join(extents)})"
        raise unsupported(operation, argument, f"has shape {tuple(tensor.shape)}", supported)


def check_input(operation: str, argument: str, x: Tensor, axes: str | None = None) -> None:
    """A dense tensor of a dtype for which kernels are compiled.

    axes: names of its dimensions, such as "(B, S, width)"; None: at least one dimension.
    """
    check_tensor(operation, argument, x)
    if axes is None:
        if x.dim() == 0:
            raise unsupported(operation, argument, "has no dimension", "(..., width)")
    elif x.dim() != axes.count(",") + 1:
        raise unsupported(operation, argument, f"has {x.dim()} dimensions", f"{axes.count(',') + 1}: {axes}")
    check_dtype(operation, argument, x)


def check_parameter(
    operation: str,
    argument: str,
    parameter: Tensor | None,
    shape: tuple[int | None, ...],
    x: Tensor,
    dtype: torch.dtype | None = None,
    *,
    x_name: str = "x",
    other: str | None = None,
    supported: str = "one dtype, or autocast",
    optional: bool = False,
) -> None:
    """A dense tensor of this shape, on x's device, in this dtype, x's unless given.

    For the message, x_name: the argument x; other: what has this dtype; supported: which dtypes are. optional: None is
    accepted.
    """
    if parameter is None and optional:
        return
    check_tensor(operation, argument, parameter)
    assert parameter is not None
    dtype = x.dtype if dtype is None else dtype
    # Valid arguments take no further calls: at small batch sizes the GPU waits for the host.
    if parameter.dtype != dtype or parameter.device != x.device:
        check_same_dtype(operation, argument, parameter, other or x_name, dtype, supported)
        check_same_device(operation, argument, parameter, x_name, x.device)
    if parameter.shape != shape:
        check_shape(operation, argument, parameter, shape)


def check_projection(
    operation: str,
    prefix: str,
    projection: Affine,
    shape: tuple[int | None, int],
    x: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """A weight (out, in) of this shape and a bias (out,) or None, in this dtype, x's unless autocast gives another.

    prefix: of the arguments' names.
    """
    weight, bias = projection
    other = "x" if dtype is None else "autocast"
    check_parameter(operation, f"{prefix}weight", weight, shape, x, dtype, other=other)
    check_parameter(operation, f"{prefix}bias", bias, (weight.shape[0],), x, dtype, other=other, optional=True)


def check_norm(
    operation: str,
    prefix: str,
    norm: tuple[Tensor | None, Tensor | None],
    eps: float,
    x: Tensor,
    *,
    optional: bool = False,
) -> None:
    """The parameters of a layer normalisation of x: (width,) each, of one dtype, x's or fp32; eps finite, from 0 on.

    prefix: of the arguments' names. optional: either parameter may be None.
    """
    other, dtype, shape = "x", None, (x.shape[-1],)
    for name, parameter in zip((f"{prefix}weight", f"{prefix}bias"), norm, strict=True):
        if parameter is None and optional:
            continue
        if dtype is None:
            dtype = torch.float32 if getattr(parameter, "dtype", None) == torch.float32 else x.dtype
        supported = "x's dtype or float32" if other == "x" else "one dtype for weight and bias"
        check_parameter(operation, name, parameter, shape, x, dtype, other=other, supported=supported)
        other = name
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise unsupported(operation, "eps", f"is {given(eps)}", "finite numbers from 0 on")


def check_residual(operation: str, residual: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """None, or a tensor of the result's shape; its dtype may differ from x's."""
    if residual is None:
        return
    check_tensor(operation, "residual", residual)
    check_dtype(operation, "residual", residual)
    check_same_device(operation, "residual", residual, "x", x.device)
    check_shape(operation, "residual", residual, shape)


def check_lengths(operation: str, lengths: Tensor | None, other: str, x: Tensor) -> None:
    """None, or int32 (B,) on the device of x, the argument `other`, (B, ...)."""
    if lengths is None:
        return
    check_tensor(operation, "lengths", lengths)
    if lengths.dtype != torch.int32:
        raise unsupported(operation, "lengths", f"has dtype {lengths.dtype}", "int32")
    if lengths.dim() != 1 or lengths.shape[0] != x.shape[0]:
        got = f"has shape {tuple(lengths.shape)} while the batch size is {x.shape[0]}"
        raise unsupported(operation, "lengths", got, "(B,)")
    check_same_device(operation, "lengths", lengths, other, x.device)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on the tensor's device, or None where autocast is off."""
    # Meta tensors have no autocast. torch 2.11 cannot compile torch.amp.is_autocast_available.
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return None


@overload
def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def cast(tensor: None, dtype: torch.dtype | None) -> None: ...
def cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """As autocast casts the inputs of torch.nn.functional.linear: floating point except fp64. dtype None: no cast."""
    if dtype is None or not isinstance(tensor, Tensor):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def cast_affine(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Affine:
    """The parameters of a projection, cast."""
    return Affine(weight, bias) if dtype is None else Affine(cast(weight, dtype), cast(bias, dtype))


@overload
def cast_norm(parameter: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def cast_norm(parameter: None, dtype: torch.dtype | None) -> None: ...
def cast_norm(parameter: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A parameter of a normalisation, in fp32 under autocast. dtype: autocast's; None: no cast."""
    if dtype is None or not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return parameter
    return parameter.float()


def as_rows(x: Tensor) -> Tensor:
    """(..., width) as (rows, width), with unit stride along a row; a copy only where that cannot be a view."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def unit_stride(tensor: Tensor) -> Tensor:
    """Kernels read rows of unit stride. Anything else, such as the expanded gradient of a sum, is copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors. Within torch.func.vmap, which hides it, it may."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
