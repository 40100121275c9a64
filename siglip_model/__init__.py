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
    from siglip_model.config import (
        Siglip2Config,
        Siglip2TextConfig,
        Siglip2VisionConfig,
        SiglipConfig,
        SiglipTextConfig,
        SiglipVisionConfig,
    )
    from siglip_model.images.auto import AutoImageProcessor
    from siglip_model.images.naflex import (
        Siglip2ImageProcessor,
        Siglip2ImageProcessorFast,
        Siglip2ImageProcessorPil,
    )
    from siglip_model.images.pillow import SiglipImageProcessorPil
    from siglip_model.images.tensor import SiglipImageProcessor, SiglipImageProcessorFast
    from siglip_model.model import SiglipModel
    from siglip_model.naflex.models import (
        Siglip2ForImageClassification,
        Siglip2Model,
        Siglip2TextModel,
        Siglip2VisionModel,
    )
    from siglip_model.processor import Siglip2Processor, SiglipProcessor
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
    "Siglip2Config",
    "Siglip2ForImageClassification",
    "Siglip2ImageProcessor",
    "Siglip2ImageProcessorFast",
    "Siglip2ImageProcessorPil",
    "Siglip2Model",
    "Siglip2Processor",
    "Siglip2TextConfig",
    "Siglip2TextModel",
    "Siglip2Tokenizer",
    "Siglip2VisionConfig",
    "Siglip2VisionModel",
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
    "Siglip2Config": "config",
    "Siglip2ForImageClassification": "naflex.models",
    "Siglip2ImageProcessor": "images.naflex",
    "Siglip2ImageProcessorFast": "images.naflex",
    "Siglip2ImageProcessorPil": "images.naflex",
    "Siglip2Model": "naflex.models",
    "Siglip2Processor": "processor",
    "Siglip2TextConfig": "config",
    "Siglip2TextModel": "naflex.models",
    "Siglip2Tokenizer": "text.gemma",
    "Siglip2VisionConfig": "config",
    "Siglip2VisionModel": "naflex.models",
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
