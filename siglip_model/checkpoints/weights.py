"""Safetensors files, single or sharded: reading headers, and memory-mapping and checking tensors.

Pickles (``pytorch_model.bin``) are never opened, since unpickling can run arbitrary code.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siglip_model.checkpoints.commit import INDEX_NAME, WEIGHTS_NAME
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import listed, read_json_object
from siglip_model.checkpoints.hub import is_local, resolve_file

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_OTHER_SUFFIXES = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
_CONVERT = """python -c "import torch; from safetensors.torch import save_file; \
tensors = torch.load('pytorch_model.bin', weights_only=True); \
save_file({name: tensor.clone() for name, tensor in tensors.items()}, 'model.safetensors', {'format': 'pt'})\""""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet. dtype: safetensors' name, such as F32, BF16, I64."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of a checkpoint by name.

    source: the file that messages name, the single file or the index. identities: detect that a file was replaced.
    """

    source: Path
    tensors: dict[str, StoredTensor]
    identities: dict[Path, tuple[int, ...]]


def find_weights(path_or_id: str | os.PathLike[str], hub: Mapping[str, Any]) -> StoredWeights:
    """Read the header of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises CheckpointError if there is neither, a file is damaged or missing, or index and shards disagree.
    """
    single = resolve_file(path_or_id, WEIGHTS_NAME, **hub)
    if single is not None:
        identity = _identity(single)
        return StoredWeights(single, _read_header(single), {single: identity})
    index = resolve_file(path_or_id, INDEX_NAME, **hub)
    if index is None:
        raise CheckpointError(_explain_absence(path_or_id))

    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    for name, file_name in weight_map.items():
        # An index is untrusted input: it must lead neither out of its directory nor to a pickle.
        if not (isinstance(file_name, str) and re.fullmatch(r"[^/\\]+\.safetensors", file_name)):
            raise CheckpointError(f"{index} has {name} in {file_name!r}, which names no safetensors file beside it")
    tensors: dict[str, StoredTensor] = {}
    identities: dict[Path, tuple[int, ...]] = {}
    for file_name in sorted(set(weight_map.values())):
        shard = resolve_file(path_or_id, file_name, **hub)
        if shard is None:
            names = [name for name, file in weight_map.items() if file == file_name]
            raise CheckpointError(f"{index} names the shard {file_name}, which is missing; it holds {listed(names)}")
        identities[shard] = _identity(shard)
        for name, tensor in _read_header(shard).items():
            if weight_map.get(name) != file_name:
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{shard} holds {name} {tensor.shape}, which {index.name} has {place}")
            tensors[name] = tensor
    lacking = [f"{name} (not in {file_name})" for name, file_name in weight_map.items() if name not in tensors]
    if lacking:
        raise CheckpointError(f"{index} lists tensors that their shards lack: {listed(lacking)}")
    return StoredWeights(index, tensors, identities)


def read_tensors(
    weights: StoredWeights, stored_names: Mapping[str, str], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors by new name, from new → stored names. See `loading.load_state_dict` for memory and errors."""
    from safetensors import safe_open

    for stored_name in stored_names.values():
        stored = weights.tensors[stored_name]
        if stored.dtype not in WEIGHT_DTYPES:
            supported = ", ".join(WEIGHT_DTYPES)
            raise CheckpointError(
                f"{stored.path}: {stored_name} {stored.shape} has dtype {stored.dtype}; supported: {supported}"
            )
    tensors: dict[str, torch.Tensor] = {}
    for name, stored_name in stored_names.items():
        path = weights.tensors[stored_name].path
        # Opened again for each tensor: pages stay in memory as long as their mapping lives, so the mapping of a tensor
        # that is converted or moved has to end with it.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(stored_name)
        _check_values(path, stored_name, tensor, dtype)
        tensors[name] = tensor.to(device=device, dtype=dtype)
    for path, identity in weights.identities.items():
        if _identity(path) != identity:
            raise CheckpointError(f"{path} was replaced while it was read; load it again")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`") from error
        size = f"{path.stat().st_size:,} bytes"
        raise CheckpointError(
            f"{path} ({size}) is not a valid safetensors file (truncated or corrupted): {error}"
        ) from error


def _check_values(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check all values without a copy: NaN and infinity both appear in the minimum or the maximum."""
    if tensor.numel() == 0:
        return
    least, greatest = (value.item() for value in tensor.aminmax())
    what = f"{path}: {name} {tuple(tensor.shape)}"
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise CheckpointError(f"{what} has non-finite values: {int((~tensor.isfinite()).sum())} NaN or infinity")
    if not torch.tensor([least, greatest], dtype=torch.float64).to(dtype).isfinite().all():
        raise CheckpointError(f"{what} has values from {least:g} to {greatest:g}, which {dtype} cannot hold")


def _identity(path: Path) -> tuple[int, ...]:
    """A value that changes when the file is replaced or written to."""
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _explain_absence(path_or_id: str | os.PathLike[str]) -> str:
    absence = f"{path_or_id} has neither {WEIGHTS_NAME} nor {INDEX_NAME}"
    why = "a pickle, which is never opened here since it can run code. If you trust its origin, convert it: "
    if not is_local(path_or_id):
        return f"{absence} (offline: in the cache). If it has only pytorch_model.bin, that is {why}{_CONVERT}"
    names = sorted(path.name for path in Path(path_or_id).expanduser().iterdir())
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return f"{absence}, only {listed(pickles)}: {why}{_CONVERT}"
    others = [name for name in names if name.endswith(_OTHER_SUFFIXES)]
    return f"{absence}; of other weights it has {listed(others) or 'none'}"
