"""pre_norm_qkv: layer normalisation, then the projections to queries, keys and values as one GEMM.

Checkpoints hold three weights, so one launch reads three weights: each tile of columns belongs to one of them. The
result is packed, (B, S, 3, H, D). Training keeps x and two numbers per row; the backward normalises x again.

`pre_norm_attention` computes this first part of an encoder layer by the same two functions, `project` and `gradients`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip_kernels.arguments import (
    Affine,
    as_rows,
    autocast_dtype,
    cast_affine,
    cast_norm,
    check_input,
    check_norm,
    check_projection,
    given,
    wants_gradients,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm import cublas
from siglip_kernels.transforms import refuse_transforms, register_derivative


def project(
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """rows: (rows, width). Returns (rows, 3 · H · D), and the rows' means and reciprocal deviations."""
    from siglip_kernels.gemm.kernels import gemm
    from siglip_kernels.layer_norm.kernels import layer_norm_forward

    normed, mean, rstd = layer_norm_forward(
        rows, norm_weight.contiguous(), norm_bias.contiguous(), eps, weights[0].dtype
    )
    return gemm(normed, list(weights), list(biases))[0], mean, rstd


def gradients(
    packed_grad: Tensor,
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    weights: Tensor | None,
    needs_normed: Sequence[bool],
    needs_weights: Sequence[bool],
    residual_grad: Tensor | None = None,
    needs_residual_sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight and norm_bias, sums, and the gradients of the needed weights, concatenated.

    packed_grad: (rows, 3, H · D). weights: all three, concatenated along their rows, where x's gradient or the norm's
    is needed. residual_grad, sums: as in `layer_norm_backward`. What is not needed is an empty tensor.
    """
    from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward

    norm_weight = norm_weight.contiguous()
    x_grad, norm_weight_grad, norm_bias_grad, residual_sums = (rows.new_empty(0) for _ in range(4))
    if weights is not None:
        x_grad, norm_weight_grad, norm_bias_grad, residual_sums = layer_norm_backward(
            cublas.input_gradient(packed_grad.flatten(1), weights),
            rows,
            norm_weight,
            mean,
            rstd,
            residual_grad,
            needs_x=needs_normed[0],
            needs_weight=needs_normed[1],
            needs_bias=needs_normed[2],
            needs_residual_sums=needs_residual_sums,
        )
    weight_grads = packed_grad.new_empty(0, rows.shape[1])
    if any(needs_weights):
        normed = layer_norm_forward(rows, norm_weight, norm_bias.contiguous(), eps, packed_grad.dtype)[0]
        weight_grads = cublas.weight_gradient(some_parts(packed_grad, needs_weights), normed)
    return x_grad, norm_weight_grad, norm_bias_grad, residual_sums, weight_grads


def gradients_by_projection(
    weight_grads: Tensor, bias_grads: Tensor, part: int, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of weight and bias of q, of k and of v, from the needed ones concatenated. part: rows of each."""
    weight_parts, bias_parts = iter(weight_grads.split(part)), iter(bias_grads.split(part))
    return [
        (next(bias_parts if is_bias else weight_parts) if need else None)
        for need, is_bias in zip(needs, (False, True) * 3, strict=True)
    ]


def some_parts(parts: Tensor, needed: Sequence[bool]) -> Tensor:
    """[rows, 3, n] -> [rows, needed · n]; a view if all are needed."""
    if all(needed):
        return parts.flatten(1)
    return torch.cat([part for part, need in zip(parts.unbind(1), needed, strict=True) if need] or [parts[:, 0, :0]], 1)


@torch.library.custom_op("siglip_kernels::pre_norm_qkv", mutates_args=())
def _pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed result (B, S, 3, H, D), and with keep the means and reciprocal deviations, else empty tensors."""
    require_kernels("pre_norm_qkv", "x", x)
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        packed, mean, rstd = project(as_rows(x), norm_weight, norm_bias, eps, weights, biases)
    if not keep:
        mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    return packed.view(packed_shape(x, q_weight, num_heads)), mean, rstd


def packed_shape(x: Tensor, weight: Tensor, num_heads: int) -> tuple[int, ...]:
    """(B, S, 3, H, D), or of packed sequences (T, 3, H, D)."""
    return *x.shape[:-1], 3, num_heads, weight.shape[0] // num_heads


@_pre_norm_qkv.register_fake
def _(x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, keep):
    packed = q_weight.new_empty(packed_shape(x, q_weight, num_heads))
    rows = x.shape[0] * x.shape[1] if keep else 0
    return packed, *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("siglip_kernels::pre_norm_qkv_backward", mutates_args=())
def _pre_norm_qkv_backward(
    packed_grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    weights: Tensor | None,
    needs_normed: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight and norm_bias, empty where not needed, then those of the needed weights,
    concatenated along their rows, and those of the needed biases, concatenated.

    weights: all three, concatenated along their rows, where x's gradient or the norm's is needed.
    """
    require_kernels("pre_norm_qkv", "x", x)
    parts = packed_grad.flatten(3).flatten(0, 1)  # [rows, 3, H · D]
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        x_grad, norm_weight_grad, norm_bias_grad, _, weight_grads = gradients(
            parts, as_rows(x), norm_weight, norm_bias, eps, mean, rstd, weights, needs_normed, needs_weights
        )
        bias_grads = cublas.bias_gradient(some_parts(parts, needs_biases))
    return (
        x_grad.view(x.shape) if needs_normed[0] else x_grad,
        norm_weight_grad,
        norm_bias_grad,
        weight_grads,
        bias_grads,
    )


@_pre_norm_qkv_backward.register_fake
def _(packed_grad, x, norm_weight, norm_bias, eps, mean, rstd, weights, needs_normed, needs_weights, needs_biases):
    part = packed_grad.shape[3] * packed_grad.shape[4]
    return (
        x.new_empty(x.shape if needs_normed[0] else 0),
        norm_weight.new_empty(norm_weight.shape if needs_normed[1] else 0),
        norm_weight.new_empty(norm_weight.shape if needs_normed[2] else 0),
        packed_grad.new_empty((sum(needs_weights) * part, x.shape[-1])),
        packed_grad.new_empty(sum(needs_biases) * part),
    )


def _keep(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, ctx.eps, q_weight, _, k_weight, _, v_weight, *_ = inputs
    _, *kept = output
    weights = (q_weight, k_weight, v_weight) if any(ctx.needs_input_grad[:3]) else ()
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, *kept, *weights)


def _differentiate(ctx, packed_grad, *_):
    if packed_grad is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    x, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
    needs_normed, needs_weights, needs_biases = needs[:3], needs[4:10:2], needs[5:10:2]
    *normed_grads, weight_grads, bias_grads = _pre_norm_qkv_backward(
        packed_grad,
        x,
        norm_weight,
        norm_bias,
        ctx.eps,
        mean,
        rstd,
        torch.cat(weights) if weights else None,
        needs_normed,
        needs_weights,
        needs_biases,
    )
    normed_grads = [gradient if need else None for gradient, need in zip(normed_grads, needs_normed, strict=True)]
    part = packed_grad.shape[3] * packed_grad.shape[4]
    return *normed_grads, None, *gradients_by_projection(weight_grads, bias_grads, part, needs[4:10]), None, None


register_derivative("pre_norm_qkv", _pre_norm_qkv, _pre_norm_qkv_backward, _differentiate, _keep)


def check_heads(operation: str, num_heads: int, rows: int) -> None:
    """Heads that share the rows of the projections' weights."""
    is_integer = isinstance(num_heads, int) and not isinstance(num_heads, bool)
    if not is_integer or num_heads < 1 or rows % num_heads != 0:
        got = f"is {given(num_heads)} while the weights have {rows} rows"
        raise unsupported(operation, "num_heads", got, "positive divisors of the rows")


def pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation, then the projections to queries, keys and values, split into heads.

    x: (B, S, width); norm_weight, norm_bias: (width,); weights of the projections: (H · D, width); biases: (H · D,) or
    None; fp32, fp16 or bf16, all of one dtype (the norm's may be fp32) and on one CUDA device. Returns q, k and v, each
    (B, S, H, D), H = num_heads: views of one packed (B, S, 3, H, D) result.
    Training keeps x and two numbers per row for the backward. Under autocast the projections' parameters are cast and x
    is not; the norm's are cast to fp32, and the result is in autocast's dtype. Products, sums, strides, derivatives and
    errors: as in `linear`.
    """
    dtype = autocast_dtype(x)
    norm = Affine(cast_norm(norm_weight, dtype), cast_norm(norm_bias, dtype))
    q_proj = cast_affine(q_weight, q_bias, dtype)
    k_proj = cast_affine(k_weight, k_bias, dtype)
    v_proj = cast_affine(v_weight, v_bias, dtype)
    check_input("pre_norm_qkv", "x", x, "(B, S, width)")
    check_norm("pre_norm_qkv", "norm_", norm, eps, x)
    check_projection("pre_norm_qkv", "q_", q_proj, (None, x.shape[-1]), x, dtype)
    out = q_proj.weight.shape[0]
    check_projection("pre_norm_qkv", "k_", k_proj, (out, x.shape[-1]), x, dtype)
    check_projection("pre_norm_qkv", "v_", v_proj, (out, x.shape[-1]), x, dtype)
    check_heads("pre_norm_qkv", num_heads, out)
    refuse_transforms("pre_norm_qkv", x=x, norm=norm, q=q_proj, k=k_proj, v=v_proj)
    keep = wants_gradients(x, *norm, q_proj.weight, k_proj.weight, v_proj.weight)
    q, k, v = _pre_norm_qkv(x, *norm, eps, *q_proj, *k_proj, *v_proj, num_heads, keep)[0].unbind(2)
    return q, k, v
