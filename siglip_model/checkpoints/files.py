"""A checkpoint's files, in a directory or on the Hub: finding them, reading JSON, writing atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import CheckpointError, naming, shortened
from siglip_model.checkpoints.fields import Field, check_fields, shown
from siglip_model.checkpoints.hub import HUB_ARGUMENTS, checkpoint_within, resolve_file

# Bytes: bounds the time and the memory of parsing. tokenizer.json of SigLIP 2 has 34 MB.
LARGEST_JSON, LARGEST_TOKENIZER_JSON = 4 * 2**20, 48 * 2**20


class StoredObject(dict[str, Any]):
    """The JSON object in a file of a checkpoint, and the file's path."""

    path: Path

    def check(self, fields: Mapping[str, Field]) -> Self:
        """Itself. Raises CheckpointError, naming file and field, for a value that its field does not support."""
        check_fields(self.path, self, fields, CheckpointError)
        return self

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raises CheckpointError for the value of one field."""
        raise CheckpointError(f"{self.path}: {name} is {shown(self[name])}; supported: {supported}")


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(The arguments of `resolve_file`, as far as given; all other arguments)."""
    hub = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}


def find_file(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path | None:
    """The path of one file, or None if the directory or repository lacks it. Raises OSError as `resolve_file`."""
    return resolve_file(path_or_id, name, **hub)


def find_json(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> StoredObject | None:
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


def read_json_object(path: Path, largest: int = LARGEST_JSON) -> StoredObject:
    """The JSON object in a file. Raises CheckpointError, naming the file, if it holds anything else or is too large."""
    with naming(path):
        size = path.stat().st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size:,} bytes; supported: at most {largest:,}")
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    stored = StoredObject(content)
    stored.path = path
    return stored


def listed(items: Iterable[str], most: int = 5) -> str:
    """The first items, and the number of the others. Names from a file may be long: the middle of each is left out."""
    items = list(items)
    others = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(shortened(item, 300) for item in items[:most]) + others


MODEL_TYPES = [  # AutoConfig.register appends
    f"{family}{part}" for family in ("siglip", "siglip2") for part in ("", "_text_model", "_vision_model")
]


def load_config_dict(path_or_id: str | os.PathLike[str], own_type: str = "", **hub: Any) -> StoredObject:
    """The content of config.json of a directory or Hub repository. hub: arguments of `resolve_file`.

    path_or_id: may also be the path of a JSON file of any name, as in transformers.
    own_type: a further model_type that it may have, of a class that is not registered.
    Raises:
        CheckpointError: config.json is missing, is not a JSON object, or describes another kind of model.
    """
    path = json_file(path_or_id) or resolve_file(path_or_id, CONFIG_NAME, **hub)
    if path is None:
        where = os.path.join(path_or_id, hub.get("subfolder") or "")
        hint = checkpoint_within(where) or "; supported: a checkpoint, or in Python its configuration as config="
        raise CheckpointError(f"{where.rstrip(os.sep)} has no {CONFIG_NAME}{hint}")
    content = read_json_object(path)
    model_type = content.get("model_type", MODEL_TYPES[0])
    if model_type not in (*MODEL_TYPES, own_type):
        content.refuse("model_type", ", ".join(MODEL_TYPES))
    return content


def json_file(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The path if it is one of a JSON file, rather than of a directory or a Hub id."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        return None
    path = Path(os.path.expanduser(path_or_id))
    return path if path.suffix == ".json" and path.is_file() else None
