"""What is trained: a module from pairs to their embeddings, which DDP or FSDP wraps, and the loss of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip_kernels import SigLipLoss
from siglip_model.model import SiglipModel
from siglip_model.outputs import pooled, unit_length
from siglip_model.training.settings import TrainingConfig


class Embedded(NamedTuple):
    """What the loss takes, in fp32: unit vectors images (V, N, D) and texts (N, D); t and b, scalars."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor


class Embedder(nn.Module):
    """The model as a function of pairs. autocast: the dtype of the towers' autocast, if any."""

    def __init__(self, model: SiglipModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        *,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        **shapes: Any,
    ) -> Embedded:
        """Arguments: tensors of a `Batch`. shapes: those that say, at native resolution, how large images are.

        images, texts: embeddings that are known, as `Embedded` has them; their tower does not run.
        """
        # A zero embedding, such as a new head may give, stays zero instead of ending the run with NaN.
        if texts is None:
            texts = unit_length(self._run(self.model.get_text_features, input_ids), eps=1e-12)
        if images is None:
            views = pixel_values if pixel_values.ndim == 5 else pixel_values[None]
            flat = self._run(self.model.get_image_features, views.flatten(0, 1), **shapes)
            images = unit_length(flat.unflatten(0, (len(views), -1)), eps=1e-12)
        # No views: FSDP frees its copy of the parameters, and hooks the results.
        return Embedded(images, texts, self.model.logit_scale.squeeze().exp(), self.model.logit_bias.squeeze().clone())

    def _run(self, tower: Callable[..., Any], inputs: Tensor, **shapes: Any) -> Tensor:
        with torch.autocast(inputs.device.type, self.autocast) if self.autocast else nullcontext():
            return pooled(tower(inputs, **shapes)).float()

    @property
    def frozen(self) -> list[str]:
        """Which of `Embedded` come from a tower without trained weights."""
        towers = {"images": self.model.vision_model, "texts": self.model.text_model}
        return [name for name, tower in towers.items() if not trains(tower)]


def trains(module: nn.Module) -> bool:
    """Whether any of its weights is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def joined(parts: Sequence[Embedded]) -> Embedded:
    """The embeddings of a batch from those of its micro-batches."""
    images, texts, scales, biases = zip(*parts, strict=True)
    return Embedded(torch.cat(images, dim=1), torch.cat(texts), scales[-1], biases[-1])


def mean_loss(embedded: Embedded, loss: SigLipLoss) -> Tensor:
    """The sigmoid loss (Zhai et al. 2023, arXiv 2303.15343), a scalar: the mean over the views."""
    images, texts, scale, bias = embedded
    return torch.stack([loss(view, texts, scale, bias) for view in images]).mean()


def initialise_logits(model: SiglipModel) -> None:
    """The paper's initial t' = log 10 and b = -10, with which the many negatives do not dominate the first steps."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)


def freeze(model: SiglipModel, tower: str) -> None:
    """Trains neither weights nor dropout of a tower: "vision", as LiT does (Zhai et al. 2022), or "text"; or "none"."""
    if tower != "none":
        getattr(model, f"{tower}_model").requires_grad_(False).eval()


@torch.no_grad()
def clamp_logits(model: SiglipModel, config: TrainingConfig) -> None:
    """Keeps the temperature t = exp(t') and the bias b in the ranges of the configuration."""
    low, high = (None if limit is None else math.log(limit) for limit in (config.min_scale, config.max_scale))
    _clamp(model.logit_scale, low, high)
    _clamp(model.logit_bias, config.min_bias, config.max_bias)


def _clamp(parameter: Tensor, least: float | None, most: float | None) -> None:
    if least is not None or most is not None:
        parameter.clamp_(least, most)
