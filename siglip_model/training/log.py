"""The log of a run: JSON lines, curves, progress on stderr, and the samples that were left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.training.plot import numbers, plot_run
from siglip_model.training.skipped import Skipped

LOG, SKIPPED, CURVES, TENSORBOARD = "log.jsonl", "skipped.jsonl", "curves.png", "tensorboard"


class RunLog:
    """Writes log.jsonl, skipped.jsonl and curves.png in the run's folder, on rank 0; other ranks write nothing.

    Lines of steps after `first`, which a resumed run does again, are dropped. show_progress: on stderr, a bar on a
    terminal, elsewhere a line of text per line of the log. tensorboard: also write its event files.
    """

    def __init__(
        self, folder: Path, total: int, first: int, *, writes: bool, show_progress: bool, tensorboard: bool = False
    ) -> None:
        self.writes, self.folder = writes, folder
        self.path, self.skipped_path = folder / LOG, folder / SKIPPED
        self.board = None
        if writes and tensorboard:
            self.board = summary_writer()(str(folder / TENSORBOARD), purge_step=first + 1)
        self.shows, self.total = writes and show_progress, total
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, disable=not (self.shows and sys.stderr.isatty()))
        self.bar = self.progress.add_task("training", total=total, completed=first)
        self.skipped: set[str] = set()
        if writes:
            _forget_after(self.path, first)
            self.skipped = {entry["name"] for entry in _forget_after(self.skipped_path, first)}

    def write(self, entry: dict[str, Any]) -> None:
        self._append(self.path, [entry])
        if self.board is not None:
            for name, value in {**entry, **numbers(entry.get("evaluation", {}))}.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, entry["step"])

    def evaluation(self, step: int, data: str | None) -> dict[str, Any] | None:
        """The last scores after a step, if the log has them and they are on this data. On rank 0."""
        entries = [entry for entry in _entries(self.path) if entry["step"] == step and "evaluation" in entry]
        return entries[-1]["evaluation"] if entries and entries[-1].get("evaluation_data") == data else None

    def draw(self) -> None:
        """Draws the curves of all lines so far."""
        if self.writes:
            plot_run(_entries(self.path), self.folder / CURVES)

    def skip(self, step: int, skipped: Iterable[Skipped]) -> None:
        """Names samples that were left out up to a step, each once."""
        new = {one.name: one for one in skipped if one.name not in self.skipped}
        self.skipped |= new.keys()
        self._append(self.skipped_path, [{"step": step, **one._asdict()} for one in new.values()])

    def show(self, entry: dict[str, Any]) -> None:
        """Shows a line of the log."""
        loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.3f}"
        text = f"loss {loss}  {entry['images_per_second']:.0f} images/s"
        if "mfu" in entry:
            text += f"  {entry['mfu']:.1%} MFU"
        self.progress.update(self.bar, completed=entry["step"], description=text)
        if self.shows and self.progress.disable:
            print(f"siglip: step {entry['step']}/{self.total}  {text}", file=sys.stderr, flush=True)

    def _append(self, path: Path, entries: list[dict[str, Any]]) -> None:
        if self.writes and entries:
            with open(path, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()


def summary_writer() -> Any:
    """TensorBoard's class. Raises RuntimeError without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise RuntimeError("tensorboard (--tensorboard) needs pip install 'siglip-triton[tensorboard]'") from error
    return SummaryWriter


def _entries(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, if it exists; a killed run may have left part of one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of steps up to this, which alone stay in the file. Raises ValueError for a file of something else."""
    if not path.exists():
        return []
    try:
        kept = [entry for entry in _entries(path) if entry["step"] <= step]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not of a run ({error}); use another folder or remove it") from error
    atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return kept
