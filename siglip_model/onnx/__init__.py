"""SigLIP in ONNX Runtime: `export` writes the towers of a model into a file, `load` runs them."""

from siglip_model.onnx.exporting import export
from siglip_model.onnx.model import OnnxModel, load

__all__ = ["OnnxModel", "export", "load"]
