"""What the backend triton_fp8 quantises of a model, what it leaves and why, and a check of what comes out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels import fp8
from siglip_kernels.errors import unsupported
from siglip_kernels.fp8 import LEAST_COSINE, Quantised
from siglip_kernels.fusable import has_ordinary_parameters, has_own_forward, is_unhooked
from siglip_model import backends

if TYPE_CHECKING:
    from siglip_model.pretrained import PreTrainedModel

logger = logging.getLogger(__name__)

BACKEND = "triton_fp8"


@dataclass
class Report(Quantised):
    """What of a model is computed in fp8."""

    left: dict[str, str] = field(default_factory=dict)  # modules that keep projections from fp8, and why

    def __str__(self) -> str:
        because = (f"not in fp8 because of {name}: it {why}" for name, why in self.left.items())
        return "\n".join([super().__str__(), *because])


def report(model: nn.Module) -> Report:
    """What triton_fp8 quantises, of the parts of the model that have this backend."""
    from siglip_model.encoder import Attention, EncoderLayer
    from siglip_model.layers import MLP, TANH_GELU

    found, names = Report(), {id(module): name for name, module in model.named_modules()}

    def fit(kind: type, *modules: nn.Module) -> bool:
        """Whether they are as they were made, so that the backend takes their weights. Those that are not are named."""
        reasons = {names[id(module)]: _why_not(module, kind) for module in modules}
        left = {name: why for name, why in reasons.items() if why is not None}
        found.left |= left
        return not left

    projections: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, EncoderLayer) and module.ops.name == BACKEND and fit(Attention, module.self_attn):
            attention = module.self_attn
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            fused = [fit(nn.LayerNorm, module.layer_norm1), fit(nn.Linear, *qkv), fit(nn.Linear, attention.out_proj)]
            projections += qkv if all(fused[:2]) else []
            projections += [attention.out_proj] if all(fused) else []
        if isinstance(module, MLP) and module.ops.name == BACKEND:
            if type(module) is not MLP or has_own_forward(module):
                found.left[name] = "has a forward of its own"
            elif module.activation not in TANH_GELU:
                found.left[name] = f"has the activation {module.activation!r}, not GELU by tanh"
            elif fit(nn.Linear, module.fc1, module.fc2):
                projections += [module.fc1, module.fc2]
    for projection in projections:
        found.add(projection.weight, projection.bias)
    return found


def _why_not(module: Any, kind: type) -> str | None:
    """As `siglip_kernels.fusable.is_fusable` says it."""
    found = type(module)
    if found is not kind:  # by their full names: PEFT's linear layers are also called Linear
        return f"is a {found.__module__}.{found.__qualname__}, not a {kind.__module__}.{kind.__qualname__}"
    if not is_unhooked(module):
        return "has hooks or a forward of its own"
    if not has_ordinary_parameters(module):
        return "lacks a weight or a bias, or they wrap other tensors"
    return None


def announce(model: nn.Module) -> None:
    """Logs the report: what is not in fp8 as a warning. The weights are quantised at their first use, or again."""
    fp8.forget(model.parameters())
    found = report(model)
    logger.log(logging.WARNING if found.left or not found.projections else logging.INFO, "%s: %s", BACKEND, found)


@torch.no_grad()
def check(model: PreTrainedModel, least_cosine: float = LEAST_COSINE) -> float:
    """The least cosine between the bundled pictures' embeddings under triton_fp8 and under sdpa.

    model: with an image tower that has the backend triton_fp8, in evaluation mode. The embeddings are the tower's.
    Raises UnsupportedInputError if the cosine is below least_cosine: then this checkpoint does not suit fp8.
    """
    from siglip_model.vision_tower import SiglipVisionModel

    tower = next((module for module in model.modules() if isinstance(module, SiglipVisionModel)), None)
    if tower is None or tower.backend != BACKEND:
        got = "has no image tower" if tower is None else f"has an image tower with the backend {tower.backend!r}"
        raise unsupported("check", "model", got, f"an image tower with the backend {BACKEND!r}")
    pictures = _pictures(tower)
    found = _embeddings(tower, pictures)
    chosen = tower._backend
    try:
        tower._backend = backends.SDPA
        tower._apply_backend()
        wanted = _embeddings(tower, pictures)
    finally:
        tower._backend = chosen
        tower._apply_backend()
    cosine = float(F.cosine_similarity(found, wanted).min())
    if not cosine >= least_cosine:
        got = f"is {BACKEND!r}, whose image embeddings have a cosine of {cosine:.4f} to those of sdpa"
        raise unsupported("check", "backend", got, f"cosines from {least_cosine} on: use the backend 'triton'")
    return cosine


def _embeddings(tower: nn.Module, pictures: dict[str, Tensor]) -> Tensor:
    """fp32 (images, width)."""
    output = tower(**pictures)
    return (output.last_hidden_state.mean(1) if output.pooler_output is None else output.pooler_output).float()


def _pictures(tower: Any) -> dict[str, Tensor]:
    """The bundled pictures as the tower takes them."""
    from PIL import Image

    from siglip_model.config import Siglip2VisionConfig
    from siglip_model.demo import PICTURES
    from siglip_model.images.naflex import Siglip2ImageProcessor
    from siglip_model.images.tensor import SiglipImageProcessor

    images = [Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*.png"))]
    config = tower.config
    if isinstance(config, Siglip2VisionConfig):
        processor: Any = Siglip2ImageProcessor(patch_size=config.patch_size, max_num_patches=config.num_patches)
    else:
        processor = SiglipImageProcessor(size={"height": config.image_size, "width": config.image_size})
    prepared = processor(images=images, return_tensors="pt")
    return {name: tensor.to(tower.device) for name, tensor in prepared.items()}
