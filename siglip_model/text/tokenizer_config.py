"""Added tokens, and the settings in a checkpoint's tokenizer_config.json."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from siglip_model.checkpoints.fields import (
    FLAG,
    TEXT,
    Field,
    choice,
    is_finite,
    is_index,
    is_text,
    mapping,
    number,
    optional,
    texts,
    whole,
)
from siglip_model.checkpoints.files import StoredObject, find_json
from siglip_model.text.padding import NO_LIMIT, PADDING, SIDES, TRUNCATION

MOST_TOKENS = 2**20  # of a text: a checkpoint could otherwise have each text padded to gigabytes
# Added tokens are searched for in every text.
MOST_ADDED_TOKENS = 2**14
LONGEST_TOKEN = 1000  # letters

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

    def __str__(self) -> str:
        """The content, as of an AddedToken of the tokenizers library."""
        return self.content


def is_token(value: Any) -> bool:
    """Whether the value is a string, or an AddedToken of this module or of the tokenizers library."""
    return isinstance(value, str) or isinstance(getattr(value, "content", None), str)


def _is_content(value: Any) -> bool:
    return is_text(value) and len(value) <= LONGEST_TOKEN


def _is_token(value: Any) -> bool:
    if isinstance(value, Mapping):
        flags = (value.get(name, False) for name in AddedToken.__dataclass_fields__ if name != "content")
        return _is_content(value.get("content")) and all(isinstance(flag, bool) for flag in flags)
    return _is_content(value) or _is_content(getattr(value, "content", None))  # an AddedToken


def _are_few(values: Any) -> bool:
    return len(values) <= MOST_ADDED_TOKENS


def _is_stored_token(value: Any) -> bool:
    return isinstance(value, Mapping) and is_index(value.get("id")) and _is_token(value)


_TOKEN = Field(f"a string of at most {LONGEST_TOKEN} letters, or an object with such a 'content'", _is_token)
_TOKENS = Field(
    f"a list of at most {MOST_ADDED_TOKENS} tokens",
    lambda value: isinstance(value, (list, tuple)) and _are_few(value) and all(map(_is_token, value)),
)
# The options of SentencePieceProcessor that a checkpoint may set. Others, such as model_file, open files.
_SENTENCEPIECE = {"enable_sampling": FLAG, "nbest_size": whole(-1, 512), "alpha": number(0, 1000)}

# Arguments of a call that tokenizer_config.json may hold; SiglipProcessor takes them as defaults.
CALL_ARGUMENTS = optional(
    {
        "add_special_tokens": FLAG,
        "padding": FLAG | choice(*PADDING),
        "truncation": FLAG | choice(*TRUNCATION),
        "max_length": whole(1, MOST_TOKENS),
        "stride": whole(0, MOST_TOKENS),
        "is_split_into_words": FLAG,
        "pad_to_multiple_of": whole(1, MOST_TOKENS),
        "return_token_type_ids": FLAG,
        "return_attention_mask": FLAG,
        "return_special_tokens_mask": FLAG,
        "return_length": FLAG,
    }
)

# Arguments of the tokenizers' constructors, by their names in tokenizer_config.json and special_tokens_map.json.
SETTINGS = optional(
    {
        **dict.fromkeys(NAMED_TOKENS, _TOKEN),
        **dict.fromkeys(
            ("extra_special_tokens", "additional_special_tokens"),
            _TOKENS | mapping(is_text, _is_token, "an object of tokens"),
        ),
        "added_tokens_decoder": Field(
            f"an object from ids to at most {MOST_ADDED_TOKENS} tokens",
            lambda value: mapping(is_index, _is_token, "").accepts(value) and _are_few(value),
        ),
        "model_max_length": Field(
            f"a whole number from 1 to {MOST_TOKENS}, or above {NO_LIMIT:g} for no limit",
            lambda value: is_finite(value) and value % 1 == 0 and (1 <= value <= MOST_TOKENS or value > NO_LIMIT),
        ),
        **dict.fromkeys(("padding_side", "truncation_side"), choice(*SIDES)),
        "model_input_names": texts(),
        **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens", "legacy"), FLAG),
        "do_lower_case": FLAG,
        "sp_model_kwargs": Field(
            "an object with any of "
            + "; ".join(f"{name}: {field.supported}" for name, field in _SENTENCEPIECE.items()),
            lambda value: (
                isinstance(value, Mapping)
                and all(name in _SENTENCEPIECE and _SENTENCEPIECE[name].accepts(value[name]) for name in value)
            ),
        ),
        **dict.fromkeys(("tokenizer_class", "processor_class"), TEXT),
    }
)

# Fields of tokenizer.json that are read here; the `tokenizers` library reads the others.
TOKENIZER_JSON = optional(
    {
        "added_tokens": Field(
            f"a list of at most {MOST_ADDED_TOKENS} objects with 'id' and 'content'",
            lambda value: isinstance(value, list) and _are_few(value) and all(map(_is_stored_token, value)),
        ),
        "padding": Field(
            "an object whose direction is Left or Right",
            lambda value: isinstance(value, Mapping) and value.get("direction", "Right") in ("Left", "Right"),
        ),
    }
)


def find_settings(path_or_id: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> StoredObject | None:
    """The checked settings in tokenizer_config.json or special_tokens_map.json; None without the file.

    Raises CheckpointError naming file and field.
    """
    found = find_json(path_or_id, name, hub)
    return None if found is None else found.check({**SETTINGS, **CALL_ARGUMENTS})


def call_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in CALL_ARGUMENTS if config.get(name) is not None}


def constructor_arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from the settings of a checkpoint (transformers 4 or 5)."""
    config = dict(config)
    if not config.get("extra_special_tokens"):  # transformers 4 wrote the older name, or an empty object
        config["extra_special_tokens"] = config.pop("additional_special_tokens", None)
    if isinstance(config["extra_special_tokens"], Mapping):
        config["extra_special_tokens"] = list(config["extra_special_tokens"].values())
    # null is meaningful only for these
    nullable = (*NAMED_TOKENS, "model_max_length")
    known = set(inspect.signature(cls).parameters) - {"vocab_file", "tokenizer_file"}  # settings choose no file
    return {name: value for name, value in config.items() if name in known and (value is not None or name in nullable)}
