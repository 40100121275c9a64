"""The weights of an int8 graph with a sign, which processors with VNNI instructions multiply faster.

A file's weights have none, because products with signed ones saturate without VNNI. Weight and zero point less 128 give
the same differences, hence the same results to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from siglip_model.onnx.file import imported
from siglip_model.onnx.weights import read_tensor

_WEIGHT, _ZERO_POINT = 1, 3  # of MatMulInteger's inputs


def faster() -> bool:
    """Whether the processor has VNNI instructions."""
    return torch.cpu._is_vnni_supported()


def give_sign(graphs: Any, folder: Path) -> None:
    """Changes uint8 weights of matrix products, and their zero points, to int8, in place.

    graphs: a ModelProto, whose weights may lie in a file of `folder`, as `find_weights` returns it; they are read into
    it.
    """
    helper = imported("onnx.numpy_helper")
    weights = {tensor.name: tensor for tensor in graphs.graph.initializer}
    products = [node.input for node in graphs.graph.node if node.op_type == "MatMulInteger"]
    for name in {each[place] for each in products if each[_WEIGHT] in weights for place in (_WEIGHT, _ZERO_POINT)}:
        values = read_tensor(weights[name], folder)
        weights[name].CopyFrom(helper.from_array((values ^ np.uint8(0x80)).view(np.int8), name))
