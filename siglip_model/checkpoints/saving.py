"""Saving a model's tensors and config as transformers does: safetensors, sharded if they are large, and JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from siglip_kernels.fusable import wraps_tensors
from siglip_model.checkpoints.commit import CONFIG_NAME, index_name, replacing_checkpoint, weights_name
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.sizes import size_in_bytes


def save_checkpoint(
    directory: str | os.PathLike[str],
    model_state_dict: Mapping[str, torch.Tensor],
    config_dict: Mapping[str, Any],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
) -> None:
    """Write ``config.json`` and the weights in place of the directory's, all or nothing.

    The directory is created if it does not exist; other files in it stay. If the process is killed at any moment, the
    directory holds the whole old or the whole new checkpoint (see `commit`). During the save both are on the disk.

    Args:
        directory: of the checkpoint.
        model_state_dict: names to floating-point tensors of any strides and device. Tensors that share memory are
            written once per name.
        config_dict: the content of ``config.json``; a ``torch.dtype`` is written by its name.
        max_shard_size: bytes, as an int or a string such as "5GB" (5 · 10^9 bytes). Larger weights are split into
            several files with an index; a tensor larger than this has a file of its own.
        variant: part of the names of the weights' files, such as ``model.fp16.safetensors`` for "fp16".

    Raises:
        CheckpointError: the directory is a file; a tensor is on the meta device, not floating-point, quantised or
            sharded.
        TypeError, ValueError: the config cannot be written as JSON, or ``max_shard_size`` is not a positive size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"cannot save a checkpoint to {directory}: it is a file, not a directory")
    limit = size_in_bytes("save_checkpoint", "max_shard_size", max_shard_size)
    single = weights_name(variant)
    _check_tensors(model_state_dict)
    config = _to_json(config_dict)
    # The factory counts tensors that share memory once per name, as they are written.
    shards = split_state_dict_into_shards_factory(
        dict(model_state_dict),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=single.removesuffix(".safetensors") + "{suffix}.safetensors",
        max_shard_size=limit,
    )

    directory.mkdir(parents=True, exist_ok=True)
    with replacing_checkpoint(directory) as partial:
        old_config = directory / CONFIG_NAME
        if not old_config.is_file() or old_config.read_bytes() != config:
            (partial / CONFIG_NAME).write_bytes(config)
        for file_name, names in (shards.filename_to_tensors or {single: []}).items():
            _write_tensors(partial / file_name, names, model_state_dict)
        if shards.is_sharded:
            parameters = sum(tensor.numel() for tensor in model_state_dict.values())
            metadata = {"total_parameters": parameters, **shards.metadata}
            index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
            (partial / index_name(variant)).write_bytes(_to_json(index))


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():  # before the dtypes: an integer beside a quantised weight says less
        if not isinstance(tensor, torch.Tensor) or wraps_tensors(tensor):
            raise CheckpointError(
                f"cannot save {name}: it is a {type(tensor).__name__} of a quantised or sharded layer; supported: "
                "plain tensors. Save the model before quantising it (torch.save saves it afterwards), or pass gathered "
                "tensors as state_dict"
            )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"cannot save {name}: its dtype is {tensor.dtype}, weights are floating-point")
        if tensor.is_meta:
            raise CheckpointError(f"cannot save {name}: it is on the meta device and has no values")


def _write_tensors(path: Path, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    to_write: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        storages.add(tensor.untyped_storage().data_ptr())
        to_write[name] = tensor
    # transformers refuses files whose metadata does not name the framework.
    save_file(to_write, path, metadata={"format": "pt"})


def _to_json(content: Mapping[str, Any]) -> bytes:
    """As transformers writes it: two spaces, sorted keys, a final newline."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, default=_dtype_name)
    return (text + "\n").encode()


def _dtype_name(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"config.json cannot hold a {type(value).__name__}: {value!r}")
