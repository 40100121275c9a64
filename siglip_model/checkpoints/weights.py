"""Safetensors files, single or sharded: reading headers, and memory-mapping and checking tensors.

Pickles (``pytorch_model.bin``) are never opened, since unpickling can run arbitrary code.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.commit import index_name, weights_name
from siglip_model.checkpoints.errors import CheckpointError, naming
from siglip_model.checkpoints.fields import shown
from siglip_model.checkpoints.files import listed, read_json_object
from siglip_model.checkpoints.hub import is_local, resolve_file

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST_HEADER = 2**22  # bytes, of all shards together: about 30,000 tensors, where SigLIP's largest models have 2,000
MOST_SHARDS = 1000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_OTHER_SUFFIXES = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
_CONVERT = """python -c "import torch; from safetensors.torch import save_file; \
tensors = torch.load('pytorch_model.bin', weights_only=True); \
save_file({name: tensor.clone() for name, tensor in tensors.items()}, 'model.safetensors', {'format': 'pt'})\""""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet. dtype: safetensors' name, such as F32, BF16, I64. start, end: bytes.

    given: the tensor itself, if it comes from a caller's state_dict instead of a file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int = 0
    end: int = 0
    given: torch.Tensor | None = None


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of a checkpoint by name.

    source: the file that messages name, the single file or the index. identities: detect that a file was replaced.
    """

    source: Path
    tensors: dict[str, StoredTensor]
    identities: dict[Path, tuple[int, ...]]


def find_weights(
    path_or_id: str | os.PathLike[str], hub: Mapping[str, Any], variant: str | None = None
) -> StoredWeights:
    """Read the header of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    variant: of the files' names, such as ``model.fp16.safetensors`` for "fp16".
    Raises CheckpointError if there is neither, a file is damaged or missing, or index and shards disagree.
    """
    single = resolve_file(path_or_id, weights_name(variant), **hub)
    if single is not None:
        identity = _identity(single)
        return StoredWeights(single, _read_header(single, LARGEST_HEADER)[0], {single: identity})
    index = resolve_file(path_or_id, index_name(variant), **hub)
    if index is None:
        raise CheckpointError(_explain_absence(path_or_id, hub.get("subfolder") or "", variant))

    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    for name, file_name in weight_map.items():
        # An index is untrusted input: it must lead neither out of its directory nor to a pickle.
        if not (isinstance(file_name, str) and re.fullmatch(r"[^/\\]+\.safetensors", file_name)):
            raise CheckpointError(
                f"{index} has {shown(name)} in {shown(file_name)}, which names no safetensors file beside it"
            )
    files = sorted(set(weight_map.values()))
    if len(files) > MOST_SHARDS:
        raise CheckpointError(f"{index} names {len(files):,} shards; supported: at most {MOST_SHARDS:,}")
    tensors: dict[str, StoredTensor] = {}
    identities: dict[Path, tuple[int, ...]] = {}
    left = LARGEST_HEADER
    for file_name in files:
        shard = resolve_file(path_or_id, file_name, **hub)
        if shard is None:
            names = [name for name, file in weight_map.items() if file == file_name]
            raise CheckpointError(f"{index} names the shard {file_name}, which is missing; it holds {listed(names)}")
        identities[shard] = _identity(shard)
        header, length = _read_header(shard, left)
        left -= length
        for name, tensor in header.items():
            if weight_map.get(name) != file_name:
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{shard} holds {name} {tensor.shape}, which {index.name} has {place}")
            tensors[name] = tensor
    lacking = [f"{name} (not in {file_name})" for name, file_name in weight_map.items() if name not in tensors]
    if lacking:
        raise CheckpointError(f"{index} lists tensors that their shards lack: {listed(lacking)}")
    return StoredWeights(index, tensors, identities)


def given_weights(state_dict: Mapping[str, torch.Tensor]) -> StoredWeights:
    """The tensors of a caller's state dict, in place of a checkpoint's."""
    names = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
    source = Path("state_dict")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise unsupported("loading", "state_dict", f"has a {type(tensor).__name__} as {shown(name)}", "tensors")
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        tensors[name] = StoredTensor(source, tuple(tensor.shape), dtype, given=tensor)
    return StoredWeights(source, tensors, {})


def read_tensors(
    weights: StoredWeights, stored_names: Mapping[str, str], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors by new name, from new → stored names. See `loading.load_state_dict` for memory and errors."""
    for stored_name in stored_names.values():
        stored = weights.tensors[stored_name]
        if stored.dtype not in WEIGHT_DTYPES:
            supported = ", ".join(WEIGHT_DTYPES)
            raise CheckpointError(
                f"{stored.path}: {stored_name} {stored.shape} has dtype {stored.dtype}; supported: {supported}"
            )
    tensors: dict[str, torch.Tensor] = {}
    for name, stored_name in stored_names.items():
        stored = weights.tensors[stored_name]
        with naming(stored.path):
            tensor = _mapped(stored)
        _check_values(stored.path, stored_name, tensor, dtype)
        tensors[name] = tensor.to(device=device, dtype=dtype, copy=stored.given is not None)
    for path, identity in weights.identities.items():
        if _identity(path) != identity:
            raise CheckpointError(f"{path} was replaced while it was read; load it again")
    return tensors


def _mapped(stored: StoredTensor) -> torch.Tensor:
    """A private mapping of the tensor, copied on write.

    Each tensor has its own: pages stay in memory as long as their mapping lives, so the mapping of a tensor that is
    converted or moved has to end with it.
    """
    if stored.given is not None:
        return stored.given.detach()
    if stored.start == stored.end:
        return torch.empty(stored.shape, dtype=WEIGHT_DTYPES[stored.dtype])
    storage = torch.UntypedStorage.from_file(str(stored.path), False, stored.end)
    data = torch.asarray(storage[stored.start : stored.end], dtype=torch.uint8)
    return data.view(WEIGHT_DTYPES[stored.dtype]).reshape(stored.shape)


def _read_header(path: Path, most: int) -> tuple[dict[str, StoredTensor], int]:
    """The tensors that a file holds, and the bytes of its header, which is parsed if they are at most `most`."""
    from safetensors import SafetensorError, safe_open

    with naming(path):
        with path.open("rb") as file:
            start = file.read(8)
            length, size = int.from_bytes(start, "little"), path.stat().st_size
            if most < length <= size - 8:
                before = f", {LARGEST_HEADER - most:,} of them in other shards" if most < LARGEST_HEADER else ""
                raise CheckpointError(
                    f"{path}: its header has {length:,} bytes; supported: at most {LARGEST_HEADER:,} bytes{before}"
                )
            header = file.read(min(length, most))
        try:
            with safe_open(path, framework="pt"):  # checks the header: lengths, offsets, dtypes
                pass
        except SafetensorError as error:
            if (start + header).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`") from error
            raise CheckpointError(
                f"{path} ({size:,} bytes) is not a valid safetensors file (truncated or corrupted): {error}"
            ) from error
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                path, tuple(entry["shape"]), entry["dtype"], *(8 + length + at for at in entry["data_offsets"])
            )
            for name, entry in sorted(entries.items())
        }
        return tensors, length


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


def _explain_absence(path_or_id: str | os.PathLike[str], subfolder: str, variant: str | None) -> str:
    folder = os.path.join(path_or_id, subfolder) if subfolder else path_or_id
    absence = f"{folder} has neither {weights_name(variant)} nor {index_name(variant)}"
    why = "a pickle, which is never opened here since it can run code. If you trust its origin, convert it: "
    if not is_local(path_or_id):
        return f"{absence} (offline: in the cache). If it has only pytorch_model.bin, that is {why}{_CONVERT}"
    names = sorted(path.name for path in Path(folder).expanduser().iterdir())
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return f"{absence}, only {listed(pickles)}: {why}{_CONVERT}"
    others = [name for name in names if name.endswith(_OTHER_SUFFIXES)]
    return f"{absence}; of other weights it has {listed(others) or 'none'}"
