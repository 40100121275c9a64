"""A checkpoint's files, in a directory or on the Hub: finding them, reading JSON, writing atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.hub import HUB_ARGUMENTS, resolve_file


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(revision, cache_dir, local_files_only and token, as far as given; all other arguments)."""
    hub = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}


def find_file(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path | None:
    """The path of one file, or None if the directory or repository lacks it. Raises OSError as `resolve_file`."""
    return resolve_file(path_or_id, name, **hub)


def find_json(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON object in one file, or None without the file. Raises CheckpointError, naming the file, if damaged."""
    path = find_file(path_or_id, name, hub)
    return None if path is None else read_json_object(path)


def to_json(content: dict[str, Any]) -> bytes:
    """As transformers writes its files: two spaces, sorted keys, UTF-8, a final newline."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_file(directory: str | os.PathLike[str], name: str, data: bytes) -> str:
    """Create the directory if it does not exist, and replace the file in it atomically. Returns the file's path.

    Raises NotADirectoryError if `directory` is a file.
    """
    if os.path.isfile(directory):
        raise NotADirectoryError(f"{os.fspath(directory)} is a file; give a directory to save to")
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    atomic_write(path, data)
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, naming the file, if it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def listed(items: Iterable[str], most: int = 5) -> str:
    """The first items, and the number of the others."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


MODEL_TYPES = ("siglip", "siglip_text_model", "siglip_vision_model")


def load_config_dict(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """The content of config.json of a directory or Hub repository (see `resolve_file`).

    Raises:
        CheckpointError: config.json is missing, is not a JSON object, or describes another kind of model.
    """
    hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    path = resolve_file(path_or_id, CONFIG_NAME, **hub)  # type: ignore[arg-type]
    if path is None:
        raise CheckpointError(f"{path_or_id} has no {CONFIG_NAME}")
    content = read_json_object(path)
    model_type = content.get("model_type", MODEL_TYPES[0])
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type is {model_type!r}; supported: {', '.join(MODEL_TYPES)}")
    return content
