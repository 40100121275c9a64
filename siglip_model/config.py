"""Configurations with transformers' names, defaults and config.json, without transformers."""

from __future__ import annotations

import copy
import json
import math
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import build_from_file
from siglip_model.checkpoints.fields import (
    FLAG,
    NOTHING,
    TEXT,
    Field,
    check_fields,
    is_finite,
    is_index,
    is_text,
    mapping,
    shown,
    whole,
)
from siglip_model.checkpoints.files import StoredObject, load_config_dict, read_json_object, split_hub_arguments
from siglip_model.checkpoints.upload import check_upload_arguments, save_and_upload, upload

# Far above every model, and small enough that shapes and the names of labels can be computed.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**14,
    "num_attention_heads": 2**17,
    "max_position_embeddings": 2**24,
    "num_patches": 2**24,
    "projection_size": 2**17,
    "num_channels": 2**10,
    "image_size": 2**16,
    "patch_size": 2**16,
}
MOST_LABELS = 2**17

_SWITCHES = dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), FLAG | NOTHING)
_ATTENTION = {
    "attn_implementation": TEXT
    | mapping(is_text, lambda name: name is None or is_text(name), "a dict from parts to strings")
    | NOTHING
}
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
    whole_model_type: ClassVar[str] = ""  # of a tower's configuration: the model_type of the file that may hold it
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {}
    # What libraries read from every configuration of transformers. Files may hold some of them.
    attribute_map: ClassVar[dict[str, str]] = {}
    architectures: ClassVar[list[str] | None] = None  # of a file that a model wrote: the name of its class
    is_encoder_decoder: ClassVar[bool] = False
    base_model_tp_plan: ClassVar[None] = None
    base_model_pp_plan: ClassVar[None] = None

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
        check_fields(type(self).__name__, kwargs, {**_SWITCHES, **_LABELS, **_ATTENTION})
        self.output_hidden_states: bool = kwargs.pop("output_hidden_states", False)
        self.output_attentions: bool = kwargs.pop("output_attentions", False)
        self.return_dict: bool = kwargs.pop("return_dict", True)
        self.problem_type: str | None = kwargs.pop("problem_type", None)
        former, dtype = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)  # the name before transformers 5
        self.dtype: Any = _as_dtype(former if dtype is None else dtype)
        self._name_or_path: str = str(kwargs.pop("_name_or_path", "") or kwargs.pop("name_or_path", ""))
        attn_implementation = kwargs.pop("attn_implementation", None)
        self._set_labels(kwargs.pop("num_labels", None), kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        for name, expected in self._field_types().items():
            default = getattr(type(self), name)
            setattr(self, name, self._checked(name, kwargs.pop(name, default), expected))
        for name, value in kwargs.items():
            stored = name in ("architectures", "is_encoder_decoder")
            if hasattr(self, name) and not stored:  # a method, or one of Python's own attributes
                raise ValueError(f"{type(self).__name__}: {name} is not a field; supported: names of no attribute")
            setattr(self, name, value)
        self._validate()
        self._attn_implementation = attn_implementation

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
    def parts(self) -> tuple[str, ...]:
        """The names of a mapping of backends: "" for the model itself, and those of the towers' configurations."""
        return ("", *self.sub_configs)

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def torch_dtype(self) -> Any:
        """The name of `dtype` before transformers 5."""
        return self.dtype

    @property
    def _attn_implementation(self) -> str | None:
        """The backend of models that are built from it, or None for their default; not written to config.json."""
        return self._backend

    @_attn_implementation.setter
    def _attn_implementation(self, name: str | Mapping[str, str] | None) -> None:
        self._backend: str | None = name.get("") if isinstance(name, Mapping) else name
        for part in self.sub_configs:
            chosen = name.get(part) if isinstance(name, Mapping) else name
            getattr(self, part)._attn_implementation = chosen

    @property
    def name_or_path(self) -> str:
        """Where it was loaded from, or an empty string."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name: str) -> None:
        self._name_or_path = str(name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The text tower's configuration, or itself for a tower alone. decoder, encoder: SigLIP has one of texts."""
        return getattr(self, "text_config", self)

    def __iter__(self) -> Iterator[str]:
        return (name for name in vars(self) if not name.startswith("_"))

    def update(self, values: Mapping[str, Any]) -> None:
        """Set these fields. Raises as the constructor for unsupported values, and then sets none."""
        updated = vars(type(self).from_dict(self.to_dict(), **values))
        names = {*values, "id2label", "label2id"} if {"num_labels", "id2label"} & {*values} else {*values}
        vars(self).update({name: updated[name] for name in names if name in updated})

    def to_dict(self) -> dict[str, Any]:
        """All values in the form of config.json, where the keys of id2label are strings."""
        values = {name: _as_json(getattr(self, name)) for name in self}
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        values["model_type"] = self.model_type
        if self.dtype is None:
            del values["dtype"]
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The values of `to_dict` that are not the defaults, and model_type."""
        return {**_difference(self.to_dict(), type(self)().to_dict()), "model_type": self.model_type}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build from the content of a config.json. A tower takes its part of a whole SigLIP configuration.

        overrides: other values of fields. Of a tower's configuration, a dict replaces the fields that it names.
        return_unused_kwargs: also return the overrides that are no fields, in a dict.
        """
        if return_unused_kwargs:
            known, unused = cls._known_and_unused(values, overrides)
            return cls.from_dict(values, **known), unused
        values = copy.deepcopy(values)
        if cls.base_config_key and values.get("model_type") == cls.whole_model_type:
            values = values.get(cls.base_config_key) or {}
            if not isinstance(values, dict):
                raise TypeError(f"{cls.__name__}: {cls.base_config_key} is {shown(values)}; supported: dict or None")
        if "num_labels" in overrides and "id2label" not in overrides:
            values.pop("id2label", None)
            values.pop("label2id", None)
        for name in cls.sub_configs:
            if isinstance(overrides.get(name), Mapping) and isinstance(values.get(name), Mapping):
                overrides[name] = {**values[name], **overrides[name]}
        return cls(**{**values, **overrides})

    @classmethod
    def _known_and_unused(cls, values: Mapping[str, Any], overrides: dict[str, Any]) -> tuple[dict, dict]:
        """The overrides that are fields, or in the content of the file, and the others."""
        names = {*vars(cls()), "num_labels", "torch_dtype", *values}
        unused = {name: value for name, value in overrides.items() if name not in names}
        return {name: value for name, value in overrides.items() if name in names}, unused

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read config.json of a directory or Hub repository, or the JSON file whose path is given.

        revision, cache_dir, local_files_only, token, subfolder, force_download: as in huggingface_hub. Other arguments
        override fields, as in `from_dict`. return_unused_kwargs: also return those that are no fields, in a dict.
        Raises CheckpointError for a missing or invalid config.json, and for another kind of model.
        """
        content, overrides = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        unused: dict[str, Any] = {}
        if return_unused_kwargs:
            overrides, unused = cls._known_and_unused(content, overrides)
        config = build_from_file(content.path, partial(cls.from_dict, content), {}, overrides)
        config._name_or_path = str(pretrained_model_name_or_path)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[StoredObject, dict[str, Any]]:
        """(The content of config.json; the arguments that do not say where it is). See `from_pretrained`."""
        hub, others = split_hub_arguments(supported_arguments(cls.__name__, kwargs))
        return load_config_dict(pretrained_model_name_or_path, cls.model_type, **hub), others

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Read a file in the form of config.json. Raises CheckpointError, naming it, if it is invalid."""
        path = Path(json_file)
        return build_from_file(path, partial(cls.from_dict, read_json_object(path)), {}, {})

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json. push_to_hub, and its arguments in kwargs: see `push_to_hub`.

        Raises TypeError for an argument that names nothing.
        """
        check_upload_arguments(push_to_hub, kwargs)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / CONFIG_NAME)
        if push_to_hub:
            upload(save_directory, [CONFIG_NAME], **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Write config.json to a repository of the Hugging Face Hub. Arguments: see `checkpoints.upload.upload`."""
        return save_and_upload(self.save_pretrained, repo_id, **kwargs)

    def to_json_string(self, use_diff: bool = False) -> str:
        """`to_dict` as JSON, or `to_diff_dict` with use_diff."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True)

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = False) -> None:
        """Write `to_json_string` to a file, atomically."""
        atomic_write(json_file_path, (self.to_json_string(use_diff) + "\n").encode())

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


def _as_dtype(value: Any) -> Any:
    """A torch.dtype from its name. Other values stay: loading refuses them, naming the file."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) and found.is_floating_point else value


def _difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults; of nested configurations, recursively."""
    found = {}
    for name, value in values.items():
        default = defaults.get(name)
        if name.endswith("_config") and isinstance(value, dict) and isinstance(default, dict):
            value = _difference(value, default)
            default = {}
        if name not in defaults or value != default:
            found[name] = value
    return found


class SiglipTextConfig(PretrainedConfig):
    """The text tower. Defaults: google/siglip-base-patch16-224."""

    model_type = "siglip_text_model"
    base_config_key = "text_config"
    whole_model_type = "siglip"

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
    whole_model_type = "siglip"

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
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "text_config": SiglipTextConfig,
        "vision_config": SiglipVisionConfig,
    }

    text_config: SiglipTextConfig | dict | None = None
    vision_config: SiglipVisionConfig | dict | None = None
    initializer_factor: float = 1.0

    def _validate(self) -> None:
        super()._validate()
        self._check(initializer_factor=Field("a finite number", is_finite))
        for name, kind in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PretrainedConfig):
                setattr(self, name, kind(**(given or {})))
            elif given.model_type != kind.model_type:
                supported = f"{kind.__name__}, dict or None"
                raise TypeError(f"{type(self).__name__}: {name} is a {type(given).__name__}; supported: {supported}")

    @classmethod
    def from_text_vision_configs(
        cls, text_config: SiglipTextConfig, vision_config: SiglipVisionConfig, **kwargs: Any
    ) -> SiglipConfig:
        """One configuration from copies of both towers'."""
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)


class Siglip2TextConfig(SiglipTextConfig):
    """The text tower of SigLIP 2, which is SigLIP's."""

    model_type = "siglip2_text_model"
    whole_model_type = "siglip2"


class Siglip2VisionConfig(PretrainedConfig):
    """The vision tower of SigLIP 2 at native resolution. Defaults: google/siglip2-base-patch16-naflex.

    patch_size: side in pixels. num_patches: size of the position embedding, a square, which each image's is resized
    from.
    """

    model_type = "siglip2_vision_model"
    base_config_key = "vision_config"
    whole_model_type = "siglip2"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = True
    num_patches: int = 256

    def _validate(self) -> None:
        super()._validate()
        self._validate_transformer()
        self._check_sizes("num_channels", "patch_size", "num_patches")
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"Siglip2VisionConfig: num_patches is {self.num_patches}; supported: squares")


class Siglip2Config(SiglipConfig):
    """Both towers of SigLIP 2 at native resolution. Fields: see `SiglipConfig`."""

    model_type = "siglip2"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "text_config": Siglip2TextConfig,
        "vision_config": Siglip2VisionConfig,
    }

    text_config: Siglip2TextConfig | dict | None = None
    vision_config: Siglip2VisionConfig | dict | None = None  # type: ignore[assignment]
