"""The weights of an exported file, in a file beside it, or in what a link beside it leads to, as in a cache of the Hub.

onnx and ONNX Runtime read no links, because a graph may name any file: here it names one in its own folder.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.onnx.file import imported


def find_weights(graphs: Any, path: Path) -> Path:
    """Names the weights in the graphs, a ModelProto, by their true file name, and returns its folder.

    path: of the graphs. Raises CheckpointError, naming the file, if it is missing or ends before the weights do.
    """
    outside = [tensor for tensor in graphs.graph.initializer if tensor.external_data]
    places = [{entry.key: entry for entry in tensor.external_data} for tensor in outside]
    names = {place["location"].value if "location" in place else "" for place in places}
    if not names:
        return path.parent
    name = names.pop()
    if names or name in ("", "..") or os.path.basename(name) != name:
        raise CheckpointError(f"{path} names weights in {sorted({name, *names})}; supported: one file in its folder")
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(f"{file}, the weights of {path.name}, is missing; keep both files in one folder")
    found, size = Path(os.path.realpath(file)), file.stat().st_size
    for tensor, place in zip(outside, places, strict=True):
        try:
            start, length = (int(place[key].value) for key in ("offset", "length"))
            dtype = imported("onnx.helper").tensor_dtype_to_np_dtype(tensor.data_type)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not say where in {name} the tensor {tensor.name} is") from error
        if start < 0 or length != math.prod(tensor.dims) * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: the tensor {tensor.name} {tuple(tensor.dims)} in {dtype} has {length:,} bytes at"
                f" {start:,}"
            )
        if start + length > size:
            raise CheckpointError(
                f"{file} is damaged: it has {size:,} bytes, and the tensor {tensor.name} ends at {start + length:,}"
            )
        place["location"].value = found.name
    return found.parent


def read_tensor(tensor: Any, folder: Path) -> np.ndarray:
    """The values of a TensorProto, a copy. folder: what `find_weights` returned."""
    if tensor.external_data:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with open(folder / place["location"], "rb") as file:
            file.seek(int(place["offset"]))
            values = file.read(int(place["length"]))
        tensor = type(tensor)(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=values)
    return np.array(imported("onnx.numpy_helper").to_array(tensor))
