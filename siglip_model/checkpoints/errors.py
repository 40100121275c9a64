"""The exception for a checkpoint's files, and the one place where other exceptions become it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

Built = TypeVar("Built")

_LONGEST_MESSAGE = 2500  # characters: names of tensors and values may come from a hostile file


class CheckpointError(OSError, ValueError):
    """A checkpoint is missing, incomplete, damaged or does not fit the model; the message names file and tensor.

    The middle of a long message is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, _LONGEST_MESSAGE))


class MisfitError(CheckpointError, RuntimeError):
    """Tensors are missing or have other shapes; in torch and transformers a RuntimeError."""


def shortened(text: str, most: int) -> str:
    """The text without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever the body raises into a CheckpointError that begins with the file's name.

    A CheckpointError, which names its file already, passes unchanged.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{os.fspath(path)}: {_reason(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries written in Rust, not derived from Exception
            raise
        raise CheckpointError(f"{os.fspath(path)}: {_reason(error)}") from error


def build_from_file(
    path: str | os.PathLike[str],
    build: Callable[..., Built],
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Built:
    """`build` called with a file's settings, overridden by the caller's arguments.

    Raises CheckpointError, naming the file, for settings that are wrong without the arguments also; other errors, which
    the arguments caused, unchanged.
    """
    try:
        return build(**{**settings, **arguments})
    except Exception:
        with naming(path):
            build(**settings)
        raise


def _reason(error: BaseException) -> str:
    """The error's message, never empty. For unexpected exceptions it begins with their type."""
    text = str(error)
    if not text or not isinstance(error, (ValueError, TypeError, OSError)):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text
