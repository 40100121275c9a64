"""bfloat16 for long runs on a CPU that multiplies it faster than fp32, where the checkpoint keeps its embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_model.demo import PICTURES
from siglip_model.demo.classify import image_name
from siglip_model.images import model_inputs
from siglip_model.outputs import pooled
from siglip_model.pretrained import PreTrainedModel

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline

LONG_RUN = 64  # images; the check takes as long as about five
LEAST_COSINE = 0.9995
CHECKED_TOKENS, CHECKED_TEXTS = 512, 4


def has_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_bfloat16(classifier: ZeroShotImageClassificationPipeline) -> float | None:
    """Converts the model to bfloat16, but t' and b of its scores. Returns the least cosine between its embeddings in
    both dtypes, of one to eight pictures of the demo, as many as have about 512 patches, and of four texts.

    None: the model stays as it is, because it is not in fp32 on a CPU that has bfloat16, or gives no embeddings.
    """
    model = classifier.model
    if not (isinstance(model, PreTrainedModel) and model.device.type == "cpu" and model.dtype == torch.float32):
        return None
    pictures = [str(path) for path in sorted(PICTURES.glob("*.png"))]
    vision = model.config.vision_config
    if not (has_bfloat16() and vision.vision_use_head and pictures):
        return None
    names = [image_name(path) for path in pictures[:CHECKED_TEXTS]]
    images = [classifier.prepare(pictures[0])]
    patches = (
        model_inputs.tokens(images[0]) if "spatial_shapes" in images[0] else model.vision_model.embeddings.num_patches
    )
    images += [classifier.prepare(path) for path in pictures[1 : CHECKED_TOKENS // patches]]
    before = _embeddings(classifier, images, names)
    classifier.exact_logits = model.logit_scale.detach().clone(), model.logit_bias.detach().clone()
    model.to(torch.bfloat16)
    after = _embeddings(classifier, images, names)
    cosines = [F.cosine_similarity(*pair, dim=-1) for pair in zip(before, after, strict=True)]
    return torch.cat(cosines).min().item()


@torch.no_grad()
def _embeddings(
    classifier: ZeroShotImageClassificationPipeline, images: list[model_inputs.Inputs], texts: list[str]
) -> tuple[Tensor, Tensor]:
    """float32 (images, width) and (texts, width)."""
    inputs: dict[str, Any] = classifier.join(images)
    image_embeds = pooled(classifier.model.get_image_features(**inputs))
    return image_embeds.float(), classifier.encode_labels(texts, "{}").float()
