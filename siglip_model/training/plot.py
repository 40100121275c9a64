"""The curves of a run: its loss and learning rate, and the scores of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_run(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the lines of a log (see `loop.py`) into a picture; steps that were left out have no loss."""
    from matplotlib.figure import Figure

    steps = [entry for entry in entries if entry.get("loss") is not None]
    scores = [(entry["step"], numbers(entry["evaluation"])) for entry in entries if "evaluation" in entry]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, score = figure.subplots(1, 2)
    loss.plot([entry["step"] for entry in steps], [entry["loss"] for entry in steps])
    loss.set(xlabel="step", ylabel="loss")
    rate = loss.twinx()
    rate.plot([entry["step"] for entry in steps], [entry["learning_rate"] for entry in steps], "--", color="#8a94a3")
    rate.set_ylabel("learning rate (dashed)")
    names = list(dict.fromkeys(name for _, found in scores for name in found))  # other data may have another task
    for name in names:
        having = [(step, found[name]) for step, found in scores if name in found]
        score.plot(*zip(*having, strict=True), ".-", label=name)
    score.set(xlabel="step", ylim=(0, 1.03), title="" if names else "no evaluation")
    if names:
        score.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The fractions of an evaluation, without its counts."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}
