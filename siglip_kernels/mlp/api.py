"""mlp: fc2(gelu(fc1(x))) + residual, and pre_norm_mlp: x + mlp(layer_norm(x)).

Two GEMMs with fused epilogues: gelu(x W₁ᵀ + b₁), then · W₂ᵀ + b₂ + residual. Of the two tensors of the hidden width,
training keeps the pre-activation h alone. The epilogue of the first GEMM of the backward gives both

    dh = (dy W₂) ∘ gelu'(h)    and    gelu(h), for dW₂ = dyᵀ gelu(h).

pre_norm_mlp does not keep the normalised x either: its backward normalises x again. The backward of the normalisation
reads dy for the residual, and sums its columns for db₂.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.arguments import (
    Affine,
    as_rows,
    autocast_dtype,
    cast,
    cast_affine,
    cast_norm,
    check_input,
    check_norm,
    check_projection,
    check_residual,
    wants_gradients,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.gemm import cublas
from siglip_kernels.transforms import refuse_transforms, register_derivative


def _forward(x: Tensor, fc1: Affine, fc2: Affine, residual: Tensor | None, *, keep: bool) -> tuple[Tensor, Tensor]:
    """x: (rows, width). Returns (rows, out), and with keep the pre-activation (rows, hidden), else an empty tensor."""
    from siglip_kernels.gemm.kernels import gemm

    activation, pre_activation, _, _ = gemm(x, [fc1.weight], [fc1.bias], gelu="forward", keep_pre_activation=keep)
    if residual is None:
        out = cublas.product(activation, *fc2)
    else:
        out = gemm(activation, [fc2.weight], [fc2.bias], residual=residual)[0]
    return out, x.new_empty(0) if pre_activation is None else pre_activation


def _gradients(
    out_grad: Tensor,
    x: Callable[[], Tensor],
    pre_activation: Tensor,
    fc1_weight: Tensor | None,
    fc2_weight: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The gradients of x, and of the weight and bias of fc1 and fc2; one that is not needed is an empty tensor.

    out_grad: (rows, out). x makes (rows, width), if fc1_weight's gradient is needed. fc1_weight is given where x's
    gradient is needed, and fc2_weight where the gradient of x, fc1_weight or fc1_bias is.
    needs: of the gradients of x, fc1_weight, fc1_bias, fc2_weight and fc2_bias.
    """
    needs_x, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias = needs
    x_grad, fc1_weight_grad, fc1_bias_grad, fc2_weight_grad, fc2_bias_grad = (out_grad.new_empty(0) for _ in range(5))
    hidden_grad = activation = None
    if fc2_weight is not None and (needs_x or needs_fc1_weight or needs_fc1_bias):
        from siglip_kernels.gemm.kernels import gemm

        hidden_grad, _, activation, column_sums = gemm(
            out_grad,
            [fc2_weight.T],
            [None],
            gelu="backward",
            pre_activation=pre_activation,
            keep_activation=needs_fc2_weight,
            keep_column_sums=needs_fc1_bias,
        )
        if column_sums is not None:
            fc1_bias_grad = column_sums.to(out_grad.dtype)
    elif needs_fc2_weight:
        activation = F.gelu(pre_activation, approximate="tanh")
    if activation is not None:
        fc2_weight_grad = cublas.weight_gradient(out_grad, activation)
        del activation  # as large as the pre-activation: freed before the next tensors are allocated
    if needs_fc2_bias:
        fc2_bias_grad = cublas.bias_gradient(out_grad)
    if hidden_grad is not None and needs_fc1_weight:
        fc1_weight_grad = cublas.weight_gradient(hidden_grad, x())
    if hidden_grad is not None and needs_x and fc1_weight is not None:
        x_grad = cublas.input_gradient(hidden_grad, fc1_weight)
    return x_grad, (fc1_weight_grad, fc1_bias_grad), (fc2_weight_grad, fc2_bias_grad)


@torch.library.custom_op("siglip_kernels::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result (..., out), and with keep the pre-activation (rows, hidden), else an empty tensor."""
    require_kernels("mlp", "x", x)
    fc1, fc2 = Affine(fc1_weight, fc1_bias), Affine(fc2_weight, fc2_bias)
    residual_rows = None if residual is None else as_rows(residual)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        out, kept = _forward(as_rows(x), fc1, fc2, residual_rows, keep=keep)
    return out.view(*x.shape[:-1], fc2_weight.shape[0]), kept


@_mlp.register_fake
def _(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, keep):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty((*x.shape[:-1], fc2_weight.shape[0]), dtype=dtype)
    return out, x.new_empty((as_rows(x).shape[0], fc1_weight.shape[0]) if keep else 0)


@torch.library.custom_op("siglip_kernels::mlp_backward", mutates_args=())
def _mlp_backward(
    out_grad: Tensor,
    x: Tensor | None,
    pre_activation: Tensor,
    fc1_weight: Tensor | None,
    fc2_weight: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, fc1_weight, fc1_bias, fc2_weight and fc2_bias; one that is not needed is an empty tensor."""
    require_kernels("mlp", "x", out_grad)

    def rows() -> Tensor:
        assert x is not None
        return as_rows(x)

    with on_device(out_grad), torch.autocast(out_grad.device.type, enabled=False):
        x_grad, fc1_grads, fc2_grads = _gradients(
            as_rows(out_grad), rows, pre_activation, fc1_weight, fc2_weight, needs
        )
    if needs[0]:
        x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
    return x_grad, *fc1_grads, *fc2_grads


def _fake_parameter_gradients(out_grad, width, hidden, needs):
    """Shapes of the gradients of fc1_weight, fc1_bias, fc2_weight and fc2_bias."""
    shapes = ((hidden, width), (hidden,), (out_grad.shape[-1], hidden), (out_grad.shape[-1],))
    return [out_grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


@_mlp_backward.register_fake
def _(out_grad, x, pre_activation, fc1_weight, fc2_weight, needs):
    x_grad = out_grad.new_empty((*out_grad.shape[:-1], fc1_weight.shape[1]) if needs[0] else 0)
    width = 0 if x is None else x.shape[-1]
    return x_grad, *_fake_parameter_gradients(out_grad, width, pre_activation.shape[-1], needs[1:])


def _keep_for_mlp(ctx, inputs, output) -> None:
    x, fc1_weight, _, fc2_weight, _, residual, _ = inputs
    _, pre_activation = output
    needs_x, needs_fc1_weight, needs_fc1_bias = ctx.needs_input_grad[:3]
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(
        x if needs_fc1_weight else None,
        pre_activation,
        fc1_weight if needs_x else None,
        fc2_weight if needs_x or needs_fc1_weight or needs_fc1_bias else None,
    )


def _differentiate_mlp(ctx, out_grad, _):
    if out_grad is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:5]
    gradients = [None] * 5
    if any(needs):
        gradients = _mlp_backward(out_grad.to(ctx.dtype), *ctx.saved_tensors, needs)
    residual_grad = out_grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
    return *(grad if need else None for grad, need in zip(gradients, needs, strict=True)), residual_grad, None


register_derivative("mlp", _mlp, _mlp_backward, _differentiate_mlp, _keep_for_mlp)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """fc2(gelu_tanh(fc1(x))) + residual.

    x: (..., width); fc1_weight: (hidden, width); fc1_bias: (hidden,); fc2_weight: (out, hidden); fc2_bias: (out,);
    fp32, fp16 or bf16, all of one dtype and on one CUDA device; either bias may be None. residual: (..., out), of any
    of these dtypes. Returns (..., out) in the dtype to which x and residual promote.
    Training keeps x and the pre-activation (..., hidden) for the backward, inference nothing. Products, sums, strides,
    autocast, derivatives and errors: as in `linear`.
    """
    dtype = autocast_dtype(x)
    x = cast(x, dtype)
    fc1, fc2 = cast_affine(fc1_weight, fc1_bias, dtype), cast_affine(fc2_weight, fc2_bias, dtype)
    check_input("mlp", "x", x)
    check_projection("mlp", "fc1_", fc1, (None, x.shape[-1]), x)
    check_projection("mlp", "fc2_", fc2, (None, fc1.weight.shape[0]), x)
    check_residual("mlp", residual, (*x.shape[:-1], fc2.weight.shape[0]), x)
    refuse_transforms("mlp", x=x, fc1=fc1, fc2=fc2, residual=residual)
    return _mlp(x, *fc1, *fc2, residual, wants_gradients(x, *fc1, fc2.weight))[0]


@torch.library.custom_op("siglip_kernels::pre_norm_mlp", mutates_args=())
def _pre_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and with keep the means, the reciprocal deviations and the pre-activation, else empty tensors."""
    require_kernels("pre_norm_mlp", "x", x)
    from siglip_kernels.layer_norm.kernels import layer_norm_forward

    rows = as_rows(x)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        normed, mean, rstd = layer_norm_forward(
            rows, norm_weight.contiguous(), norm_bias.contiguous(), eps, fc1_weight.dtype
        )
        fc1, fc2 = Affine(fc1_weight, fc1_bias), Affine(fc2_weight, fc2_bias)
        out, kept = _forward(normed, fc1, fc2, residual=rows, keep=keep)
    if not keep:
        mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    return out.view(x.shape), mean, rstd, kept


@_pre_norm_mlp.register_fake
def _(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, keep):
    rows = as_rows(x).shape[0]
    mean, rstd = (x.new_empty(rows if keep else 0, dtype=torch.float32) for _ in range(2))
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, fc1_weight.dtype))
    return out, mean, rstd, fc1_weight.new_empty((rows, fc1_weight.shape[0]) if keep else 0)


@torch.library.custom_op("siglip_kernels::pre_norm_mlp_backward", mutates_args=())
def _pre_norm_mlp_backward(
    out_grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    pre_activation: Tensor,
    fc1_weight: Tensor | None,
    fc2_weight: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight and fc2_bias.

    One that is not needed is an empty tensor. That of x includes the residual's.
    """
    require_kernels("pre_norm_mlp", "x", x)
    from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward

    rows, out_rows = as_rows(x), as_rows(out_grad)
    norm_weight = norm_weight.contiguous()

    def normed() -> Tensor:
        return layer_norm_forward(rows, norm_weight, norm_bias.contiguous(), eps, pre_activation.dtype)[0]

    with on_device(x), torch.autocast(x.device.type, enabled=False):
        needs_normed = any(needs[:3])
        sums_on_the_way = needs[0] and needs[6]  # db₂, in the backward of the normalisation
        normed_grad, fc1_grads, (fc2_weight_grad, fc2_bias_grad) = _gradients(
            out_rows.to(pre_activation.dtype),
            normed,
            pre_activation,
            fc1_weight,
            fc2_weight,
            (needs_normed, *needs[3:6], needs[6] and not sums_on_the_way),
        )
        x_grad, norm_weight_grad, norm_bias_grad = (rows.new_empty(0) for _ in range(3))
        if needs_normed:
            x_grad, norm_weight_grad, norm_bias_grad, out_sums = layer_norm_backward(
                normed_grad,
                rows,
                norm_weight,
                mean,
                rstd,
                residual_grad=out_rows if needs[0] else None,
                needs_x=needs[0],
                needs_weight=needs[1],
                needs_bias=needs[2],
                needs_residual_sums=sums_on_the_way,
            )
            if sums_on_the_way:
                fc2_bias_grad = out_sums.to(pre_activation.dtype)
    x_grad = x_grad.view(x.shape) if needs[0] else x_grad
    return x_grad, norm_weight_grad, norm_bias_grad, *fc1_grads, fc2_weight_grad, fc2_bias_grad


@_pre_norm_mlp_backward.register_fake
def _(out_grad, x, norm_weight, norm_bias, eps, mean, rstd, pre_activation, fc1_weight, fc2_weight, needs):
    gradient = pre_activation.new_empty(out_grad.shape)
    return (
        x.new_empty(x.shape if needs[0] else 0),
        norm_weight.new_empty(norm_weight.shape if needs[1] else 0),
        norm_weight.new_empty(norm_weight.shape if needs[2] else 0),
        *_fake_parameter_gradients(gradient, x.shape[-1], pre_activation.shape[-1], needs[3:]),
    )


def _keep_for_pre_norm_mlp(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, ctx.eps, fc1_weight, _, fc2_weight, _, _ = inputs
    _, *kept = output
    needs = ctx.needs_input_grad
    needs_normed = any(needs[:3])
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x,
        norm_weight,
        norm_bias,
        *kept,
        fc1_weight if needs_normed else None,
        fc2_weight if needs_normed or needs[4] or needs[5] else None,
    )


def _differentiate_pre_norm_mlp(ctx, out_grad, *_):
    if out_grad is None:
        return (None,) * 9
    all_needs = ctx.needs_input_grad
    needs = (*all_needs[:3], *all_needs[4:8])
    x, norm_weight, norm_bias, *kept = ctx.saved_tensors
    gradients = _pre_norm_mlp_backward(out_grad, x, norm_weight, norm_bias, ctx.eps, *kept, needs)
    gradients = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *gradients[:3], None, *gradients[3:], None


register_derivative(
    "pre_norm_mlp", _pre_norm_mlp, _pre_norm_mlp_backward, _differentiate_pre_norm_mlp, _keep_for_pre_norm_mlp
)


def pre_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> Tensor:
    """x + mlp(layer_norm(x)): the second half of an encoder layer.

    x: (..., width); norm_weight, norm_bias: (width,); fc1_weight: (hidden, width); fc1_bias: (hidden,); fc2_weight:
    (width, hidden); fc2_bias: (width,); fp32, fp16 or bf16, all of one dtype (the norm's may be fp32) and on one CUDA
    device; either bias of the MLP may be None. Returns (..., width).
    Training keeps x, two numbers per row and the pre-activation (..., hidden) for the backward, which normalises x
    again. Under autocast the parameters of the MLP are cast and x is not; the norm's are cast to fp32, and the result
    is in the dtype to which x and autocast's dtype promote. Products, sums, strides, derivatives and errors: as in
    `linear`.
    """
    dtype = autocast_dtype(x)
    norm = Affine(cast_norm(norm_weight, dtype), cast_norm(norm_bias, dtype))
    fc1, fc2 = cast_affine(fc1_weight, fc1_bias, dtype), cast_affine(fc2_weight, fc2_bias, dtype)
    check_input("pre_norm_mlp", "x", x)
    check_norm("pre_norm_mlp", "norm_", norm, eps, x)
    check_projection("pre_norm_mlp", "fc1_", fc1, (None, x.shape[-1]), x, dtype)
    check_projection("pre_norm_mlp", "fc2_", fc2, (x.shape[-1], fc1.weight.shape[0]), x, dtype)
    refuse_transforms("pre_norm_mlp", x=x, norm=norm, fc1=fc1, fc2=fc2)
    return _pre_norm_mlp(x, *norm, eps, *fc1, *fc2, wants_gradients(x, *norm, *fc1, fc2.weight))[0]
