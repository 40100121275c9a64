"""Progress events: what a command is doing, as data; `bench.terminal` shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.cases.operations import Setting
from bench.peers import Peer


@dataclass(frozen=True)
class Event:
    """A step that begins; `done == total` without a group marks the end.

    group: label of what is measured, checked or compiled. step: the part of it that begins, if it has parts.
    setting, peer: what the labels stand for, where the event does not come from another process.
    """

    done: int
    total: int
    group: str = ""
    step: str = ""
    setting: Setting | None = None
    peer: Peer | None = None

    @property
    def label(self) -> str:
        return f"{self.group}: {self.step}" if self.step else self.group


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Shows nothing."""
