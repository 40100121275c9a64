"""Classes that users register with an Auto class, found by the model_type in a checkpoint's config.json."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.files import find_json


class Registry:
    """Base of an Auto class."""

    registered: ClassVar[dict[str, Any]]  # by model_type

    def __init_subclass__(cls) -> None:
        cls.registered = {}

    @classmethod
    def register(cls, config_class: Any, registered_class: Any, exist_ok: bool = False) -> None:
        """Let `from_pretrained` call the class's own for checkpoints of the configuration's model_type.

        Raises ValueError for classes without what that needs, and if the model_type is registered already and exist_ok
        is False.
        """
        model_type = getattr(config_class, "model_type", None)
        if not model_type:
            raise ValueError(f"{cls.__name__}: config_class is {config_class!r}; supported: a class with a model_type")
        if not hasattr(registered_class, "from_pretrained"):
            raise ValueError(f"{cls.__name__}: {registered_class!r} has no from_pretrained")
        if model_type in cls.registered and not exist_ok:
            raise ValueError(
                f"{cls.__name__}: {model_type!r} is registered already; supported: others, or exist_ok=True"
            )
        cls.registered[model_type] = registered_class

    @classmethod
    def registered_for(cls, path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> Any:
        """The class that is registered for the checkpoint, or None. hub: arguments of `resolve_file`."""
        config = find_json(path_or_id, CONFIG_NAME, hub) if cls.registered else None
        return None if config is None else cls.registered.get(str(config.get("model_type")))
