"""The command `siglip`: classify pictures, embed them, see the demo, ask what this machine can run.

Exit codes: 0 all went well, 1 some images failed (each is named on stderr), 2 wrong use or setup, 130 stopped.
"""

from __future__ import annotations

import logging
import sys
import warnings

import typer

from siglip_model.cli import terminal
from siglip_model.cli.classify import LabelListCommand, classify
from siglip_model.cli.demo import demo
from siglip_model.cli.embed import embed
from siglip_model.cli.info import info

app = typer.Typer(
    name="siglip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Score pictures against labels, and embed them, with SigLIP.",
    epilog="Exit codes: 0 all went well, 1 some images failed, 2 wrong use or setup, 130 stopped by Ctrl-C.",
)
app.command(cls=LabelListCommand)(classify)
app.command()(embed)
app.command()(demo)
app.command()(info)


def main() -> None:
    """The entry point of `siglip`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error that ends them is shown
    warnings.showwarning = lambda message, *details, **more: terminal.say(f"warning: {' '.join(str(message).split())}")
    app()
