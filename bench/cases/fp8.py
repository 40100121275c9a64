"""Definitions of the operations with products in fp8: exact in fp64, and by fp8's own formula in half precision.

So their error to fp64 is that of fp8, and kernels are held to twice that of the formula.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from siglip_kernels import reference
from siglip_kernels.fp8.reference import linear, quantise_projection
from siglip_kernels.fp8.reference import mlp as rows_of_mlp

Parameters = tuple[Tensor, Tensor]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In fp32, from which kernels quantise it."""
    return _rows(reference.layer_norm(x.float(), weight.float(), bias.float(), eps))


def _mlp(rows: Tensor, fc1: Parameters, fc2: Parameters, residual: Tensor) -> Tensor:
    out = rows_of_mlp(rows, quantise_projection(*fc1), quantise_projection(*fc2))
    return (out.view(residual.shape) + residual.float()).to(residual.dtype)


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor
) -> Tensor:
    return _mlp(_rows(x), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias), residual)


def pre_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    return _mlp(_normed(x, norm_weight, norm_bias, eps), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias), x)


def pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    num_heads: int,
) -> tuple[Tensor, ...]:
    rows = _normed(x, norm_weight, norm_bias, eps)
    projections = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    each = (linear(rows, quantise_projection(*projection)).to(x.dtype) for projection in projections)
    return tuple(projected.view(*x.shape[:-1], num_heads, -1) for projected in each)


def pre_norm_attention(x: Tensor, *, out_weight: Tensor, out_bias: Tensor, **arguments: Tensor) -> Tensor:
    attended = reference.attention(*pre_norm_qkv(x, **arguments)).flatten(-2)  # type: ignore[arg-type]
    out = linear(_rows(attended), quantise_projection(out_weight, out_bias))
    return (out.view(x.shape) + x.float()).to(x.dtype)


DEFINITIONS: dict[str, Callable[..., object]] = {
    f"fp8_{definition.__name__}": definition for definition in (mlp, pre_norm_mlp, pre_norm_qkv, pre_norm_attention)
}
