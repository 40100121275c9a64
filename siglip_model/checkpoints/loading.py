"""Loading checkpoints into models: every tensor is matched, checked and read before the model receives any."""

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from siglip_kernels.errors import MissingBackendError, unsupported
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import CheckpointError, MisfitError, shortened
from siglip_model.checkpoints.fields import shown
from siglip_model.checkpoints.files import listed
from siglip_model.checkpoints.weights import WEIGHT_DTYPES, StoredWeights, find_weights, read_tensors

logger = logging.getLogger(__name__)

# The names and prefixes at the root of a whole model's checkpoint and of a classifier's.
_ROOTS = ("text_model.", "vision_model.", "classifier.", "logit_scale", "logit_bias")


def load_state_dict(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    names: Collection[str] | None = None,
    **hub: Any,
) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by their names in the file, each checked to be floating-point and finite.

    On the CPU and without conversion the tensors are private memory mappings of the file, copied on write. (The file
    may be replaced or deleted afterwards, as `save_checkpoint` does, but not overwritten in place.) Otherwise tensors
    are converted and moved one by one: peak memory is the result and the largest tensor.

    Args:
        path_or_id: a directory or a Hub id; hub: arguments of `resolve_file`, such as revision and subfolder.
        dtype: float64, float32, float16 or bfloat16, or its name; None or "auto": that of the file's first tensor.
        device: of the returned tensors.
        names: of the tensors to read; None: all.

    Raises:
        CheckpointError: naming file and tensor: weights missing, damaged, integer, non-finite, or too large for dtype.
        MissingBackendError: this machine has no such device.
    """
    device = _usable(device)
    weights = find_weights(path_or_id, hub)
    for name in names or ():
        if name not in weights.tensors:
            raise CheckpointError(f"{weights.source} has no tensor {name}")
    chosen = weights.tensors if names is None else names
    stored_names = {name: name for name in chosen if not _is_position_ids(name)}
    return read_tensors(weights, stored_names, _resolve_dtype(dtype, None, weights), device)


def load_into(
    model: torch.nn.Module,
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    new_parameters: tuple[str, ...] = (),
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> None:
    """Load the weights of a checkpoint into a model on any device, meta included; after an error it is unchanged.

    A tower loads its part of a whole model's checkpoint, and its own with or without the prefix ``text_model.`` or
    ``vision_model.``; a classifier loads a whole model's without the text tower. ``position_ids`` in old files are
    ignored; other tensors that the model does not have, such as another head's, are not loaded, and a warning names
    them. Memory as in `load_state_dict`.

    Args:
        model: its ``state_dict()`` defines the expected tensors; its ``config.dtype`` is the dtype of "auto".
        path_or_id: a directory or a Hub id; hub: arguments of `resolve_file`, such as revision and subfolder.
        dtype: of the whole model, or its name; None or "auto": the config's, else that of the file's first tensor.
        device: of the loaded weights.
        new_parameters: prefixes such as ``("classifier.",)``. Where the checkpoint has no parameter with the prefix,
            ``model.init_new_parameters(names)`` initialises them, and a warning names them.
        ignore_mismatched_sizes: initialise tensors whose shape differs from the model's in the same way.

    Raises:
        CheckpointError: naming file, tensor and shapes: missing and misshapen tensors, and as
            `load_state_dict`.
        MissingBackendError: this machine has no such device.
    """
    load_weights(
        model,
        find_weights(path_or_id, hub),
        dtype=dtype,
        device=device,
        new_parameters=new_parameters,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )


def load_weights(
    model: torch.nn.Module,
    weights: StoredWeights,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    new_parameters: tuple[str, ...] = (),
    ignore_mismatched_sizes: bool = False,
    most_new_values: float = math.inf,
    most_bytes: float = math.inf,
    differing_sizes: Iterable[str] = (),
    config_file: str | None = None,
) -> dict[str, Any]:
    """`load_into` for weights whose header was read. Returns transformers' loading info.

    missing_keys, unexpected_keys: sets of names; mismatched_keys: a set of (name, stored shape, model's shape);
    error_msgs: empty, since what is not among the former is an exception.

    most_new_values: supported number of values in tensors that are newly initialised; more raise a CheckpointError.
    most_bytes: supported size of all weights on the device.
    differing_sizes: what the configuration and the header contradict each other in, for the error message.
    config_file: where the configuration is from. If it has fewer layers than the weights, that is an error; if the
        caller's configuration has fewer, the caller wants fewer.
    """
    device = _usable(device)
    config = getattr(model, "config", None)
    configured = getattr(config, "dtype", None)
    if configured is None:
        configured = getattr(config, "torch_dtype", None)
    dtype = _resolve_dtype(dtype, configured, weights)

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored_names, unused, strays = _match_names(expected, weights.tensors)
    new_names: list[str] = []
    for prefix in new_parameters:
        names = [name for name in expected if name.startswith(prefix)]
        if not any(name in stored_names for name in names):
            new_names += names
    lacking, misshapen = list(new_names), _misshapen(expected, stored_names, weights)
    shapes = {(name, weights.tensors[stored_names[name]].shape, expected[name]) for name in misshapen}
    if ignore_mismatched_sizes:
        new_names += misshapen
        for name in misshapen:
            del stored_names[name]
    _check_fit(type(model).__name__, expected, stored_names, strays, new_names, weights, differing_sizes, config_file)
    new_values = sum(math.prod(expected[name]) for name in new_names)
    if new_values > most_new_values:
        lacked = listed(f"{name} {expected[name]}" for name in new_names)
        raise CheckpointError(
            f"{weights.source} lacks {lacked}, {new_values:,} values; supported: at most {most_new_values:,}, or give "
            "the configuration as config="
        )
    size = sum(math.prod(shape) for shape in expected.values()) * dtype.itemsize
    if size > most_bytes:
        got = f"grants {device} {int(most_bytes):,} bytes, and the weights have {size:,}"
        raise unsupported("loading", "max_memory", got, "a device that holds the whole model")

    tensors = read_tensors(weights, stored_names, dtype, device)
    for name in new_names:
        tensors[name] = torch.empty(expected[name], dtype=dtype, device=device)
    model.load_state_dict(tensors, assign=True)
    _restore_buffers(model, device)
    if new_names:
        model.init_new_parameters(new_names)  # type: ignore[operator]
    if lacking:
        logger.warning("%s lacks %s: newly initialised, to be trained", weights.source, ", ".join(lacking))
    if misshapen:
        others = ", ".join(misshapen.values())
        logger.warning("%s has other shapes (%s): newly initialised, to be trained", weights.source, others)
    if strays:
        unexpected = shortened(listed((f"{name} {weights.tensors[name].shape}" for name in strays), most=50), 2500)
        logger.warning("%s has tensors that %s does not: %s", weights.source, type(model).__name__, unexpected)
    return {
        "missing_keys": set(lacking),
        "unexpected_keys": set(unused),
        "mismatched_keys": shapes,
        "error_msgs": [],
    }


def _misshapen(
    expected: Mapping[str, tuple[int, ...]], stored_names: Mapping[str, str], weights: StoredWeights
) -> dict[str, str]:
    """The model's names of tensors that have another shape in the checkpoint, each with a description."""
    found = {}
    for name, stored_name in stored_names.items():
        tensor = weights.tensors[stored_name]
        if tensor.shape != expected[name]:
            found[name] = f"{stored_name} in {tensor.path.name} has shape {tensor.shape}, expected {expected[name]}"
    return found


def _usable(device: torch.device | str) -> torch.device:
    """The device, tested before gigabytes are read."""
    device = torch.device(device)
    if device.type == "meta":
        raise unsupported(
            "loading a checkpoint", "device", "is meta", "a device that holds values, such as cpu or cuda"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise MissingBackendError(f"device {device} cannot be used here, {reason}; use cpu") from error
    return device


def _resolve_dtype(dtype: object, configured: object, weights: StoredWeights) -> torch.dtype:
    supported = {str(value).removeprefix("torch."): value for value in WEIGHT_DTYPES.values()}
    for argument, value in (("dtype", dtype), (f"dtype in {CONFIG_NAME}", configured)):
        if value is None or value == "auto":
            continue
        found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if isinstance(found, torch.dtype) and found in supported.values():
            return found
        if value is configured:
            raise CheckpointError(
                f"{weights.source}: {argument} is {shown(value)}; supported: auto, {', '.join(supported)}"
            )
        raise unsupported("loading a checkpoint", argument, f"is {value!r}", f"auto, {', '.join(supported)}")
    # As in transformers, one dtype even if the file mixes them: that of the first floating-point tensor.
    stored = (tensor.dtype for name, tensor in weights.tensors.items() if not _is_position_ids(name))
    return next((WEIGHT_DTYPES[name] for name in stored if name in WEIGHT_DTYPES), torch.float32)


def _is_position_ids(name: str) -> bool:
    """Whether these are the constants 0, 1, 2 ... of older files, which the model computes."""
    return name.rpartition(".")[2] == "position_ids"


def _match_names(expected: Mapping[str, object], stored: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """(The model's names → stored names; names that the model has not; stored names of those in no other known part).

    All but the stored names are without the prefix of the tower that the model is.
    """
    candidates = [name for name in stored if not _is_position_ids(name)]
    prefix = ""
    if "embeddings.token_embedding.weight" in expected:  # the model is a single tower
        prefix = "text_model."
    elif "embeddings.patch_embedding.weight" in expected:
        prefix = "vision_model."
    if not any(name.startswith(prefix) for name in candidates):
        prefix = ""  # the checkpoint of a tower, without prefix
    if prefix:
        ignorable = tuple(root for root in _ROOTS if root != prefix)
    elif "classifier.weight" in expected:
        ignorable = ("text_model.", "logit_scale", "logit_bias")
    else:
        ignorable = ()
    names: dict[str, str] = {}
    unused: list[str] = []
    strays: list[str] = []
    for stored_name in candidates:
        name = stored_name.removeprefix(prefix)
        if stored_name.startswith(prefix) and name in expected:
            names[name] = stored_name
            continue
        unused.append(name)
        if not stored_name.startswith(ignorable):
            strays.append(stored_name)
    return names, unused, strays


def _check_fit(
    model: str,
    expected: Mapping[str, tuple[int, ...]],
    stored_names: Mapping[str, str],
    strays: Iterable[str],
    new_names: Iterable[str],
    weights: StoredWeights,
    differing_sizes: Iterable[str],
    config_file: str | None,
) -> None:
    """Raise one error for all missing and misshapen tensors, which lists the unexpected ones also.

    The unexpected ones are an error if the checkpoint's own configuration does not fit its weights.
    """
    differing_sizes = list(differing_sizes)
    stored = weights.tensors
    missing = [f"{name} {expected[name]}" for name in expected if name not in stored_names and name not in new_names]
    unexpected = [f"{name} {stored[name].shape}" for name in strays]
    misshapen = list(_misshapen(expected, stored_names, weights).values())
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen (ignore_mismatched_sizes=True re-initialises them)", misshapen),
    )
    if missing or misshapen or (unexpected and differing_sizes and config_file):
        problems = [f"{kind}: {listed(names)}" for kind, names in kinds if names]
        problems += differing_sizes
        raise MisfitError(
            f"{weights.source} does not fit {model} with {config_file or 'its config'}; {'; '.join(problems)}"
        )


def _restore_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Move non-persistent buffers, which no file holds, to the device; from meta, compute ``position_ids``."""
    for module_name, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))
            elif name == "position_ids":
                positions = torch.arange(buffer.shape[-1], dtype=buffer.dtype, device=device)
                setattr(module, name, positions.expand(buffer.shape))
            else:
                raise RuntimeError(f"{module_name}.{name} is a buffer that no checkpoint holds and nothing computes")
