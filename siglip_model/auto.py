"""`AutoModel` and `AutoProcessor`: the class that a checkpoint's config.json asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import load_config_dict, split_hub_arguments
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
    """`AutoModel.from_pretrained(...)` returns a SiglipModel, or a tower that was saved alone."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Arguments: see `SiglipModel.from_pretrained`. Raises CheckpointError if model_type is not SigLIP's."""
        hub, _ = split_hub_arguments(kwargs)
        config = load_config_dict(pretrained_model_name_or_path, **hub)
        if "model_type" not in config:
            raise CheckpointError(f"{config.path}: model_type is missing; supported: {', '.join(MODELS)}")
        return MODELS[config["model_type"]].from_pretrained(pretrained_model_name_or_path, **kwargs)


class AutoProcessor:
    """`AutoProcessor.from_pretrained(...)` returns a SiglipProcessor."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Arguments: see `SiglipProcessor.from_pretrained`."""
        from siglip_model.processor import SiglipProcessor

        return SiglipProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
