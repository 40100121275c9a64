"""Which kernels compute a call: short.py's, Hopper's or Blackwell's where enabled, or forward.py's and backward.py's.

Only the launches import Triton.
"""

from typing import Any

import torch
from torch import Tensor

from siglip_kernels.arguments import unit_stride
from siglip_kernels.attention.config import is_short, typical_length
from siglip_kernels.device import blackwell_kernels_enabled, hopper_kernels_enabled
from siglip_kernels.errors import unsupported


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None, keep_for_backward: bool
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exp if the backward needs it, else an empty tensor. scale: None for D**-0.5."""
    from siglip_kernels.attention.forward import attention_forward
    from siglip_kernels.attention.short import attention_short_forward

    scale = _scale(scale, q)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    lengths = None if lengths is None else lengths.contiguous()
    if is_short(q, k):
        return attention_short_forward(q, k, v, lengths, scale), q.new_empty(0, dtype=torch.float32)
    if hopper_kernels_enabled():
        from siglip_kernels.attention.hopper import attention_forward_hopper

        return attention_forward_hopper(q, k, v, lengths, scale, keep_for_backward)
    if blackwell_kernels_enabled() and lengths is None:  # with lengths it would spill: see blackwell.py
        from siglip_kernels.attention.blackwell import attention_forward_blackwell

        return attention_forward_blackwell(q, k, v, lengths, scale, keep_for_backward)
    return attention_forward(q, k, v, lengths, scale, keep_for_backward)


def kept_shape(q: Tensor, k: Tensor, keep_for_backward: bool) -> int | tuple[int, int, int]:
    """The shape of the log-sum-exp that `launch_forward` returns."""
    return 0 if not keep_for_backward or is_short(q, k) else (q.shape[0], q.shape[2], q.shape[1])


def launch_backward(
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
    packed_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; one that is not needed is an empty tensor.

    packed_grad: (B, S, 3, H, D), contiguous, into whose parts they are written; None: each is a tensor of its own.
    """
    from siglip_kernels.attention.backward import attention_backward
    from siglip_kernels.attention.short import attention_short_backward

    scale = _scale(scale, q)
    q, k, v, out_grad = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(out_grad)
    lengths = None if lengths is None else lengths.contiguous()
    needs = (needs_q, needs_k_or_v, packed_grad)
    if is_short(q, k):
        return attention_short_backward(out_grad, q, k, v, lengths, scale, *needs)
    _require_kept(log_sum_exp, kept_shape(q, k, True))
    if hopper_kernels_enabled():
        from siglip_kernels.attention.hopper import attention_backward_hopper

        return attention_backward_hopper(out_grad, q, k, v, out, log_sum_exp, lengths, scale, *needs)
    return attention_backward(out_grad, q, k, v, out, log_sum_exp, lengths, scale, *needs)


def launch_packed_forward(
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
    """`launch_forward` of packed sequences, (T, H, D). cu_seqlens_k: None for cu_seqlens_q.

    These are computed by forward.py's and backward.py's kernels, however short, and whichever others are enabled.
    """
    from siglip_kernels.attention.forward import attention_forward

    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    batch_q, batch_k, batch_v = (unit_stride(tensor)[None] for tensor in (q, k, v))
    scale = _scale(scale, q)
    out, log_sum_exp = attention_forward(batch_q, batch_k, batch_v, None, scale, keep_for_backward, sequences)
    return out.view(q.shape), log_sum_exp.view(packed_kept_shape(q, keep_for_backward))


def packed_kept_shape(q: Tensor, keep_for_backward: bool) -> int | tuple[int, int]:
    """The shape of the log-sum-exp that `launch_packed_forward` returns."""
    return (q.shape[1], q.shape[0]) if keep_for_backward else 0


def launch_packed_backward(
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
    packed_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_backward` of packed sequences. packed_grad: (T, 3, H, D)."""
    from siglip_kernels.attention.backward import attention_backward

    _require_kept(log_sum_exp, packed_kept_shape(q, True))
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    batch_out_grad, batch_q, batch_k, batch_v = (unit_stride(tensor)[None] for tensor in (out_grad, q, k, v))
    kept = (out[None], log_sum_exp[None], None, _scale(scale, q), needs_q, needs_k_or_v)
    packed_grad = None if packed_grad is None else packed_grad[None]
    gradients = attention_backward(batch_out_grad, batch_q, batch_k, batch_v, *kept, packed_grad, sequences)
    needs = (needs_q, needs_k_or_v, needs_k_or_v)
    q_grad, k_grad, v_grad = (
        gradient[0] if need else gradient for gradient, need in zip(gradients, needs, strict=True)
    )
    return q_grad, k_grad, v_grad


def _sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Any:
    """The launchers' `Sequences`."""
    from siglip_kernels.attention.sequences import Sequences

    sequences = len(cu_seqlens_q) - 1
    queries, keys = typical_length(len(q), sequences, max_seqlen_q), typical_length(len(k), sequences, max_seqlen_k)
    return Sequences(cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, (queries, keys))


def _require_kept(log_sum_exp: Tensor, shape: Any) -> None:
    if log_sum_exp.shape != shape:
        raise unsupported("attention", "keep_for_backward", "was False", "True where gradients are required")


def _scale(scale: float | None, q: Tensor) -> float:
    head_dim: int = q.shape[-1]
    return head_dim**-0.5 if scale is None else scale
