"""What the models return: dataclasses that can be indexed like transformers' ModelOutput."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from siglip_kernels.errors import unsupported


@dataclass
class ModelOutput:
    """Fields by attribute, by name or by position; the latter two skip fields that are None."""

    def __init_subclass__(cls) -> None:
        # DDP, FSDP and torch.compile find the tensors through pytree.
        pytree.register_pytree_node(
            cls,
            lambda output: ([getattr(output, field.name) for field in fields(output)], None),
            lambda values, _: cls(*values),
        )

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self else default

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in (field.name for field in fields(self)):
            raise KeyError(key)
        setattr(self, key, value)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """A tower's output.

    last_hidden_state: (B, S, width), after the final LayerNorm. pooler_output: (B, projection), or None without a head.
    hidden_states: the embeddings and each layer's output, before the final LayerNorm. attentions: per layer
    (B, H, S, S).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SiglipOutput(ModelOutput):
    """loss: scalar. logits_per_image: (images, texts); logits_per_text: its transpose. The embeds have unit length."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class ImageClassifierOutput(ModelOutput):
    """loss: scalar. logits: (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def pooled(output: BaseModelOutputWithPooling) -> Tensor:
    """A tower's embeddings (B, projection). Raises ValueError for a vision tower without its pooling head."""
    if output.pooler_output is None:
        raise unsupported(
            "SiglipModel", "vision_use_head", "is False, so images have no embedding", "True, or SiglipVisionModel"
        )
    return output.pooler_output


def unit_length(embeds: Tensor, eps: float | None = None) -> Tensor:
    """embeds: floating point (..., D). Each vector divided by its Euclidean norm, as in transformers.

    eps: the least number to divide by. Without it a zero vector gives NaN, as in transformers.
    """
    norm = embeds.norm(p=2, dim=-1, keepdim=True)
    return embeds / (norm if eps is None else norm.clamp_min(eps))
