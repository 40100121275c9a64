"""The layer_norm op: contract, registration, autograd. The mathematics and the kernels are in kernels.py.

Two operators are registered, `siglip_kernels::layer_norm` and `siglip_kernels::layer_norm_backward`, each with a
schema, an implementation that launches kernels, a fake for tracing, and a derivative.
"""

import math

import torch
from torch import Tensor

from siglip_kernels.arguments import (
    as_rows,
    cast_norm,
    check_input,
    check_norm,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import refuse_transforms, register_derivative

_WIDEST = 2**25


def _validate(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Raises for every unsupported argument. Traceable: it reads no values."""
    check_input("layer_norm", "x", x)
    if x.shape[-1] > _WIDEST:
        raise unsupported("layer_norm", "x", f"has width {x.shape[-1]}", f"widths up to {_WIDEST}")
    check_norm("layer_norm", "", (weight, bias), eps, x, optional=True)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@torch.library.custom_op("siglip_kernels::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for the backward each row's mean and reciprocal standard deviation, (rows,) fp32."""
    require_kernels("layer_norm", "x", x)
    from siglip_kernels.layer_norm.kernels import layer_norm_forward

    with on_device(x):
        y, mean, rstd = layer_norm_forward(as_rows(x), _contiguous(weight), _contiguous(bias), eps, out_dtype)
    return y.view(x.shape), mean, rstd


@torch.library.custom_op("siglip_kernels::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    y_grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; one that is not needed is an empty tensor."""
    require_kernels("layer_norm", "x", x)
    from siglip_kernels.layer_norm.kernels import layer_norm_backward

    with on_device(x):
        x_grad, weight_grad, bias_grad, _ = layer_norm_backward(
            as_rows(y_grad),
            as_rows(x),
            _contiguous(weight),
            mean,
            rstd,
            parameter_dtype=parameter_dtype,
            needs_x=needs_x,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
        )
    return x_grad.view(x.shape) if needs_x else x_grad, weight_grad, bias_grad


@_layer_norm.register_fake
def _(x, weight, bias, eps, out_dtype):
    rows = math.prod(x.shape[:-1])
    statistics = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), *statistics


@_layer_norm_backward.register_fake
def _(y_grad, x, weight, mean, rstd, parameter_dtype, needs_x, needs_weight, needs_bias):
    return (
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(x.shape[-1] if needs_weight else 0, dtype=parameter_dtype),
        x.new_empty(x.shape[-1] if needs_bias else 0, dtype=parameter_dtype),
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.parameter_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)


def _differentiate(ctx, y_grad, *_):
    if y_grad is None:
        return (None,) * 5
    needed = ctx.needs_input_grad[:3]
    gradients = _layer_norm_backward(y_grad, *ctx.saved_tensors, ctx.parameter_dtype, *needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None, None


register_derivative("layer_norm", _layer_norm, _layer_norm_backward, _differentiate, _keep)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450).

    x: (..., width), fp32, fp16 or bf16, width up to 2^25. weight, bias: (width,), of one dtype, x's or fp32; either may
    be None. Returns (..., width), contiguous, in x's dtype; on CUDA under autocast in fp32, as
    torch.nn.functional.layer_norm does. Statistics and sums are in fp32, and stay accurate where the mean is much
    larger than the deviation. x is read in place if its rows have one stride between them and unit stride along them,
    and copied otherwise. Gradients are deterministic; second and forward-mode derivatives, and
    differentiation by torch.func, raise an error.

    Raises UnsupportedInputError (a ValueError) for other shapes and dtypes, and MissingBackendError for tensors that
    are not on an NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    out_dtype = None
    if isinstance(x, Tensor) and x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        out_dtype = torch.float32  # the kernel writes it: x itself is not cast
    weight, bias = cast_norm(weight, out_dtype), cast_norm(bias, out_dtype)
    _validate(x, weight, bias, eps)
    refuse_transforms("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps, out_dtype or x.dtype)[0]
