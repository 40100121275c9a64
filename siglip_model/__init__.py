"""SigLIP in PyTorch, compatible with Hugging Face transformers in names, checkpoints and results."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siglip_model.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
    )
    from siglip_model.classifier import SiglipForImageClassification
    from siglip_model.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
    from siglip_model.images.auto import AutoImageProcessor
    from siglip_model.images.pillow import SiglipImageProcessorPil
    from siglip_model.images.tensor import SiglipImageProcessor, SiglipImageProcessorFast
    from siglip_model.model import SiglipModel
    from siglip_model.processor import SiglipProcessor
    from siglip_model.retrieval.searcher import search
    from siglip_model.text.auto import AutoTokenizer
    from siglip_model.text.gemma import GemmaTokenizer, Siglip2Tokenizer
    from siglip_model.text.siglip import SiglipTokenizer
    from siglip_model.text_tower import SiglipTextModel
    from siglip_model.vision_tower import SiglipVisionModel
    from siglip_model.zero_shot import pipeline

__all__ = [
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoProcessor",
    "AutoTokenizer",
    "GemmaTokenizer",
    "Siglip2Tokenizer",
    "SiglipConfig",
    "SiglipForImageClassification",
    "SiglipImageProcessor",
    "SiglipImageProcessorFast",
    "SiglipImageProcessorPil",
    "SiglipModel",
    "SiglipProcessor",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipTokenizer",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "pipeline",
    "search",
]

# Imported on first use: running the model alone imports no image or tokenizer library, and the command `siglip` prints
# its help without importing PyTorch.
_LAZY = {
    "AutoConfig": "auto",
    "AutoImageProcessor": "images.auto",
    "AutoModel": "auto",
    "AutoModelForImageClassification": "auto",
    "AutoModelForZeroShotImageClassification": "auto",
    "AutoProcessor": "auto",
    "AutoTokenizer": "text.auto",
    "GemmaTokenizer": "text.gemma",
    "Siglip2Tokenizer": "text.gemma",
    "SiglipConfig": "config",
    "SiglipForImageClassification": "classifier",
    "SiglipImageProcessor": "images.tensor",
    "SiglipImageProcessorFast": "images.tensor",
    "SiglipImageProcessorPil": "images.pillow",
    "SiglipModel": "model",
    "SiglipProcessor": "processor",
    "SiglipTextConfig": "config",
    "SiglipTextModel": "text_tower",
    "SiglipTokenizer": "text.siglip",
    "SiglipVisionConfig": "config",
    "SiglipVisionModel": "vision_tower",
    "pipeline": "zero_shot",
    "search": "retrieval.searcher",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
