"""Attention over packed sequences: validation, registration with PyTorch, autograd, and flash-attn's function.

The operators are `siglip_kernels::attention_variable_length` and `siglip_kernels::attention_variable_length_backward`;
their kernels are those of `siglip_kernels::attention` for sequences that are not short.
"""

import torch
from torch import Tensor

from siglip_kernels.arguments import autocast_dtype, cast, given, wants_gradients
from siglip_kernels.attention.boundaries import check_boundaries, check_longest, check_packing, check_values
from siglip_kernels.attention.checks import check_heads, check_scale
from siglip_kernels.attention.dispatch import launch_packed_backward, launch_packed_forward, packed_kept_shape
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import refuse_transforms, register_derivative


@torch.library.custom_op("siglip_kernels::attention_variable_length", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    keep_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exp if the backward needs it, else an empty tensor. cu_seqlens_k: None for cu_seqlens_q."""
    require_kernels("attention", "q", q)
    if cu_seqlens_k is None:
        check_values("attention", cu_seqlens_q, q.shape[0], max_seqlen_q)
    else:
        for side, tokens, boundaries, longest in (
            ("q", q.shape[0], cu_seqlens_q, max_seqlen_q),
            ("k", k.shape[0], cu_seqlens_k, max_seqlen_k),
        ):
            names = (f"cu_seqlens_{side}", f"max_seqlen_{side}")
            check_values("flash_attn_varlen_func", boundaries, tokens, longest, *names)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with on_device(q):
        return launch_packed_forward(q, k, v, *packing, scale, keep_for_backward)


@torch.library.custom_op("siglip_kernels::attention_variable_length_backward", mutates_args=())
def _attention_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    needs_q: bool,
    needs_k_or_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; one that is not needed is an empty tensor."""
    require_kernels("attention", "q", q)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with on_device(q):
        return launch_packed_backward(out_grad, q, k, v, out, log_sum_exp, *packing, scale, needs_q, needs_k_or_v)


@_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, keep_for_backward):
    return q.new_empty(q.shape), q.new_empty(packed_kept_shape(q, keep_for_backward), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    out_grad, q, k, v, out, log_sum_exp,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, needs_q, needs_k_or_v,
):  # fmt: skip
    kv_shape = k.shape if needs_k_or_v else 0
    return q.new_empty(q.shape if needs_q else 0), q.new_empty(kv_shape), q.new_empty(kv_shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.longest, ctx.scale, _ = inputs
    out, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, log_sum_exp, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx, out_grad, _):
    nothing = (None,) * 6
    if out_grad is None:
        return None, None, None, *nothing
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    q_grad, k_grad, v_grad = _attention_backward(
        out_grad, *ctx.saved_tensors, *ctx.longest, ctx.scale, needs_q, needs_k or needs_v
    )
    return q_grad if needs_q else None, k_grad if needs_k else None, v_grad if needs_v else None, *nothing


register_derivative("attention", _attention, _attention_backward, _differentiate, _keep)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scale: float | None,
) -> Tensor:
    """`siglip_kernels.attention` with cu_seqlens. lengths: refused."""
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    check_heads("attention", q, k, v, "(T, H, D)")
    if k.shape[0] != q.shape[0]:
        got = f"has {k.shape[0]} tokens while q has {q.shape[0]}"
        raise unsupported("attention", "k", got, "as many as q; flash_attn_varlen_func takes lengths of the keys")
    check_scale("attention", scale)
    check_packing("attention", lengths, cu_seqlens, max_seqlen, "q", q)
    refuse_transforms("attention", q=q, k=k, v=v)
    keep = wants_gradients(q, k, v)
    return _attention(q, k, v, cu_seqlens, None, max_seqlen, max_seqlen, scale, keep)[0]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`siglip_kernels.attention` over packed sequences, under the names of flash-attn 2's function.

    q: (Tq, H, D); k, v: (Tk, H, D). Sequence i is the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1], which attend to
    the keys cu_seqlens_k[i] to cu_seqlens_k[i + 1]; without any, they give zeros. Lengths of keys may differ from those
    of queries. cu_seqlens_q and cu_seqlens_k are as `cu_seqlens` there, max_seqlen_q and max_seqlen_k as `max_seqlen`,
    but may be tensors, which are not read. Returns (Tq, H, D).
    Gradients are deterministic, whatever `deterministic` is.

    Raises UnsupportedInputError as `attention` does, and for dropout, causal attention, windows, soft caps, ALiBi,
    returned probabilities, block tables, and fewer heads in k and v than in q.
    """
    operation = "flash_attn_varlen_func"
    for name, value, neutral in (
        ("dropout_p", dropout_p, (0.0,)),
        ("causal", causal, (False,)),
        ("window_size", window_size, ((-1, -1), [-1, -1], (None, None))),
        ("softcap", softcap, (0.0, None)),
        ("alibi_slopes", alibi_slopes, (None,)),
        ("return_attn_probs", return_attn_probs, (False,)),
        ("block_table", block_table, (None,)),
    ):
        is_array = isinstance(value, Tensor) or getattr(value, "ndim", None)  # of which no comparison is one truth
        if is_array or value not in neutral:
            got = value if isinstance(value, tuple) else given(value)
            raise unsupported(operation, name, f"is {got}", f"{neutral[0]}")
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    check_heads(operation, q, k, v, "(T, H, D)")
    check_scale(operation, softmax_scale, "softmax_scale")
    longest = []
    for side, boundaries, most in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        most = None if isinstance(most, Tensor) else most
        check_boundaries(operation, f"cu_seqlens_{side}", boundaries, "q", q)
        check_longest(operation, f"max_seqlen_{side}", most)
        longest.append(most)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        got = f"has shape {tuple(cu_seqlens_k.shape)} while cu_seqlens_q has {tuple(cu_seqlens_q.shape)}"
        raise unsupported(operation, "cu_seqlens_k", got, "as many sequences as cu_seqlens_q")
    refuse_transforms(operation, q=q, k=k, v=v)
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, softmax_scale, wants_gradients(q, k, v))[0]
