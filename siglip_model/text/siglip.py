"""SigLIP's tokenizer: lower-cases, drops ASCII punctuation, applies SentencePiece, appends `</s>`."""

from __future__ import annotations

import logging
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.errors import CheckpointError, build_from_file, naming
from siglip_model.checkpoints.fields import Field, check_fields, is_index
from siglip_model.checkpoints.files import find_file, find_json, split_hub_arguments, to_json, write_file
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

logger = logging.getLogger(__name__)

UNDERLINE = "▁"  # SentencePiece's mark for a space
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHITE_SPACE = re.compile(r"\s+")
# A serialized ModelProto is extended by appending: here normalizer_spec { add_dummy_prefix: false }.
LARGEST_MODEL = 2**24  # bytes; SigLIP's models of 32,000 and 250,000 pieces have 0.8 and 4.3 MB
_NO_DUMMY_PREFIX = bytes((0x1A, 0x02, 0x18, 0x00))


class SiglipTokenizer(Tokenizer):
    """SentencePiece with transformers' interface and tokens (see `Tokenizer.__call__` for the arguments).

    vocab_file: a SentencePiece model, usually spiece.model. model_input_names: without "attention_mask", as in
    published checkpoints, no mask is returned and the model attends to padding, as it did in training. do_lower_case:
    True or False; None means True.
    Raises CheckpointError naming the file if it is missing or not a SentencePiece model.
    """

    vocab_file_name: ClassVar[str] = "spiece.model"
    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": vocab_file_name}

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        eos_token: Any = "</s>",
        unk_token: Any = "<unk>",
        pad_token: Any = "</s>",
        additional_special_tokens: Sequence[Any] | None = None,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        model_max_length: int | float | None = 64,
        do_lower_case: bool | None = True,
        *,
        bos_token: Any = None,
        sep_token: Any = None,
        cls_token: Any = None,
        mask_token: Any = None,
        extra_special_tokens: Sequence[Any] | None = None,
        added_tokens_decoder: Mapping[int | str, Any] | None = None,
        padding_side: str | None = None,
        truncation_side: str = "right",
        model_input_names: Sequence[str] | None = None,
        clean_up_tokenization_spaces: bool | None = False,
        split_special_tokens: bool = False,
        legacy: bool = True,
    ) -> None:
        check_fields(type(self).__name__, locals(), SETTINGS)
        given = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "sep_token": sep_token,
                 "pad_token": pad_token, "cls_token": cls_token, "mask_token": mask_token}  # fmt: skip
        super().__init__(
            given,
            additional_special_tokens if extra_special_tokens is None else extra_special_tokens,
            model_max_length=model_max_length,
            padding_side=padding_side,
            truncation_side=truncation_side,
            model_input_names=model_input_names,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
        )
        if self.unk_token is None:
            raise ValueError("SiglipTokenizer: unk_token is None; supported: a string")
        self.vocab_file = os.fspath(vocab_file)
        self.do_lower_case = True if do_lower_case is None else do_lower_case
        self.legacy = legacy
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        with naming(self.vocab_file):
            self._model_bytes = _read_model(self.vocab_file)
            self._load_model()
            self._add_tokens({int(i): AddedToken.from_json(token) for i, token in (added_tokens_decoder or {}).items()})

    def _load_model(self) -> None:
        import sentencepiece

        content = self._model_bytes if self.legacy else self._model_bytes + _NO_DUMMY_PREFIX
        self.sp_model = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        try:
            loaded = self.sp_model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise CheckpointError(f"{self.vocab_file} is not a SentencePiece model, or is damaged: {error}") from error
        if not loaded or self.sp_model.get_piece_size() == 0:
            raise CheckpointError(f"{self.vocab_file} is not a SentencePiece model, or is damaged")
        # Text is encoded behind the unknown token's characters, which preserves leading spaces; this many pieces are
        # dropped afterwards.
        self._prefix_length = len(self.sp_model.encode(self.unk_token))

    def _add_tokens(self, given: dict[int, AddedToken]) -> None:
        """Special tokens outside the vocabulary get the next ids."""
        self._added_by_id = dict(given)
        self._added_ids = {token.content: index for index, token in given.items()}
        next_id = len(self.get_vocab())
        for token in self.all_special_tokens:
            if token in self._added_ids:
                continue
            index = self.sp_model.piece_to_id(token)
            if self.sp_model.id_to_piece(index) != token:
                index, next_id = next_id, next_id + 1
            self._added_by_id[index] = AddedToken(token, special=True)
            self._added_ids[token] = index

    def _extend_vocabulary(self, tokens: list[AddedToken]) -> int:
        start = next_id = len(self)
        for token in tokens:
            if self.do_lower_case and token.normalized and not token.special:
                token = replace(token, content=token.content.lower())
            index = self._added_ids.get(token.content)
            if index is None:
                index = self.sp_model.piece_to_id(token.content)
                if self.sp_model.id_to_piece(index) != token.content:
                    index, next_id = next_id, next_id + 1
            if token.special and token.content not in self.all_special_tokens:
                self.extra_special_tokens.append(token.content)
            self._added_by_id[index], self._added_ids[token.content] = token, index
        return next_id - start

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sp_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_model()

    # ---- vocabulary

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size()

    @property
    def vocabulary_path(self) -> str:
        return self.vocab_file

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are never split, by id: special tokens and those that the checkpoint added."""
        return dict(sorted(self._added_by_id.items()))

    def get_vocab(self) -> dict[str, int]:
        vocabulary = {self._id_to_token(index): index for index in range(self.vocab_size)}
        return {**vocabulary, **self.added_tokens_encoder}

    def _token_to_id(self, token: str) -> int:
        added = self._added_ids.get(token)
        return self.sp_model.piece_to_id(token) if added is None else added

    def _id_to_token(self, index: int) -> str:
        if index in self._added_by_id:
            return self._added_by_id[index].content
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"id {index} is not in the vocabulary of {self.vocab_size} tokens")
        return self.sp_model.id_to_piece(index)

    # ---- text to tokens

    def remove_punctuation(self, text: str) -> str:
        """The text without ASCII punctuation."""
        return text.translate(_PUNCTUATION)

    def canonicalize_text(self, text: str, *, keep_punctuation_exact_string: str | None = None) -> str:
        """Lower-cases (if `do_lower_case`), removes ASCII punctuation, collapses and strips white space.

        keep_punctuation_exact_string: a string, such as "{}", whose occurrences are kept.
        """
        if self.do_lower_case:
            text = text.lower()
        if keep_punctuation_exact_string:
            parts = text.split(keep_punctuation_exact_string)
            text = keep_punctuation_exact_string.join(map(self.remove_punctuation, parts))
        else:
            text = self.remove_punctuation(text)
        return _WHITE_SPACE.sub(" ", text).strip()

    def tokenize(
        self, text: str, add_special_tokens: bool = False, *, split_special_tokens: bool | None = None
    ) -> list[str]:
        """The pieces of a text. Added tokens within the text stay whole unless `split_special_tokens`.

        add_special_tokens: ignored, as in transformers; no special token is added here.
        """
        if not isinstance(text, str):
            raise TypeError(f"tokenize: text is of type {type(text).__name__}; supported: str")
        text = UNDERLINE + text.replace(UNDERLINE, " ")
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            tokens = self._pieces(text)
        else:
            whole = {token for token in self._added_ids if token}
            kept = whole.union(self.all_special_tokens)
            tokens = []
            for segment in self._segments(text, whole):
                tokens += [segment] if segment in kept else self._pieces(segment)
        if len(tokens) > 1 and tokens[0] == UNDERLINE and tokens[1] in self.all_special_tokens:
            tokens = tokens[1:]
        return tokens

    def _segments(self, text: str, whole: set[str]) -> list[str]:
        """Splits the text around the tokens that stay whole; the longest match wins."""
        pattern = "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True))
        segments = [segment for segment in re.split(f"({pattern})", text) if segment] if whole else [text]
        for i, segment in enumerate(segments):
            token = self._added_by_id.get(self._added_ids.get(segment, -1))
            if token is None:
                continue
            left = segments[i - 1] if i > 0 else ""
            right = segments[i + 1] if i + 1 < len(segments) else ""
            if token.rstrip and right:
                segments[i + 1] = right.lstrip()
            if token.lstrip and left:
                segments[i - 1] = left.rstrip()
            if token.single_word:
                if left and not left.endswith(" "):
                    segments[i - 1] += segment
                    segments[i] = ""
                elif right and not right.startswith(" "):
                    segments[i + 1] = segment + segments[i + 1]
                    segments[i] = ""
        return [segment for segment in segments if segment]

    def _pieces(self, segment: str) -> list[str]:
        text = str(self.unk_token) + self.canonicalize_text(segment)
        check_unicode(text)
        pieces = self.sp_model.encode(text, out_type=str)
        return pieces[self._prefix_length :] if len(pieces) >= self._prefix_length else pieces

    # ---- special tokens

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A </s>`, or `A </s> B </s>`; a sequence that already ends with `</s>` gets no second one."""
        return self._with_end(token_ids_0) + ([] if token_ids_1 is None else self._with_end(token_ids_1))

    def _with_end(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos_token_id else [*ids, self._end_id()]

    def _end_id(self) -> int:
        if self.eos_token_id is None:
            raise ValueError("SiglipTokenizer: eos_token is None; give add_special_tokens=False, or set one")
        return self.eos_token_id

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for the `</s>` that ends each sequence, 0 for its tokens.

        As in transformers, a sequence that already ends with `</s>` is counted as if it received another.
        """
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        mask = [0] * len(token_ids_0) + [1]
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros, one per token of the sequences and per `</s>`."""
        return [0] * len(self.get_special_tokens_mask(token_ids_0, token_ids_1))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2 if pair else 1

    # ---- one text to ids

    def _is_batch(self, text: Any, is_split_into_words: bool) -> bool:
        if not isinstance(text, (list, tuple)):
            return False
        if not text:
            return not is_split_into_words
        return isinstance(text[0], (list, tuple) if is_split_into_words else (str, list, tuple))

    def _encode(self, text: Any, pair: Any, options: EncodeOptions) -> dict[str, Any]:
        first = self._ids(text, options)
        second = None if pair is None else self._ids(pair, options)
        if options.return_overflowing_tokens and options.truncation == "longest_first" and second is not None:
            raise ValueError(
                "return_overflowing_tokens=True with a pair and truncation 'longest_first'; supported: 'only_first', "
                "'only_second'"
            )
        added = self.num_special_tokens_to_add(second is not None) if options.add_special_tokens else 0
        excess = len(first) + len(second or ()) + added - options.limit if options.limit else 0
        overflowing: list[int] = []
        if excess > 0:
            first, second, overflowing = self._truncate(first, second, excess, options.truncation, options.stride)
        if options.add_special_tokens:
            fields: dict[str, Any] = {
                "input_ids": self.build_inputs_with_special_tokens(first, second),
                "token_type_ids": self.create_token_type_ids_from_sequences(first, second),
                "special_tokens_mask": self.get_special_tokens_mask(first, second),
            }
        else:
            ids = first + (second or [])
            fields = {"input_ids": ids, "token_type_ids": [0] * len(ids), "special_tokens_mask": [0] * len(ids)}
        if options.return_overflowing_tokens and overflowing:
            fields |= {"overflowing_tokens": overflowing, "num_truncated_tokens": excess}
        return fields

    def _ids(self, text: Any, options: EncodeOptions) -> list[int]:
        """Ids of a text, of words or of tokens; ids are returned unchanged."""
        if isinstance(text, str):
            return self._ids_of_words([text], options)
        if isinstance(text, (list, tuple)) and text:
            if all(isinstance(item, int) for item in text):
                return list(text)
            if all(isinstance(item, str) for item in text):
                if options.is_split_into_words:
                    return self._ids_of_words(text, options)
                return [self._token_to_id(token) for token in text]
        raise ValueError(
            f"SiglipTokenizer: got a text of type {type(text).__name__}; supported: a string, a list of token ids, "
            "a list of tokens as the pair of another, or with is_split_into_words=True a list of words"
        )

    def _ids_of_words(self, words: Sequence[str], options: EncodeOptions) -> list[int]:
        return [
            self._token_to_id(token)
            for word in words
            for token in self.tokenize(word, split_special_tokens=options.split_special_tokens)
        ]

    def _truncate(
        self, first: list[int], second: list[int] | None, excess: int, strategy: str, stride: int
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Drops `excess` ids at `truncation_side`. Also returns what a single sequence lost, plus `stride` ids."""
        right = self.truncation_side == "right"

        def cut(ids: list[int], count: int) -> list[int]:
            return ids[: max(len(ids) - count, 0)] if right else ids[count:]

        def lost(ids: list[int]) -> list[int]:
            window = min(len(ids), stride + excess)
            return ids[len(ids) - window :] if right else ids[:window]

        if strategy == "only_first" or (strategy == "longest_first" and second is None):
            return cut(first, excess), second, lost(first)
        if second and strategy == "only_second":
            return first, cut(second, excess), lost(second)
        if second is not None and strategy == "longest_first":
            # First the longer one down to the other's length, then both equally.
            from_longer = min(abs(len(second) - len(first)), excess)
            half = (excess - from_longer) // 2
            if len(first) > len(second):
                return cut(first, from_longer + half), cut(second, excess - from_longer - half), []
            return cut(first, half), cut(second, excess - half), []
        return first, second, []

    # ---- tokens to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        text, after_special = "", False
        pieces: list[str] = []
        for token in tokens:
            if token in special:
                text += ("" if after_special else " ") + self.sp_model.decode(pieces) + token
                pieces, after_special = [], True
            else:
                pieces.append(token)
                after_special = False
        return (text + self.sp_model.decode(pieces)).strip()

    def _decode_ids(self, ids: int | list[int], skip_special_tokens: bool) -> str:
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens)  # a single id is never skipped
        return self.convert_tokens_to_string([tokens] if isinstance(tokens, str) else tokens)

    # ---- files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: Any
    ) -> SiglipTokenizer:
        """Loads a directory or Hub repository: spiece.model and, if present, tokenizer_config.json.

        arguments: those of the constructor, which override the files; those of a call, which SiglipProcessor then takes
        as defaults; those of `resolve_file`.
        Raises CheckpointError for a missing or damaged file, naming it; OSError as `resolve_file`; TypeError for an
        unknown argument, ValueError for one of transformers whose effect is not supported.
        """
        path_or_id = pretrained_model_name_or_path
        hub, given = split_hub_arguments(supported_arguments(cls.__name__, arguments))
        of_calls = {name: given.pop(name) for name in CALL_ARGUMENTS if name in given}
        check_fields(cls.__name__, of_calls, CALL_ARGUMENTS)
        vocab_file = find_file(path_or_id, cls.vocab_file_name, hub)
        if vocab_file is None:
            raise CheckpointError(f"{path_or_id} has no {cls.vocab_file_name}, which SiglipTokenizer needs")
        config = find_settings(path_or_id, cls.config_name, hub)
        if config is None:
            logger.warning(
                "%s has no %s: the defaults of %s apply, which return an attention mask",
                path_or_id,
                cls.config_name,
                cls.__name__,
            )
        legacy = {} if config is not None and "added_tokens_decoder" in config else _legacy_files(path_or_id, hub)
        settings = constructor_arguments(cls, {**(config or {}), **legacy})
        blamed = vocab_file if config is None else config.path
        tokenizer = build_from_file(blamed, partial(cls, vocab_file), settings, given)
        tokenizer.name_or_path = os.fspath(path_or_id)
        tokenizer.call_defaults = call_defaults({**(config or {}), **of_calls})
        return tokenizer

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes the SentencePiece model alone, atomically. Returns its path."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_file_name
        return (write_file(save_directory, name, self._model_bytes),)

    def _write(self, save_directory: str | os.PathLike[str], prefix: str) -> tuple[str, ...]:
        """spiece.model and tokenizer_config.json, which transformers 4 and 5 load."""
        vocabulary = self.save_vocabulary(save_directory, prefix.removesuffix("-"))
        return (write_file(save_directory, prefix + self.config_name, to_json(self._to_config())), *vocabulary)

    def _to_config(self) -> dict[str, Any]:
        return {
            **self.special_tokens_map,
            **self.call_defaults,
            "added_tokens_decoder": {str(i): token.to_json() for i, token in self.added_tokens_decoder.items()},
            "backend": "sentencepiece",
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "do_lower_case": self.do_lower_case,
            "extra_special_tokens": self.extra_special_tokens,
            "legacy": self.legacy,
            "model_input_names": self.model_input_names,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "processor_class": "SiglipProcessor",
            "sp_model_kwargs": self.sp_model_kwargs,
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": "SiglipTokenizer",
            "truncation_side": self.truncation_side,
        }


def _read_model(path: str) -> bytes:
    try:
        size = os.stat(path).st_size
        content = Path(path).read_bytes() if size <= LARGEST_MODEL else b""
    except OSError as error:
        raise CheckpointError(f"{path}: the SentencePiece model cannot be read: {error.strerror}") from error
    if size > LARGEST_MODEL:
        raise CheckpointError(f"{path} has {size:,} bytes; supported: at most {LARGEST_MODEL:,}")
    if not content:
        raise CheckpointError(f"{path} is empty, not a SentencePiece model")
    return content


def _legacy_files(path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """Settings from transformers 4's older files: special_tokens_map.json, added_tokens.json, tokenizer.json."""
    settings = dict(find_settings(path_or_id, "special_tokens_map.json", hub) or {})
    special = [AddedToken.from_json(token).content for name in NAMED_TOKENS if (token := settings.get(name))]
    ids = find_json(path_or_id, "added_tokens.json", hub)
    if ids is not None:
        ids.check(dict.fromkeys(ids, Field("an id from 0", is_index)))
    added = {int(index): AddedToken(content, special=content in special) for content, index in (ids or {}).items()}
    library = find_json(path_or_id, "tokenizer.json", hub)
    if library is not None:
        for token in library.check(TOKENIZER_JSON).get("added_tokens") or ():
            added[int(token["id"])] = AddedToken.from_json(token)
    return {**settings, "added_tokens_decoder": added}
