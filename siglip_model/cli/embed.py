"""`siglip embed`: images or texts into a file of embeddings."""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    DTYPES,
    LIST_ON_STDIN,
    BackendOption,
    BatchSizeOrBudgetOption,
    CheckOption,
    DeviceOption,
    JsonOption,
    LongRunDtypeOption,
    MaxNumPatchesOption,
    MaxPixelsOption,
    ModelOption,
    TokenBudgetOption,
    check_one_measure,
    errors_in_one_line,
    exit_with,
    find_images,
    holds_several,
    load_classifier,
    places,
    workers,
)
from siglip_model.cli.process import share_with_decoders
from siglip_model.demo import CHECKPOINT
from siglip_model.images.limits import MAX_PIXELS

INPUTS_HELP = (
    "Files, folders (searched recursively), URLs, WebDataset shards (.tar) or .parquet files; - reads a list of them"
    " from stdin."
)


def embed(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Output file: .safetensors, .npy or .parquet.", show_default=False)
    ],
    inputs: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help=INPUTS_HELP, show_default=False)] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--texts", metavar="FILE", help="Embed the lines of text files, or a column of .parquet files, instead."
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", metavar="NAME", help="Column of .parquet files: encoded images, paths, or texts."),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            "--encoding", metavar="NAME", help="Of text files; by default as their byte order mark says, else UTF-8."
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale rows to unit length, or keep the pooled output.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over; the old output is kept until the new one is complete.")
    ] = False,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    check: CheckOption = False,
    dtype: LongRunDtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOrBudgetOption = None,
    max_num_patches: MaxNumPatchesOption = None,
    token_budget: TokenBudgetOption = None,
    shards: Annotated[
        int | None,
        typer.Option("--shards", metavar="N", min=1, help="Write N files and a manifest, for ranks of torchrun."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="Cut the output into numbered files above this size, such as 2GB."
        ),
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="How many read and decode at a time; by default 2 to 8."),
    ] = None,
    decode: Annotated[
        str,
        typer.Option(
            "--decode",
            metavar="HOW",
            help="threads, processes, or auto: a run of over half a minute times both and keeps the faster.",
        ),
    ] = "auto",
    fast_decode: Annotated[
        bool,
        typer.Option(
            "--fast-decode",
            help="Decode large JPEG files at 1/2, 1/4 or 1/8 of their size. Moves pixels: 19 levels of 255 were seen in"
            " photographs, and more at steep edges.",
        ),
    ] = False,
    resize_on_device: Annotated[
        bool,
        typer.Option(
            "--resize-on-device",
            help="Copy images in uint8, and resize and normalise them on the device; on CUDA it rounds differently.",
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure the stages, and print what bounds the run.")
    ] = False,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
) -> None:
    """Embed images, or texts, into one file: `embeddings` (n, width), and the file name or text of each row.

    The same command resumes an interrupted run: finished rows are skipped, failed and changed images are retried.
    Rows are stored as float32, or as --dtype. Read the file with siglip_model.embed.load_embeddings(FILE).
    """
    share_with_decoders()
    with errors_in_one_line():
        import torch

        from siglip_model.embed.journal import computed_in, resuming
        from siglip_model.embed.run import EmbeddingInterrupted, embed_images, embed_texts, out_problem
        from siglip_model.embed.workers import DECODE

        if problem := out_problem(out):
            raise ValueError(f"--out: {problem}")
        what = "texts" if texts else "images"
        if decode not in DECODE:
            raise ValueError(f"--decode is {decode!r}; supported: {', '.join(DECODE)}")
        check_one_measure(batch_size, token_budget)
        _check_inputs(inputs or [], texts or [], encoding, column)
        most_bytes = None if shard_size is None else bytes_of(shard_size)
        of_images = {
            "--fast-decode": fast_decode,
            "--resize-on-device": resize_on_device,
            "--decode": decode != "auto",
            "--token-budget": token_budget is not None,
            "--max-num-patches": max_num_patches is not None,
            "--max-pixels": max_pixels != MAX_PIXELS,
        }
        if texts and any(of_images.values()):
            raise ValueError(f"{next(name for name in of_images if of_images[name])} is for images, not for --texts")
        images = find_images([] if texts else inputs or [], optional=bool(texts))
        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if most_bytes is not None and (shards is not None or ranks > 1):
            raise ValueError("--shard-size cuts the output of one process, in order; give --shards for that of ranks")
        if ranks > 1 and LIST_ON_STDIN in (*(inputs or []), *(texts or [])):
            raise ValueError("- reads stdin, which ranks cannot share; give files")
        if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        total = None if ranks > 1 or texts or any(map(holds_several, inputs or [])) else len(images)
        earlier = computed_in(out) if dtype == "auto" and not overwrite else None
        chosen = earlier if earlier in DTYPES else dtype
        counted = 0 if ranks > 1 else total  # ranks may be on unlike machines, and their rows share files
        classifier = load_classifier(model, backend, chosen, device, max_num_patches, token_budget, counted, check)
        if chosen == "bfloat16" != dtype and classifier.device.type == "cpu" and rank == 0:
            terminal.say(f"computing in bfloat16, as were the rows of {out}")
        failures: list[dict[str, str]] = []
        interrupted = False
        with (
            closing(images),
            terminal.progress(total, "embed", hidden=as_json or rank > 0, unit=what) as progress,
            _termination_as_ctrl_c(),
        ):

            def on_source(name: str, outcome: str, error: str) -> None:
                if outcome == "failed":
                    progress.say(f"failed: {error}")
                    if as_json:
                        failures.append({what[:-1]: name, "error": error})
                progress.advance(counts=outcome != "skipped")

            options: dict[str, Any] = {
                "column": column,
                "normalize": normalize,
                "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype),
                "num_workers": num_workers or workers(),
                "profile": profile,
                "overwrite": overwrite,
                "shards": shards,
                "shard_size": most_bytes,
                "rank": rank,
                "world_size": ranks,
                "model_name": os.path.abspath(model) if os.path.exists(model) else model,  # from any folder
            }
            if batch_size is not None:
                options["batch_size"] = batch_size
            try:
                if texts:
                    files = [_stdin(encoding) if file == LIST_ON_STDIN else file for file in texts]
                    summary = embed_texts(
                        classifier.model,
                        classifier.tokenizer,
                        files,
                        out,
                        encoding=encoding,
                        on_text=on_source,
                        **options,
                    )
                else:
                    summary = embed_images(
                        classifier.model,
                        classifier.image_processor,
                        images,
                        out,
                        token_budget=token_budget,
                        max_pixels=max_pixels,
                        decode=decode,
                        fast_decode=fast_decode,
                        resize_on_device=resize_on_device,
                        on_image=on_source,
                        **options,
                    )
            except EmbeddingInterrupted as interruption:
                summary, interrupted = interruption.summary, True
        if summary.blank:
            terminal.say(f"left out {summary.blank} blank text{'s' * (summary.blank != 1)}")
        done = summary.embedded + summary.failed + summary.skipped
        if ranks == 1 and not (done or interrupted):  # a rank's share may be empty
            raise ValueError(f"no {what} in {places(texts or inputs or [])}")
        of_rank = f"rank {rank} of {ranks}: " if ranks > 1 else ""
        if as_json:
            report = dataclasses.asdict(summary)
            report["images_per_second"] = round(summary.images_per_second, 2)
            if summary.profile is None:
                del report["profile"]
            else:
                report["profile"]["bound_by"] = summary.profile.bound_by
            if not texts:
                del report["blank"]
            print(json.dumps({**report, "failures": failures}, indent=2))
        elif summary.rows == 0:
            print(f"{of_rank}no {what[:-1]} was embedded" + ("" if shards or ranks > 1 else f"; {out} was not written"))
        elif not summary.written:
            print(f"{of_rank}{out} is kept until all new rows are finished; {summary.rows} are")
        else:
            rate = f" ({summary.images_per_second:.1f} {what}/s)" if summary.embedded else ""
            print(
                f"{of_rank}{out}: {summary.rows} row{'s' * (summary.rows != 1)} of width {summary.width};"
                f" {summary.embedded} embedded now{rate}, {summary.skipped} already present, {summary.failed} failed"
            )
        if summary.profile is not None and not as_json:
            terminal.print_profile(summary.profile)
        # The number of rows in shards and files is known when they have been read
        whole = total if total is not None or interrupted else done
        if ranks > 1 and summary.failed and not interrupted:
            terminal.say(f"{summary.failed} {what} failed on rank {rank}")
            return  # torchrun would take another code for a rank that died, and end those that still embed
        exit_with(interrupted, summary.failed, done, whole, f"; {resuming(overwrite)}", what)


def _check_inputs(inputs: Sequence[str], texts: Sequence[str], encoding: str | None, column: str | None) -> None:
    if texts and inputs:
        raise ValueError(f"{inputs[0]} is given beside --texts; embed images and texts into different files")
    if not texts and not inputs:
        raise ValueError("there is nothing to embed; give images, or --texts FILE")
    if column is not None and not any(name.endswith(".parquet") or name == LIST_ON_STDIN for name in (*inputs, *texts)):
        raise ValueError("--column is that of .parquet files, and none is given")
    if encoding is not None:
        if not texts:
            raise ValueError("--encoding is that of --texts, which is not given")
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise ValueError(f"--encoding: {error}; supported: the encodings of Python, such as latin-1") from error
    for file in texts:
        if file != LIST_ON_STDIN and not os.path.isfile(file):
            raise ValueError(f"--texts: no such file: {file}")


def bytes_of(size: str) -> int:
    """Bytes of a size such as 2GB, 500 MiB or 1000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", size.strip(), re.IGNORECASE)
    number = 0
    if found is not None and (found[2] or "." not in found[1]):  # no part of a byte
        power = " kmgt".index((found[2] or " ").lower())
        number = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if number < 1:
        raise ValueError(
            f"--shard-size is {size!r}; supported: a whole number of bytes, or a number of kB, MB, GB, TB, KiB ... TiB"
        )
    return number


def _stdin(encoding: str | None) -> TextIO:
    from siglip_model.text.encodings import encoding_of

    if sys.stdin is None:
        raise ValueError("--texts - reads texts from stdin, which is closed")
    beginning = io.BufferedReader(sys.stdin.buffer)  # type: ignore[type-var]  # one that can be peeked into
    return io.TextIOWrapper(beginning, encoding or encoding_of(beginning.peek(4)[:4]))


@contextmanager
def _termination_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends the run as Ctrl-C does: finished rows are written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
