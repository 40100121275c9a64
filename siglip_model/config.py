"""Configurations with transformers' names, defaults and config.json, without transformers."""

from __future__ import annotations

import copy
import json
import typing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.checkpoints.errors import build_from_file
from siglip_model.checkpoints.fields import (
    FLAG,
    NOTHING,
    Field,
    check_fields,
    is_finite,
    is_index,
    is_text,
    mapping,
    shown,
    whole,
)
from siglip_model.checkpoints.files import load_config_dict, split_hub_arguments

# Far above every model, and small enough that shapes and the names of labels can be computed.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**14,
    "num_attention_heads": 2**17,
    "max_position_embeddings": 2**24,
    "projection_size": 2**17,
    "num_channels": 2**10,
    "image_size": 2**16,
    "patch_size": 2**16,
}
MOST_LABELS = 2**17

_SWITCHES = dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), FLAG | NOTHING)
_LABELS = {
    "num_labels": whole(0, MOST_LABELS) | NOTHING,
    "id2label": mapping(is_index, is_text, "a dict from ids to strings") | NOTHING,
    "label2id": mapping(is_text, is_index, "a dict from strings to ids") | NOTHING,
}


class PretrainedConfig:
    """Typed fields (the class annotations), and all other entries of a config.json, which are kept and written back.

    Raises TypeError for a field of the wrong type and ValueError for values out of range or inconsistent sizes.
    """

    model_type: ClassVar[str] = ""
    base_config_key: ClassVar[str] = ""

    def __init__(self, /, *args: Any, **kwargs: Any):
        names = list(self._field_types())
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} positional arguments, got {len(args)}")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__} got {name} twice")
            kwargs[name] = value
        foreign = kwargs.pop("model_type", self.model_type)
        if foreign != self.model_type:
            raise ValueError(f"{type(self).__name__}: model_type is {shown(foreign)}; supported: {self.model_type!r}")
        check_fields(type(self).__name__, kwargs, {**_SWITCHES, **_LABELS})
        self.output_hidden_states: bool = kwargs.pop("output_hidden_states", False)
        self.output_attentions: bool = kwargs.pop("output_attentions", False)
        self.return_dict: bool = kwargs.pop("return_dict", True)
        self.problem_type: str | None = kwargs.pop("problem_type", None)
        self._set_labels(kwargs.pop("num_labels", None), kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        for name, expected in self._field_types().items():
            default = getattr(type(self), name)
            setattr(self, name, self._checked(name, kwargs.pop(name, default), expected))
        for name, value in kwargs.items():
            if hasattr(self, name):  # a method, or one of Python's own attributes
                raise ValueError(f"{type(self).__name__}: {name} is not a field; supported: names of no attribute")
            setattr(self, name, value)
        self._validate()

    @classmethod
    def _field_types(cls) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not ClassVar}

    def _checked(self, name: str, value: Any, expected: Any) -> Any:
        # Not huggingface_hub's strict dataclasses: their errors are not TypeErrors, and this package imports lightly.
        allowed = typing.get_args(expected) or (expected,)
        if float in allowed:
            allowed = (*allowed, int)
        if isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
            return value
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise TypeError(
            f"{type(self).__name__}: {name} is {shown(value)} ({type(value).__name__}); supported: {wanted}"
        )

    def _validate(self) -> None:
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type is {shown(self.problem_type)}; supported: {', '.join(PROBLEM_TYPES)}")

    def _check(self, **fields: Field) -> None:
        check_fields(type(self).__name__, vars(self), fields)

    def _check_sizes(self, *names: str, least: int = 1) -> None:
        self._check(**{name: whole(least, LARGEST[name]) for name in names})

    def _validate_transformer(self) -> None:
        self._check_sizes("hidden_size", "intermediate_size", "num_attention_heads")
        self._check_sizes("num_hidden_layers", least=0)
        self._check(
            layer_norm_eps=Field("a finite number above 0", lambda value: is_finite(value) and value > 0),
            attention_dropout=Field("a number from 0 to below 1", lambda value: 0 <= value < 1),
        )
        width, heads = self.hidden_size, self.num_attention_heads  # type: ignore[attr-defined]
        if width % heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size {width} is not divisible by num_attention_heads {heads}"
            )

    def _set_labels(self, num_labels: int | None, id2label: dict | None, label2id: dict | None) -> None:
        """Labels by id: int keys in memory, string keys in JSON. Without names they are LABEL_0, LABEL_1, ..."""
        self.label2id: dict[str, int]
        if id2label is not None:
            self.id2label = {int(index): label for index, label in id2label.items()}
            if num_labels is not None and num_labels != len(self.id2label):
                raise ValueError(f"num_labels is {num_labels} but id2label has {len(self.id2label)} entries")
            self.label2id = label2id if label2id is not None else {name: i for i, name in self.id2label.items()}
        else:
            self.num_labels = 2 if num_labels is None else num_labels
            if label2id is not None:
                self.label2id = label2id

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {index: f"LABEL_{index}" for index in range(count)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    def to_dict(self) -> dict[str, Any]:
        """All values in the form of config.json, where the keys of id2label are strings."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        values = {name: _as_json(value) for name, value in values.items()}
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        values["model_type"] = self.model_type
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Self:
        """Build from the content of a config.json. A tower takes its part of a whole SigLIP configuration."""
        values = copy.deepcopy(values)
        if cls.base_config_key and values.get("model_type") == SiglipConfig.model_type:
            values = values.get(cls.base_config_key) or {}
            if not isinstance(values, dict):
                raise TypeError(f"{cls.__name__}: {cls.base_config_key} is {shown(values)}; supported: dict or None")
        if "num_labels" in overrides and "id2label" not in overrides:
            values.pop("id2label", None)
            values.pop("label2id", None)
        return cls(**{**values, **overrides})

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs: Any) -> Self:
        """Read config.json of a directory or Hub repository.

        revision, cache_dir, local_files_only, token: as in huggingface_hub. Other arguments override fields.
        Raises CheckpointError for a missing or invalid config.json, and for another kind of model.
        """
        hub, overrides = split_hub_arguments(kwargs)
        content = load_config_dict(path_or_id, **hub)
        return build_from_file(content.path, partial(cls.from_dict, content), {}, overrides)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(directory) / "config.json", (self.to_json_string() + "\n").encode())

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _as_json(value: Any) -> Any:
    if isinstance(value, PretrainedConfig):
        return value.to_dict()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return copy.deepcopy(value)


class SiglipTextConfig(PretrainedConfig):
    """The text tower. Defaults: google/siglip-base-patch16-224."""

    model_type = "siglip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | list | None = 49407
    projection_size: int | None = None

    def _validate(self) -> None:
        super()._validate()
        self._validate_transformer()
        if self.projection_size is None:
            self.projection_size = self.hidden_size
        self._check_sizes("vocab_size", "max_position_embeddings", "projection_size")


class SiglipVisionConfig(PretrainedConfig):
    """The vision tower. Defaults: google/siglip-base-patch16-224. image_size and patch_size: sides in pixels."""

    model_type = "siglip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = True

    def _validate(self) -> None:
        super()._validate()
        self._validate_transformer()
        self._check_sizes("num_channels", "image_size", "patch_size")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"SiglipVisionConfig: image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )


class SiglipConfig(PretrainedConfig):
    """Both towers. `text_config` and `vision_config`: a configuration, a dict of its fields, or None for defaults."""

    model_type = "siglip"

    text_config: SiglipTextConfig | dict | None = None
    vision_config: SiglipVisionConfig | dict | None = None
    initializer_factor: float = 1.0

    def _validate(self) -> None:
        super()._validate()
        self._check(initializer_factor=Field("a finite number", is_finite))
        if not isinstance(self.text_config, SiglipTextConfig):
            self.text_config = SiglipTextConfig(**(self.text_config or {}))
        if not isinstance(self.vision_config, SiglipVisionConfig):
            self.vision_config = SiglipVisionConfig(**(self.vision_config or {}))

    @classmethod
    def from_text_vision_configs(
        cls, text_config: SiglipTextConfig, vision_config: SiglipVisionConfig, **kwargs: Any
    ) -> SiglipConfig:
        """One configuration from copies of both towers'."""
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)
