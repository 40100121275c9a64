"""How a tokenizer call pads and truncates: transformers' arguments, resolved once."""

from __future__ import annotations

import numbers
import warnings
from dataclasses import dataclass
from typing import Any

PADDING = ("longest", "max_length", "do_not_pad")
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("right", "left")
# A model_max_length above this stands for "no limit" (transformers writes 10^30).
NO_LIMIT = 10**20
TRAINED_TOKENS = 64  # SigLIP was trained on texts padded to this length


def as_trained(positions: int) -> dict[str, Any]:
    """Arguments of a tokenizer call that pads and cuts as in training. positions: the most tokens the model takes."""
    return {"padding": "max_length", "max_length": min(TRAINED_TOKENS, positions), "truncation": True}


@dataclass(frozen=True)
class Lengths:
    """Padding and truncation of one call, resolved: `padding` from PADDING, `truncation` from TRUNCATION."""

    padding: str
    truncation: str
    max_length: int | None
    pad_to_multiple_of: int | None
    padding_side: str

    @classmethod
    def resolve(
        cls,
        padding: Any,
        truncation: Any,
        max_length: Any,
        pad_to_multiple_of: Any,
        padding_side: Any,
        *,
        model_max_length: int,
    ) -> Lengths:
        """Resolves a call's arguments as transformers does.

        `max_length` alone implies truncation. A missing `max_length` is the model's, if the model has a limit.
        Raises ValueError for unsupported values and for contradictory lengths.
        """
        if max_length is not None and padding is False and truncation is None:
            truncation = "longest_first"
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        padding = one_of("padding", padding, PADDING, "True, False")
        if truncation is None or isinstance(truncation, bool):
            truncation = "longest_first" if truncation else "do_not_truncate"
        truncation = one_of("truncation", truncation, TRUNCATION, "True, False, None")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (
                not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1
            ):
                raise ValueError(f"{name} is {value!r}; supported: an int of at least 1, or None")
        truncates = truncation != "do_not_truncate"

        if max_length is None and model_max_length > NO_LIMIT:
            padding = "do_not_pad" if padding == "max_length" else padding
            truncation, truncates = "do_not_truncate", False
        elif max_length is None and (padding == "max_length" or truncates):
            max_length = model_max_length
        if truncates and padding != "do_not_pad" and max_length % (pad_to_multiple_of or 1) != 0:
            raise ValueError(
                f"max_length is {max_length} and pad_to_multiple_of {pad_to_multiple_of}; "
                "supported with padding and truncation: a multiple of it"
            )
        return cls(padding, truncation, max_length, pad_to_multiple_of, one_of("padding_side", padding_side, SIDES))

    def pad(self, fields: dict[str, Any], longest: int, pad_id: int | None, with_mask: bool) -> None:
        """Pads a sample's lists in place and adds its attention mask. longest: tokens of the batch's longest sample."""
        count = len(fields["input_ids"])
        if with_mask and "attention_mask" not in fields:
            fields["attention_mask"] = [1] * count
        if self.padding == "do_not_pad":
            return
        target = longest if self.padding == "longest" else self.max_length or 0
        multiple = self.pad_to_multiple_of or 1
        missing = -(-target // multiple) * multiple - count
        if missing <= 0:
            return
        fillers = {"input_ids": pad_id, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        if with_mask:
            fillers["attention_mask"] = 0
        for name, filler in fillers.items():
            if name in fields:
                padding = [filler] * missing
                fields[name] = fields[name] + padding if self.padding_side == "right" else padding + fields[name]


def warn_unless_as_trained(who: str, lengths: Lengths, padding_side: str) -> None:
    """Warns where a call pads texts otherwise than SigLIP 2 was trained, which changes every score.

    who: what was called. padding_side: the tokenizer's.
    """
    trained: dict[str, Any] = {"padding": "max_length", "max_length": TRAINED_TOKENS, "padding_side": padding_side}
    padded = {name: getattr(lengths, name) for name in trained}
    if TRAINED_TOKENS % (lengths.pad_to_multiple_of or 1):
        padded["pad_to_multiple_of"] = lengths.pad_to_multiple_of
    if padded != trained:
        warnings.warn(f"{who}: texts are padded with {padded}; SigLIP 2 was trained with {trained}", stacklevel=5)


def one_of(argument: str, value: Any, allowed: tuple[str, ...], others: str = "") -> str:
    """The element of `allowed` that equals the value, a string or transformers' enumeration. Raises ValueError."""
    for name in allowed:
        if isinstance(value, str) and value == name:
            return name
    choices = ", ".join([*([others] if others else []), *map(repr, allowed)])
    raise ValueError(f"{argument} is {value!r}; supported: {choices}")
