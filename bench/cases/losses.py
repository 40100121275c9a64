"""The definitions of the losses that are made of the sigmoid loss, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import reference


def siglip_plus_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_groups: Tensor,
    text_groups: Tensor,
) -> Tensor:
    """SigLIP+ as `siglip_kernels.SigLIPPlusLoss` defines it: each positive weighs the mean of 1/k and 1/k'.

    image_embeds: (N, D); text_embeds: (M, D); image_groups: (N,); text_groups: (M,), negative for texts of no image.
    """
    positive = image_groups[:, None] == text_groups  # [N, M]
    logits = (image_embeds @ text_embeds.T).to(logit_scale.dtype) * logit_scale + logit_bias
    of_image, of_text = (positive.sum(side, keepdim=True).clamp_min(1).to(logits) for side in (1, 0))
    weight = torch.where(positive, (1 / of_image + 1 / of_text) / 2, 1.0)
    return (weight * F.softplus(torch.where(positive, -logits, logits))).mean()


def matryoshka_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    widths: Sequence[int],
    **options: Any,
) -> Tensor:
    """(len(widths),): the sigmoid loss of each prefix of the embeddings (N, D) and (M, D), normalised."""
    exact = torch.promote_types(image_embeds.dtype, torch.float32)

    def prefix(embeds: Tensor, width: int) -> Tensor:
        return F.normalize(embeds[:, :width].to(exact), dim=-1).to(embeds.dtype)

    losses = [
        reference.sigmoid_loss(prefix(image_embeds, width), prefix(text_embeds, width), scale, bias, **options)
        for width, scale, bias in zip(widths, logit_scales, logit_biases, strict=True)
    ]
    return torch.stack(losses)
