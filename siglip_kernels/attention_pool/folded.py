"""The MAP head's attention without its two large GEMMs.

The probe is the same for every image, so its query q = W_q·probe + b_q is one vector. Per head,
  scores  qₕ·(W_k x + b_k) = x·(W_kᵀ qₕ) + constant, and a constant does not change a softmax;
  values  Σₛ aₛ (W_v xₛ + b_v) = W_v (Σₛ aₛ xₛ) + b_v, because Σₛ aₛ = 1.
So keys and values are never formed: 4·width² FLOPs a token become 4·width·heads. Exact but for rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_by(
    pooling: Callable[[Tensor, Tensor, float, Tensor | None], Tensor],
    x: Tensor,
    probe: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    num_heads: int,
    lengths: Tensor | None,
) -> Tensor:
    """Everything around the one pass over the tokens, which is `pooling(x, folded, scale, lengths)`: `plain_pooling`,
    or another of the same meaning."""
    width = x.shape[-1]
    head_dim = width // num_heads
    q_weight, k_weight, v_weight = in_proj_weight.chunk(3)
    q_bias, _, v_bias = in_proj_bias.chunk(3)
    q = F.linear(probe.reshape(width), q_weight, q_bias).view(num_heads, 1, head_dim)
    folded = (q @ k_weight.reshape(num_heads, head_dim, width)).squeeze(1)  # [H, width]
    pooled = pooling(x, folded, head_dim**-0.5, lengths).transpose(0, 1)  # [H, B, width]
    values = pooled @ v_weight.reshape(num_heads, head_dim, width).transpose(1, 2)  # [H, B, head_dim]
    bias = v_bias.view(num_heads, 1, head_dim)
    if lengths is not None:  # no key, no value: its bias goes too
        bias = bias * (lengths > 0).to(x.dtype)[:, None]
    if x.shape[1] > 0:
        values = values + bias
    return F.linear(values.transpose(0, 1).flatten(1), out_proj_weight, out_proj_bias)


def plain_pooling(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    """Σₛ softmaxₛ(scale · x·folded) xₛ, in plain PyTorch. x: (B, S, width); folded: (H, width). Returns (B, H, width).

    lengths: (B,), how many of a sample's tokens are valid; 0 gives zeros.
    """
    scores = F.linear(x, folded * scale).transpose(1, 2)  # [B, H, S]
    wide = torch.promote_types(x.dtype, torch.float32)
    if lengths is None:
        return scores.softmax(-1, dtype=wide).to(x.dtype) @ x
    padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[:, None]  # [B, 1, S]
    scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=wide).masked_fill(padding, 0).to(x.dtype) @ x


def folded_attention_pool(
    x: Tensor,
    probe: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    num_heads: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """`reference.attention_pool` by the algebra above, in plain PyTorch. x: (B, S, width). Returns (B, width)."""
    return pool_by(
        plain_pooling,
        x,
        probe,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        num_heads,
        lengths,
    )
