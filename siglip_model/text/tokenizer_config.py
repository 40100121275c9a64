"""Added tokens, and the settings in a checkpoint's tokenizer_config.json."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# In the order of transformers.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is never split. lstrip, rstrip: absorb adjacent white space. single_word: match whole words only."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False

    @classmethod
    def from_json(cls, value: Any) -> AddedToken:
        """From a string, or from an object with any of the fields (transformers' files hold both)."""
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("content"), str):
            return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})
        if isinstance(getattr(value, "content", None), str):  # an AddedToken of the tokenizers library
            return cls(**{name: getattr(value, name) for name in cls.__dataclass_fields__ if hasattr(value, name)})
        raise ValueError(f"expected a token as a string or an object with 'content', got {value!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Call arguments that tokenizer_config.json may hold; SiglipProcessor takes them as defaults.
CALL_ARGUMENTS = (
    "add_special_tokens", "padding", "truncation", "max_length", "stride", "is_split_into_words", "pad_to_multiple_of",
    "return_token_type_ids", "return_attention_mask", "return_special_tokens_mask", "return_length",
)  # fmt: skip


def call_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in CALL_ARGUMENTS if config.get(name) is not None}


def constructor_arguments(cls: type, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments: a file's settings (transformers 4 or 5), overridden by those given by the caller."""
    config = dict(config)
    if not config.get("extra_special_tokens"):  # transformers 4 wrote the older name, or an empty object
        config["extra_special_tokens"] = config.pop("additional_special_tokens", None)
    if isinstance(config["extra_special_tokens"], Mapping):
        config["extra_special_tokens"] = list(config["extra_special_tokens"].values())
    # null is meaningful only for these
    nullable = (*NAMED_TOKENS, "model_max_length")
    known = inspect.signature(cls).parameters
    read = {name: value for name, value in config.items() if name in known and (value is not None or name in nullable)}
    return {**read, **given}


def lower_case_flag(cls: type, value: Any, default: Any) -> Any:
    """`do_lower_case`, or `default` for None. Raises ValueError for anything but True, False and None."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{cls.__name__}: do_lower_case is {value!r}; supported: True, False")
    return default if value is None else value
