"""What a target is, and the endings that only the tests know."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import Damage, entry, raw
from typer.testing import CliRunner

from siglip_model.cli.main import app

Result = dict[str, Any]  # plain values by name


class Refused(Exception):
    """A documented refusal other than at loading: one line of a command with exit code 2, or a call's ValueError."""


class NotFinite(Exception):
    """The weights are finite, but what is computed from them is not, so that no file can be named."""


@dataclass(frozen=True)
class Target:
    """A kind of folder, built once. Each case damages one file of a copy and uses the copy in one of several ways.

    build(folder): writes it. damages: per file name, the function that knows its format. ways: functions of the folder
    that use it and return plain values. errors: the classes that may be raised. problem(result, whole, done): what
    is wrong with the result after the damage `done`, where the undamaged folder gives `whole`; empty if nothing is.
    read_only: the ways write nothing.
    """

    name: str
    build: Callable[[Path], None]
    damages: Mapping[str, Damage]
    ways: Mapping[str, Callable[[Path], Result]]
    errors: tuple[str, ...]
    problem: Callable[[Result, Result, str], str]
    read_only: bool = False

    def damage(self, rng: random.Random, folder: Path) -> tuple[str, str]:
        """Damages one file and returns its name and what was done to it."""
        name = rng.choice(sorted(self.damages))
        change = rng.choices([self.damages[name], raw, entry], weights=[6, 3, 1])[0]
        return name, change(rng, folder / name)


def run_command(words: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    """stdout, if the exit code is allowed. Raises Refused for a documented error, and what was raised otherwise."""
    result = CliRunner().invoke(app, words, prog_name="siglip")
    if result.exit_code in allowed:
        return result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("siglip: error: ")]
    if result.exit_code == 2 and len(lines) == 1:
        raise Refused(lines[0].removeprefix("siglip: error: "))
    if result.exit_code == 1 and "its scores are not finite" in result.stderr:
        raise NotFinite
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    raise AssertionError(f"exit code {result.exit_code}: {result.stderr[-500:]}")
