"""Options, exit codes and error handling that the commands share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_model.cli import terminal
from siglip_model.demo import CHECKPOINT
from siglip_model.images.files import IMAGE_SUFFIXES, is_url, list_images

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline


GOOGLE_EXAMPLE = 'siglip classify IMAGE --model google/siglip-so400m-patch14-384 --labels "2 cats" "a plane"'
SOME_FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130

TEMPLATE = "This is a photo of {}."
DTYPES = ("auto", "float32", "float16", "bfloat16")

TemplateOption = Annotated[str, typer.Option("--template", metavar="TEXT", help="The sentence around a label.")]
ModelOption = Annotated[
    str,
    typer.Option("--model", metavar="FOLDER|HUB_ID", help="A checkpoint; by default the demo's.", show_default=False),
]
BackendOption = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="What computes; `siglip info` lists them, and which can here.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="What it computes in: float32, float16, bfloat16, or auto: what the checkpoint says.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images that go through the model together.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def count_images(inputs: Sequence[str]) -> int:
    """How many images the inputs stand for. ValueError if that is none, or if not one of the inputs is there."""
    present = [entry for entry in inputs if is_url(entry) or os.path.lexists(entry)]
    if not present:
        raise ValueError(f"no such file or folder: {', '.join(inputs[:3])}{' ...' * (len(inputs) > 3)}")
    total = sum(1 for _ in list_images(inputs))
    if total == 0:
        raise ValueError(f"no images in {', '.join(inputs[:3])}; looked for names ending in {' '.join(IMAGE_SUFFIXES)}")
    return total


def load_classifier(model: str, backend: str, dtype: str, device: str | None) -> ZeroShotImageClassificationPipeline:
    from siglip_model.zero_shot import TASK, pipeline

    if model == str(CHECKPOINT) and not (CHECKPOINT / "config.json").exists():
        raise ValueError(f"the package's own checkpoint is not there ({CHECKPOINT}); name one with --model")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    place = int(device) if device is not None and device.lstrip("-").isdigit() else device
    return pipeline(TASK, model=model, backend=backend, dtype=dtype, device=place)


def workers() -> int:
    """Threads that open images beside the model: decoding leaves Python's lock, a few of them feed a GPU."""
    return max(2, min(8, (os.cpu_count() or 2) // 2))


def exit_with(stopped: bool, failed: int, done: int, total: int, remark: str = "") -> None:
    if stopped:
        terminal.say(f"stopped after {done} of {total} images{remark}")
        raise typer.Exit(INTERRUPTED)
    if failed:
        terminal.say(f"{failed} of {total} images failed")
        raise typer.Exit(SOME_FAILED)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can get wrong ends in one line and exit code 2. SIGLIP_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        terminal.say("stopped")
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if os.environ.get("SIGLIP_TRACEBACK"):
            raise
        terminal.say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        raise typer.Exit(WRONG_USE) from None
