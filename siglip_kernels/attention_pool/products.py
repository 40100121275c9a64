"""Pooling by PyTorch's products, where the kernels do not fit: fp32, whose IEEE products get no tensor core and whose
tiles would take twice the registers, and more heads or columns than `launch.LARGEST`.
"""

import math

import torch
from torch import Tensor


def pool_forward(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """pooled (B, H, width), and the log-sum-exp (B, H) of the scores in base 2, -inf without a token; fp32."""
    x, scores = _scores(x, folded, scale, lengths)
    highest = scores.amax(1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0)  # a sample without a token
    weights = torch.exp2(scores - highest)
    total = weights.sum(1, keepdim=True)  # [B, 1, H]
    weights = (weights / total.masked_fill(total == 0, 1)).to(x.dtype)
    return weights.transpose(1, 2) @ x, (highest + total.log2()).squeeze(1)


def pool_backward(
    pooled_grad: Tensor,
    x: Tensor,
    folded: Tensor,
    pooled: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and folded; formulas in kernels.py."""
    x, scores = _scores(x, folded, scale, lengths)
    weights = torch.exp2(scores - log_sum_exp[:, None]).masked_fill(scores == float("-inf"), 0)
    delta = (pooled.float() * pooled_grad.float()).sum(2)[:, None]
    scores_grad = weights * ((x @ pooled_grad.transpose(1, 2)).float() - delta) * scale
    weights, scores_grad = weights.to(x.dtype), scores_grad.to(x.dtype)
    return weights @ pooled_grad + scores_grad @ folded, scores_grad.flatten(0, 1).T @ x.flatten(0, 1)


def _scores(x: Tensor, folded: Tensor, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with zeros, and fp32 scores (B, S, H) in base 2 with -inf, where a token is not valid."""
    padding = None
    if lengths is not None:
        padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[:, :, None]  # [B, S, 1]
        x = x.masked_fill(padding, 0)
    scores = (x @ folded.T).float() * (scale * math.log2(math.e))
    return x, scores if padding is None else scores.masked_fill(padding, float("-inf"))
