"""The command `siglip`: zero-shot classification, bulk embedding, a demo, and what this machine supports.

Exit codes: 0 success, 1 some images failed (listed on stderr), 2 usage or setup error, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import typer

from siglip_model.cli import terminal
from siglip_model.cli.classify import LabelListCommand, classify
from siglip_model.cli.demo import demo
from siglip_model.cli.embed import embed
from siglip_model.cli.info import DISTRIBUTION, info, installed_version

app = typer.Typer(
    name="siglip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Score images against labels, and embed images, with SigLIP.",
    epilog="Exit codes: 0 success, 1 some images failed (listed on stderr), 2 usage or setup error, 130 interrupted.",
)


def _print_version(requested: bool) -> None:
    if requested:
        print(DISTRIBUTION, installed_version(DISTRIBUTION) or "(not installed)")
        raise typer.Exit


@app.callback()
def siglip(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before the command."""


app.command(cls=LabelListCommand)(classify)
app.command()(embed)
app.command()(demo)
app.command()(info)


def main() -> None:
    """The entry point of `siglip`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an unprintable file name must not end the run
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries; the final error is reported
    warnings.showwarning = lambda message, *details, **more: terminal.say(f"warning: {' '.join(str(message).split())}")
    app()
