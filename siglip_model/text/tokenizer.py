"""The base of all tokenizers: special tokens, transformers' calling convention, padding and decoding."""

from __future__ import annotations

import abc
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from siglip_model.batch import BatchFeature, check_tensor_kind, tokens_to_tensor
from siglip_model.checkpoints.upload import check_upload_arguments, save_and_upload, upload
from siglip_model.text.padding import SIDES, Lengths, one_of, warn_unless_as_trained
from siglip_model.text.tokenizer_config import NAMED_TOKENS, AddedToken, is_token

logger = logging.getLogger(__name__)


def _named_token(name: str) -> property:
    def read(self: Tokenizer) -> str | None:
        return self._named_tokens.get(name)

    def write(self: Tokenizer, token: Any) -> None:
        if token is not None and not is_token(token):
            raise TypeError(f"{name} is {token!r}; supported: a string, an AddedToken or None")
        self._named_tokens[name] = None if token is None else AddedToken.from_json(token).content

    return property(read, write, doc=f"The {name.removesuffix('_token')} token as a string, None if there is none.")


def _named_token_id(name: str) -> property:
    def read(self: Tokenizer) -> int | None:
        token = self._named_tokens.get(name)
        return None if token is None else self.convert_tokens_to_ids(token)

    def write(self: Tokenizer, index: int | None) -> None:
        self._named_tokens[name] = None if index is None else self.convert_ids_to_tokens(index)

    return property(read, write, doc=f"The id of the {name.removesuffix('_token')} token, None if there is none.")


@dataclass(frozen=True)
class EncodeOptions:
    """How one text, or one pair of texts, becomes ids: the arguments of a call, resolved."""

    add_special_tokens: bool
    truncation: str  # one of padding.TRUNCATION
    max_length: int | None
    stride: int
    is_split_into_words: bool
    split_special_tokens: bool
    return_overflowing_tokens: bool

    @property
    def limit(self) -> int | None:
        """The most ids that a text, or a pair, may have; None without truncation."""
        return None if self.truncation == "do_not_truncate" else self.max_length


class Tokenizer(abc.ABC):
    """Text to token ids and back, with the calling convention of transformers' tokenizers.

    A subclass encodes one text (`_encode`), maps tokens to ids and back, and joins tokens into text.
    """

    # Defaults of the class; each instance has its own values.
    model_input_names: Sequence[str] = ("input_ids", "attention_mask")
    padding_side: str = "right"
    config_name: ClassVar[str] = "tokenizer_config.json"
    pad_token_type_id: ClassVar[int] = 0
    init_inputs: ClassVar[tuple[()]] = ()  # positional arguments that transformers' files may hold

    bos_token, bos_token_id = _named_token("bos_token"), _named_token_id("bos_token")
    eos_token, eos_token_id = _named_token("eos_token"), _named_token_id("eos_token")
    unk_token, unk_token_id = _named_token("unk_token"), _named_token_id("unk_token")
    sep_token, sep_token_id = _named_token("sep_token"), _named_token_id("sep_token")
    pad_token, pad_token_id = _named_token("pad_token"), _named_token_id("pad_token")
    cls_token, cls_token_id = _named_token("cls_token"), _named_token_id("cls_token")
    mask_token, mask_token_id = _named_token("mask_token"), _named_token_id("mask_token")

    def __init__(
        self,
        named_tokens: Mapping[str, Any],
        extra_special_tokens: Sequence[Any] | None,
        *,
        model_max_length: int | float | None,
        padding_side: str | None,
        truncation_side: str,
        model_input_names: Sequence[str] | None,
        clean_up_tokenization_spaces: bool | None,
        split_special_tokens: bool,
    ) -> None:
        self._named_tokens: dict[str, str | None] = {
            name: None if token is None else AddedToken.from_json(token).content for name, token in named_tokens.items()
        }
        self.extra_special_tokens = [AddedToken.from_json(token).content for token in extra_special_tokens or ()]
        self.model_max_length = int(10**30 if model_max_length is None else model_max_length)
        self.padding_side = one_of("padding_side", padding_side or type(self).padding_side, SIDES)
        self.truncation_side = one_of("truncation_side", truncation_side, SIDES)
        self.model_input_names = list(model_input_names or type(self).model_input_names)
        if self.model_input_names[0] != "input_ids":
            raise ValueError(
                f"model_input_names is {self.model_input_names}; supported: a list that begins with input_ids"
            )
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.split_special_tokens = split_special_tokens
        self.name_or_path = ""
        self._warned_of_length = False
        # Call arguments from a checkpoint's tokenizer_config.json: SiglipProcessor's defaults.
        self.call_defaults: dict[str, Any] = {}

    # ---- what a subclass provides

    @abc.abstractmethod
    def _encode(self, text: Any, pair: Any, options: EncodeOptions) -> dict[str, Any]:
        """input_ids, token_type_ids and special_tokens_mask of one text or one pair, truncated, not padded."""

    @abc.abstractmethod
    def _is_batch(self, text: Any, is_split_into_words: bool) -> bool:
        """Whether `text` holds several texts, or is one text."""

    @abc.abstractmethod
    def _token_to_id(self, token: str) -> int:
        """The token's id, or the unknown token's."""

    @abc.abstractmethod
    def _id_to_token(self, index: int) -> str:
        """The token of an id. Raises IndexError outside the vocabulary."""

    @abc.abstractmethod
    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Tokens joined into text."""

    @abc.abstractmethod
    def _decode_ids(self, ids: int | list[int], skip_special_tokens: bool) -> str:
        """Ids joined into text, before any clean-up of spaces."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""

    @property
    @abc.abstractmethod
    def vocabulary_path(self) -> str:
        """The file of the vocabulary."""

    @property
    @abc.abstractmethod
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are never split, by id."""

    @abc.abstractmethod
    def _extend_vocabulary(self, tokens: list[AddedToken]) -> int:
        """Adds these tokens, or changes those of the same content; returns how many are new to the vocabulary."""

    @abc.abstractmethod
    def get_vocab(self) -> dict[str, int]:
        """Every token, including added ones, with its id."""

    @abc.abstractmethod
    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of special tokens that a text, or a pair of texts, receives."""

    @abc.abstractmethod
    def _write(self, save_directory: str | os.PathLike[str], prefix: str) -> tuple[str, ...]:
        """Writes the tokenizer's files, each atomically, with this prefix to their names. Returns their paths."""

    # ---- vocabulary

    def __len__(self) -> int:
        """Number of tokens, including added ones."""
        return len(self.get_vocab())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        named = {name: token for name, token in self._named_tokens.items() if token is not None}
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, special_tokens={named})"
        )

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: token for name in NAMED_TOKENS if (token := self._named_tokens.get(name)) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Named and extra special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._token_to_id(token) for token in self.all_special_tokens]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the ids of a list of tokens; the unknown token's id outside the vocabulary."""
        if isinstance(tokens, str):
            return self._token_to_id(tokens)
        return [self._token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the list of tokens of a list, array or 1-D tensor of ids."""
        if isinstance(ids, (int, np.integer)):
            return self._id_to_token(int(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._id_to_token(int(index)) for index in ids if int(index) not in skipped]

    # ---- added tokens

    @property
    def is_fast(self) -> bool:
        """Whether transformers runs this tokenizer in Rust."""
        return self._pads_like_rust

    @property
    def backend(self) -> str:
        """transformers' name of the library that splits texts."""
        return "tokenizers" if self.is_fast else "sentencepiece"

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The arguments of the constructor, with their present values."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def additional_special_tokens(self) -> list[str]:
        """transformers 4's name for `extra_special_tokens`."""
        return self.extra_special_tokens

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any]) -> None:
        self.extra_special_tokens = [AddedToken.from_json(token).content for token in tokens]

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        return [self._token_to_id(token) for token in self.extra_special_tokens]

    @extra_special_tokens_ids.setter
    def extra_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self.extra_special_tokens = self.convert_ids_to_tokens(ids)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.extra_special_tokens_ids

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens, which are then never split, at the end of the vocabulary; returns how many are new to it.

        new_tokens: a string, an AddedToken, or a list of them; a string that was added before stays as it is.
        special_tokens: also leave them out where `skip_special_tokens` asks for it. Give the model as many rows:
        `model.resize_token_embeddings(len(tokenizer))`. Raises TypeError for what is no token.
        """
        tokens = [new_tokens] if is_token(new_tokens) else list(new_tokens or ())
        added = []
        for token in tokens:
            if not is_token(token):
                raise TypeError(f"new_tokens holds {token!r}; supported: strings and AddedTokens")
            if isinstance(token, str):
                if not token or token in self.added_tokens_encoder:
                    continue
                special = special_tokens or token in self.all_special_tokens
                added.append(AddedToken(token, normalized=not special, special=special))
            else:
                stored = AddedToken.from_json(token)
                added.append(replace(stored, special=True) if special_tokens else stored)
        return self._extend_vocabulary(added)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Sets special tokens by name, adds those that the vocabulary lacks, and returns how many it lacked.

        special_tokens_dict: bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: one token
        each; extra_special_tokens (or additional_special_tokens): a list, which replaces or extends the present one.
        Raises ValueError for another name or value.
        """
        given = dict(special_tokens_dict or {})
        if "additional_special_tokens" in given:
            given.setdefault("extra_special_tokens", given.pop("additional_special_tokens"))
        tokens: list[Any] = []
        for name, value in given.items():
            extra = name == "extra_special_tokens"
            values = value if extra and isinstance(value, (list, tuple)) else [value]
            supported = values is value if extra else name in NAMED_TOKENS
            if not supported or not all(map(is_token, values)):
                raise ValueError(
                    f"special_tokens_dict: {name} is {value!r}; supported: a token for {', '.join(NAMED_TOKENS)}, a "
                    "list of tokens for extra_special_tokens"
                )
            if extra:
                kept = [] if replace_extra_special_tokens and values else self.extra_special_tokens
                contents = [AddedToken.from_json(token).content for token in values]
                self.extra_special_tokens = list(dict.fromkeys([*kept, *contents]))
            else:
                setattr(self, name, value)
            tokens += values
        return self.add_tokens(tokens, special_tokens=True)

    # ---- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **upload_arguments: Any,
    ) -> tuple[str, ...]:
        """Writes the tokenizer's files, each atomically. Returns their paths.

        filename_prefix: written before each name, with a hyphen. push_to_hub: also upload the files; its arguments in
        upload_arguments. Raises ValueError for legacy_format=True (transformers 4's separate files of added tokens).
        """
        if legacy_format:
            raise ValueError(f"{type(self).__name__}: legacy_format is True; supported: False, None")
        check_upload_arguments(push_to_hub, upload_arguments)
        paths = self._write(save_directory, f"{filename_prefix}-" if filename_prefix else "")
        if push_to_hub:
            upload(save_directory, [os.path.basename(path) for path in paths], **upload_arguments)
        return paths

    def push_to_hub(self, repo_id: str, **upload_arguments: Any) -> Any:
        """Writes the tokenizer's files to a repository of the Hub. Arguments: see `checkpoints.upload.upload`."""
        return save_and_upload(self.save_pretrained, repo_id, **upload_arguments)

    # ---- encoding

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        max_target_length: int | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Token ids of a text, of a list of texts, of a pair of texts or of a list of pairs.

        text_target, text_pair_target: texts to predict, in the same forms: alone they are encoded like `text`; beside
        it their ids become `labels`. max_target_length: of them, by default `max_length`. options: see `encode_texts`,
        also for what is returned and raised.
        """
        if text_target is None:
            return self.encode_texts(text, text_pair, **options)
        longest = {} if max_target_length is None else {"max_length": max_target_length}
        target = self.encode_texts(text_target, text_pair_target, **{**options, **longest})
        if text is None:
            return target
        batch = self.encode_texts(text, text_pair, **options)
        batch["labels"] = target["input_ids"]
        return batch

    def encode_texts(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchFeature:
        """Token ids of a text, of a list of texts, of a pair of texts or of a list of pairs.

        padding: False, True or "longest" (to the longest in the batch), "max_length" (to `max_length`, else to
            `model_max_length`), on `padding_side`, to a multiple of `pad_to_multiple_of`.
        truncation: None or False, True or "longest_first", "only_first", "only_second", to `max_length`, else to
            `model_max_length`. `max_length` alone implies truncation.
        return_tensors: "pt" (int64 tensors), "np", or None for lists. With tensors a single text gets a batch axis.
        return_attention_mask, return_token_type_ids: by default, whether `model_input_names` lists them.
        return_offsets_mapping: `offset_mapping`, the letters of each token as (first, behind the last); for tokenizers
            whose `is_fast` is True.
        verbose: warn of a text of more tokens than `model_max_length`, the first time.

        Returns input_ids and the other requested fields. Raises TypeError for an unknown argument, ValueError for an
        unsupported value and for lengths that differ where a tensor was requested, NotImplementedError for offsets of a
        SentencePiece tokenizer.
        """
        if text is None:
            raise ValueError(f"{type(self).__name__}: text is None; supported: a string or a list of strings")
        if return_offsets_mapping and not self.is_fast:
            raise NotImplementedError(f"{type(self).__name__}: return_offsets_mapping is True; supported: False")
        kind = check_tensor_kind(return_tensors)
        lengths = self._lengths(padding, truncation, max_length, pad_to_multiple_of, padding_side)
        if self.warns_of_padding(padding, return_tensors):
            warn_unless_as_trained(type(self).__name__, lengths, self.padding_side)
        options = EncodeOptions(
            add_special_tokens=add_special_tokens,
            truncation=lengths.truncation,
            max_length=lengths.max_length,
            stride=stride,
            is_split_into_words=is_split_into_words,
            split_special_tokens=self.split_special_tokens if split_special_tokens is None else split_special_tokens,
            return_overflowing_tokens=return_overflowing_tokens,
        )
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        unwanted = {"token_type_ids"} if not return_token_type_ids else set()
        unwanted |= {"special_tokens_mask"} if not return_special_tokens_mask else set()
        unwanted |= {"offset_mapping"} if not return_offsets_mapping else set()
        unwanted |= {"overflowing_tokens", "num_truncated_tokens"} if kind else set()

        batched = self._is_batch(text, is_split_into_words)
        samples = self._pairs(text, text_pair, is_split_into_words) if batched else [(text, text_pair)]
        encoded = []
        for sample, pair in samples:
            fields = self._encode(sample, pair, options)
            encoded.append({name: value for name, value in fields.items() if name not in unwanted})
        most = max(len(fields["input_ids"]) for fields in encoded)
        if verbose and lengths.max_length is None and most > self.model_max_length and not self._warned_of_length:
            self._warned_of_length = True
            logger.warning(
                "%s: a text has %d tokens, more than model_max_length, %d; give truncation=True to shorten it",
                type(self).__name__,
                most,
                self.model_max_length,
            )
        length_before_padding = batched and not self._pads_like_rust
        if return_length and length_before_padding:
            for fields in encoded:
                fields["length"] = len(fields["input_ids"])

        longest = max(len(fields["input_ids"]) for fields in encoded)
        for fields in encoded:
            if not batched and not fields["input_ids"] and not self._pads_like_rust:
                if return_attention_mask:
                    fields["attention_mask"] = []
                continue
            lengths.pad(fields, longest, self.pad_token_id, return_attention_mask)
        if return_length and not length_before_padding:
            for fields in encoded:
                fields["length"] = len(fields["input_ids"])

        if not batched and kind is None:
            return BatchFeature(encoded[0])
        batch = BatchFeature()
        for name in dict.fromkeys(name for fields in encoded for name in fields):
            batch[name] = [fields[name] for fields in encoded if name in fields]
        return batch if kind is None else self._to_tensors(batch, kind)

    # transformers' Python tokenizers do not pad a single text without tokens, and report the lengths of a batch before
    # padding; its Rust tokenizers pad it, and report lengths after padding.
    _pads_like_rust: ClassVar[bool] = False

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """`input_ids` alone, as a list or as `return_tensors` requests. Takes the arguments of `encode_texts`."""
        return self.encode_texts(text, text_pair, **options)["input_ids"]

    @property
    def max_len_single_sentence(self) -> int:
        """The most tokens of a text beside the special tokens that it receives."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=False)

    @property
    def max_len_sentences_pair(self) -> int:
        """The most tokens of a pair of texts beside the special tokens that it receives."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _pairs(self, text: Any, text_pair: Any, is_split_into_words: bool) -> list[tuple[Any, Any]]:
        """A batch as (text, pair or None)."""
        if len(text) == 0:
            raise ValueError(f"{type(self).__name__}: text is empty; supported: at least one text")
        if text_pair is None:
            return [self._split_pair(item, is_split_into_words) for item in text]
        if not isinstance(text_pair, (list, tuple)) or len(text_pair) != len(text):
            raise ValueError(
                f"{type(self).__name__}: text is a list of {len(text)}; text_pair must be a list of the same length, "
                f"got {len(text_pair) if isinstance(text_pair, (list, tuple)) else type(text_pair).__name__}"
            )
        return [
            (item, pair) if pair is not None else self._split_pair(item, is_split_into_words)
            for item, pair in zip(text, text_pair, strict=True)
        ]

    def _split_pair(self, item: Any, is_split_into_words: bool) -> tuple[Any, Any]:
        """Splits an item of a batch that is itself a list: a pair of texts, or a list of one text."""
        if not isinstance(item, (list, tuple)) or not item or isinstance(item[0], int):
            return item, None
        parts = (str, list, tuple)
        if (
            len(item) == 2
            and (not is_split_into_words or isinstance(item, tuple))
            and isinstance(item[0], parts)
            and isinstance(item[1], parts)
        ):
            return item[0], item[1]
        if len(item) == 1:
            return item[0], None
        if is_split_into_words:
            return item, None
        raise ValueError(
            f"{type(self).__name__}: a text of the batch is a list of {len(item)}; supported: a pair of texts"
        )

    def _lengths(self, padding: Any, truncation: Any, max_length: Any, multiple: Any, side: Any) -> Lengths:
        lengths = Lengths.resolve(
            padding,
            truncation,
            max_length,
            multiple,
            self.padding_side if side is None else side,
            model_max_length=self.model_max_length,
        )
        if lengths.padding != "do_not_pad" and self.pad_token is None:
            origin = f", and {self.config_name} of {self.name_or_path} names none" if self.name_or_path else ""
            raise ValueError(
                f"padding: the tokenizer has no pad_token{origin}; set one (tokenizer.pad_token = ...) to pad"
            )
        return lengths

    # ---- padding

    def warns_of_padding(self, padding: bool | str, return_tensors: str | None) -> bool:
        """Whether a call with these arguments warns where it pads otherwise than in training."""
        return False

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchFeature:
        """Pads tokenized texts: a dict of lists (one text, or a batch) or a list of dicts (for collating).

        Arrays and tensors are accepted, and returned unless `return_tensors` requests another kind. The input is not
        modified. Other arguments as for `encode_texts`.
        """
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {name: [sample[name] for sample in encoded_inputs] for name in encoded_inputs[0]}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            held = list(encoded_inputs) if isinstance(encoded_inputs, Mapping) else type(encoded_inputs).__name__
            raise ValueError(
                f"pad: encoded_inputs is {held}; supported: a dict with input_ids, or a list of such dicts"
            )
        first = encoded_inputs["input_ids"]
        while isinstance(first, (list, tuple)) and len(first) > 0:
            first = next((item for item in first if not isinstance(item, (list, tuple)) or item), first[0])
        if return_tensors is None and isinstance(first, (torch.Tensor, np.ndarray, np.generic)):
            return_tensors = "pt" if isinstance(first, torch.Tensor) else "np"
        kind = check_tensor_kind(return_tensors)
        fields = {name: _to_lists(value) for name, value in encoded_inputs.items()}
        if return_attention_mask is None:
            with_mask, if_empty = "attention_mask" in self.model_input_names, False
        else:
            with_mask = if_empty = return_attention_mask
        ids = fields["input_ids"]
        if not ids:
            return BatchFeature(fields, **({"attention_mask": []} if if_empty else {}))
        lengths = self._lengths(padding, None, max_length, pad_to_multiple_of, padding_side)
        if self.warns_of_padding(padding, return_tensors):
            warn_unless_as_trained(type(self).__name__, lengths, self.padding_side)
        if not isinstance(ids[0], list):
            lengths.pad(fields, len(ids), self.pad_token_id, with_mask)
            batch = BatchFeature(fields)
        else:
            wrong = [name for name, value in fields.items() if not hasattr(value, "__len__") or len(value) != len(ids)]
            if wrong:
                raise ValueError(f"pad: {', '.join(wrong)} must have as many items as input_ids, {len(ids)}")
            longest = max(map(len, ids))
            samples = [{name: value[row] for name, value in fields.items()} for row in range(len(ids))]
            for sample in samples:
                lengths.pad(sample, longest, self.pad_token_id, with_mask)
            batch = BatchFeature({name: [sample[name] for sample in samples] for name in samples[0]})
        return batch if kind is None else self._to_tensors(batch, kind)

    def _to_tensors(self, batch: BatchFeature, kind: str) -> BatchFeature:
        for name, value in batch.items():
            batch[name] = tokens_to_tensor(name, value, kind)
        return batch

    # ---- decoding

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of one id or of a list, array or tensor of ids; a list of texts for nested lists or a 2-D tensor."""
        ids = _to_lists(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [self._decode_one(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        return self._decode_one(ids, skip_special_tokens, clean_up_tokenization_spaces)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """Like `decode`, always as a list of texts; an empty batch has none."""
        sequences = _to_lists(sequences)
        if isinstance(sequences, list) and not sequences:
            return []
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def _decode_one(self, ids: Any, skip_special_tokens: bool, clean_up: bool | None) -> str:
        text = self._decode_ids(ids, skip_special_tokens)
        return (
            self.clean_up_tokenization(text)
            if (self.clean_up_tokenization_spaces if clean_up is None else clean_up)
            else text
        )

    def clean_up_tokenization(self, text: str) -> str:
        """The text without the spaces before punctuation and abbreviated words."""
        for spaced, joined in _CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for every special token of a finished sequence, 0 for the other tokens."""
        if not already_has_special_tokens:
            raise NotImplementedError(f"{type(self).__name__} supports already_has_special_tokens=True only")
        if token_ids_1 is not None:
            raise ValueError("token_ids_1 is given; with already_has_special_tokens=True, token_ids_0 holds both texts")
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]


def check_unicode(text: str) -> None:
    """Raises ValueError for a lone surrogate, which the tokenizer libraries refuse without naming it."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text contains a lone surrogate; supported: valid Unicode")


_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _to_lists(value: Any) -> Any:
    """Tensors and arrays, also inside lists, as Python lists and numbers."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_to_lists(item) for item in value]
    return value
