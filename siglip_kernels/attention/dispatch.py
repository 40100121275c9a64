"""Which kernels compute a call: short.py's, Hopper's or Blackwell's where enabled, or forward.py's and backward.py's.

Only the launches import Triton.
"""

import torch
from torch import Tensor

from siglip_kernels.arguments import unit_stride
from siglip_kernels.attention.config import is_short
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
    if blackwell_kernels_enabled() and lengths is None:  # with lengths the kernel would spill 24 bytes
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
    if log_sum_exp.shape != kept_shape(q, k, True):
        raise unsupported("attention", "keep_for_backward", "was False", "True where gradients are required")
    if hopper_kernels_enabled():
        from siglip_kernels.attention.hopper import attention_backward_hopper

        return attention_backward_hopper(out_grad, q, k, v, out, log_sum_exp, lengths, scale, *needs)
    return attention_backward(out_grad, q, k, v, out, log_sum_exp, lengths, scale, *needs)


def _scale(scale: float | None, q: Tensor) -> float:
    head_dim: int = q.shape[3]
    return head_dim**-0.5 if scale is None else scale
