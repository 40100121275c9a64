"""`siglip embed`: a folder of images into one safetensors file."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    IMAGES_HELP,
    BackendOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxPixelsOption,
    ModelOption,
    errors_in_one_line,
    exit_with,
    find_images,
    load_classifier,
    workers,
)
from siglip_model.demo import CHECKPOINT
from siglip_model.images.limits import MAX_PIXELS


def embed(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE", help=IMAGES_HELP, show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Output file.", show_default=False)],
    normalize: Annotated[bool, typer.Option(help="Scale rows to unit length, or keep the pooled output.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over; the old output is kept until the new one is complete.")
    ] = False,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 16,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
) -> None:
    """Embed images into one file: `embeddings` (n, width), and the file name of each row.

    The same command resumes an interrupted run: finished images are skipped, failed and changed ones are retried.
    Rows are stored as float32, or as --dtype. Read the file with siglip_model.embed.load_embeddings(FILE).
    """
    with errors_in_one_line():
        import torch

        from siglip_model.embed.journal import resuming
        from siglip_model.embed.run import EmbeddingInterrupted, embed_images, out_problem

        if problem := out_problem(out):
            raise ValueError(f"--out: {problem}")
        images = find_images(inputs)
        classifier = load_classifier(model, backend, dtype, device)
        failures: list[dict[str, str]] = []
        interrupted = False
        with (
            closing(images),
            terminal.progress(len(images), "embed", hidden=as_json) as progress,
            _termination_as_ctrl_c(),
        ):

            def on_image(path: str, outcome: str, error: str) -> None:
                if outcome == "failed":
                    progress.say(f"failed: {error}")
                    if as_json:
                        failures.append({"image": path, "error": error})
                progress.advance(counts=outcome != "skipped")

            try:
                summary = embed_images(
                    classifier.model,
                    classifier.image_processor,
                    images,
                    out,
                    normalize=normalize,
                    dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
                    batch_size=batch_size,
                    num_workers=workers(),
                    max_pixels=max_pixels,
                    overwrite=overwrite,
                    model_name=os.path.abspath(model) if os.path.isdir(model) else model,  # from any folder
                    on_image=on_image,
                )
            except EmbeddingInterrupted as interruption:
                summary, interrupted = interruption.summary, True
        if as_json:
            report = dataclasses.asdict(summary)
            report["images_per_second"] = round(summary.images_per_second, 2)
            print(json.dumps({**report, "failures": failures}, indent=2))
        elif summary.rows == 0:
            print(f"no image was embedded; {out} was not written")
        elif not summary.written:
            print(f"{out} is kept until all new rows are finished; {summary.rows} are")
        else:
            print(
                f"{out}: {summary.rows} row{'s' * (summary.rows != 1)} of {summary.width};"
                f" {summary.embedded} embedded now ({summary.images_per_second:.1f} images/s),"
                f" {summary.skipped} already present, {summary.failed} failed"
            )
        done = summary.embedded + summary.failed + summary.skipped
        exit_with(interrupted, summary.failed, done, len(images), f"; {resuming(overwrite)}")


@contextmanager
def _termination_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends the run as Ctrl-C does: finished rows are written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
