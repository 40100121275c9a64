"""`siglip train`: fine-tune or pre-train on captioned images."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from siglip_model.cli import terminal
from siglip_model.cli.options import STOPPED, errors_in_one_line
from siglip_model.training.settings import RunSettings, read_settings

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def train(config: Path | None, **given: Any) -> None:
    """Train on captioned images: a folder, or WebDataset shards.

    Settings come from a file, from options, or from both; an option wins. The same command resumes an interrupted run.
    Under torchrun the processes share the work: torchrun --nproc-per-node 8 -m siglip_model train ... Exit code 75
    says that SIGTERM stopped the run after its state was saved.
    """
    with errors_in_one_line():
        settings = read_settings(config, given)

        from siglip_model.training.run import MODEL, run

        trained = run(settings)
        if int(os.environ.get("RANK", 0)) > 0:
            return
        if trained.steps < settings.steps:
            terminal.say(f"stopped by SIGTERM after step {trained.steps} of {settings.steps}; run it again to resume")
            raise typer.Exit(STOPPED)
        print(f"{Path(settings.out) / MODEL}: the model after {trained.steps} steps")
        if trained.scores is not None:
            terminal.print_scores(trained.scores)


def _signature() -> inspect.Signature:
    """An option per setting. Values are texts, which `read_settings` checks as it does those of a file."""
    kinds = get_type_hints(RunSettings)
    file = typer.Option("--config", metavar="FILE", help="Settings in TOML or YAML.", show_default=False)
    options: dict[str, Any] = {"config": Annotated[Path | None, file]}
    for field in dataclasses.fields(RunSettings):
        kind, text = kinds[field.name], field.metadata["help"]
        if field.default is not dataclasses.MISSING and field.default is not None:
            text += f" [default: {field.default}]"
        metavar = "|".join(field.metadata["choices"]) or _METAVARS.get(get_args(kind)[0] if get_args(kind) else kind)
        option = typer.Option(metavar=metavar, help=text, show_default=False)
        options[field.name] = Annotated[bool | None if kind is bool else str | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(name, keyword, default=None, annotation=options[name]) for name in options]
    )


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: each.annotation for name, each in _signature().parameters.items()}
