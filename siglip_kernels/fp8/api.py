"""The products of encoder layers with operands in fp8 (e4m3), for inference.

mlp, pre_norm_mlp, pre_norm_qkv and pre_norm_attention compute what the operations of the same names in
`siglip_kernels` compute, with activations quantised per token as they are made, and weights per output channel, once:

    layer normalisation → fp8 · q, k, v in half precision · attention · → fp8 · projection + residual
    layer normalisation → fp8 · fc1, GELU → fp8 · fc2 + residual

Sums, biases, residuals, normalisation and attention are as without fp8. There is no calibration: all scales come from
the row at hand or from a bound (see `quantise.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from siglip_kernels.arguments import (
    Affine,
    as_rows,
    autocast_dtype,
    cast_norm,
    check_input,
    check_lengths,
    check_norm,
    check_projection,
    check_residual,
)
from siglip_kernels.attention.boundaries import check_packing, check_values
from siglip_kernels.attention.checks import check_head_dim, check_scale
from siglip_kernels.attention.dispatch import launch_forward, launch_packed_forward
from siglip_kernels.device import on_device
from siglip_kernels.errors import unsupported
from siglip_kernels.fp8.devices import require_fp8
from siglip_kernels.fp8.reference import Projection
from siglip_kernels.fp8.weights import quantised
from siglip_kernels.layer_norm.config import WIDEST_IN_REGISTERS
from siglip_kernels.qkv.api import check_heads
from siglip_kernels.transforms import refuse_transforms, register_derivative

_HALF = (torch.float16, torch.bfloat16)
_TRAINS = "inference, under torch.no_grad(); to train, use the backend 'triton', or accelerate without fp8"

Norm = tuple[Tensor, Tensor, float]


def _launch_mlp(
    rows: Tensor, norm: Norm | None, fc1: Projection, fc2: Projection, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """fc2(gelu(fc1(·))) + residual of rows (rows, width), normalised first if norm is given."""
    from siglip_kernels.fp8.quantise import quantise_rows
    from siglip_kernels.gemm.kernels import Scales, gemm

    values, scales, hidden_scales = quantise_rows(rows, norm, fc1.gains)
    hidden = gemm(
        values,
        [fc1.values],
        [fc1.bias],
        gelu="forward",
        scales=Scales(scales, fc1.scales, hidden_scales),
        out_dtype=torch.float8_e4m3fn,
    )[0]
    assert hidden_scales is not None
    return _launch_product(hidden, hidden_scales, fc2, residual, dtype)


def _launch_product(
    values: Tensor, scales: Tensor, projection: Projection, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(rows, out), in the dtype to which the residual's and this one promote."""
    from siglip_kernels.gemm.kernels import Scales, gemm

    out_dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    scales_of = Scales(scales, projection.scales)
    return gemm(
        values, [projection.values], [projection.bias], residual=residual, scales=scales_of, out_dtype=out_dtype
    )[0]


def _launch_qkv(rows: Tensor, norm: Norm, projection: Projection, dtype: torch.dtype) -> Tensor:
    """(rows, 3 · H · D)."""
    from siglip_kernels.fp8.quantise import quantise_rows

    values, scales, _ = quantise_rows(rows, norm)
    return _launch_product(values, scales, projection, None, dtype)


def _quantised_qkv(weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...]) -> Projection:
    """Of q, k and v, or only the first, which is of all three."""
    given = [weight for weight in weights if weight is not None]
    return quantised(given, biases[: len(given)])


def _qkv_shape(x: Tensor, q_weight: Tensor, k_weight: Tensor | None, num_heads: int) -> tuple[int, ...]:
    """(B, S, 3, H, D), or of packed sequences (T, 3, H, D)."""
    rows = q_weight.shape[0] // (3 if k_weight is None else 1)
    return *x.shape[:-1], 3, num_heads, rows // num_heads


def _contiguous(weight: Tensor, bias: Tensor, eps: float) -> Norm:
    return weight.contiguous(), bias.contiguous(), eps


@torch.library.custom_op("siglip_kernels::fp8_mlp", mutates_args=())
def _mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Of normalised x if the norm's parameters are given."""
    require_fp8("fp8.mlp", "x", x)
    norm = None if norm_weight is None or norm_bias is None else _contiguous(norm_weight, norm_bias, eps)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        fc1, fc2 = quantised([fc1_weight], [fc1_bias]), quantised([fc2_weight], [fc2_bias])
        rows = None if residual is None else as_rows(residual)
        out = _launch_mlp(as_rows(x), norm, fc1, fc2, rows, dtype)
    return out.view(*x.shape[:-1], fc2_weight.shape[0])


@_mlp.register_fake
def _(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, dtype):
    out_dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], fc2_weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("siglip_kernels::fp8_pre_norm_qkv", mutates_args=())
def _pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    num_heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed, (B, S, 3, H, D)."""
    require_fp8("fp8.pre_norm_qkv", "x", x)
    norm = _contiguous(norm_weight, norm_bias, eps)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        projection = _quantised_qkv((q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias))
        packed = _launch_qkv(as_rows(x), norm, projection, dtype)
    return packed.view(_qkv_shape(x, q_weight, k_weight, num_heads))


@_pre_norm_qkv.register_fake
def _(x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, dtype):
    return x.new_empty(_qkv_shape(x, q_weight, k_weight, num_heads), dtype=dtype)


@torch.library.custom_op("siglip_kernels::fp8_pre_norm_attention", mutates_args=())
def _pre_norm_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    dtype: torch.dtype,
) -> Tensor:
    require_fp8("fp8.pre_norm_attention", "x", x)
    if cu_seqlens is not None:
        check_values("fp8.pre_norm_attention", cu_seqlens, x.shape[0], max_seqlen)
    from siglip_kernels.fp8.quantise import quantise_rows

    rows, norm = as_rows(x), _contiguous(norm_weight, norm_bias, eps)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        projection = _quantised_qkv((q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias))
        packed = _launch_qkv(rows, norm, projection, dtype).view(_qkv_shape(x, q_weight, k_weight, num_heads))
        q, k, v = packed.unbind(-3)
        if cu_seqlens is None:
            attended, _ = launch_forward(q, k, v, lengths, scale, False)
        else:
            boundaries = (cu_seqlens, None, max_seqlen, max_seqlen)
            attended, _ = launch_packed_forward(q, k, v, *boundaries, scale, False)
        values, scales, _ = quantise_rows(as_rows(attended.flatten(-2)))
        out = _launch_product(values, scales, quantised([out_weight], [out_bias]), rows, dtype)
    return out.view(x.shape)


@_pre_norm_attention.register_fake
def _(
    x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias,
    num_heads, scale, lengths, cu_seqlens, max_seqlen, dtype,
):  # fmt: skip
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype))


@torch.library.custom_op("siglip_kernels::fp8_gradient", mutates_args=())
def _gradient(upstream: Tensor, operation: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Raises where a gradient is computed. It is an operator since torch.compile traces a backward pass that may never
    run: an error of the trace would be the compiler's, and would end calls that eager computes.
    """
    raise unsupported(operation, "x", "needs gradients", _TRAINS)


@_gradient.register_fake
def _(upstream, operation, shape, dtype):
    return upstream.new_empty(shape, dtype=dtype)


def _register(operation: str, operator: Any) -> None:
    """No derivative: asking for one says so. vmap, as of the other operators."""

    def keep(ctx, inputs, output) -> None:
        ctx.inputs = [(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in inputs]

    def refuse(ctx, upstream):
        needed = zip(ctx.needs_input_grad, ctx.inputs, strict=True)
        return tuple(_gradient(upstream, operation, *given) if needs else None for needs, given in needed)

    register_derivative(operation, operator, None, refuse, keep)


for _operation, _operator in (
    ("fp8.mlp", _mlp),
    ("fp8.pre_norm_qkv", _pre_norm_qkv),
    ("fp8.pre_norm_attention", _pre_norm_attention),
):
    _register(_operation, _operator)


# Public functions -----------------------------------------------------------------------------------------------------


def _computed_in(operation: str, x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of what is not fp8: autocast's, or the weights'."""
    autocast = autocast_dtype(x)
    dtype = autocast or weight.dtype
    if dtype not in _HALF:
        got = f"has dtype {dtype}" if autocast is None else f"is cast to {dtype} by autocast"
        how = "load with dtype=torch.bfloat16 (siglip --dtype bfloat16), or use torch.autocast"
        raise unsupported(operation, "x", got, f"float16 and bfloat16 ({how})")
    _check_width(operation, "x", x.shape[-1])
    return dtype


def _check_width(operation: str, argument: str, width: int) -> None:
    if width > WIDEST_IN_REGISTERS:
        raise unsupported(operation, argument, f"makes rows {width} wide", f"widths up to {WIDEST_IN_REGISTERS}")


def _check_projection(
    operation: str, prefix: str, projection: Affine, shape: tuple[int | None, int], x: Tensor
) -> None:
    """In any dtype under autocast, which fp8 replaces: a cast of the weights would be quantised at every call."""
    dtype = projection.weight.dtype if autocast_dtype(x) is not None else None
    check_projection(operation, prefix, projection, shape, x, dtype)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """fc2(gelu(fc1(x))) + residual, as `siglip_kernels.mlp`, with products of fp8.

    Arguments and result: as there, in fp16 or bf16, with x up to 8,192 wide. Under autocast the weights may have any
    dtype; they are quantised as they are. The result is for inference: its gradient raises UnsupportedInputError.
    Raises MissingBackendError for tensors on a GPU of compute capability below 8.9.
    """
    fc1, fc2 = Affine(fc1_weight, fc1_bias), Affine(fc2_weight, fc2_bias)
    check_input("fp8.mlp", "x", x)
    _check_projection("fp8.mlp", "fc1_", fc1, (None, x.shape[-1]), x)
    _check_projection("fp8.mlp", "fc2_", fc2, (None, fc1_weight.shape[0]), x)
    check_residual("fp8.mlp", residual, (*x.shape[:-1], fc2_weight.shape[0]), x)
    dtype = _computed_in("fp8.mlp", x, fc1_weight)
    refuse_transforms("fp8.mlp", x=x, fc1=fc1, fc2=fc2, residual=residual)
    return _mlp(x, None, None, 0.0, *fc1, *fc2, residual, dtype)


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
    """x + mlp(layer_norm(x)), as `siglip_kernels.pre_norm_mlp`, with products of fp8. See `mlp`."""
    norm, fc1, fc2 = _norm(x, norm_weight, norm_bias), Affine(fc1_weight, fc1_bias), Affine(fc2_weight, fc2_bias)
    check_input("fp8.pre_norm_mlp", "x", x)
    check_norm("fp8.pre_norm_mlp", "norm_", norm, eps, x)
    _check_projection("fp8.pre_norm_mlp", "fc1_", fc1, (None, x.shape[-1]), x)
    _check_projection("fp8.pre_norm_mlp", "fc2_", fc2, (x.shape[-1], fc1_weight.shape[0]), x)
    dtype = _computed_in("fp8.pre_norm_mlp", x, fc1_weight)
    refuse_transforms("fp8.pre_norm_mlp", x=x, norm=norm, fc1=fc1, fc2=fc2)
    return _mlp(x, *norm, eps, *fc1, *fc2, x, dtype)


def pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, S, H, D) of normalised x, as `siglip_kernels.pre_norm_qkv`, with a product of fp8. See `mlp`.

    With k_weight and v_weight None, q_weight and q_bias are those of q, k and v in this order, (3 · H · D, width):
    slices, cut at each call, would be quantised at each call.
    """
    norm = _norm(x, norm_weight, norm_bias)
    check_input("fp8.pre_norm_qkv", "x", x, "(B, S, width)")
    q_proj, k_proj, v_proj = Affine(q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    projections, _ = _check_qkv("fp8.pre_norm_qkv", x, norm, eps, q_proj, k_proj, v_proj, num_heads)
    dtype = _computed_in("fp8.pre_norm_qkv", x, q_weight)
    refuse_transforms("fp8.pre_norm_qkv", x=x, norm=norm, **projections)
    q, k, v = _pre_norm_qkv(x, *norm, eps, *q_proj, *k_proj, *v_proj, num_heads, dtype).unbind(2)
    return q, k, v


def pre_norm_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
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
    """x + out_proj(attention(q, k, v)), as `siglip_kernels.pre_norm_attention`, with projections of fp8. See `mlp`, and
    `pre_norm_qkv` for the weights."""
    norm, out_proj = _norm(x, norm_weight, norm_bias), Affine(out_weight, out_bias)
    operation = "fp8.pre_norm_attention"
    check_input(operation, "x", x, "(B, S, width)" if cu_seqlens is None else "(T, width)")
    q_proj, k_proj, v_proj = Affine(q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    projections, columns = _check_qkv(operation, x, norm, eps, q_proj, k_proj, v_proj, num_heads)
    _check_projection(operation, "out_", out_proj, (x.shape[-1], columns), x)
    _check_width(operation, "q_weight", columns)
    check_head_dim(operation, "q_weight", columns // num_heads)
    check_scale(operation, scale)
    check_packing(operation, lengths, cu_seqlens, max_seqlen, "x", x)
    check_lengths(operation, lengths, "x", x)
    dtype = _computed_in(operation, x, q_weight)
    refuse_transforms(operation, x=x, norm=norm, out=out_proj, **projections)
    parameters = (*q_proj, *k_proj, *v_proj, *out_proj)
    return _pre_norm_attention(x, *norm, eps, *parameters, num_heads, scale, lengths, cu_seqlens, max_seqlen, dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Affine:
    dtype = autocast_dtype(x)
    return Affine(cast_norm(weight, dtype), cast_norm(bias, dtype))


def _check_qkv(
    operation: str,
    x: Tensor,
    norm: Affine,
    eps: float,
    q_proj: Affine,
    k_proj: tuple[Tensor | None, Tensor | None],
    v_proj: tuple[Tensor | None, Tensor | None],
    num_heads: int,
) -> tuple[dict[str, Affine], int]:
    """k_proj, v_proj: weight and bias, all None where q_proj has the rows of q, k and v. Returns the projections that
    are given, by name, and the rows of each of q, k and v.
    """
    check_norm(operation, "norm_", norm, eps, x)
    _check_projection(operation, "q_", q_proj, (None, x.shape[-1]), x)
    rows = q_proj.weight.shape[0]
    if all(parameter is None for parameter in (*k_proj, *v_proj)):
        if rows % 3:
            raise unsupported(operation, "q_weight", f"has {rows} rows", "those of q, k and v, or also the others")
        check_heads(operation, num_heads, rows // 3)
        return {"q": q_proj}, rows // 3
    k, v = Affine(*k_proj), Affine(*v_proj)  # type: ignore[arg-type]
    _check_projection(operation, "k_", k, (rows, x.shape[-1]), x)
    _check_projection(operation, "v_", v, (rows, x.shape[-1]), x)
    check_heads(operation, num_heads, rows)
    return {"q": q_proj, "k": k, "v": v}, rows
