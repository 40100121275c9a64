"""Fields of a checkpoint's JSON files and of the constructors that take them: what each supports, checked by name."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


@dataclass(frozen=True)
class Field:
    """What a field supports: in words, for the error, and as a predicate of any value that JSON can hold."""

    supported: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: Field) -> Field:
        return Field(
            f"{self.supported}, or {other.supported}", lambda value: self.accepts(value) or other.accepts(value)
        )


def shown(value: object) -> str:
    """`repr(value)`, shortened if it is long."""
    return _SHORT.repr(value)


def check_fields(
    where: object, values: Mapping[str, Any], fields: Mapping[str, Field], error: type[Exception] = ValueError
) -> None:
    """Raises `error` for the first of the values that its field does not support. Values without a field pass.

    where: the file or the class that the message begins with.
    """
    for name, field in fields.items():
        if name in values and not field.accepts(values[name]):
            raise error(f"{where}: {name} is {shown(values[name])}; supported: {field.supported}")


def is_whole(value: Any, least: int = 0, most: int = 2**31 - 1) -> bool:
    """Whether the value is an integer (not a bool) from `least` to `most`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_text(value: Any) -> bool:
    """Whether the value is a string of valid Unicode: JSON can hold lone surrogates, which libraries refuse."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def whole(least: int, most: int) -> Field:
    return Field(f"an int from {least} to {most}", lambda value: is_whole(value, least, most))


def number(least: float, most: float) -> Field:
    def accepts(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    return Field(f"a number from {least:g} to {most:g}", accepts)


def choice(*names: str) -> Field:
    return Field(", ".join(map(repr, names)), lambda value: isinstance(value, str) and value in names)


def texts(what: str = "a list of strings") -> Field:
    return Field(what, lambda value: isinstance(value, (list, tuple)) and all(map(is_text, value)))


def mapping(keys: Callable[[Any], bool], values: Callable[[Any], bool], supported: str) -> Field:
    """An object whose keys and values are all accepted."""

    def accepts(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(keys, value)) and all(map(values, value.values()))

    return Field(supported, accepts)


def is_index(value: Any) -> bool:
    """Whether the value is an id from 0, as an int or in decimal digits (JSON's keys are strings)."""
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and len(value) <= 10 and is_whole(int(value))
    return is_whole(value)


def is_finite(value: Any) -> bool:
    """Whether the value is an int or a float (not a bool), and neither NaN nor infinite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


NOTHING = Field("None", lambda value: value is None)
FLAG = Field("True, False", lambda value: isinstance(value, bool))
TEXT = Field("a string", is_text)


def optional(fields: Mapping[str, Field], names: Iterable[str] | None = None) -> dict[str, Field]:
    """The fields, or those of these names, which also support None."""
    return {name: field | NOTHING if names is None or name in names else field for name, field in fields.items()}
