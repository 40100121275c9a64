"""Pooling in PyTorch, for inputs that the kernels do not support (`config.fits`): fp32, whose IEEE products have no
tensor core and whose tiles would take twice the registers, and more heads × columns than `config.LARGEST`.
"""

import math

import torch
from torch import Tensor


def pool_forward(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """pooled (B, H, width), and of the scores in base 2 the highest and the sum of powers, each (B, H) fp32."""
    x, scores = _scores(x, folded, scale, lengths)
    highest = scores.amax(1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0)  # a sample without a token
    weights = torch.exp2(scores - highest)
    total = weights.sum(1, keepdim=True)  # [B, 1, H]
    weights = (weights / total.masked_fill(total == 0, 1)).to(x.dtype)
    return weights.transpose(1, 2) @ x, highest.squeeze(1), total.squeeze(1)


def pool_backward(
    pooled_grad: Tensor,
    x: Tensor,
    folded: Tensor,
    pooled: Tensor,
    highest: Tensor,
    total: Tensor,
    scale: float,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and folded; formulas in kernels.py."""
    x, scores = _scores(x, folded, scale, lengths)
    weights = torch.exp2(scores - highest[:, None]) / total.masked_fill(total == 0, 1)[:, None]
    weights_grad = (x @ pooled_grad.transpose(1, 2)).float()
    delta = (weights * weights_grad).sum(1, keepdim=True)
    weights, scores_grad = weights.to(x.dtype), (weights * (weights_grad - delta) * scale).to(x.dtype)
    surplus = scores_grad.sum(1, dtype=torch.float32)  # [B, H]; see kernels.py
    folded_grad = (scores_grad.flatten(0, 1).T @ x.flatten(0, 1)).float()
    folded_grad -= (surplus[:, :, None] * pooled).sum(0)
    return weights @ pooled_grad + scores_grad @ folded, folded_grad.to(x.dtype)


def _scores(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, and fp32 scores (B, S, H) in base 2; where a token is not valid they are zero and -inf."""
    padding = None
    if lengths is not None:
        padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[:, :, None]  # [B, S, 1]
        x = x.masked_fill(padding, 0)
    scores = (x @ folded.T).float() * (scale * math.log2(math.e))
    return x, scores if padding is None else scores.masked_fill(padding, float("-inf"))
