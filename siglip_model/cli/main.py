"""The command `siglip`: classify, embed, search, train, evaluate, export, a demo, and what this machine supports.

Exit codes: 0 success, 1 some images failed (listed on stderr; 0 in ranks of torchrun), 2 usage or setup error, 75
training was stopped by SIGTERM and saved, 130 interrupted, 141 the output was closed early, as by
`siglip ... | head -1`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from siglip_model.cli import terminal
from siglip_model.cli.classify import LabelListCommand, classify
from siglip_model.cli.demo import demo
from siglip_model.cli.embed import embed
from siglip_model.cli.evaluate import evaluate
from siglip_model.cli.export import export
from siglip_model.cli.info import DISTRIBUTION, info, installed_version
from siglip_model.cli.options import INTERRUPTED, OUTPUT_CLOSED, USAGE_ERROR
from siglip_model.cli.search import search
from siglip_model.cli.train import train

app = typer.Typer(
    name="siglip",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's columns cut the names of options in narrow terminals
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Score images against labels, embed and search images, and train, with SigLIP.",
    epilog="Exit codes: 0 success, 1 some images failed (listed on stderr), 2 usage or setup error, 75 training was"
    " stopped by SIGTERM and saved, 130 interrupted, 141 the output was closed early.",
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


app.command(cls=LabelListCommand, short_help="Score images against labels.")(classify)
app.command(short_help="Embed images into one file.")(embed)
app.command(short_help="Search embedded images by text or image.")(search)
app.command(short_help="Train on captioned images.")(train)
app.command(short_help="Measure zero-shot accuracy or retrieval.")(evaluate)
app.command(short_help="Export a model to ONNX.")(export)
app.command(short_help="Classify eight bundled images.")(demo)
app.command(short_help="Show versions, devices and backends.")(info)


def main() -> None:
    """The entry point of `siglip`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # an unprintable file name must not end the run
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries; the final error is reported
    warnings.showwarning = lambda message, *details, **more: terminal.say(f"warning: {' '.join(str(message).split())}")
    # Pillow's warning about images of half its own limit; here --max-pixels decides.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit of .* decompression bomb")
    # torch.distributed.checkpoint's, whatever it is told
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    code: str | int | None = 0
    try:
        code = _run()
        sys.stdout.flush()
    except OSError as error:  # of stdout: the reader of a pipe has left, or the disk is full
        if os.environ.get("SIGLIP_TRACEBACK"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what Python writes when it ends
        if isinstance(error, BrokenPipeError):
            code = OUTPUT_CLOSED
        elif code != USAGE_ERROR:  # else it was reported
            terminal.say(f"error: {error.strerror}")
            code = USAGE_ERROR
    if code == INTERRUPTED:  # without waiting for threads and processes that still read or download
        import multiprocessing

        sys.stderr.flush()
        processes = multiprocessing.active_children()
        if not processes:
            os._exit(INTERRUPTED)
        for process in processes:  # whose locks are removed at the end of the program
            process.kill()
    sys.exit(code)


def _run() -> str | int | None:
    """Runs the command and returns its exit code. Raises BrokenPipeError, for which typer and rich exit with 1."""
    try:
        app(prog_name="siglip")  # also under `python -m`: usage and shell completion name this command
    except SystemExit as ending:
        if isinstance(ending.__context__, BrokenPipeError):
            raise ending.__context__ from None
        # typer's code for a shell that it does not know is that of failed images
        completes = sys.argv[1:2] in (["--install-completion"], ["--show-completion"])
        return USAGE_ERROR if completes and ending.code else ending.code
    return 0
