"""The attention_pool op: contract, registration, autograd. The algebra is in folded.py, the kernels in kernels.py.

The pass over the tokens is registered, as `siglip_kernels::attention_pool` and
`siglip_kernels::attention_pool_backward`. What the algebra leaves of the head's projections, one row per sample, is
computed by PyTorch.
"""

import torch
from torch import Tensor

from siglip_kernels.arguments import (
    Affine,
    autocast_dtype,
    cast,
    cast_affine,
    check_input,
    check_lengths,
    check_parameter,
    given,
    unit_stride,
)
from siglip_kernels.attention_pool.config import fits
from siglip_kernels.attention_pool.fallback import pool_backward, pool_forward
from siglip_kernels.attention_pool.folded import fold, project, split
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import refuse_transforms, register_derivative


def _validate(
    x: Tensor, probe: Tensor, in_proj: Affine, out_proj: Affine, num_heads: int, lengths: Tensor | None
) -> None:
    """Raises for every unsupported argument. Traceable: it reads no values."""
    check_input("attention_pool", "x", x, "(B, S, width)")
    width = x.shape[2]
    check_parameter("attention_pool", "probe", probe, (1, 1, width), x)
    check_parameter("attention_pool", "in_proj_weight", in_proj.weight, (3 * width, width), x)
    check_parameter("attention_pool", "in_proj_bias", in_proj.bias, (3 * width,), x)
    check_parameter("attention_pool", "out_proj_weight", out_proj.weight, (width, width), x)
    check_parameter("attention_pool", "out_proj_bias", out_proj.bias, (width,), x)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise unsupported("attention_pool", "num_heads", f"is {given(num_heads)}", "positive integers")
    if width == 0 or width % num_heads:
        raise unsupported("attention_pool", "num_heads", f"is {num_heads} while x has width {width}", "divisors of it")
    check_lengths("attention_pool", lengths, "x", x)


@torch.library.custom_op("siglip_kernels::attention_pool", mutates_args=())
def _pool(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`folded.pool_tokens`; for the backward each head's highest score and sum of powers, in base 2, (B, H) fp32."""
    require_kernels("attention_pool", "x", x)
    from siglip_kernels.attention_pool.kernels import attention_pool_forward

    with on_device(x), torch.autocast(x.device.type, enabled=False):
        if x.shape[1] > 0 and not fits(x, folded.shape[0]):
            return pool_forward(x, folded, scale, lengths)
        lengths = None if lengths is None else lengths.contiguous()
        return attention_pool_forward(unit_stride(x), folded.contiguous(), scale, lengths)


@torch.library.custom_op("siglip_kernels::attention_pool_backward", mutates_args=())
def _pool_backward(
    pooled_grad: Tensor,
    x: Tensor,
    folded: Tensor,
    pooled: Tensor,
    highest: Tensor,
    total: Tensor,
    scale: float,
    lengths: Tensor | None,
    needs_x: bool,
    needs_folded: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and folded; one that is not needed is an empty tensor."""
    require_kernels("attention_pool", "x", x)
    from siglip_kernels.attention_pool.kernels import attention_pool_backward

    with on_device(x), torch.autocast(x.device.type, enabled=False):
        if x.shape[1] > 0 and not fits(x, folded.shape[0]):
            x_grad, folded_grad = pool_backward(pooled_grad, x, folded, pooled, highest, total, scale, lengths)
            return x_grad if needs_x else x.new_empty(0), folded_grad if needs_folded else x.new_empty(0)
        return attention_pool_backward(
            unit_stride(pooled_grad),
            unit_stride(x),
            folded.contiguous(),
            pooled,
            highest,
            total,
            scale,
            None if lengths is None else lengths.contiguous(),
            needs_x,
            needs_folded,
        )


@_pool.register_fake
def _(x, folded, scale, lengths):
    batch, heads = x.shape[0], folded.shape[0]
    statistics = (x.new_empty(batch, heads, dtype=torch.float32) for _ in range(2))
    return x.new_empty(batch, heads, x.shape[2]), *statistics


@_pool_backward.register_fake
def _(pooled_grad, x, folded, pooled, highest, total, scale, lengths, needs_x, needs_folded):
    return x.new_empty(x.shape if needs_x else 0), x.new_empty(folded.shape if needs_folded else 0)


def _keep(ctx, inputs, output) -> None:
    x, folded, ctx.scale, lengths = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, folded, *output, lengths)


def _differentiate(ctx, pooled_grad, *_):
    if pooled_grad is None:
        return None, None, None, None
    *saved, lengths = ctx.saved_tensors
    needs_x, needs_folded = ctx.needs_input_grad[:2]
    x_grad, folded_grad = _pool_backward(pooled_grad, *saved, ctx.scale, lengths, needs_x, needs_folded)
    return x_grad if needs_x else None, folded_grad if needs_folded else None, None, None


register_derivative("attention_pool", _pool, _pool_backward, _differentiate, _keep)


def attention_pool(
    x: Tensor,
    probe: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    num_heads: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of one learned probe over all tokens (the MAP head; Zhai et al. 2022, "Scaling Vision Transformers").

    x: (B, S, width), fp32, fp16 or bf16; probe: (1, 1, width); the others are torch.nn.MultiheadAttention's parameters,
    (3 width, width), (3 width,), (width, width), (width,), all of x's dtype; num_heads divides the width.
    Returns (B, width).
    lengths: int32 (B,), how many of a sample's tokens are valid (clamped to 0..S); the others are never read, and their
    gradient is zero; a sample with 0 gives out_proj_bias.

    In fp16 and bf16, with heads (rounded up to a power of two, at least 16) × width up to 18,432, a Triton kernel reads
    the tokens once, in place if their last stride is 1, and the forward allocates nothing as large as x. Otherwise
    PyTorch computes the same products; fp32 then honours torch.backends.cuda.matmul.allow_tf32. Training keeps nothing
    as large as x but x itself: neither keys nor values. Sums are in fp32. Under autocast all tensors but
    lengths are cast as torch.nn.functional.linear casts them. Gradients are deterministic (that of the keys' bias is 0:
    it does not change a softmax); second derivatives with respect to x, forward-mode
    derivatives and differentiation by torch.func raise an error.

    Raises UnsupportedInputError (a ValueError) for other shapes and dtypes, and MissingBackendError for tensors that
    are not on an NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    dtype = autocast_dtype(x)
    x, probe = cast(x, dtype), cast(probe, dtype)
    in_proj = cast_affine(in_proj_weight, in_proj_bias, dtype)
    out_proj = cast_affine(out_proj_weight, out_proj_bias, dtype)
    _validate(x, probe, in_proj, out_proj, num_heads, lengths)
    refuse_transforms("attention_pool", x=x, probe=probe, in_proj=in_proj, out_proj=out_proj)
    q_proj, k_proj, v_proj = split(in_proj)
    folded = fold(probe, q_proj, k_proj.weight, num_heads)
    pooled, _, _ = _pool(x, folded, (x.shape[2] // num_heads) ** -0.5, lengths)
    return project(pooled, v_proj, out_proj, x.shape[1], lengths)
