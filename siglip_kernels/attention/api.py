"""The attention op: validation, registration with PyTorch, autograd, and the public function.

Two operators are registered, `siglip_kernels::attention` and `siglip_kernels::attention_backward`, each with a schema,
an implementation that launches kernels, a fake for tracing, and a derivative. dispatch.py chooses the kernels.
"""

import torch
from torch import Tensor

from siglip_kernels.arguments import autocast_dtype, cast, check_lengths, wants_gradients
from siglip_kernels.attention.boundaries import check_packing
from siglip_kernels.attention.checks import check_heads, check_scale
from siglip_kernels.attention.dispatch import kept_shape, launch_backward, launch_forward
from siglip_kernels.attention.variable_length import packed_attention
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.transforms import refuse_transforms, register_derivative


@torch.library.custom_op("siglip_kernels::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None, keep_for_backward: bool
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exp if the backward needs it, else an empty tensor."""
    require_kernels("attention", "q", q)
    with on_device(q):
        return launch_forward(q, k, v, lengths, scale, keep_for_backward)


@torch.library.custom_op("siglip_kernels::attention_backward", mutates_args=())
def _attention_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    lengths: Tensor | None,
    scale: float | None,
    needs_q: bool,
    needs_k_or_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; one that is not needed is an empty tensor."""
    require_kernels("attention", "q", q)
    with on_device(q):
        return launch_backward(out_grad, q, k, v, out, log_sum_exp, lengths, scale, needs_q, needs_k_or_v)


@_attention.register_fake
def _(q, k, v, lengths, scale, keep_for_backward):
    return q.new_empty(q.shape), q.new_empty(kept_shape(q, k, keep_for_backward), dtype=torch.float32)


@_attention_backward.register_fake
def _(out_grad, q, k, v, out, log_sum_exp, lengths, scale, needs_q, needs_k_or_v):
    kv_shape = k.shape if needs_k_or_v else 0
    return q.new_empty(q.shape if needs_q else 0), q.new_empty(kv_shape), q.new_empty(kv_shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, lengths, ctx.scale, _ = inputs
    out, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, lengths, out, log_sum_exp)


def _differentiate(ctx, out_grad, _):
    if out_grad is None:
        return None, None, None, None, None, None
    q, k, v, lengths, out, log_sum_exp = ctx.saved_tensors
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    q_grad, k_grad, v_grad = _attention_backward(
        out_grad, q, k, v, out, log_sum_exp, lengths, ctx.scale, needs_q, needs_k or needs_v
    )
    return q_grad if needs_q else None, k_grad if needs_k else None, v_grad if needs_v else None, None, None, None


register_derivative("attention", _attention, _attention_backward, _differentiate, _keep)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Softmax attention without dropout or mask: softmax(scale · q kᵀ) v.

    q: (B, Sq, H, D); k, v: (B, Sk, H, D), fp32, fp16 or bf16. Returns (B, Sq, H, D), contiguous, in q's dtype.
    D is a multiple of 8 up to 128. Views, packed and expanded ones included, are read in place; only a tensor whose
    last stride is not 1 is copied. fp32 products are IEEE unless torch.backends.cuda.matmul allows TF32; sums are fp32.
    scale: default D**-0.5. lengths: int32 (B,), the number of valid keys per sample, clamped to 0..Sk; other keys are
    never read, and a sample without keys gives zeros. So does Sk = 0.

    cu_seqlens: int32 or int64 (N + 1,), contiguous. q, k, v and the result are then (T, H, D), the tokens of N
    sequences one after the other: tokens cu_seqlens[i] to cu_seqlens[i + 1] attend to each other alone. It starts with
    0, does not decrease and ends with at most T; equal neighbours are an empty sequence, and tokens from its end on
    belong to none and give zeros. The host does not read it on a GPU: values that break these rules give wrong results
    but no access outside the tensors. SIGLIP_KERNELS_CHECK=1 reads and checks them at every call, as on a CPU.
    max_seqlen: at least the length of the longest sequence. With the numbers of tokens and sequences it chooses tiles;
    on a GPU a wrong one costs time only.

    Under autocast the inputs are cast as torch.nn.functional.scaled_dot_product_attention casts them.
    Gradients are deterministic.

    Raises UnsupportedInputError (a ValueError) for other types, shapes and dtypes and for second and forward-mode
    derivatives and differentiation by torch.func, and MissingBackendError for tensors that are not on an NVIDIA GPU of
    compute capability 8.0 or later, unless they are on the CPU and Triton was imported with TRITON_INTERPRET=1.
    """
    if cu_seqlens is not None:
        return packed_attention(q, k, v, lengths, cu_seqlens, max_seqlen, scale)
    check_packing("attention", lengths, cu_seqlens, max_seqlen, "q", q)
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    check_heads("attention", q, k, v, "(B, S, H, D)")
    check_scale("attention", scale)
    check_lengths("attention", lengths, "q", q)
    refuse_transforms("attention", q=q, k=k, v=v)
    return _attention(q, k, v, lengths, scale, wants_gradients(q, k, v))[0]
