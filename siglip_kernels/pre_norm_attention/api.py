"""pre_norm_attention: x + out_proj(attention(q, k, v)) with q, k, v = pre_norm_qkv(x), the first half of a layer.

The forward launches what the three operations launch. The backward saves passes over tensors of x's size: attention's
backward writes the gradients of q, k and v into the packed gradient of the projections, and the normalisation's adds
the residual's gradient. Two of the biases have gradients without reading those of k and v. With G the gradient of the
result, O = P V, and dO = G W_o,

    db_k = Σ_keys dK = scale · Σ_queries (Σ_keys dS) q = 0,    because rows of dS sum to zero,
    db_v = Σ_keys dV = Σ_queries (Σ_keys P) dO = Σ dO = (Σ G) W_o,    because rows of P sum to one,

and Σ G over rows, which is db_o, is made where the normalisation's backward reads G for the residual. A sample without
valid keys has rows of P that are zero, and so have tokens of no packed sequence: with either, dV is summed.
"""

import math
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
    check_lengths,
    check_norm,
    check_projection,
    wants_gradients,
)
from siglip_kernels.attention.boundaries import check_packing, check_values
from siglip_kernels.attention.checks import check_head_dim, check_scale
from siglip_kernels.attention.dispatch import (
    kept_shape,
    launch_backward,
    launch_forward,
    launch_packed_backward,
    launch_packed_forward,
    packed_kept_shape,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.gemm import cublas
from siglip_kernels.qkv.api import check_heads, gradients, gradients_by_projection, packed_shape, project
from siglip_kernels.transforms import refuse_transforms, register_derivative


@torch.library.custom_op("siglip_kernels::pre_norm_attention", mutates_args=())
def _pre_norm_attention(
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
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and with keep what the backward reads, else empty tensors: means, reciprocal deviations, packed
    q, k and v (..., 3, H, D), attention's result (..., H, D), and its log-sum-exp, empty for short sequences.
    """
    require_kernels("pre_norm_attention", "x", x)
    if cu_seqlens is not None:
        check_values("pre_norm_attention", cu_seqlens, x.shape[0], max_seqlen)
    from siglip_kernels.gemm.kernels import gemm

    rows = as_rows(x)
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        packed, mean, rstd = project(rows, norm_weight, norm_bias, eps, weights, biases)
        packed = packed.view(packed_shape(x, q_weight, num_heads))
        q, k, v = packed.unbind(-3)
        if cu_seqlens is None:
            attended, log_sum_exp = launch_forward(q, k, v, lengths, scale, keep)
        else:
            boundaries = (cu_seqlens, None, max_seqlen, max_seqlen)
            attended, log_sum_exp = launch_packed_forward(q, k, v, *boundaries, scale, keep)
        out = gemm(as_rows(attended.flatten(-2)), [out_weight], [out_bias], residual=rows)[0].view(x.shape)
    if keep:
        return out, mean, rstd, packed, attended, log_sum_exp
    mean, rstd, log_sum_exp = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
    return out, mean, rstd, packed.new_empty(0), packed.new_empty(0), log_sum_exp


@_pre_norm_attention.register_fake
def _(
    x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias,
    num_heads, scale, lengths, cu_seqlens, max_seqlen, keep,
):  # fmt: skip
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, q_weight.dtype))
    mean, rstd = (x.new_empty(math.prod(x.shape[:-1]) if keep else 0, dtype=torch.float32) for _ in range(2))
    packed = q_weight.new_empty(packed_shape(x, q_weight, num_heads))
    q = packed.select(-3, 0)
    kept = kept_shape(q, q, keep) if cu_seqlens is None else packed_kept_shape(q, keep)
    log_sum_exp = x.new_empty(kept, dtype=torch.float32)
    if not keep:
        return out, mean, rstd, packed.new_empty(0), packed.new_empty(0), log_sum_exp
    return out, mean, rstd, packed, packed.new_empty(q.shape), log_sum_exp


@torch.library.custom_op("siglip_kernels::pre_norm_attention_backward", mutates_args=())
def _pre_norm_attention_backward(
    out_grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    packed: Tensor,
    attended: Tensor,
    log_sum_exp: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    weights: Tensor | None,
    out_weight: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight, norm_bias, the needed ones of q_weight, k_weight and v_weight, concatenated, and
    of q_bias, k_bias and v_bias, concatenated, out_weight and out_bias; one that is not needed is an empty tensor.

    weights: q_weight, k_weight and v_weight, concatenated, where the gradient of x or of the norm is needed;
    out_weight: where a gradient other than those of out_weight, out_bias and k_bias is. needs: of the gradients of x,
    norm_weight and norm_bias, of weight and bias of q, of k and of v, of out_weight and of out_bias.
    """
    require_kernels("pre_norm_attention", "x", x)
    rows, out_rows, dtype = as_rows(x), as_rows(out_grad), packed.dtype
    needs_normed, needs_weights, needs_biases = needs[:3], needs[3:9:2], needs[4:9:2]
    needs_q_bias, needs_k_bias, needs_v_bias = needs_biases
    sums_v_grad = needs_v_bias and not (lengths is None and cu_seqlens is None)
    needs_sums = needs[10] or (needs_v_bias and not sums_v_grad)
    sums_on_the_way = needs_sums and needs_normed[0]
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        narrowed = out_rows.to(dtype)
        out_weight_grad = (
            cublas.weight_gradient(narrowed, as_rows(attended.flatten(-2))) if needs[9] else rows.new_empty(0)
        )
        packed_grad = _packed_gradient(
            narrowed,
            packed,
            attended,
            log_sum_exp,
            lengths,
            cu_seqlens,
            max_seqlen,
            scale,
            out_weight,
            needs_q=any(needs_normed) or needs_weights[0] or needs_q_bias,
            needs_k_or_v=any(needs_normed) or any(needs_weights[1:]) or sums_v_grad,
        )
        x_grad, norm_weight_grad, norm_bias_grad, sums, weight_grads = gradients(
            packed_grad,
            rows,
            norm_weight,
            norm_bias,
            eps,
            mean,
            rstd,
            weights,
            needs_normed,
            needs_weights,
            residual_grad=out_rows if needs_normed[0] else None,
            needs_residual_sums=sums_on_the_way,
        )
        if needs_sums and not sums_on_the_way:
            sums = out_rows.sum(0, dtype=torch.float32)
        bias_grads = []
        if needs_q_bias:
            bias_grads.append(cublas.bias_gradient(packed_grad[:, 0]))
        if needs_k_bias:
            bias_grads.append(packed.new_zeros(packed_grad.shape[2]))
        if sums_v_grad:
            bias_grads.append(cublas.bias_gradient(packed_grad[:, 2]))
        elif needs_v_bias and out_weight is not None:
            bias_grads.append(torch.mv(out_weight.T.float(), sums).to(dtype))
    return (
        x_grad.view(x.shape) if needs_normed[0] else x_grad,
        norm_weight_grad,
        norm_bias_grad,
        weight_grads,
        torch.cat(bias_grads) if bias_grads else packed.new_empty(0),
        out_weight_grad,
        sums.to(dtype) if needs[10] else packed.new_empty(0),
    )


def _packed_gradient(
    out_grad: Tensor,
    packed: Tensor,
    attended: Tensor,
    log_sum_exp: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    out_weight: Tensor | None,
    needs_q: bool,
    needs_k_or_v: bool,
) -> Tensor:
    """(rows, 3, H · D). Parts that are not needed are not written. out_grad: (rows, width), in packed's dtype."""
    packed_grad = torch.empty_like(packed)
    if out_weight is not None and (needs_q or needs_k_or_v):
        attended_grad = cublas.input_gradient(out_grad, out_weight).view(attended.shape)
        q, k, v = packed.unbind(-3)
        kept, needs = (q, k, v, attended, log_sum_exp), (needs_q, needs_k_or_v)
        if cu_seqlens is None:
            launch_backward(attended_grad, *kept, lengths, scale, *needs, packed_grad)
        else:
            boundaries = (cu_seqlens, None, max_seqlen, max_seqlen)
            launch_packed_backward(attended_grad, *kept, *boundaries, scale, *needs, packed_grad)
    return packed_grad.flatten(-2).flatten(0, -3)


@_pre_norm_attention_backward.register_fake
def _(
    out_grad, x, norm_weight, norm_bias, eps, mean, rstd, packed, attended, log_sum_exp, lengths, cu_seqlens,
    max_seqlen, scale, weights, out_weight, needs,
):  # fmt: skip
    width, part = x.shape[-1], packed.shape[-2] * packed.shape[-1]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        norm_weight.new_empty(norm_weight.shape if needs[1] else 0),
        norm_weight.new_empty(norm_weight.shape if needs[2] else 0),
        packed.new_empty((sum(needs[3:9:2]) * part, width)),
        packed.new_empty(sum(needs[4:9:2]) * part),
        packed.new_empty((width, part) if needs[9] else 0),
        packed.new_empty(width if needs[10] else 0),
    )


def _keep(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, ctx.eps, q_weight, _, k_weight, _, v_weight, _, out_weight, *_ = inputs
    *_, ctx.scale, lengths, cu_seqlens, ctx.max_seqlen, _ = inputs
    _, *kept = output
    needs = ctx.needs_input_grad
    needs_attended = any(needs[:3]) or any(needs[4:7]) or needs[8] or needs[9]  # its gradient
    weights = (q_weight, k_weight, v_weight) if any(needs[:3]) else ()
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    read_out_weight = out_weight if needs_attended else None
    ctx.save_for_backward(x, norm_weight, norm_bias, *kept, lengths, cu_seqlens, read_out_weight, *weights)


def _differentiate(ctx, out_grad, *_):
    if out_grad is None:
        return (None,) * 18
    all_needs = ctx.needs_input_grad
    needs = (*all_needs[:3], *all_needs[4:12])
    x, norm_weight, norm_bias, mean, rstd, packed, attended, log_sum_exp, lengths, cu_seqlens, out_weight, *weights = (
        ctx.saved_tensors
    )
    *normed_grads, weight_grads, bias_grads, out_weight_grad, out_bias_grad = _pre_norm_attention_backward(
        out_grad,
        x,
        norm_weight,
        norm_bias,
        ctx.eps,
        mean,
        rstd,
        packed,
        attended,
        log_sum_exp,
        lengths,
        cu_seqlens,
        ctx.max_seqlen,
        ctx.scale,
        torch.cat(weights) if weights else None,
        out_weight,
        needs,
    )
    projections = gradients_by_projection(weight_grads, bias_grads, packed.shape[-2] * packed.shape[-1], needs[3:9])
    normed_grads = [gradient if need else None for gradient, need in zip(normed_grads, needs[:3], strict=True)]
    out_grads = (out_weight_grad if needs[9] else None, out_bias_grad if needs[10] else None)
    return *normed_grads, None, *projections, *out_grads, *(None,) * 6


register_derivative("pre_norm_attention", _pre_norm_attention, _pre_norm_attention_backward, _differentiate, _keep)


def pre_norm_attention(
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
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x + out_proj(attention(q, k, v)), where q, k and v are `pre_norm_qkv` of x: the first half of an encoder layer.

    x: (B, S, width); norm_weight, norm_bias: (width,); q_weight, k_weight, v_weight: (H · D, width), their biases:
    (H · D,), H = num_heads; out_weight: (width, H · D); out_bias: (width,); fp32, fp16 or bf16, all of one dtype (the
    norm's may be fp32) and on one CUDA device; the biases of projections may be None. scale, lengths and head dims: as
    in `attention`. Returns (B, S, width).
    cu_seqlens, max_seqlen: as in `attention`; x and the result are (T, width), the tokens of packed sequences. Those of
    no sequence attend to nothing, so that their rows of the result are x + out_bias.
    Training keeps x, two numbers per row, q, k and v, and attention's result with one number per row and head for the
    backward, which normalises x again. The gradient of k_bias is zero: a constant added to a row of scores does not
    change its softmax. Under autocast the parameters of the projections are cast and x is not; the norm's are cast to
    fp32, and the result is in the dtype to which x and autocast's dtype promote. Products, sums, strides, derivatives
    and errors: as in `linear`.
    """
    dtype = autocast_dtype(x)
    norm = Affine(cast_norm(norm_weight, dtype), cast_norm(norm_bias, dtype))
    q_proj = cast_affine(q_weight, q_bias, dtype)
    k_proj = cast_affine(k_weight, k_bias, dtype)
    v_proj = cast_affine(v_weight, v_bias, dtype)
    out_proj = cast_affine(out_weight, out_bias, dtype)
    check_input("pre_norm_attention", "x", x, "(B, S, width)" if cu_seqlens is None else "(T, width)")
    check_norm("pre_norm_attention", "norm_", norm, eps, x)
    check_projection("pre_norm_attention", "q_", q_proj, (None, x.shape[-1]), x, dtype)
    columns = q_proj.weight.shape[0]
    check_projection("pre_norm_attention", "k_", k_proj, (columns, x.shape[-1]), x, dtype)
    check_projection("pre_norm_attention", "v_", v_proj, (columns, x.shape[-1]), x, dtype)
    check_projection("pre_norm_attention", "out_", out_proj, (x.shape[-1], columns), x, dtype)
    check_heads("pre_norm_attention", num_heads, columns)
    check_head_dim("pre_norm_attention", "q_weight", columns // num_heads)
    check_scale("pre_norm_attention", scale)
    check_packing("pre_norm_attention", lengths, cu_seqlens, max_seqlen, "x", x)
    check_lengths("pre_norm_attention", lengths, "x", x)
    refuse_transforms("pre_norm_attention", x=x, norm=norm, q=q_proj, k=k_proj, v=v_proj, out=out_proj)
    projections = (*q_proj, *k_proj, *v_proj, *out_proj)
    keep = wants_gradients(x, *norm, *projections)
    packing = (lengths, cu_seqlens, max_seqlen)
    return _pre_norm_attention(x, *norm, eps, *projections, num_heads, scale, *packing, keep)[0]
