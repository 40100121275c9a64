"""What the models return: dataclasses that are mappings, like transformers' ModelOutput."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from siglip_kernels.errors import unsupported

_TWINS = (
    "transformers.modeling_outputs",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.siglip2.modeling_siglip2",
)


class _Item:
    """An attribute that reads and writes an item of a ModelOutput. None is an item that is not there."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, output: ModelOutput | None, kind: type) -> Any:
        return None if output is None else output.get(self.name)

    def __set__(self, output: ModelOutput, value: Any) -> None:
        output[self.name] = value


class ModelOutput(dict[str, Any]):
    """Fields by attribute, by name or by position; the latter two skip fields that are None.

    A dict of the fields that are not None, in the order of the class: nn.DataParallel, torch.jit and the ONNX exporter
    need a dict, and accelerate and pipelines rebuild an output from one, or from pairs. DDP, FSDP, torch.compile and
    torch.export find the tensors through pytree.
    """

    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._names = (*cls._names, *inspect.get_annotations(cls))
        for name in cls._names:
            setattr(cls, name, _Item(name))  # @dataclass reads from it that the default is None
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            cls._from_items,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(name), value) for name, value in output.items()],
                list(output),
            ),
        )

    @classmethod
    def _from_items(cls, values: Any, names: Any) -> Self:
        output = cls()
        for name, value in zip(names, values, strict=True):
            output[name] = value
        return output

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """transformers' class of the same name, once it is imported, so that `isinstance` holds for it also.

        Its pipelines index and batch its own outputs, and take any other dict for a plain one.
        """
        cls: type = type(self)
        if torch.compiler.is_compiling():
            return cls
        for module in _TWINS:
            twin = vars(sys.modules[module]).get(cls.__name__) if module in sys.modules else None
            if twin is not None:
                return twin
        return cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._from_items, (list(self.values()), list(self))

    def __post_init__(self) -> None:
        first = self.get(self._names[0])
        if isinstance(first, Iterator):
            first = self[self._names[0]] = list(first)
        if len(self) == 1 and (isinstance(first, Mapping) or _are_pairs(first)):  # the items instead of the first field
            self.clear()
            for name, value in dict(first).items():  # type: ignore[arg-type]
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise KeyError(name)
        if value is None:
            self.pop(name, None)
            return
        after = self._names[self._names.index(name) + 1 :]
        later = {each: self.pop(each) for each in after if each in self}  # to keep the order
        super().__setitem__(name, value)
        super().update(later)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    setdefault = MutableMapping.setdefault  # dict's own, and its |=, would set items past __setitem__

    def __ior__(self, other: Any) -> Self:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __or__(self, other: Any) -> Self:  # type: ignore[override]
        return self.copy().__ior__(other)

    def copy(self) -> Self:
        return self._from_items(self.values(), self)


def _are_pairs(items: Any) -> bool:
    """Whether these are (name, value) pairs, and not a field that is a list, such as a tensor's `tolist()`."""
    if not isinstance(items, list) or not items:
        return False
    return all(isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) for item in items)


@dataclass
class BaseModelOutput(ModelOutput):
    """An encoder's output: as a tower's, but last_hidden_state is before the final LayerNorm."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """A tower's output.

    last_hidden_state: (B, S, width), after the final LayerNorm. pooler_output: (B, projection), or None without a head.
    hidden_states: the embeddings and each layer's output, before the final LayerNorm; None for those not asked for.
    attentions: per layer (B, H, S, S).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
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
class Siglip2Output(SiglipOutput):
    """A SiglipOutput."""


@dataclass
class ImageClassifierOutput(ModelOutput):
    """loss: scalar. logits: (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
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
