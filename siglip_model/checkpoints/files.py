"""The files of a tokenizer or an image processor: found in a directory or on the hub, read, and written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from siglip_model.config import HUB_ARGUMENTS


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(those that say where on the hub, all others)`."""
    hub = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}


def find_file(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path | None:
    """The path of one file, None if the directory or repository has none. Raises OSError as `resolve_file`."""
    from siglip_model.checkpoints.loading import resolve_file

    return resolve_file(path_or_id, name, **hub)


def find_json(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON object in one file, None if there is none. Raises CheckpointError, naming the file, if it is damaged."""
    from siglip_model.checkpoints.weights import read_json_object

    path = find_file(path_or_id, name, hub)
    return None if path is None else read_json_object(path)


def to_json(content: dict[str, Any]) -> bytes:
    """As transformers writes its files: two spaces, sorted keys, UTF-8, a final newline."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_file(directory: str | os.PathLike[str], name: str, data: bytes) -> str:
    """Create the directory if need be, and replace the file in it atomically. Returns the file's path.

    Raises NotADirectoryError if `directory` is a file.
    """
    from siglip_model.checkpoints.loading import atomic_write

    if os.path.isfile(directory):
        raise NotADirectoryError(f"{os.fspath(directory)} is a file; give a directory to save to")
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    atomic_write(path, data)
    return path
