"""Gemma's tokenizer, used by SigLIP 2: byte-pair encoding from tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.errors import CheckpointError, build_from_file, naming
from siglip_model.checkpoints.fields import check_fields, shown
from siglip_model.checkpoints.files import (
    LARGEST_TOKENIZER_JSON,
    StoredObject,
    find_file,
    find_json,
    read_json_object,
    split_hub_arguments,
    to_json,
    write_file,
)
from siglip_model.text.tokenizer import EncodeOptions, Tokenizer, check_unicode
from siglip_model.text.tokenizer_config import (
    CALL_ARGUMENTS,
    NAMED_TOKENS,
    SETTINGS,
    TOKENIZER_JSON,
    AddedToken,
    call_defaults,
    constructor_arguments,
    find_settings,
)

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)
MOST_GROWTH = 1000  # of a text by the replacements of a normaliser

TOKENIZER_FILE = "tokenizer.json"


class TokenizersTokenizer(Tokenizer):
    """Any tokenizer.json, with the interface of `SiglipTokenizer` and the behaviour of transformers' Rust tokenizers.

    tokenizer_file: the path of tokenizer.json. Raises CheckpointError naming it if it is missing or damaged.
    do_lower_case: True lower-cases texts first, False removes the lower-casing step of tokenizer.json's normaliser
    (ValueError if it lower-cases in another way), None leaves the normaliser as it is.
    """

    _lower_case: ClassVar[bool | None] = None  # the default of do_lower_case
    vocab_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": TOKENIZER_FILE}
    _pads_like_rust = True
    default_tokens: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        tokenizer_file: str | os.PathLike[str],
        *,
        bos_token: Any = None,
        eos_token: Any = None,
        unk_token: Any = None,
        sep_token: Any = None,
        pad_token: Any = None,
        cls_token: Any = None,
        mask_token: Any = None,
        extra_special_tokens: Sequence[Any] | None = None,
        added_tokens_decoder: Mapping[int | str, Any] | None = None,
        model_max_length: int | float | None = None,
        padding_side: str | None = None,
        truncation_side: str = "right",
        model_input_names: Sequence[str] | None = None,
        clean_up_tokenization_spaces: bool | None = False,
        split_special_tokens: bool = False,
        do_lower_case: bool | None = None,
    ) -> None:
        check_fields(type(self).__name__, locals(), SETTINGS)
        given = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "sep_token": sep_token,
                 "pad_token": pad_token, "cls_token": cls_token, "mask_token": mask_token}  # fmt: skip
        self.tokenizer_file = os.fspath(tokenizer_file)
        content = _read_document(self.tokenizer_file)
        padding = content.get("padding") or {}
        super().__init__(
            {name: self.default_tokens.get(name) if token is None else token for name, token in given.items()},
            extra_special_tokens,
            model_max_length=model_max_length,
            padding_side=padding_side or (str(padding["direction"]).lower() if "direction" in padding else None),
            truncation_side=truncation_side,
            model_input_names=model_input_names,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
        )
        self._check_tokens(content)
        self._lock = threading.Lock()  # truncation is state of the library's object, set for each call
        self._tokenizer = self._build(content, self._lower_case if do_lower_case is None else do_lower_case)
        with naming(self.tokenizer_file):
            self._add_tokens(added_tokens_decoder or {})

    def _check_tokens(self, content: dict[str, Any]) -> None:
        """Raises ValueError for a special token that this class cannot use with the content of tokenizer.json."""

    def _adapt(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of tokenizer.json as this class interprets it."""
        return content

    def _build(self, content: dict[str, Any], lower_case: bool | None) -> tokenizers.Tokenizer:
        import tokenizers

        with naming(self.tokenizer_file):
            adapted = self._adapt(content)
            if lower_case is not None:
                adapted = {**adapted, "normalizer": _lower_casing(adapted.get("normalizer"), lower_case)}
            _check_growth(adapted.get("normalizer"), self.tokenizer_file)
            built = tokenizers.Tokenizer.from_str(json.dumps(adapted))
        if lower_case is False and _lower_cases(built.normalizer):
            raise ValueError(
                f"{type(self).__name__}: do_lower_case is False, but {self.tokenizer_file} lower-cases in another "
                "step than Lowercase; supported: True, None"
            )
        built.no_truncation()
        built.no_padding()
        return built

    @property
    def do_lower_case(self) -> bool:
        """Whether texts are lower-cased; fixed when the tokenizer is loaded."""
        return _lower_cases(self._tokenizer.normalizer)

    @property
    def tokenizer_class(self) -> str:
        """The class under which transformers gives the same ids."""
        return "TokenizersBackend"

    def _add_tokens(self, given: Mapping[int | str, Any]) -> None:
        """Adds the configuration's added tokens and special tokens that tokenizer.json lacks."""
        import tokenizers

        added = {index: AddedToken.from_json(token) for index, token in given.items()}
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        missing = [
            token for _, token in sorted(added.items(), key=lambda item: int(item[0])) if token.content not in known
        ]
        contents = known | {token.content for token in missing}
        missing += [AddedToken(token, special=True) for token in self.all_special_tokens if token not in contents]
        self._tokenizer.add_tokens([tokenizers.AddedToken(**token.to_json()) for token in missing])

    def _extend_vocabulary(self, tokens: list[AddedToken]) -> int:
        import tokenizers

        with self._lock:
            return self._tokenizer.add_tokens([tokenizers.AddedToken(**token.to_json()) for token in tokens])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    # ---- vocabulary

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocabulary_path(self) -> str:
        return self.tokenizer_file

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are never split, by id."""
        return {
            i: AddedToken.from_json(token) for i, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
        }

    def _token_to_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            index = None if self.unk_token is None else self._tokenizer.token_to_id(self.unk_token)
        if index is None:
            raise KeyError(f"token {token!r} is not in the vocabulary, and the tokenizer has no unknown token")
        return index

    def _id_to_token(self, index: int) -> str:
        token = self._tokenizer.id_to_token(index) if index >= 0 else None
        if token is None:
            raise IndexError(f"id {index} is not in the vocabulary of {len(self)} tokens")
        return token

    # ---- encoding

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        *,
        split_special_tokens: bool | None = None,
    ) -> list[str]:
        """The tokens of a text, or of a pair of texts."""
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens)
        return self.convert_ids_to_tokens(ids)

    def _is_batch(self, text: Any, is_split_into_words: bool) -> bool:
        if not isinstance(text, (list, tuple)):
            return False
        return not is_split_into_words or (len(text) > 0 and isinstance(text[0], (list, tuple)))

    def _encode(self, text: Any, pair: Any, options: EncodeOptions) -> dict[str, Any]:
        if options.return_overflowing_tokens:
            raise ValueError(f"{type(self).__name__}: return_overflowing_tokens is True; supported: False")
        words = options.is_split_into_words
        for part in (text, pair):
            if words and isinstance(part, (list, tuple)) and all(isinstance(word, str) for word in part):
                check_unicode("".join(part))
                continue
            if part is not None and (words or not isinstance(part, str)):
                raise ValueError(
                    f"{type(self).__name__}: got a text of type {type(part).__name__}; supported: "
                    + ("a list of words (is_split_into_words is True)" if words else "a string")
                )
            if part is not None:
                check_unicode(part)
        with self._lock:
            if options.limit is not None:
                self._tokenizer.enable_truncation(
                    max_length=options.limit, strategy=options.truncation, direction=self.truncation_side
                )
            self._tokenizer.encode_special_tokens = options.split_special_tokens
            try:
                encoding = self._tokenizer.encode(
                    text, pair, is_pretokenized=words, add_special_tokens=options.add_special_tokens
                )
            except Exception as error:  # the library raises bare Exceptions
                raise ValueError(f"{type(self).__name__}: {error}") from error
            except BaseException as error:
                with naming(self.tokenizer_file):  # of a panic, such as a regular expression that does not end
                    raise error
            finally:
                self._tokenizer.no_truncation()
        return {
            "input_ids": encoding.ids,
            "token_type_ids": encoding.type_ids,
            "special_tokens_mask": encoding.special_tokens_mask,
            "offset_mapping": encoding.offsets,
        }

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._tokenizer.num_special_tokens_to_add(pair)

    # ---- decoding

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    def _decode_ids(self, ids: int | list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode([ids] if isinstance(ids, int) else ids, skip_special_tokens=skip_special_tokens)

    def clean_up_tokenization(self, text: str) -> str:
        # Byte-pair encodings preserve spaces, so transformers does not clean up their text.
        return text if type(self._tokenizer.model).__name__ == "BPE" else super().clean_up_tokenization(text)

    # ---- files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: Any
    ) -> TokenizersTokenizer:
        """Loads a directory or Hub repository: tokenizer.json and, if present, tokenizer_config.json.

        arguments: those of the constructor, which override the files; those of a call, which SiglipProcessor then takes
        as defaults; those of `resolve_file`. Errors as in
        `SiglipTokenizer.from_pretrained`.
        """
        path_or_id = pretrained_model_name_or_path
        hub, given = split_hub_arguments(supported_arguments(cls.__name__, arguments))
        of_calls = {name: given.pop(name) for name in CALL_ARGUMENTS if name in given}
        check_fields(cls.__name__, of_calls, CALL_ARGUMENTS)
        tokenizer_file = find_file(path_or_id, TOKENIZER_FILE, hub)
        if tokenizer_file is None:
            raise CheckpointError(f"{path_or_id} has no {TOKENIZER_FILE}, which {cls.__name__} needs")
        config = find_settings(path_or_id, cls.config_name, hub)
        if config is None:
            logger.warning("%s has no %s: the defaults of %s apply", path_or_id, cls.config_name, cls.__name__)
        found: dict[str, Any] = dict(config or {})
        if "added_tokens_decoder" not in found:
            found.update(find_settings(path_or_id, "special_tokens_map.json", hub) or {})
        found.update(cls._checkpoint_defaults(path_or_id, found, hub))
        blamed = tokenizer_file if config is None else config.path
        tokenizer = build_from_file(blamed, partial(cls, tokenizer_file), constructor_arguments(cls, found), given)
        tokenizer.name_or_path = os.fspath(path_or_id)
        tokenizer.call_defaults = call_defaults({**found, **of_calls})
        return tokenizer

    @classmethod
    def _checkpoint_defaults(
        cls, path_or_id: str | os.PathLike[str], config: dict[str, Any], hub: dict[str, Any]
    ) -> dict[str, Any]:
        """Settings that the checkpoint implies where tokenizer_config.json lacks them."""
        return {}

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes tokenizer.json alone, atomically. Returns its path."""
        name = (filename_prefix + "-" if filename_prefix else "") + TOKENIZER_FILE
        return (write_file(save_directory, name, self._tokenizer.to_str(pretty=True).encode()),)

    def _write(self, save_directory: str | os.PathLike[str], prefix: str) -> tuple[str, ...]:
        """tokenizer.json and tokenizer_config.json, which transformers 5 loads."""
        vocabulary = self.save_vocabulary(save_directory, prefix.removesuffix("-"))
        config = {
            **{name: self._named_tokens.get(name) for name in NAMED_TOKENS if self._named_tokens.get(name)},
            **self.call_defaults,
            "backend": "tokenizers",
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "do_lower_case": self.do_lower_case,
            "extra_special_tokens": self.extra_special_tokens,
            "model_input_names": self.model_input_names,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "processor_class": "SiglipProcessor",
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": self.tokenizer_class,
            "truncation_side": self.truncation_side,
        }
        return (write_file(save_directory, prefix + self.config_name, to_json(config)), *vocabulary)


class GemmaTokenizer(TokenizersTokenizer):
    """Gemma's tokenizer: spaces become "▁", no prefix is added, unknown characters fall back to bytes.

    Normaliser, pre-tokenizer and decoder are those of transformers' GemmaTokenizer, not those of tokenizer.json.

    do_lower_case: lower-cases texts first. SigLIP 2 was trained on lower-cased text (Tschannen et al. 2025, section 2),
    and its fixed-resolution checkpoints name this class and set do_lower_case. transformers ignores the setting (it
    lower-cases under the class Siglip2Tokenizer alone); here it is followed. If tokenizer_config.json lacks it, the
    checkpoint decides: True for SigLIP's (by model_type, or by the processor's class), False for any other, such as
    Gemma's. An argument of `from_pretrained` overrides both. A tokenizer that lower-cases is saved as Siglip2Tokenizer,
    so that transformers gives the same ids, and warns where it pads otherwise than to 64 tokens, as in training.
    """

    padding_side = "left"
    default_tokens: ClassVar[Mapping[str, str]] = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    _lower_case = False

    def warns_of_padding(self, padding: bool | str, return_tensors: str | None) -> bool:
        """Of SigLIP 2's texts, where they are padded or become tensors; lists without padding may be for anything."""
        return self.do_lower_case and (padding not in (False, "do_not_pad") or return_tensors is not None)

    @property
    def tokenizer_class(self) -> str:
        return "Siglip2Tokenizer" if self.do_lower_case else "GemmaTokenizer"

    @classmethod
    def _checkpoint_defaults(
        cls, path_or_id: str | os.PathLike[str], config: dict[str, Any], hub: dict[str, Any]
    ) -> dict[str, Any]:
        if config.get("do_lower_case") is not None:
            return {}
        model = find_json(path_or_id, "config.json", hub)
        kinds = (config.get("processor_class"), None if model is None else model.get("model_type"))
        return {"do_lower_case": True} if any(str(kind).lower().startswith("siglip") for kind in kinds) else {}

    def _check_tokens(self, content: dict[str, Any]) -> None:
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if self.unk_token is not None and isinstance(vocabulary, dict) and self.unk_token not in vocabulary:
            raise ValueError(
                f"{type(self).__name__}: unk_token is {shown(self.unk_token)}; supported: a token of the vocabulary of "
                f"{self.tokenizer_file}, or None"
            )

    def _adapt(self, content: dict[str, Any]) -> dict[str, Any]:
        model = content.get("model")
        if not isinstance(model, dict) or "merges" not in model:
            raise ValueError("its model is not a byte-pair encoding")
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        decoders = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        splitting = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        return {
            **content,
            "normalizer": space,
            "pre_tokenizer": splitting,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {**model, "dropout": None, "unk_token": self.unk_token, "fuse_unk": True, "byte_fallback": True},
        }


class Siglip2Tokenizer(GemmaTokenizer):
    """Gemma's tokenizer on lower-cased text, as SigLIP 2 was trained."""

    _lower_case = True


def class_for(name: str) -> type[TokenizersTokenizer] | None:
    """The class for a tokenizer_class (without "Fast") of tokenizer_config.json; None if it is unsupported."""
    classes: dict[str, type[TokenizersTokenizer]] = {
        "": TokenizersTokenizer,
        "GemmaTokenizer": GemmaTokenizer,
        "PreTrainedTokenizer": TokenizersTokenizer,
        "Siglip2Tokenizer": Siglip2Tokenizer,
        "TokenizersBackend": TokenizersTokenizer,
    }
    return classes.get(name)


def _read_document(path: str) -> StoredObject:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    return read_json_object(Path(path), LARGEST_TOKENIZER_JSON).check(TOKENIZER_JSON)


def _check_growth(normalizer: Any, path: str) -> None:
    """Raises CheckpointError for a normaliser whose replacements can multiply a text's length by more than MOST_GROWTH.

    A kilobyte of tokenizer.json could otherwise make gigabytes of a word.
    """
    growth, steps = 1, [normalizer]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            steps += step["normalizers"] if isinstance(step.get("normalizers"), list) else []
            for name in ("content", "prepend"):
                growth *= max(1, len(step[name])) if isinstance(step.get(name), str) else 1
    if growth > MOST_GROWTH:
        raise CheckpointError(
            f"{path}: its normalizer can make a text {growth:,} times as long; supported: at most {MOST_GROWTH} times"
        )


def _lower_casing(normalizer: Any, wanted: bool) -> dict[str, Any] | None:
    """A normaliser of tokenizer.json, or None, with or without a Lowercase step."""
    steps = [] if normalizer is None else [normalizer]
    if steps and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    kept = [step for step in steps if step["type"] != "Lowercase"]
    if wanted:
        kept = steps if len(kept) < len(steps) else [{"type": "Lowercase"}, *steps]
    if len(kept) < 2:
        return kept[0] if kept else None
    return {"type": "Sequence", "normalizers": kept}


def _lower_cases(normalizer: tokenizers.normalizers.Normalizer | None) -> bool:
    return normalizer is not None and normalizer.normalize_str("A") == "a"
