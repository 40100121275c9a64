"""A sample that was left out."""

from typing import NamedTuple


class Skipped(NamedTuple):
    """The sample's name, and why it was left out."""

    name: str
    reason: str
