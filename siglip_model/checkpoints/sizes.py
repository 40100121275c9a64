"""The sizes of a configuration beside those in the header of the weights, compared before modules are built."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.weights import StoredWeights

DECIMAL_UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_ALL_UNITS = {**DECIMAL_UNITS, **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}}

# Tensors that show the sizes, by tower: the field of each dimension.
_SHOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {
        "embeddings.token_embedding.weight": ("vocab_size", "hidden_size"),
        "embeddings.position_embedding.weight": ("max_position_embeddings", "hidden_size"),
        "encoder.layers.0.mlp.fc1.weight": ("intermediate_size", "hidden_size"),
        "head.weight": ("projection_size", "hidden_size"),
    },
    "vision": {
        "embeddings.patch_embedding.weight": ("hidden_size", "num_channels", "patch_size", "patch_size"),
        "embeddings.position_embedding.weight": ("patches (image_size // patch_size squared)", "hidden_size"),
        "encoder.layers.0.mlp.fc1.weight": ("intermediate_size", "hidden_size"),
        "head.mlp.fc1.weight": ("intermediate_size", "hidden_size"),
    },
}
_NAFLEX_EMBEDDINGS = {
    "embeddings.patch_embedding.weight": ("hidden_size", "values of a patch (num_channels · patch_size squared)"),
    "embeddings.position_embedding.weight": ("num_patches", "hidden_size"),
}
_FAMILIES = ("siglip", "siglip2")
_LAYER = re.compile(r"encoder\.layers\.(\d{1,9})\.")


def differing_sizes(config: Any, weights: StoredWeights) -> list[str]:
    """Each field of the configuration whose size is not the weights', with both values."""
    found: dict[str, str] = {}
    classifier = weights.tensors.get("classifier.weight")
    if classifier is not None and classifier.shape and getattr(config, "model_type", "") in _FAMILIES:
        _compare(found, "", "num_labels", {"num_labels": config.num_labels}, classifier.shape[0])
    for tower, field, part in _towers(config):
        shapes = _shapes(tower, weights)
        configured: dict[str, Any] = dict(vars(part))
        sizes = _SHOWN[tower]
        if "num_patches" in configured:
            sizes = sizes | _NAFLEX_EMBEDDINGS
            values = part.num_channels * part.patch_size**2
            configured["values of a patch (num_channels · patch_size squared)"] = values
        elif tower == "vision":
            configured["patches (image_size // patch_size squared)"] = (part.image_size // part.patch_size) ** 2
        if shapes:
            _compare(found, field, "num_hidden_layers", configured, _layers(shapes))
        for name, fields in sizes.items():
            for size, stored in zip(fields, shapes.get(name, ()), strict=False):
                _compare(found, field, size, configured, stored)
    return list(found.values())


def buildable(config: Any, weights: StoredWeights) -> Any:
    """The configuration; a copy with fewer layers where it has many more than the weights.

    The first layer that the weights lack is an error, whatever number follows it, so one suffices to report it.
    """
    for tower, field, part in _towers(config):
        most = _layers(_shapes(tower, weights)) + 1
        if part.num_hidden_layers > most:
            config = copy.deepcopy(config)
            (getattr(config, field) if field else config).num_hidden_layers = most
    return config


def memory_limit(max_memory: Mapping[int | str, int | str] | None, device: torch.device) -> float:
    """Bytes that max_memory, by ordinal of a GPU or "cpu", grants the device. Raises ValueError if it has no entry."""
    if max_memory is None:
        return math.inf
    key: int | str = "cpu" if device.type == "cpu" else device.index or 0
    if not isinstance(max_memory, Mapping) or key not in max_memory:
        raise unsupported("loading", "max_memory", f"is {max_memory!r}", f"a dict with the model's device, {key!r}")
    return size_in_bytes("loading", "max_memory", max_memory[key], _ALL_UNITS)


def size_in_bytes(operation: str, argument: str, size: int | str, units: Mapping[str, int] = DECIMAL_UNITS) -> int:
    """Bytes, from an int or a string such as "5GB". Stricter than huggingface_hub, which takes zero and less."""
    limit = size if isinstance(size, int) else 0
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]+)\s*", size.upper())
        limit = int(float(match[1]) * units.get(match[2], 0)) if match else 0
    if limit < 1:
        raise unsupported(operation, argument, f"is {size!r}", "a positive number of bytes, or like '5GB'")
    return limit


def _towers(config: Any) -> list[tuple[str, str, Any]]:
    """(tower, field that holds its configuration or "", its configuration) of every tower."""
    kind = getattr(config, "model_type", "")
    if kind in _FAMILIES:
        return [(tower, f"{tower}_config", getattr(config, f"{tower}_config")) for tower in _SHOWN]
    return [(tower, "", config) for tower in _SHOWN if kind in {f"{family}_{tower}_model" for family in _FAMILIES}]


def _shapes(tower: str, weights: StoredWeights) -> dict[str, tuple[int, ...]]:
    """The shapes of one tower's tensors, by their names within the tower."""
    prefix = f"{tower}_model."
    if not any(name.startswith(prefix) for name in weights.tensors):
        mark = "embeddings.token_embedding.weight" if tower == "text" else "embeddings.patch_embedding.weight"
        prefix = "" if mark in weights.tensors else prefix  # a tower that was saved alone
    return {
        name.removeprefix(prefix): tensor.shape for name, tensor in weights.tensors.items() if name.startswith(prefix)
    }


def _layers(names: Mapping[str, object]) -> int:
    return 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=-1)


def _compare(found: dict[str, str], field: str, size: str, configured: Mapping[str, Any], stored: int) -> None:
    if configured[size] != stored:
        name = f"{field}.{size}" if field else size
        found.setdefault(name, f"{name} of {CONFIG_NAME} is {configured[size]}, of the weights {stored}")
