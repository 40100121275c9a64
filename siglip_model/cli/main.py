"""The command `siglip`: classify pictures, embed them, see the demo, ask what this machine can run.

Exit codes: 0 all went well, 1 some images failed (each is named on stderr), 2 wrong use or setup, 130 stopped.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from siglip_model.cli import terminal
from siglip_model.demo import CHECKPOINT, PICTURES
from siglip_model.images.files import IMAGE_SUFFIXES, is_url, list_images, load_image, read_ahead

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline

GOOGLE_EXAMPLE = 'siglip classify IMAGE --model google/siglip-so400m-patch14-384 --labels "2 cats" "a plane"'
SOME_FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="siglip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Score pictures against labels, and embed them, with SigLIP.",
    epilog="Exit codes: 0 all went well, 1 some images failed, 2 wrong use or setup, 130 stopped by Ctrl-C.",
)


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


class LabelListCommand(TyperCommand):
    """Takes `IMAGE... --labels LABEL...`: after the images, --labels owns every word up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value = {
            name
            for option in self.params
            for name in option.opts
            if name[:1] == "-" and not getattr(option, "is_flag", 0)
        }
        return super().parse_args(ctx, repeat_label_option(args, takes_value))


def repeat_label_option(args: Sequence[str], takes_value: Iterable[str]) -> list[str]:
    """`--labels a b` as `--labels a --labels b`; where no image came before it, --labels owns one word only."""
    words = iter(args)
    result: list[str] = []
    any_image = in_labels = False
    for word in words:
        is_option = word.startswith("-") and len(word) > 1
        if word == "--":
            return [*result, word, *words]
        if not is_option and in_labels and any_image:
            result += ["--labels", word]
            continue
        in_labels = word == "--labels"
        any_image = any_image or not is_option
        result.append(word)
        if is_option and word in takes_value:
            value = next(words, None)
            result += [] if value is None else [value]
    return result


def split_labels(values: Iterable[str]) -> list[str]:
    """The labels in the values of --labels: commas part them, `\\,` is a comma inside one. Each label once."""
    labels: dict[str, None] = {}
    for value in values:
        for label in value.replace("\\,", "\0").split(","):
            text = label.replace("\0", ",").strip()
            if text:
                labels[text] = None
    return list(labels)


@app.command(cls=LabelListCommand)
def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders or URLs.", show_default=False)],
    labels: Annotated[
        list[str],
        typer.Option(
            "--labels",
            metavar="LABEL...",
            help='Parted by spaces or commas: "a cat" "a dog", or "a cat, a dog". Write \\, for a comma in a label.',
            show_default=False,
        ),
    ],
    template: TemplateOption = TEMPLATE,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of the images beside their bars.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Show only this many labels of each image.")] = None,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Score each image against the labels. A score is the probability of its label alone: they need not add to 1."""
    with _errors_in_one_line():
        from siglip_model.cli import plot as plotting

        chosen = split_labels(labels)
        if not chosen:
            raise ValueError("--labels has no label; give one or more")
        if plot is not None and (problem := plotting.plot_problem(plot)):
            raise ValueError(f"--plot {problem}")
        total = _count_images(images)
        classifier = _load_classifier(model, backend, dtype, device)
        label_embeds = classifier.encode_labels(chosen, template)
        run = _ClassifyRun(classifier, chosen, label_embeds, top_k)
        rows_at_most = plotting.ROWS_AT_MOST if plot is not None else 0
        stopped = False
        with terminal.progress(total, "classify", hidden=as_json) as progress:
            try:
                run.over(list_images(images), batch_size, progress, keep_thumbnails=rows_at_most)
            except KeyboardInterrupt:  # what is done is shown
                stopped = True
        results = [result for result in run.results if result is not None]
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            terminal.print_predictions(results)
        if plot is not None and run.thumbnails:
            plotting.plot_predictions(
                [
                    plotting.PlotRow(picture, os.path.basename(result["image"]), result["predictions"])
                    for picture, result in run.thumbnails.values()
                ],
                plot,
            )
            shown = len(run.thumbnails)
            left_out = sum("predictions" in result for result in results) - shown
            terminal.say(
                f"wrote {plot}"
                + (f" with the first {shown} images; it has no room for {left_out} more" * bool(left_out))
            )
        failed = sum("error" in result for result in results)
        _exit(stopped, failed, len(results), total)


class _ClassifyRun:
    """Images through the classifier in batches; `results` keeps their order, whichever of them fail."""

    def __init__(
        self,
        classifier: ZeroShotImageClassificationPipeline,
        labels: Sequence[str],
        label_embeds: Any,
        top_k: int | None,
    ) -> None:
        self.classifier = classifier
        self.labels = labels
        self.label_embeds = label_embeds
        self.top_k = top_k
        self.results: list[dict[str, Any] | None] = []
        self.thumbnails: dict[int, tuple[Any, dict[str, Any]]] = {}

    def over(
        self, paths: Iterable[str], batch_size: int, progress: terminal.ProgressReport, keep_thumbnails: int
    ) -> None:
        from siglip_model.cli.plot import thumbnail

        def prepare(item: tuple[int, str]) -> tuple[Any, Any]:
            image = load_image(item[1])
            small = thumbnail(image) if item[0] < keep_thumbnails else None
            return self.classifier.prepare(image), small

        batch: list[tuple[int, str, Any, Any]] = []
        ready = read_ahead(enumerate(paths), prepare, workers=_workers(), window=2 * batch_size)
        with closing(ready):
            for (index, path), prepared, error in ready:
                self.results.append(None)
                if prepared is None:
                    self._fail(index, path, str(error), progress)
                else:
                    batch.append((index, path, *prepared))
                if len(batch) == batch_size:
                    self._score(batch, progress)
                    batch = []
            if batch:
                self._score(batch, progress)

    def _score(self, batch: Sequence[tuple[int, str, Any, Any]], progress: terminal.ProgressReport) -> None:
        import torch

        from siglip_model.zero_shot import rank

        scores = self.classifier.score(torch.cat([pixels for _, _, pixels, _ in batch]), self.label_embeds)
        finite = scores.isfinite().all(dim=-1).tolist()
        for (index, path, _, small), row, is_finite in zip(batch, scores.tolist(), finite, strict=True):
            if not is_finite:
                self._fail(index, path, f"{path}: its scores are not finite in {self.classifier.dtype}", progress)
                continue
            result = {"image": path, "predictions": rank(row, self.labels)[: self.top_k]}
            self.results[index] = result
            if small is not None:
                self.thumbnails[index] = (small, result)
            progress.advance()

    def _fail(self, index: int, path: str, error: str, progress: terminal.ProgressReport) -> None:
        reason = " ".join(error.split())
        self.results[index] = {"image": path, "error": reason}
        progress.say(f"failed: {reason}")
        progress.advance()


@app.command()
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES_OR_FOLDER", help="Files, folders (searched through) or URLs.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the embeddings go.", show_default=False)],
    normalize: Annotated[bool, typer.Option(help="Rows of unit length, or the pooled output as it is.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, even if the file is there.")] = False,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Embed images into one file: `embeddings` (n, width), and each row's file name.

    Started again it goes on where it stopped: images that are done are skipped, failed and changed ones tried again.
    Rows are float32, or the --dtype. In Python: siglip_model.embed.run.load_embeddings(FILE).
    """
    with _errors_in_one_line():
        import torch

        from siglip_model.embed.run import EmbeddingInterrupted, embed_images, out_problem

        if problem := out_problem(out):
            raise ValueError(f"--out: {problem}")
        total = _count_images(inputs)
        classifier = _load_classifier(model, backend, dtype, device)
        failures: list[dict[str, str]] = []
        stopped = False
        with terminal.progress(total, "embed", hidden=as_json) as progress, _termination_as_ctrl_c():

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
                    inputs,
                    out,
                    normalize=normalize,
                    dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
                    batch_size=batch_size,
                    num_workers=_workers(),
                    overwrite=overwrite,
                    model_name=model,
                    on_image=on_image,
                )
            except EmbeddingInterrupted as interruption:
                summary, stopped = interruption.summary, True
        if as_json:
            report = {name: getattr(summary, name) for name in summary.__dataclass_fields__}
            report["images_per_second"] = round(summary.images_per_second, 2)
            print(json.dumps({**report, "failures": failures}, indent=2))
        elif summary.rows == 0:
            print(f"no image was embedded; {out} was not written")
        else:
            print(
                f"{out}: {summary.rows} row{'s' * (summary.rows != 1)} of {summary.width};"
                f" {summary.embedded} embedded now ({summary.images_per_second:.1f} images/s),"
                f" {summary.skipped} done before, {summary.failed} failed"
            )
        done = summary.embedded + summary.failed + summary.skipped
        _exit(stopped, summary.failed, done, total, "; the same command goes on from here" * stopped)


@app.command()
def demo(
    template: TemplateOption = TEMPLATE,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 16,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of the images beside their bars.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Name the pictures that come with this package, and see whether the names are right."""
    with _errors_in_one_line():
        from siglip_model.cli import plot as plotting
        from siglip_model.demo.classify import classify_demo_pictures, score_on_card

        if plot is not None and (problem := plotting.plot_problem(plot)):
            raise ValueError(f"--plot {problem}")
        classifier = _load_classifier(model, backend, dtype, device)
        results = classify_demo_pictures(classifier, PICTURES, template, batch_size)
        right = sum(result["right"] for result in results)
        if plot is not None:
            rows = [
                plotting.PlotRow(load_image(entry["image"]), entry["name"], entry["predictions"][:3])
                for entry in results
            ]
            plotting.plot_predictions(rows, plot)
            terminal.say(f"wrote {plot}")
        if as_json:
            print(json.dumps({"right": right, "of": len(results), "pictures": results}, indent=2))
            return
        terminal.print_demo(results, right)
        if model == str(CHECKPOINT):
            score = score_on_card(CHECKPOINT)
            measured = (
                f" On all pictures of that design it picks the right one of ten names in {score}." if score else ""
            )
            print(f"The pictures are of a design that this small model never saw in training.{measured}")
        print(f"With a checkpoint of Google's instead: {GOOGLE_EXAMPLE}")


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Versions, devices, and which backends this machine supports, or why not."""
    with _errors_in_one_line():
        from siglip_model.cli.info import describe_machine

        facts = describe_machine()
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        terminal.print_machine(facts)


def _count_images(inputs: Sequence[str]) -> int:
    """How many images the inputs stand for. ValueError if that is none, or if not one of the inputs is there."""
    present = [entry for entry in inputs if is_url(entry) or os.path.lexists(entry)]
    if not present:
        raise ValueError(f"no such file or folder: {', '.join(inputs[:3])}{' ...' * (len(inputs) > 3)}")
    total = sum(1 for _ in list_images(inputs))
    if total == 0:
        raise ValueError(f"no images in {', '.join(inputs[:3])}; looked for names ending in {' '.join(IMAGE_SUFFIXES)}")
    return total


def _load_classifier(model: str, backend: str, dtype: str, device: str | None) -> ZeroShotImageClassificationPipeline:
    from siglip_model.zero_shot import TASK, pipeline

    if model == str(CHECKPOINT) and not (CHECKPOINT / "config.json").exists():
        raise ValueError(f"the package's own checkpoint is not there ({CHECKPOINT}); name one with --model")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    place = int(device) if device is not None and device.lstrip("-").isdigit() else device
    return pipeline(TASK, model=model, backend=backend, dtype=dtype, device=place)


def _workers() -> int:
    """Threads that open images beside the model: decoding leaves Python's lock, a few of them feed a GPU."""
    return max(2, min(8, (os.cpu_count() or 2) // 2))


def _exit(stopped: bool, failed: int, done: int, total: int, remark: str = "") -> None:
    if stopped:
        terminal.say(f"stopped after {done} of {total} images{remark}")
        raise typer.Exit(INTERRUPTED)
    if failed:
        terminal.say(f"{failed} of {total} images failed")
        raise typer.Exit(SOME_FAILED)


@contextmanager
def _termination_as_ctrl_c() -> Iterator[None]:
    """A batch system that ends the job (SIGTERM) leaves what is done as usable as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
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


def main() -> None:
    """The entry point of `siglip`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error that ends them is shown
    warnings.showwarning = lambda message, *details, **more: terminal.say(f"warning: {' '.join(str(message).split())}")
    app()
