"""The MAP head's attention without its two large GEMMs.

The probe is the same for every image, so its query q = W_q·probe + b_q is one vector. Per head,
  scores  qₕ·(W_k x + b_k) = x·(W_kᵀ qₕ) + constant, and a constant does not change a softmax;
  values  Σₛ aₛ (W_v xₛ + b_v) = W_v (Σₛ aₛ xₛ) + b_v, because Σₛ aₛ = 1.
So keys and values are never formed: 4·width² FLOPs per token become 4·width·heads. Exact up to rounding.

Three steps: `fold` makes fₕ = W_kᵀ qₕ; one pass over the tokens makes pooledₕ = Σₛ aₛₕ xₛ (`pool_tokens`, or the
operator of api.py); `project` applies W_v, b_v and the output projection.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.arguments import Affine


def split(in_proj: Affine) -> tuple[Affine, Affine, Affine]:
    """The projections of q, k and v: a third of the rows each."""
    assert in_proj.bias is not None
    q, k, v = (Affine(*third) for third in zip(in_proj.weight.chunk(3), in_proj.bias.chunk(3), strict=True))
    return q, k, v


def fold(probe: Tensor, q_proj: Affine, k_weight: Tensor, num_heads: int) -> Tensor:
    """fₕ, the query of every head folded with the projection of keys. probe: (1, 1, width). Returns (H, width)."""
    width = probe.shape[-1]
    q = F.linear(probe.reshape(width), *q_proj).view(num_heads, 1, -1)
    return (q @ k_weight.reshape(num_heads, -1, width)).squeeze(1)


def project(pooled: Tensor, v_proj: Affine, out_proj: Affine, tokens: int, lengths: Tensor | None) -> Tensor:
    """The head's output (B, width) from averages of the tokens, pooled: (B, H, width).

    tokens: S. Where there is no token, or lengths (B,) is 0, there is no value, and v's bias does not count.
    """
    _, heads, width = pooled.shape
    assert v_proj.bias is not None
    values = pooled.transpose(0, 1) @ v_proj.weight.reshape(heads, -1, width).transpose(1, 2)  # [H, B, head_dim]
    bias = v_proj.bias.view(heads, 1, -1)
    if lengths is not None:
        bias = bias * (lengths > 0).to(pooled.dtype)[:, None]
    if tokens > 0:
        values = values + bias
    return F.linear(values.transpose(0, 1).flatten(1), *out_proj)


def pool_tokens(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    """Σₛ softmaxₛ(scale · x·folded) xₛ in PyTorch. x: (B, S, width); folded: (H, width). Returns (B, H, width).

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
    """`reference.attention_pool` by the algebra above, in PyTorch. x: (B, S, width). Returns (B, width)."""
    q_proj, k_proj, v_proj = split(Affine(in_proj_weight, in_proj_bias))
    folded = fold(probe, q_proj, k_proj.weight, num_heads)
    pooled = pool_tokens(x, folded, (x.shape[2] // num_heads) ** -0.5, lengths)
    return project(pooled, v_proj, Affine(out_proj_weight, out_proj_bias), x.shape[1], lengths)
