"""`siglip classify`: images against free-text labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    TEMPLATE,
    BackendOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    TemplateOption,
    count_images,
    errors_in_one_line,
    exit_with,
    load_classifier,
    workers,
)
from siglip_model.demo import CHECKPOINT
from siglip_model.images.batches import read_ahead
from siglip_model.images.files import list_images, load_image

if TYPE_CHECKING:
    from siglip_model.zero_shot import ZeroShotImageClassificationPipeline


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
    with errors_in_one_line():
        from siglip_model.cli import plot as plotting

        chosen = split_labels(labels)
        if not chosen:
            raise ValueError("--labels has no label; give one or more")
        if plot is not None and (problem := plotting.plot_problem(plot)):
            raise ValueError(f"--plot {problem}")
        total = count_images(images)
        classifier = load_classifier(model, backend, dtype, device)
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
        exit_with(stopped, failed, len(results), total)


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
        ready = read_ahead(enumerate(paths), prepare, workers=workers(), window=2 * batch_size)
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
