"""Labels to sentences. Imports no PyTorch: the commands name the template in their help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TEMPLATE = "This is a photo of {}."


def fill_template(labels: Sequence[Any], template: str) -> list[str]:
    """One sentence per label: the template with the label in place of {}.

    Raises ValueError for a template without {} or with an unknown field.
    """
    try:
        sentences = [template.format(label) for label in labels]
        if template.format("\0one") == template.format("\0two"):
            raise ValueError("it has no {} for the label")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"hypothesis_template (--template) is {template!r} ({error}); supported: a text with {{}} where the label"
            " goes, and {{ and }} for literal braces"
        ) from error
    return sentences
