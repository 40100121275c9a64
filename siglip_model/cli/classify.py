"""`siglip classify`: images against free-text labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    IMAGES_HELP,
    BackendOption,
    BatchSizeOrBudgetOption,
    CheckOption,
    DeviceOption,
    JsonOption,
    LongRunDtypeOption,
    MaxNumPatchesOption,
    MaxPixelsOption,
    ModelOption,
    PlotOption,
    TemplateOption,
    TokenBudgetOption,
    check_one_measure,
    errors_in_one_line,
    exit_with,
    find_images,
    load_classifier,
    workers,
)
from siglip_model.cli.process import share_with_decoders
from siglip_model.demo import CHECKPOINT
from siglip_model.images.batches import BATCH_SIZE, Batch, Failure, read_batches
from siglip_model.images.files import DOWNLOAD_SECONDS, describe_failure, open_image
from siglip_model.images.limits import MAX_PIXELS, PixelBudget
from siglip_model.text.prompts import TEMPLATE

if TYPE_CHECKING:
    from siglip_model.plot import PlotRow
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
    """`--labels a b` as `--labels a --labels b`; before the first image, --labels owns a single word."""
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
    """The labels in the values of --labels, each once. Commas separate labels; `\\,` is a comma within one."""
    labels: dict[str, None] = {}
    for value in values:
        for label in value.replace("\\,", "\0").split(","):
            text = label.replace("\0", ",").strip()
            if text:
                labels[text] = None
    return list(labels)


def looks_like_a_label(word: str) -> bool:
    """Whether an image that is not there can be meant as a label, as `b` in `--labels a b cat.jpg`."""
    a_name = not word.startswith("-") and len(word) < 100 and not {"/", os.sep, "."} & set(word)  # and not in base64
    return a_name and not os.path.lexists(word)


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help=IMAGES_HELP, show_default=False)],
    labels: Annotated[
        list[str],
        typer.Option(
            "--labels",
            metavar="LABEL...",
            help='Separated by spaces or commas: "a cat" "a dog", or "a cat, a dog". Write \\, for a comma in a label.',
            show_default=False,
        ),
    ],
    template: TemplateOption = TEMPLATE,
    plot: PlotOption = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=1, help="Show the k best labels per image.")] = None,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    check: CheckOption = False,
    dtype: LongRunDtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOrBudgetOption = None,
    max_num_patches: MaxNumPatchesOption = None,
    token_budget: TokenBudgetOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
) -> None:
    """Score each image against the labels. Each score is an independent probability: they need not sum to 1."""
    share_with_decoders()
    with errors_in_one_line():
        from siglip_model import plot as plotting

        chosen = split_labels(labels)
        if not chosen:
            raise ValueError("--labels has no label; give one or more")
        if plot is not None and (problem := plotting.plot_problem(plot)):
            raise ValueError(f"--plot: {problem}")
        check_one_measure(batch_size, token_budget)
        paths = find_images(images)
        if words := [word for word in images if looks_like_a_label(word)]:
            terminal.say(
                f"{words[0]!r} is not a file; if it is a label: --labels takes several words only after the images,"
                " or with commas between them"
            )
        classifier = load_classifier(model, backend, dtype, device, max_num_patches, token_budget, len(paths), check)
        label_embeds = classifier.encode_labels(chosen, template)
        interrupted = False
        with closing(paths), terminal.progress(len(paths), "classify", hidden=as_json) as progress:
            run = _ClassifyRun(
                classifier, chosen, label_embeds, top_k, progress, plotting.ROWS_AT_MOST if plot is not None else 0
            )
            try:
                run.over(paths, batch_size or BATCH_SIZE, PixelBudget(max_pixels))
            except KeyboardInterrupt:  # the finished results are still printed
                interrupted = True
        results = [result for _, result in sorted(run.results.items())]
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            terminal.print_predictions(results)
        rows = run.plot_rows()
        if plot is not None and rows:
            plotting.plot_predictions(rows, plot)
            omitted = sum("predictions" in result for result in results) - len(rows)
            remark = f" with the first {len(rows)} images; {omitted} more do not fit" if omitted else ""
            terminal.say(f"wrote {plot}{remark}")
        failed = sum("error" in result for result in results)
        exit_with(interrupted, failed, len(results), len(paths))


class _ClassifyRun:
    """Images through the classifier in batches; `results` are the finished ones, by place in the input."""

    def __init__(
        self,
        classifier: ZeroShotImageClassificationPipeline,
        labels: Sequence[str],
        label_embeds: Any,
        top_k: int | None,
        progress: terminal.ProgressReport,
        thumbnails_at_most: int,
    ) -> None:
        self.classifier = classifier
        self.labels = labels
        self.label_embeds = label_embeds
        self.top_k = top_k
        self.progress = progress
        self.thumbnails_at_most = thumbnails_at_most
        self.results: dict[int, dict[str, Any]] = {}
        self.thumbnails: dict[int, Any] = {}

    def over(self, paths: Iterable[str], batch_size: int, budget: PixelBudget) -> None:
        from siglip_model.embed.workers import Workers
        from siglip_model.plot import thumbnail

        def read(item: tuple[int, str]) -> Any:
            index, path = item
            with open_image(path, DOWNLOAD_SECONDS, budget) as image:
                if index < self.thumbnails_at_most:
                    self.thumbnails[index] = thumbnail(image)
                return self.classifier.prepare(image)

        tokens = self.classifier.token_budget
        sizes = {"batch_size": batch_size} if tokens is None else tokens.sizes()
        with Workers("threads", workers()) as readers, budget:
            pool = partial(readers.pool, read, read)
            with closing(read_batches(enumerate(paths), read, workers=readers.count, pool=pool, **sizes)) as batches:
                for batch in batches:
                    if isinstance(batch, Failure):
                        self._fail(*batch.item, describe_failure(batch.item[1], batch.error))
                    else:
                        self._score(batch)

    def _score(self, batch: Batch[tuple[int, str], Any]) -> None:
        from siglip_model.zero_shot import rank

        scores = self.classifier.score(self.classifier.join(batch.values), self.label_embeds)
        finite = scores.isfinite().all(dim=-1).tolist()
        for (index, path), row, is_finite in zip(batch.items, scores.tolist(), finite, strict=True):
            if is_finite:
                self.results[index] = {"image": path, "predictions": rank(row, self.labels)[: self.top_k]}
                self.progress.advance()
            else:
                self._fail(index, path, f"{path}: its scores are not finite in {self.classifier.dtype}")

    def _fail(self, index: int, path: str, error: str) -> None:
        self.results[index] = {"image": path, "error": error}
        self.progress.say(f"failed: {error}")
        self.progress.advance()

    def plot_rows(self) -> list[PlotRow]:
        """The first images that were scored, beside their predictions."""
        from siglip_model.plot import PlotRow

        return [
            PlotRow(self.thumbnails[index], os.path.basename(result["image"]), result["predictions"])
            for index, result in sorted(self.results.items())
            if index in self.thumbnails and "predictions" in result
        ]
