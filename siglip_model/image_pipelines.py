"""`pipeline("image-classification")` and `pipeline("image-feature-extraction")`, as transformers 5 builds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from siglip_model.automatic_capture import CapturesRepeats
from siglip_model.checkpoints.upload import save_and_upload
from siglip_model.devices import resolve_device
from siglip_model.fit import check_pixels
from siglip_model.images import model_inputs
from siglip_model.images.batches import Failure, read_batches
from siglip_model.images.files import describe_source, open_image
from siglip_model.images.limits import PixelBudget
from siglip_model.images.model_inputs import Inputs

if TYPE_CHECKING:
    from siglip_model.classifier import SiglipForImageClassification
    from siglip_model.vision_tower import SiglipVisionModel

RowsOf = Callable[[Inputs], Iterable[Any]]
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=-1),
    "none": lambda logits: logits,
}


class ImagePipeline:
    """The base of all pipelines: images are opened ahead of the model, prepared and put into batches.

    device: device to move the model to; None leaves it on its device. batch_size, num_workers, timeout: defaults of
    each call. max_pixels: as for `ZeroShotImageClassificationPipeline`.
    token_budget: at native resolution, patches per forward pass: it takes as many images as fit, instead of batch_size.
    Raises ValueError for both.
    max_num_patches: at native resolution, patches per image, instead of the image processor's.
    """

    task: ClassVar[str]
    method: ClassVar[str] = "__call__"  # of the model, which encodes images
    results_are: ClassVar[str] = "the model's outputs are"
    keep_padding: ClassVar[bool] = False  # of images at native resolution

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        *,
        device: str | int | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        max_pixels: int | None = None,
        token_budget: int | None = None,
        max_num_patches: int | None = None,
    ) -> None:
        self.model = model.eval() if device is None else model.eval().to(resolve_device(device))
        self.encode_images = CapturesRepeats(self.model, self.method)
        if max_num_patches is not None:
            image_processor = with_patches(image_processor, max_num_patches)
        self.image_processor = image_processor
        self.token_budget = TokenBudget(image_processor, token_budget) if token_budget is not None else None
        self.batch_size = images_per_batch(self.task, batch_size, self.token_budget, default=1)
        self.num_workers = count("num_workers", num_workers or 0, at_least=0)
        self.timeout = timeout
        self.max_pixels = PixelBudget(max_pixels).max_pixels

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __repr__(self) -> str:
        return f"{type(self).__name__}(backend={self.model.backend!r}, device={self.device}, dtype={self.dtype})"

    def predict(self, inputs: Any) -> Any:
        """A call, by scikit-learn's name."""
        return self(inputs)  # type: ignore[operator]  # each pipeline defines its call

    def transform(self, inputs: Any) -> Any:
        """A call, by scikit-learn's name."""
        return self(inputs)  # type: ignore[operator]  # each pipeline defines its call

    def save_pretrained(self, save_directory: str | os.PathLike[str], **arguments: Any) -> None:
        """Write the model and its components to a folder that `pipeline` loads. arguments: push_to_hub and its own."""
        for part in (self.model, getattr(self, "tokenizer", None), self.image_processor):
            if part is not None:
                part.save_pretrained(save_directory, **arguments)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> Any:
        """Write these files to a repository of the Hub. arguments: see `checkpoints.upload.upload`."""
        return save_and_upload(self.save_pretrained, repo_id, **arguments)

    def prepare(
        self, image: Any, timeout: float | None = None, budget: PixelBudget | None = None, **options: Any
    ) -> Inputs:
        """One image as the model's inputs on the CPU: pixel_values, float32 (1, channels, height, width), or at native
        resolution (1, patches, values) with pixel_attention_mask and spatial_shapes. Raises like `load_image`.

        budget: that of all threads that prepare images; by default of this image alone. options: of the image
        processor.
        """
        with open_image(image, timeout, PixelBudget(self.max_pixels) if budget is None else budget) as opened:
            inputs = model_inputs.prepare(self.image_processor, opened, **options)
        check_pixels(self.model.config, self.image_processor, inputs["pixel_values"])
        return inputs

    def join(self, images: Sequence[Inputs]) -> Inputs:
        """One batch of what `prepare` returned, for the model."""
        joined = model_inputs.join(images, keep_padding=self.keep_padding)
        return model_inputs.to_model(joined, self.device, self.dtype)

    def not_finite(self, image: Any) -> str:
        """The error for an image whose results are not finite."""
        return f"{describe_source(image)}: {self.results_are} not finite in {self.dtype}"

    def _over(
        self,
        sources: Mapping[str, Any],
        *,
        batch_size: int | None,
        num_workers: int | None,
        timeout: float | None,
        **options: Any,
    ) -> Callable[[RowsOf], Any]:
        """Checks the arguments of a call, and returns what runs it: the rows of one image, of a list of images as a
        list, of a stream of images as an iterator.

        options: of the image processor. What runs it takes a function from a batch's inputs to a row per image, which
        is None for one that is not finite.
        """
        source = only_source(self.task, sources)
        size = images_per_batch(self.task, batch_size, self.token_budget, default=self.batch_size)
        workers = self.num_workers if num_workers is None else count("num_workers", num_workers, at_least=0)
        wait = self.timeout if timeout is None else timeout

        def results(items: Iterable[Any], rows_of: RowsOf) -> Iterator[Any]:
            budget = PixelBudget(self.max_pixels)
            sizes = {"batch_size": size} if self.token_budget is None else self.token_budget.sizes()
            batches = read_batches(
                items, lambda item: self.prepare(item, wait, budget, **options), workers=workers, **sizes
            )
            with closing(batches), budget:
                for batch in batches:
                    if isinstance(batch, Failure):
                        raise batch.error
                    with torch.no_grad():
                        rows = list(rows_of(self.join(batch.values)))
                    for item, row in zip(batch.items, rows, strict=True):
                        if row is None:
                            raise ValueError(self.not_finite(item))
                        yield row

        def run(rows_of: RowsOf) -> Any:
            if isinstance(source, (list, tuple)):
                return list(results(source, rows_of))
            if is_stream(source):
                return results(items_of(source), rows_of)
            return next(results([source], rows_of))

        return run


class ImageClassificationPipeline(ImagePipeline):
    """Labels of images with their scores. Build it with `pipeline("image-classification", ...)`.

    model: a SiglipForImageClassification. top_k, function_to_apply: defaults of each call.
    """

    task = "image-classification"
    model: SiglipForImageClassification

    def __init__(
        self,
        model: SiglipForImageClassification,
        image_processor: Any,
        *,
        top_k: int | None = None,
        function_to_apply: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, image_processor, **options)
        self.top_k = count("top_k", 5 if top_k is None else top_k, at_least=1)
        self.function_to_apply = self._function(function_to_apply)

    def __call__(
        self,
        inputs: Any = None,
        *,
        function_to_apply: str | None = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        images: Any = None,
    ) -> Any:
        """The best labels of an image as a list of {"label", "score"}, best first.

        inputs (or images): a path, URL, base64 string or PIL image; a list or tuple of them gives a list of results; a
        dataset, generator or other iterable gives an iterator that draws images lazily.
        function_to_apply: "softmax", "sigmoid" or "none" to the logits; by default none for a regression, sigmoid for
        one label or several per image, else softmax. top_k: at most so many labels.
        batch_size, num_workers, timeout: as for the zero-shot pipeline; so are the errors.
        """
        asked = self.function_to_apply if function_to_apply is None else function_to_apply
        apply = FUNCTIONS[self._function(asked)]
        most = self.top_k if top_k is None else count("top_k", top_k, at_least=1)
        labels = self.model.config.id2label

        def rows_of(inputs: Inputs) -> Iterator[list[dict[str, Any]] | None]:
            logits = self.encode_images(**inputs).logits.float()
            for row, finite in zip(apply(logits).tolist(), logits.isfinite().all(dim=-1).tolist(), strict=True):
                scores = [{"label": labels[index], "score": score} for index, score in enumerate(row)]
                yield sorted(scores, key=lambda each: -each["score"])[:most] if finite else None

        sources = {"inputs": inputs, "images": images}
        return self._over(sources, batch_size=batch_size, num_workers=num_workers, timeout=timeout)(rows_of)

    def _function(self, name: str | None) -> str:
        if name is None:
            kind, labels = self.model.config.problem_type, self.model.config.num_labels
            if kind == "regression":
                return "none"
            return "sigmoid" if kind == "multi_label_classification" or labels == 1 else "softmax"
        if not isinstance(name, str) or name.lower() not in FUNCTIONS:
            raise ValueError(f"function_to_apply is {name!r}; supported: {', '.join(map(repr, FUNCTIONS))}, None")
        return name.lower()


class ImageFeatureExtractionPipeline(ImagePipeline):
    """What the vision tower makes of images. Build it with `pipeline("image-feature-extraction", ...)`.

    model: a SiglipVisionModel. pool, return_tensors, image_processor_kwargs: defaults of each call.
    """

    task = "image-feature-extraction"
    keep_padding = True  # as in transformers
    model: SiglipVisionModel

    def __init__(
        self,
        model: SiglipVisionModel,
        image_processor: Any,
        *,
        pool: bool = False,
        return_tensors: bool = False,
        image_processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, image_processor, **options)
        self.pool, self.return_tensors = pool, return_tensors
        self.image_processor_kwargs = dict(image_processor_kwargs or {})

    def __call__(
        self,
        images: Any = None,
        *,
        pool: bool | None = None,
        return_tensors: bool | None = None,
        image_processor_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        inputs: Any = None,
    ) -> Any:
        """The last hidden states (1, patches, width) of an image, or with `pool` its pooled output (1, width).

        Nested lists of numbers, or with `return_tensors` tensors. images (or inputs): as for
        `ImageClassificationPipeline`. image_processor_kwargs: options of the image processor.
        Raises ValueError for `pool` with a model that has no pooling head; otherwise as the zero-shot pipeline.
        """
        pool = self.pool if pool is None else pool
        as_tensors = self.return_tensors if return_tensors is None else return_tensors
        if pool and not self.model.config.vision_use_head:
            raise ValueError(f"{self.task}: pool is True, but the model has no pooling head; supported: False")

        def rows_of(inputs: Inputs) -> Iterator[Any]:
            output = self.encode_images(**inputs)
            rows = output.pooler_output if pool else output.last_hidden_state
            for row, finite in zip(rows, rows.isfinite().flatten(1).all(dim=-1).tolist(), strict=True):
                kept = row[None].cpu()
                yield (kept if as_tensors else kept.tolist()) if finite else None

        run = self._over(
            {"inputs": inputs, "images": images},
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=timeout,
            **{**self.image_processor_kwargs, **(image_processor_kwargs or {})},
        )
        return run(rows_of)


class TokenBudget:
    """How many patches a forward pass takes of images at native resolution.

    Raises ValueError for other image processors, and unless `tokens` is a whole number from 1.
    """

    def __init__(self, image_processor: Any, tokens: int) -> None:
        if "spatial_shapes" not in getattr(image_processor, "model_input_names", ()):
            raise ValueError(
                f"token_budget is given with a {type(image_processor).__name__}, whose images have equally many "
                "patches; supported: models at native resolution, or batch_size"
            )
        self.tokens = count("token_budget", tokens, at_least=1)
        self._image_processor = image_processor

    def sizes(self) -> dict[str, Any]:
        """Arguments of `read_batches`."""
        ahead = 2 * max(1, self.tokens // self._image_processor.max_num_patches)
        return {"batch_size": self.tokens, "cost": model_inputs.tokens, "ahead": ahead}


def images_per_batch(operation: str, asked: int | None, token_budget: TokenBudget | None, *, default: int) -> int:
    """batch_size, or its default. Raises ValueError beside a budget, and unless it is a whole number from 1."""
    if asked is None:
        return default
    if token_budget is not None:
        raise ValueError(
            f"{operation}: batch_size={asked!r} and token_budget={token_budget.tokens} both say how many "
            "images a batch has; give one of them"
        )
    return count("batch_size", asked, at_least=1)


def with_patches(image_processor: Any, most: int) -> Any:
    """The image processor with other max_num_patches. Raises ValueError for those whose images have one size."""
    if not hasattr(image_processor, "max_num_patches"):
        raise ValueError(
            f"max_num_patches is given with a {type(image_processor).__name__}, whose images have one size; supported: "
            "models at native resolution"
        )
    return type(image_processor).from_dict({**image_processor.to_dict(), "max_num_patches": most})


def only_source(task: str, sources: Mapping[str, Any]) -> Any:
    """The one that is given of an argument's names. Raises ValueError for none or several."""
    given = {name: value for name, value in sources.items() if value is not None}
    if len(given) != 1:
        what = " and ".join(given) + " were all given" if given else "no image was given"
        raise ValueError(f"{task}: {what}; pass the image or images once, as `{next(iter(sources))}`")
    return next(iter(given.values()))


def count(name: str, value: Any, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} is {value!r}; supported: a whole number from {at_least}")
    return value


def is_stream(source: Any) -> bool:
    """True for datasets, generators and other iterables; strings, paths, images and arrays are single inputs."""
    if isinstance(source, torch.utils.data.Dataset):
        return True
    return (
        isinstance(source, Iterable)
        and not isinstance(source, (str, bytes, Mapping, torch.Tensor))
        and (
            not hasattr(source, "__array_interface__")  # numpy arrays, and PIL images
        )
    )


def items_of(source: Any) -> Iterable[Any]:
    if isinstance(source, torch.utils.data.Dataset) and not isinstance(source, torch.utils.data.IterableDataset):
        return (source[index] for index in range(len(source)))  # type: ignore[arg-type]
    return source
