"""Measures the configurations that an operation may choose from, and writes the winners into the table that it reads.

An operation is tunable if its package has two modules:

- `tuned`, with `TUNED: {name of a GPU: {shape class: fields of a configuration}}` and only its docstring besides;
- `config`, which looks a shape class up in the table before it falls back on a heuristic.

Recording the look-ups shows which shape classes a call needs; putting an entry into the table tries a candidate. An
entry of TUNABLE says how the candidates of a shape class are listed.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases.operations import OPERATIONS, Contender, Setting, kernels_for
from bench.cases.suites import SUITES
from bench.measure.accuracy import Judge
from bench.measure.measure import free, step_of
from bench.measure.progress import Event, Progress, silent
from bench.measure.timing import Steps, Timing, clock, copies, interleaved
from bench.peers import peers_of
from siglip_kernels.device import Facts, facts

Key = tuple[Any, ...]
Fields = tuple[Any, ...]


@dataclass(frozen=True)
class Tunable:
    """An operation's package, the suites that exercise it, and the candidates of a shape class."""

    package: str
    suites: tuple[str, ...]
    candidates: Callable[[Any, Key, Facts], Sequence[Any]]  # (config module, shape class, GPU)

    def table(self) -> dict[str, dict[Key, Fields]]:
        return importlib.import_module(f"{self.package}.tuned").TUNED

    def config(self) -> Any:
        return importlib.import_module(f"{self.package}.config")

    def path(self) -> Path:
        file = importlib.import_module(f"{self.package}.tuned").__file__
        assert file is not None
        return Path(file)

    def forget(self) -> None:
        """Clears the caches of `config`, so that the next call reads the table."""
        for value in vars(self.config()).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    @contextlib.contextmanager
    def trying(self, gpu: str, entries: Mapping[Key, Fields]) -> Iterator[None]:
        """Calls inside the context use these configurations for these shape classes."""
        with self._replaced(gpu, {**self.table().get(gpu, {}), **entries}):
            yield

    def asked_for(self, gpu: str, call: Callable[[], object]) -> list[Key]:
        """The shape classes that a call looks up, in order."""
        recorder = _Recorder(self.table().get(gpu, {}))
        with self._replaced(gpu, recorder):
            call()
        return list(recorder.keys_asked)

    @contextlib.contextmanager
    def _replaced(self, gpu: str, entries: dict[Key, Fields]) -> Iterator[None]:
        table = self.table()
        before = table.get(gpu)
        table[gpu] = entries
        self.forget()
        try:
            yield
        finally:
            if before is None:
                del table[gpu]
            else:
                table[gpu] = before
            self.forget()


class _Recorder(dict):
    """A table that remembers the keys that were looked up."""

    def __init__(self, entries: Mapping[Key, Fields]):
        super().__init__(entries)
        self.keys_asked: dict[Key, None] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        self.keys_asked[key] = None
        return super().get(key, default)


def _attention_candidates(config: Any, key: Key, gpu: Facts) -> Sequence[Any]:
    return config.candidates(key[0], gpu) if key[1] == 2 else []  # bytes per element


def _linear_candidates(config: Any, key: Key, gpu: Facts) -> Sequence[Any]:
    return config.candidates(config.Shape(*key), gpu)


def _loss_candidates(config: Any, key: Key, gpu: Facts) -> Sequence[Any]:
    return config.candidates(key[1], gpu)


TUNABLE = {
    "attention": Tunable("siglip_kernels.attention", ("attention",), _attention_candidates),
    "linear": Tunable("siglip_kernels.gemm", ("linear", "mlp"), _linear_candidates),
    "sigmoid_loss": Tunable("siglip_kernels.sigmoid_loss", ("loss",), _loss_candidates),
}


@dataclass
class Choice:
    """The best configuration of one shape class."""

    key: Key
    fields: Fields
    milliseconds: float
    heuristic_milliseconds: float
    tried: int


Timer = Callable[[Mapping[Fields | None, Callable[[], object]], Setting], dict[Fields | None, Timing]]
"""Times a step for each candidate; None stands for the heuristic's choice."""


def tune(
    name: str,
    settings: Sequence[Setting],
    timer: Timer,
    progress: Progress = silent,
    known: Collection[Key] = (),
) -> Iterator[Choice]:
    """The best candidate for every shape class that the settings need, each class measured once.

    Classes are settled one after the other: a later one is measured with the winners of the earlier ones in place.
    Nothing is yielded where the heuristic's own choice is fastest. known: shape classes that are not measured.
    """
    tunable = TUNABLE[name]
    winners: dict[Key, Fields] = {}
    settled = set(known)
    for number, setting in enumerate(settings):
        kernels = kernels_for(setting.operation.name)
        if kernels is None:
            continue
        gpu = facts(torch.device(setting.device))
        entry, contender = peers_of(setting.operation.name)["triton"], Contender(kernels)
        first = setting.inputs()
        judge = Judge(setting, first)
        others = range(1, copies(first.bytes(), setting.device))
        step = Steps([step_of(contender, inputs, setting) for inputs in (first, *map(setting.inputs, others))])
        for key in tunable.asked_for(gpu.name, step):
            if key in settled:
                continue
            settled.add(key)
            label = f"{setting.operation.name} {setting.shape.name} {setting.direction} {key}"
            progress(Event(number, len(settings), label, setting=setting))
            steps: dict[Fields | None, Callable[[], object]] = {None: _trying(tunable, gpu.name, winners, step)}
            candidates = [dataclasses.astuple(tile) for tile in tunable.candidates(tunable.config(), key, gpu)]
            for fields in candidates:
                entries = {**winners, key: fields}
                try:
                    with tunable.trying(gpu.name, entries):
                        if judge.judge(entry, contender).problem:
                            continue
                        step()
                except Exception:  # it does not compile, or does not fit on this GPU
                    continue
                steps[fields] = _trying(tunable, gpu.name, entries, step)
            if len(steps) == 1:
                continue
            times = timer(steps, setting)
            best = min(times, key=lambda fields: times[fields].median)
            if best is None:
                continue
            winners[key] = best
            yield Choice(key, best, times[best].median, times[None].median, len(steps) - 1)
        free()


def _trying(
    tunable: Tunable, gpu: str, entries: Mapping[Key, Fields], step: Callable[[], object]
) -> Callable[[], object]:
    def call() -> None:
        with tunable.trying(gpu, entries):
            step()

    return call


def time_candidates(
    steps: Mapping[Fields | None, Callable[[], object]], setting: Setting
) -> dict[Fields | None, Timing]:
    """Times the candidates side by side on the GPU."""
    named = {str(fields): Steps([step]) for fields, step in steps.items()}
    times = interleaved(named, clock(setting.device), seconds=0.1)
    return {fields: times[str(fields)] for fields in steps}


def settings_of(name: str, device: str, dtypes: Sequence[torch.dtype], quick: bool) -> list[Setting]:
    """The settings that tune an operation: its suites' shapes, forward and backward."""
    cases = [case for suite in TUNABLE[name].suites for case in SUITES[suite].cases if case.quick or not quick]
    return [
        Setting(OPERATIONS[case.operation], case.shape, dtype, device, direction)
        for case in cases
        for direction in ("fwd", "fwd+bwd")
        for dtype in dtypes
    ]


def write_table(path: Path, gpu: str, entries: Mapping[Key, Fields], target: Path | None = None) -> Path:
    """Adds a GPU's entries to a `tuned` module; its docstring and other entries stay.

    target: the file to write, if not the module itself, whose package may be read-only. Returns the file's path.
    """
    text = path.read_text()
    node = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TUNED"
    )
    assert node.value is not None and node.value.end_lineno is not None
    table: dict[str, dict[Key, Fields]] = ast.literal_eval(node.value)
    table[gpu] = {**table.get(gpu, {}), **entries}
    lines = text.splitlines(keepends=True)
    before = "".join(lines[: node.value.lineno - 1]) + lines[node.value.lineno - 1][: node.value.col_offset]
    after = lines[node.value.end_lineno - 1][node.value.end_col_offset :] + "".join(lines[node.value.end_lineno :])
    target = target or path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(before + _literal(table) + after)
    return target


def _literal(table: Mapping[str, Mapping[Key, Fields]]) -> str:
    """The table as ruff formats it, one line per entry."""
    if not table:
        return "{}"
    lines = ["{"]
    for gpu in sorted(table):
        lines.append(f"    {_quoted(gpu)}: {{")
        for key in sorted(table[gpu], key=repr):
            lines.append(f"        {_quoted(key)}: {_quoted(table[gpu][key])},")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def _quoted(value: Any) -> str:
    """repr with double quotes, as ruff formats strings."""
    if isinstance(value, tuple):
        return f"({', '.join(_quoted(item) for item in value)}{',' * (len(value) == 1)})"
    return '"' + value.replace('"', '\\"') + '"' if isinstance(value, str) else repr(value)
