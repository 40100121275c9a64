"""What is in an exported file: one graph per tower, and the configuration and settings as its metadata.

The towers share no node, so that `model.py` runs one without the other's weights. Weights lie beside the graphs in
`FILE.data`, because a protobuf holds at most 2 GB.
"""

from __future__ import annotations

import importlib
from typing import Any

INPUTS = {"vision": "pixel_values", "text": "input_ids"}
OUTPUTS = {"vision": "image_features", "text": "text_features"}  # before they are scaled to unit length
METADATA = "siglip"  # the key of JSON: {"config", "precision", "logit_scale", "logit_bias"}
FLOAT32, INT8 = "float32", "int8"


def imported(module: str) -> Any:
    """A module of the extra `onnx`. Raises ImportError that names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"ONNX models need {module} ({error}); install it with: pip install 'siglip-triton[onnx]'"
        ) from error
