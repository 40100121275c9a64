"""`AutoModel` and `AutoProcessor`: the class that a checkpoint's config.json asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siglip_model.checkpoints.hub import HUB_ARGUMENTS
from siglip_model.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from siglip_model.model import SiglipModel
from siglip_model.pretrained import PreTrainedModel
from siglip_model.text_tower import SiglipTextModel
from siglip_model.vision_tower import SiglipVisionModel

MODELS: dict[str, type[PreTrainedModel]] = {
    SiglipConfig.model_type: SiglipModel,
    SiglipTextConfig.model_type: SiglipTextModel,
    SiglipVisionConfig.model_type: SiglipVisionModel,
}


class AutoModel:
    """`AutoModel.from_pretrained(...)`: SiglipModel, or the tower that was saved alone."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Arguments as `SiglipModel.from_pretrained`. Raises ValueError for a model_type that is not SigLIP's."""
        from siglip_model.checkpoints.files import load_config_dict

        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        model_type = load_config_dict(pretrained_model_name_or_path, **hub).get("model_type")
        if model_type not in MODELS:
            raise ValueError(
                f"AutoModel: {pretrained_model_name_or_path} has model_type {model_type!r}; "
                f"supported: {', '.join(MODELS)}"
            )
        return MODELS[model_type].from_pretrained(pretrained_model_name_or_path, **kwargs)


class AutoProcessor:
    """`AutoProcessor.from_pretrained(...)`: SiglipProcessor."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Arguments as `SiglipProcessor.from_pretrained`."""
        from siglip_model.processor import SiglipProcessor

        return SiglipProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
