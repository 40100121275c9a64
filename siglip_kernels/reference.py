"""Every operation in PyTorch: the specification that the kernels are tested against, and the `eager` backend.

Written for clarity and for correctness in any floating-point dtype (tests compare with fp64), not for speed. Statistics
and probabilities are in at least fp32 whatever the inputs are.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attention`, and its probabilities (B, H, Sq, Sk).

    mask: broadcastable to (B, H, Sq, Sk); bool (True: attended to) or floating point (added to the scores).
    dropout: the rate at which probabilities are dropped.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale  # [B, H, Sq, Sk]
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask.to(scores.dtype)
    if lengths is None:
        weights = scores.softmax(-1, dtype=_at_least_fp32(q.dtype))
    else:
        padding = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]  # [B, Sk]
        padding = padding[:, None, None, :]
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        # Masked again after the softmax: a sample without any valid key then gives zeros, not an average of padding.
        weights = scores.softmax(-1, dtype=_at_least_fp32(q.dtype)).masked_fill(padding, 0)
    weights = weights.to(q.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention: softmax(scale · q kᵀ) v.

    q: (B, Sq, H, D); k, v: (B, Sk, H, D). Returns (B, Sq, H, D).
    scale: D**-0.5 unless given. lengths: int32 (B,), how many of a sample's keys are valid; 0 gives zeros.
    cu_seqlens: integers (N + 1,). q, k, v and the result are (T, H, D), N sequences one after the other; tokens
    cu_seqlens[i] to cu_seqlens[i + 1] attend to each other alone, and those behind the last give zeros.
    max_seqlen: not used, with cu_seqlens. mask, dropout: as in `attention_with_weights`; no mask with cu_seqlens.
    """
    if cu_seqlens is None:
        return attention_with_weights(q, k, v, scale=scale, lengths=lengths, mask=mask, dropout=dropout)[0]
    if lengths is not None or mask is not None:
        raise ValueError("attention: cu_seqlens is given with lengths or mask; supported: one of them")
    boundaries = cu_seqlens.tolist()
    sizes = [end - start for start, end in pairwise([*boundaries, q.shape[0]])]
    *sequences, _ = zip(*(tensor[None].split(sizes, dim=1) for tensor in (q, k, v)), strict=True)
    out = [attention(*sequence, scale=scale, dropout=dropout) for sequence in sequences]
    return torch.cat([*out, q.new_zeros(1, sizes[-1], *q.shape[1:])], dim=1)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias + residual. x: (..., in); weight: (out, in); bias: (out,); residual and result: (..., out)."""
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """fc2(gelu_tanh(fc1(x))) + residual. x: (..., width); fc1_weight: (hidden, width); fc2_weight: (width, hidden)."""
    return linear(F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate="tanh"), fc2_weight, fc2_bias, residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., 2016). x: (..., width); weight, bias: (width,)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)  # the ONNX exporter needs a constant, not a size of x


def pre_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    *,
    linear: Callable[..., Tensor] = linear,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation, then the projections to queries, keys and values, split into heads.

    x: (B, S, width); norm_weight, norm_bias: (width,); weights of the projections: (H · D, width), biases: (H · D,).
    linear: what computes the projections. Returns q, k and v, each (B, S, H, D), H = num_heads.
    """
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    q = linear(normed, q_weight, q_bias).unflatten(-1, (num_heads, -1))
    k = linear(normed, k_weight, k_bias).unflatten(-1, (num_heads, -1))
    v = linear(normed, v_weight, v_bias).unflatten(-1, (num_heads, -1))
    return q, k, v


def pre_norm_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x + out_proj(attention(pre_norm_qkv(x))): the first half of an encoder layer.

    x: (B, S, width), or (T, width) with cu_seqlens; out_weight: (width, H · D); out_bias: (width,); the others as in
    `pre_norm_qkv` and `attention`.
    """
    q, k, v = pre_norm_qkv(
        x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads
    )
    attended = attention(q, k, v, scale=scale, lengths=lengths, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return linear(attended.flatten(-2), out_weight, out_bias, x)


def pre_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    mlp: Callable[..., Tensor] = mlp,
) -> Tensor:
    """x + mlp(layer_norm(x)): the second half of an encoder layer. x: (..., width); weights as in `mlp`.

    mlp: what computes it.
    """
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    return mlp(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, x)


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

    x: (B, S, width); probe: (1, 1, width); the others are `torch.nn.MultiheadAttention`'s parameters:
    in_proj_weight (3 width, width) holds the projections of q, k and v. Returns (B, width).
    """
    batch, _, width = x.shape
    q_weight, k_weight, v_weight = in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = in_proj_bias.chunk(3)
    q = F.linear(probe, q_weight, q_bias).expand(batch, 1, width).unflatten(-1, (num_heads, -1))
    k = F.linear(x, k_weight, k_bias).unflatten(-1, (num_heads, -1))
    v = F.linear(x, v_weight, v_bias).unflatten(-1, (num_heads, -1))
    pooled = attention(q, k, v, lengths=lengths).reshape(batch, width)
    return F.linear(pooled, out_proj_weight, out_proj_bias)


def patch_embed(pixel_values: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """Non-overlapping patches, each projected to one token, plus its position embedding.

    pixel_values: (B, C, H, W); weight: (width, C, p, p), a convolution's; bias: (width,);
    position: (S, width) or broadcastable, S = (H // p) · (W // p). Pixels beyond the last whole patch are ignored.
    Returns (B, S, width).
    """
    tokens = F.conv2d(pixel_values, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    return tokens + position


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    offset: int | None = None,
    positive_weight: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    image_weight: Tensor | None = None,
    text_weight: Tensor | None = None,
    ignore: int | None = None,
    reduction: str = "images",
) -> Tensor:
    """The pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, equation 1), and those derived from it.

    L = -(1/N) Σᵢⱼ wᵢⱼ log σ(zᵢⱼ (t xᵢ·yⱼ + b)), zᵢⱼ = 1 where pair (i, j) is positive, else -1.
    image_embeds: (N, D), text_embeds: (M, D), normalised by the caller; logit_scale: t itself, already exponentiated.
    image_groups, text_groups: int64 (N,), (M,); pairs of equal groups from 0 on are positive. offset: instead, pairs
    i + offset = j are positive; with neither, N = M and the offset is 0.
    positive_weight (a number or (N,)), negative_weight, image_weight (N,), text_weight (M,): factors of w.
    ignore: pairs with an image or a text of this group weigh 0.
    reduction: the sum is divided by the number of "images", "pairs" or "positives", or not ("sum"); "none": (N,), of
    each image. Returns at least fp32.
    """
    dtype = _at_least_fp32(image_embeds.dtype)
    logits = (text_embeds @ image_embeds.T).to(dtype) * logit_scale + logit_bias  # [M, N]
    texts, images = logits.shape  # not len(logits), which an exporter makes a constant
    if image_groups is not None and text_groups is not None:
        positive = (text_groups[:, None] == image_groups) & (image_groups >= 0)
        if ignore is not None:
            positive = positive & (image_groups != ignore)
        signs = 2 * positive.to(dtype) - 1
    elif offset is not None:
        rows, columns = torch.arange(texts, device=logits.device), torch.arange(images, device=logits.device)
        signs = 2 * (rows[:, None] == columns + offset).to(dtype) - 1
    else:
        signs = 2 * torch.eye(images, dtype=dtype, device=logits.device) - 1
    losses = -F.logsigmoid(signs * logits)
    if isinstance(positive_weight, Tensor) or positive_weight != 1 or negative_weight != 1:
        losses = torch.where(signs > 0, losses * positive_weight, losses * negative_weight)
    if image_weight is not None:
        losses = losses * image_weight
    if text_weight is not None:
        losses = losses * text_weight[:, None]
    if ignore is not None and image_groups is not None and text_groups is not None:
        losses = losses.masked_fill((text_groups[:, None] == ignore) | (image_groups == ignore), 0)
    if reduction == "none":
        return losses.sum(0)
    return losses.sum() / {"images": images, "pairs": images * texts, "sum": 1}.get(reduction, (signs > 0).sum())


def resize_normalize(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype
) -> Tensor:
    """Images (C, H, W) of any sizes, uint8, as (B, C, *size): resized, rounded to whole levels, normalised.

    mean, std: (C,), in levels. mode: "bilinear" or "bicubic", antialiased. Computes in at least the dtype of mean.
    """
    exact = _at_least_fp32(mean.dtype)
    resized = [
        F.interpolate(image[None].to(exact), size=size, mode=mode, align_corners=False, antialias=True)
        for image in images
    ]
    levels = torch.cat(resized).clamp(0, 255).round()
    return ((levels - mean[:, None, None]) / std[:, None, None]).to(dtype)
