"""linear: y = x Wᵀ + b + residual, the sum in the epilogue of one GEMM.

With g the gradient of y, dx = g W, dW = gᵀ x, db = Σ g over rows, and the residual's gradient is g: two GEMMs without
a fused epilogue (`gemm.cublas`). A call without a residual is torch.nn.functional.linear, forward and backward.
"""

import torch
from torch import Tensor

from siglip_kernels.arguments import (
    as_rows,
    autocast_dtype,
    cast,
    cast_affine,
    check_input,
    check_projection,
    check_residual,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.gemm import cublas
from siglip_kernels.transforms import refuse_transforms, register_derivative


@torch.library.custom_op("siglip_kernels::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Returns (..., out), in the dtype to which x and residual promote. Arguments: as in `linear`."""
    require_kernels("linear", "x", x)
    from siglip_kernels.gemm.kernels import gemm

    with on_device(x):
        return gemm(as_rows(x), [weight], [bias], residual=as_rows(residual))[0].view(residual.shape)


@_linear.register_fake
def _(x, weight, bias, residual):
    return residual.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.custom_op("siglip_kernels::linear_backward", mutates_args=())
def _linear_backward(
    out_grad: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (if weight is given), weight (if x is given) and bias; one that is not needed is empty."""
    require_kernels("linear", "x", out_grad)
    rows = as_rows(out_grad)
    x_grad, weight_grad, bias_grad = (rows.new_empty(0) for _ in range(3))
    with torch.autocast(out_grad.device.type, enabled=False):
        if weight is not None:
            x_grad = cublas.input_gradient(rows, weight).view(*out_grad.shape[:-1], weight.shape[1])
        if x is not None:
            weight_grad = cublas.weight_gradient(rows, as_rows(x))
        if needs_bias:
            bias_grad = cublas.bias_gradient(rows)
    return x_grad, weight_grad, bias_grad


@_linear_backward.register_fake
def _(out_grad, x, weight, needs_bias):
    return (
        out_grad.new_empty(0 if weight is None else (*out_grad.shape[:-1], weight.shape[1])),
        out_grad.new_empty(0 if x is None else (out_grad.shape[-1], x.shape[-1])),
        out_grad.new_empty(out_grad.shape[-1] if needs_bias else 0),
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, _, residual = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, out_grad):
    if out_grad is None:
        return None, None, None, None
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
    x_grad = weight_grad = bias_grad = None
    if needs_x or needs_weight or needs_bias:
        x_grad, weight_grad, bias_grad = _linear_backward(out_grad.to(ctx.dtype), *ctx.saved_tensors, needs_bias)
    return (
        x_grad if needs_x else None,
        weight_grad if needs_weight else None,
        bias_grad if needs_bias else None,
        out_grad.to(ctx.residual_dtype) if needs_residual else None,
    )


register_derivative("linear", _linear, _linear_backward, _differentiate, _keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias + residual.

    x: (..., in); weight: (out, in); bias: (out,); fp32, fp16 or bf16, all of one dtype and on one CUDA device.
    residual: (..., out), of any of these dtypes. Returns (..., out) in the dtype to which x and residual promote.
    Without a residual this is torch.nn.functional.linear.
    fp32 products are IEEE unless torch.backends.cuda.matmul allows TF32; sums are in fp32 and rounded once. Rows of
    unit stride that start at multiples of 16 bytes, and weights that are transposed views, are read in place; anything
    else may be copied. Under autocast x, weight and bias are cast as torch.nn.functional.linear casts them. Gradients
    are deterministic. With a residual, second and forward-mode derivatives, and differentiation by torch.func, raise an
    error.

    Raises UnsupportedInputError (a ValueError) for other shapes and dtypes, and MissingBackendError for tensors that
    are not on an NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    dtype = autocast_dtype(x)
    x, projection = cast(x, dtype), cast_affine(weight, bias, dtype)
    check_input("linear", "x", x)
    check_projection("linear", "", projection, (None, x.shape[-1]), x)
    weight, bias = projection
    shape = (*x.shape[:-1], weight.shape[0])
    check_residual("linear", residual, shape, x)
    if residual is not None:
        refuse_transforms("linear", x=x, weight=weight, bias=bias, residual=residual)
        return _linear(x, weight, bias, residual)
    if x.device.type != "meta":
        require_kernels("linear", "x", x)
    return cublas.product(x, weight, bias)
