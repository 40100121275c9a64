"""Options, exit codes and error handling that the commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_model.cli import terminal
from siglip_model.demo import CHECKPOINT
from siglip_model.images.batches import BATCH_SIZE
from siglip_model.images.files import IMAGE_SUFFIXES, ImageList, is_url

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline


IMAGES_HELP = "Files, folders (searched recursively) or URLs; - reads a list of them from stdin."
GOOGLE_EXAMPLE = 'siglip classify IMAGE --model google/siglip-so400m-patch14-384 --labels "2 cats" "a plane"'
SOME_FAILED, USAGE_ERROR, STOPPED, INTERRUPTED, OUTPUT_CLOSED = 1, 2, 75, 130, 141
DTYPES = ("auto", "float32", "float16", "bfloat16")
BACKEND_NAMES = ("auto", "eager", "sdpa", "flash_attention_2", "triton", "triton_fp8")  # `backends` imports PyTorch
LIST_ON_STDIN = "-"
_ARGUMENT = re.compile(r"^(?:pipeline: )?(backend|check|device|dtype|max_num_patches|token_budget)(?= is )")
_DTYPE_HELP = "Compute dtype: float32, float16, bfloat16, or auto: as stored in the checkpoint's configuration"
READ_AT_ONCE = 2**16  # bytes: longer than any path, so that the first piece shows the separator

TemplateOption = Annotated[
    str, typer.Option("--template", metavar="TEXT", help="Sentence in which {} stands for the label.")
]
CheckpointOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="FOLDER|HUB_ID",
        help="Checkpoint; the bundled demo checkpoint by default.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="FOLDER|HUB_ID",
        help="Checkpoint, or a file of `siglip export`; the bundled demo checkpoint by default.",
        show_default=False,
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Compute backend; `siglip info` lists those available.",
        autocompletion=lambda: list(BACKEND_NAMES),
    ),
]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="Compare triton_fp8's embeddings of the bundled pictures with sdpa's first."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help=f"{_DTYPE_HELP}.",
        autocompletion=lambda: list(DTYPES),
    ),
]
LongRunDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help=f"{_DTYPE_HELP}, but bfloat16 for many images on a CPU that has it.",
        autocompletion=lambda: list(DTYPES),
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; auto, the default: the first GPU, else the CPU."
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images per forward pass.")]
BatchSizeOrBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        help=f"Images per forward pass; {BATCH_SIZE} by default.",
        show_default=False,
    ),
]
MaxNumPatchesOption = Annotated[
    int | None,
    typer.Option(
        "--max-num-patches",
        metavar="N",
        min=1,
        help="Patches per image at native resolution; the checkpoint's by default.",
        show_default=False,
    ),
]
TokenBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--token-budget",
        metavar="N",
        min=1,
        help="Patches per forward pass at native resolution, instead of --batch-size.",
        show_default=False,
    ),
]
MaxPixelsOption = Annotated[
    int,
    typer.Option(
        "--max-pixels",
        metavar="N",
        min=1,
        help="Refuse larger images, and decode at most this many pixels at a time.",
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Plot the images beside bars of their scores.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def find_images(inputs: Sequence[str], optional: bool = False) -> ImageList:
    """The images that the inputs stand for; - stands for those listed on stdin.

    Raises ValueError if there are none, unless they are optional, or if none of the inputs exists.
    """
    if optional and not inputs:
        return ImageList([])
    if inputs.count(LIST_ON_STDIN) > 1:
        raise ValueError("- is given twice; stdin holds one list (./- is the file of that name)")
    if not any(is_url(entry) or entry == LIST_ON_STDIN or os.path.lexists(entry) for entry in inputs):
        raise ValueError(f"no such file or folder: {', '.join(inputs[:3])}{' ...' * (len(inputs) > 3)}")
    images = ImageList(name for entry in inputs for name in (listed_on_stdin() if entry == LIST_ON_STDIN else [entry]))
    if len(images) == 0:
        raise ValueError(f"no images in {places(inputs)}; looked for names ending in {' '.join(IMAGE_SUFFIXES)}")
    return images


def places(inputs: Sequence[str]) -> str:
    """The first inputs, as a message names them."""
    return ", ".join("the list on stdin" if entry == LIST_ON_STDIN else entry for entry in inputs[:3])


def holds_several(name: str) -> bool:
    """Whether an input may be a file of many images, whose number is known after reading it."""
    return name.endswith((".tar", ".parquet")) or name == LIST_ON_STDIN


def listed_on_stdin() -> Iterator[str]:
    """Names separated by newlines, or by NUL bytes (`find -print0`) where stdin begins with one so ended."""
    if sys.stdin is None:
        raise ValueError("- reads a list from stdin, which is closed")
    rest = sys.stdin.buffer.read(READ_AT_ONCE)
    separator = b"\0" if b"\0" in rest else b"\n"
    while rest:
        *names, rest = rest.split(separator)
        piece = sys.stdin.buffer.read(READ_AT_ONCE)
        names, rest = (names, rest + piece) if piece else ([*names, rest], b"")
        for name in names:
            if separator == b"\n":
                name = name.removesuffix(b"\r")
            if name:
                yield os.fsdecode(name)


def device_named(device: str | None) -> str | int | None:
    """The value of --device, whose ordinals are numbers."""
    return int(device) if device is not None and device.lstrip("-").isdigit() else device


def check_one_measure(batch_size: int | None, token_budget: int | None) -> None:
    """Raises ValueError if both are given."""
    if batch_size is not None and token_budget is not None:
        raise ValueError(
            f"--batch-size {batch_size} and --token-budget {token_budget} both say how many images a batch has; give "
            "one of them"
        )


def load_classifier(
    model: str,
    backend: str,
    dtype: str,
    device: str | None,
    max_num_patches: int | None = None,
    token_budget: int | None = None,
    images: int | None = 0,
    check: bool = False,
) -> ZeroShotImageClassificationPipeline:
    """images: of the run, or None for an unknown number. Where there are many, `auto` may choose bfloat16 on a CPU."""
    from siglip_model.zero_shot import TASK, pipeline

    if model == str(CHECKPOINT) and not (CHECKPOINT / "config.json").exists():
        raise ValueError(f"the bundled checkpoint is missing ({CHECKPOINT}); choose one with --model")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    given = {"max_num_patches": max_num_patches, "token_budget": token_budget}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if check and backend != "triton_fp8":
        raise ValueError(f"--check compares --backend triton_fp8 with sdpa, and --backend is {backend!r}")
    if check:
        options["model_kwargs"] = {"check": True}
    load = partial(pipeline, TASK, model=model, backend=backend, dtype=dtype, device=device_named(device), **options)
    classifier: ZeroShotImageClassificationPipeline = load()
    if not dtype == backend == "auto":
        return classifier

    from siglip_model.cli.precision import LEAST_COSINE, LONG_RUN, use_bfloat16

    cosine = use_bfloat16(classifier) if images is None or images >= LONG_RUN else None
    if cosine is None:
        return classifier
    if cosine >= LEAST_COSINE:
        terminal.say(
            f"computing in bfloat16 (cosine to float32 at least {cosine:.5f}); --dtype float32 for more digits"
        )
        return classifier
    terminal.say(f"computing in float32, because bfloat16 changes embeddings (cosine {cosine:.5f})")
    return load()  # what was converted has lost its digits


def workers() -> int:
    """Number of threads that open images ahead of the model. Decoding releases the GIL, so a few feed a GPU."""
    return max(2, min(8, (os.cpu_count() or 2) // 2))


def exit_with(
    interrupted: bool, failed: int, done: int, total: int | None, remark: str = "", what: str = "images"
) -> None:
    """Reports an incomplete run on stderr and exits with its code; returns if all images succeeded."""
    of_all = "" if total is None else f" of {total}"
    if interrupted:
        terminal.say(f"interrupted after {done}{of_all} {what}{remark}")
        raise typer.Exit(INTERRUPTED)
    if failed:
        terminal.say(f"{failed}{of_all} {what} failed")
        raise typer.Exit(SOME_FAILED)


def naming_options(message: str) -> str:
    """A message of the library that begins with the name of an argument, with the name of the commands' option."""
    return _ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')}", message)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Reports usage and setup errors in one line, with exit code 2. SIGLIP_TRACEBACK=1 shows the traceback."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader of stdout or stderr has seen enough
        raise typer.Exit(OUTPUT_CLOSED) from None
    except KeyboardInterrupt:
        terminal.say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("SIGLIP_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        if not text or not isinstance(error, (OSError, ValueError, TypeError, RuntimeError, ImportError)):
            text = f"{type(error).__name__}{': ' * bool(text)}{text} (SIGLIP_TRACEBACK=1 shows where)"
        terminal.say(f"error: {naming_options(text)}")
        raise typer.Exit(USAGE_ERROR) from None
