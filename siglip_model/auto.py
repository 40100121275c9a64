"""Auto classes: the class that a checkpoint's config.json, or a configuration, asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import MODEL_TYPES, load_config_dict, split_hub_arguments
from siglip_model.checkpoints.registered import Registry
from siglip_model.classifier import SiglipForImageClassification
from siglip_model.config import (
    PretrainedConfig,
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from siglip_model.model import SiglipModel
from siglip_model.naflex.models import (
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2TextModel,
    Siglip2VisionModel,
)
from siglip_model.pretrained import PreTrainedModel
from siglip_model.text_tower import SiglipTextModel
from siglip_model.vision_tower import SiglipVisionModel


class AutoConfig:
    """`AutoConfig.from_pretrained(...)` returns a Siglip(2)Config, or the configuration of a tower saved alone."""

    classes: ClassVar[dict[str, type[PretrainedConfig]]] = {
        config.model_type: config
        for config in (
            SiglipConfig,
            SiglipTextConfig,
            SiglipVisionConfig,
            Siglip2Config,
            Siglip2TextConfig,
            Siglip2VisionConfig,
        )
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Arguments: see `SiglipConfig.from_pretrained`. Raises CheckpointError if model_type is not known."""
        hub, _ = split_hub_arguments(supported_arguments("AutoConfig", kwargs))
        content = load_config_dict(pretrained_model_name_or_path, **hub)
        if "model_type" not in content:
            raise CheckpointError(f"{content.path}: model_type is missing; supported: {', '.join(cls.classes)}")
        return cls.classes[content["model_type"]].from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """A configuration of the class with this model_type. Raises ValueError if there is none."""
        if model_type not in cls.classes:
            raise ValueError(f"AutoConfig: model_type is {model_type!r}; supported: {', '.join(cls.classes)}")
        return cls.classes[model_type](*args, **kwargs)

    @classmethod
    def register(cls, model_type: str, config: type[PretrainedConfig], exist_ok: bool = False) -> None:
        """Let `from_pretrained` return the class for this model_type, which must be its own.

        Raises ValueError if the model_type is another, or is registered already and exist_ok is False.
        """
        own = getattr(config, "model_type", None)
        if own != model_type:
            raise ValueError(f"AutoConfig: model_type of {_name(config)} is {own!r}, not {model_type!r}")
        _add(cls.classes, model_type, config, exist_ok)
        if model_type not in MODEL_TYPES:
            MODEL_TYPES.append(model_type)


class AutoModel:
    """`AutoModel.from_pretrained(...)` returns a Siglip(2)Model, or a tower that was saved alone."""

    classes: ClassVar[dict[type[PretrainedConfig], type[PreTrainedModel]]] = {
        SiglipConfig: SiglipModel,
        SiglipTextConfig: SiglipTextModel,
        SiglipVisionConfig: SiglipVisionModel,
        Siglip2Config: Siglip2Model,
        Siglip2TextConfig: Siglip2TextModel,
        Siglip2VisionConfig: Siglip2VisionModel,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Arguments: see `SiglipModel.from_pretrained`. Raises CheckpointError if model_type has no such model."""
        config = kwargs.get("config")
        if config is None or isinstance(config, (str, os.PathLike)):
            hub, _ = split_hub_arguments(kwargs)
            config = AutoConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)  # type: ignore[arg-type]
        return cls._class(config).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A model with new weights. Arguments: backend (alias attn_implementation), dtype (alias torch_dtype)."""
        return cls._class(config)._from_config(config, **kwargs)

    @classmethod
    def register(
        cls, config_class: type[PretrainedConfig], model_class: type[PreTrainedModel], exist_ok: bool = False
    ) -> None:
        """Return the model for configurations of this class, which must be its `config_class`.

        Raises ValueError if it is another, or is registered already and exist_ok is False.
        """
        own = getattr(model_class, "config_class", None)
        if own is not config_class or own is None:
            raise ValueError(
                f"{cls.__name__}: config_class of {_name(model_class)} is {_name(own)}, not {_name(config_class)}"
            )
        _add(cls.classes, config_class, model_class, exist_ok)

    @classmethod
    def _class(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        if type(config) not in cls.classes:
            supported = ", ".join(each.__name__ for each in cls.classes)
            raise CheckpointError(
                f"{cls.__name__}: the configuration is a {type(config).__name__}; supported: {supported}"
            )
        return cls.classes[type(config)]


class AutoModelForZeroShotImageClassification(AutoModel):
    """`from_pretrained` returns a SiglipModel, or a Siglip2Model."""

    classes: ClassVar = {SiglipConfig: SiglipModel, Siglip2Config: Siglip2Model}


class AutoModelForImageClassification(AutoModel):
    """`from_pretrained` returns a SiglipForImageClassification, or a Siglip2ForImageClassification."""

    classes: ClassVar = {
        SiglipConfig: SiglipForImageClassification,
        Siglip2Config: Siglip2ForImageClassification,
    }


class AutoVisionTower(AutoModel):
    """`from_pretrained` returns the vision tower of a whole model, or one that was saved alone."""

    classes: ClassVar = {
        SiglipConfig: SiglipVisionModel,
        SiglipVisionConfig: SiglipVisionModel,
        Siglip2Config: Siglip2VisionModel,
        Siglip2VisionConfig: Siglip2VisionModel,
    }


class AutoProcessor(Registry):
    """`AutoProcessor.from_pretrained(...)` returns a SiglipProcessor, or a Siglip2Processor."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The processor that the image processor belongs to. Arguments: see `SiglipProcessor.from_pretrained`."""
        from siglip_model.images.auto import AutoImageProcessor
        from siglip_model.processor import Siglip2Processor, SiglipProcessor

        hub, _ = split_hub_arguments(kwargs)
        if own := cls.registered_for(pretrained_model_name_or_path, hub):
            return own.from_pretrained(pretrained_model_name_or_path, **kwargs)
        given = kwargs.get("image_processor")
        if given is None:
            kinds = AutoImageProcessor.kinds(pretrained_model_name_or_path, **hub)
        else:
            kinds = getattr(given, "kinds", ())
        naflex = kinds == Siglip2Processor.image_processor_class.kinds
        return (Siglip2Processor if naflex else SiglipProcessor).from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )


def _name(given: Any) -> str:
    return str(getattr(given, "__name__", repr(given)))


def _add(classes: dict[Any, Any], key: Any, value: Any, exist_ok: bool) -> None:
    if key in classes and not exist_ok:
        raise ValueError(f"{key!r} is registered already; supported: other keys, or exist_ok=True")
    classes[key] = value
