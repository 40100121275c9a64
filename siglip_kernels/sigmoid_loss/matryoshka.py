"""The sigmoid loss of nested embeddings, whose first columns are embeddings themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.arguments import given
from siglip_kernels.errors import unsupported
from siglip_kernels.sigmoid_loss.api import check_embeds, same_length, sigmoid_loss

Scalars = Tensor | float | Sequence[Tensor | float]


def matryoshka_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Scalars,
    logit_biases: Scalars,
    widths: Sequence[int],
    *,
    loss: Callable[..., Tensor] = sigmoid_loss,
    **options: Any,
) -> Tensor:
    """(len(widths),): the loss of the first columns of the embeddings, normalised, for each width.

    Their sum, or a weighted sum, is the objective of matryoshka representation learning (Kusupati et al. 2022, arXiv
    2205.13147, equation 1).

    image_embeds: (N, D), text_embeds: (M, D), not necessarily normalised: each prefix is, in at least fp32, and rounded
    to the embeddings' dtype. logit_scales (already exponentiated), logit_biases: one for all widths, or one for each,
    as a tensor (len(widths),) or a sequence. widths: ascending, from 1 to D.
    loss: `sigmoid_loss` in Triton, `chunked_sigmoid_loss`, `plain_sigmoid_loss` or one that takes the same. options: of
    that loss, such as groups and weights, except reduction="none".

    Each width is a launch of its own: together they cost the sum of the widths, 2.25 times the widest of 64, 128, 256,
    512 and 768. Memory is that of the loss and the normalised prefixes. Raises UnsupportedInputError as the loss does.
    """
    operation = "matryoshka_sigmoid_loss"
    check_embeds(operation, image_embeds, text_embeds, same_length=same_length(options))  # type: ignore[arg-type]
    if options.get("reduction") == "none":
        raise unsupported(operation, "reduction", "is 'none'", "a reduction to one number")
    widths, columns = list(widths), image_embeds.shape[1]
    ascending = all(isinstance(width, int) and not isinstance(width, bool) for width in widths)
    if not widths or not ascending or widths != sorted(set(widths)) or not 1 <= widths[0] <= widths[-1] <= columns:
        raise unsupported(operation, "widths", f"is {widths}", f"ascending numbers from 1 to {columns}")
    scales = _each(operation, "logit_scales", logit_scales, len(widths))
    biases = _each(operation, "logit_biases", logit_biases, len(widths))
    losses = []
    for width, scale, bias in zip(widths, scales, biases, strict=True):
        embeds = (_normalised(values[:, :width]) for values in (image_embeds, text_embeds))
        losses.append(loss(*embeds, scale, bias, **options))
    return torch.stack(losses)


def _normalised(prefix: Tensor) -> Tensor:
    exact = torch.promote_types(prefix.dtype, torch.float32)
    return F.normalize(prefix.to(exact), dim=-1).to(prefix.dtype)


def _each(operation: str, argument: str, values: Scalars, count: int) -> list[Tensor | float]:
    """One value for each width."""
    if isinstance(values, (int, float)) or (isinstance(values, Tensor) and values.numel() == 1):
        return [values] * count
    if isinstance(values, Tensor) and values.dim() == 1 and len(values) == count:
        return list(values.unbind())
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count:
        return list(values)
    got = f"has shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"is {given(values)}"
    raise unsupported(operation, argument, got, f"one number, or {count}")
