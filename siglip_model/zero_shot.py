"""`pipeline("zero-shot-image-classification")`: scores images against free-text labels.

A label's score is σ(t·⟨x, y⟩ + b), with image embedding x and the embedding y of the label's sentence (Zhai et al.
2023, "Sigmoid Loss for Language Image Pre-Training"): an independent probability, so scores need not sum to 1. Names
and results are those of transformers 5's pipeline.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from siglip_model.devices import SPREADING, resolve_device, resolve_device_map
from siglip_model.fit import check_fit
from siglip_model.image_pipelines import (
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImagePipeline,
    count,
)
from siglip_model.images.model_inputs import Inputs
from siglip_model.outputs import pooled, unit_length
from siglip_model.text.padding import as_trained
from siglip_model.text.prompts import TEMPLATE, fill_template

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel
    from siglip_model.pretrained import PreTrainedModel

TASK = "zero-shot-image-classification"
_OF_ALL = ("timeout", "max_pixels", "token_budget", "max_num_patches")
CALL_DEFAULTS = {
    TASK: {"candidate_labels", "hypothesis_template", "tokenizer_kwargs", "top_k", *_OF_ALL},
    ImageClassificationPipeline.task: {"function_to_apply", "top_k", *_OF_ALL},
    ImageFeatureExtractionPipeline.task: {"image_processor_kwargs", "pool", "return_tensors", *_OF_ALL},
}
LABELS_AT_ONCE = 128  # bounds the text tower's memory for any number of labels

Prediction = dict[str, Any]


class ZeroShotImageClassificationPipeline(ImagePipeline):
    """Scores images against free-text labels. Build it with `pipeline(...)`; call it with images and labels.

    model: a SiglipModel; tokenizer, image_processor: its own, or any with transformers' calling convention.
    device: device to move the model to; None leaves the model on its device.
    candidate_labels, hypothesis_template, timeout, tokenizer_kwargs, top_k, batch_size, num_workers: defaults of each
    call.
    max_pixels: limit on the pixels of a file, and on those decoded at one time by all workers of a call (default:
    `images.limits.MAX_PIXELS`). Larger files are refused, larger PIL images are processed alone.
    token_budget, max_num_patches: see `ImagePipeline`.

    exact_logits: t' and b that replace the model's in scores, for a model whose own are rounded; None by default.
    """

    task = TASK
    method = "get_image_features"
    results_are = "its scores are"
    model: SiglipModel
    exact_logits: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self,
        model: SiglipModel,
        tokenizer: Any,
        image_processor: Any,
        *,
        device: str | int | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        candidate_labels: Iterable[Any] | None = None,
        hypothesis_template: str = TEMPLATE,
        timeout: float | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        max_pixels: int | None = None,
        token_budget: int | None = None,
        max_num_patches: int | None = None,
    ) -> None:
        super().__init__(
            model,
            image_processor,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=timeout,
            max_pixels=max_pixels,
            token_budget=token_budget,
            max_num_patches=max_num_patches,
        )
        self.tokenizer = tokenizer
        self.candidate_labels = candidate_labels
        self.hypothesis_template = hypothesis_template
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.top_k = None if top_k is None else count("top_k", top_k, at_least=1)

    def __call__(
        self,
        image: Any = None,
        candidate_labels: Iterable[Any] | None = None,
        *,
        hypothesis_template: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        images: Any = None,
        inputs: Any = None,
    ) -> list[Prediction] | list[list[Prediction]] | Iterator[list[Prediction]]:
        """The labels with their scores in [0, 1], best first; equal scores keep the order of the labels.

        image (or images, or inputs): a path, URL, base64 string or PIL image gives a list of {"score", "label"}; a list
        or tuple of them gives a list of such lists; a dataset, generator or other iterable gives an iterator of such
        lists that draws images lazily.
        candidate_labels: the labels, each inserted into `hypothesis_template` in place of {}; encoded once per call.
        batch_size: images per forward pass. num_workers: threads that open images ahead of the model.
        timeout: seconds that a URL may take. tokenizer_kwargs: override the tokenizer's default arguments.
        top_k: at most so many labels; None for all.
        Raises ValueError for missing labels, a template without {} or an unreadable image (UnreadableImageError, naming
        it) and for scores that are not finite; TypeError for an input that is not an image.
        """
        sources = {"image": image, "images": images, "inputs": inputs}
        run = self._over(sources, batch_size=batch_size, num_workers=num_workers, timeout=timeout)
        labels = _checked_labels(self.candidate_labels if candidate_labels is None else candidate_labels)
        label_embeds = self.encode_labels(
            labels,
            self.hypothesis_template if hypothesis_template is None else hypothesis_template,
            {**self.tokenizer_kwargs, **(tokenizer_kwargs or {})},
        )
        most = self.top_k if top_k is None else count("top_k", top_k, at_least=1)

        def rows_of(inputs: Inputs) -> Iterator[list[Prediction] | None]:
            scores = self.score(inputs, label_embeds)
            for row, finite in zip(scores.tolist(), are_finite(scores), strict=True):
                yield rank(row, labels)[:most] if finite else None

        return run(rows_of)

    @torch.no_grad()
    def encode_labels(
        self,
        labels: Sequence[Any],
        hypothesis_template: str = TEMPLATE,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Unit-length embeddings (labels, width) of the labels' sentences, in the model's dtype, on its device."""
        positions = self.model.config.text_config.max_position_embeddings
        options = {**as_trained(positions), "return_tensors": "pt", **(tokenizer_kwargs or {})}
        tokens = self.tokenizer(fill_template(labels, hypothesis_template), **options)
        embeds = [
            pooled(
                self.model.get_text_features(
                    **{name: rows[start : start + LABELS_AT_ONCE].to(self.device) for name, rows in tokens.items()}
                )
            )
            for start in range(0, len(labels), LABELS_AT_ONCE)
        ]
        return unit_length(torch.cat(embeds))

    @torch.no_grad()
    def score(self, inputs: Inputs, label_embeds: torch.Tensor) -> torch.Tensor:
        """σ(t·⟨image, label⟩ + b) for what `join` returned: float32 (images, labels)."""
        image_embeds = pooled(self.encode_images(**inputs))
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)  # in half precision, close scores would be equal
        scale, bias = self.logit_scale_and_bias
        logits = label_embeds.to(dtype) @ unit_length(image_embeds.to(dtype)).T * scale.exp() + bias
        return torch.sigmoid(logits.t().float())

    @property
    def logit_scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """t', the logarithm of t, and b, as scores have them."""
        return self.exact_logits or (self.model.logit_scale, self.model.logit_bias)


def are_finite(scores: torch.Tensor) -> list[bool]:
    """Whether all scores of each image are finite, from `score`'s (images, labels)."""
    return scores.isfinite().all(dim=-1).tolist()


def rank(scores: Sequence[float], labels: Sequence[Any]) -> list[Prediction]:
    """The labels with their scores, best first; equal scores keep the labels' order."""
    pairs = sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])
    return [{"score": score, "label": label} for score, label in pairs]


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    image_processor: Any = None,
    feature_extractor: Any = None,
    processor: Any = None,
    framework: str | None = None,
    backend: str | None = None,
    attn_implementation: str | None = None,
    device: str | int | torch.device | None = None,
    device_map: Any = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool | None = None,
    use_fast: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    **call_defaults: Any,
) -> Any:
    """A ready pipeline over images, as `transformers.pipeline` builds one.

    task: "zero-shot-image-classification" (also None), "image-classification" or "image-feature-extraction".
    model: a checkpoint folder, a Hub id, for zero-shot a file of `siglip export`, or the task's model: Siglip(2)Model,
    Siglip(2)ForImageClassification, and for features Siglip(2)VisionModel, or a Siglip(2)Model, whose vision tower it
    takes.
    tokenizer (for zero-shot only), image_processor (or feature_extractor, its older name), processor: objects, or where
    to load them from; by default from the model's checkpoint. Required with a model that is already loaded.
    config, backend (or attn_implementation), dtype (or torch_dtype), revision, token, cache_dir, local_files_only,
    model_kwargs: for loading.
    device (or device_map): a name, a torch.device or an ordinal (-1: the CPU); by default the first accelerator, else
    the CPU. By default a model that is already loaded stays on its device.
    framework: "pt". use_fast: of the tokenizer, without effect. trust_remote_code: ignored; code from a checkpoint is
    never run.
    batch_size, num_workers, and the arguments of the task's call, such as candidate_labels or top_k: defaults of each
    call. max_pixels: limit on decoded pixels, see ZeroShotImageClassificationPipeline. token_budget, max_num_patches:
    see ImagePipeline.
    Raises ValueError for an unknown task, a missing component or contradictory arguments, TypeError for unknown ones.
    """
    task = TASK if task is None else task
    if task not in CALL_DEFAULTS:
        raise ValueError(f"pipeline: task is {task!r}; supported: {', '.join(map(repr, CALL_DEFAULTS))}")
    if model is None:
        raise ValueError("pipeline: model is missing; supported: a checkpoint folder, a Hub id or a model")
    if framework not in (None, "pt"):
        raise ValueError(f"pipeline: framework is {framework!r}; supported: 'pt', None")
    unknown = set(call_defaults) - CALL_DEFAULTS[task]
    if unknown:
        raise TypeError(f"pipeline() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if trust_remote_code:
        warnings.warn("trust_remote_code has no effect: code from a checkpoint is never run", stacklevel=2)
    dtype = _only_one("dtype", dtype, "torch_dtype", torch_dtype)
    if isinstance(device_map, Mapping) or device_map in SPREADING:
        device_map = str(resolve_device_map(device_map))
    device = _only_one("device", device, "device_map", device_map)
    image_processor = _only_one("image_processor", image_processor, "feature_extractor", feature_extractor)
    hub = {
        name: value
        for name, value in (
            ("revision", revision),
            ("token", token),
            ("cache_dir", cache_dir),
            ("local_files_only", local_files_only),
        )
        if value is not None
    }
    for_model = {"config": config, "backend": backend, "attn_implementation": attn_implementation, "dtype": dtype}
    for_model = {name: value for name, value in for_model.items() if value is not None}

    loaded: Any = model
    origin: Any = model if isinstance(model, (str, os.PathLike)) else None  # of the components that are not given
    if origin is not None and os.fspath(origin).endswith(".onnx"):
        loaded = _load_onnx(task, origin, {**for_model, **(model_kwargs or {}), **hub, "device": device})
        origin, device, hub = os.path.dirname(os.path.abspath(origin)), None, {}
    elif isinstance(model, (str, os.PathLike)):
        for name in for_model:
            if name in (model_kwargs or {}):
                raise ValueError(f"pipeline: {name} is given both as an argument and in model_kwargs; give it once")
        options = {"device_map": resolve_device(device), **(model_kwargs or {}), **hub, **for_model}
        loaded = _model_class(task).from_pretrained(os.fspath(model), **options)
        device = None
    elif for_model or model_kwargs or hub:
        unused = [*for_model, *(["model_kwargs"] if model_kwargs else []), *hub]
        raise ValueError(
            f"pipeline: {', '.join(unused)} given with a model that is already loaded; supported: with a path or"
            " a Hub id (or use model.set_backend and model.to)"
        )
    if task == ImageFeatureExtractionPipeline.task:
        loaded = getattr(loaded, "vision_model", loaded)
    if task == TASK:
        components = _components(origin, {"tokenizer": tokenizer, "image_processor": image_processor}, processor, hub)
    elif tokenizer is not None:
        raise ValueError(f"pipeline: tokenizer is given; {task} takes none")
    else:
        components = _components(origin, {"image_processor": image_processor}, processor, hub)
    where = task if origin is None else os.fspath(origin)
    check_fit(loaded.config, components.get("tokenizer"), components["image_processor"], where)
    shared = {"device": device, "batch_size": batch_size, "num_workers": num_workers, **call_defaults}
    if task == ImageClassificationPipeline.task:
        return ImageClassificationPipeline(loaded, **components, **shared)
    if task == ImageFeatureExtractionPipeline.task:
        return ImageFeatureExtractionPipeline(loaded, **components, **shared)
    return ZeroShotImageClassificationPipeline(loaded, **components, **shared)


def _model_class(task: str) -> Any:
    from siglip_model import auto

    if task == ImageFeatureExtractionPipeline.task:
        return auto.AutoVisionTower
    is_classifier = task == ImageClassificationPipeline.task
    return auto.AutoModelForImageClassification if is_classifier else auto.AutoModelForZeroShotImageClassification


def _load_onnx(task: str, path: Any, given: dict[str, Any]) -> Any:
    """given: the other arguments for loading."""
    from siglip_model.onnx import load

    if task != TASK:
        raise ValueError(
            f"pipeline: model is the ONNX file {path}; supported for {task}: a checkpoint folder, a Hub id"
        )
    supported = {
        "backend": ("auto",),
        "attn_implementation": ("auto",),
        "dtype": ("auto", "float32", torch.float32),
        "device": ("auto", "cpu", torch.device("cpu"), -1),
    }
    for name, value in given.items():
        if value is not None and value not in supported.get(name, ()):
            values = ", ".join(each for each in supported.get(name, ("none",)) if isinstance(each, str))
            raise ValueError(f"pipeline: {name} is {value!r} with an ONNX file; supported: {values}")
    return load(path)


def _components(origin: Any, given: dict[str, Any], processor: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer and image processor: each as given, else the processor's, else from `origin`, as the model is."""
    if isinstance(processor, (str, os.PathLike)):
        from siglip_model.auto import AutoProcessor

        processor = AutoProcessor.from_pretrained(processor, **hub)
    components = {}
    for name, component in given.items():
        if component is None:
            component = getattr(processor, name, None) if processor is not None else origin
        if component is None:
            needed = " and ".join(f"{each}=" for each in given)
            raise ValueError(
                f"pipeline: {name} is missing; a model that is already loaded needs {needed}, or processor="
            )
        if isinstance(component, (str, os.PathLike)):
            component = _loader(name).from_pretrained(component, **hub)
        elif not callable(component):
            raise TypeError(
                f"pipeline: {name} is a {type(component).__name__}; supported: a loaded one, or its path or Hub id"
            )
        components[name] = component
    return components


def _loader(name: str) -> Any:
    if name == "tokenizer":
        from siglip_model.text.auto import AutoTokenizer

        return AutoTokenizer
    from siglip_model.images.auto import AutoImageProcessor

    return AutoImageProcessor


def _only_one(name: str, value: Any, alias: str, alias_value: Any) -> Any:
    if value is not None and alias_value is not None and value != alias_value:
        raise ValueError(f"pipeline: {name}={value!r} and {alias}={alias_value!r} mean the same; give one of them")
    return alias_value if value is None else value


def _checked_labels(candidate_labels: Any) -> list[Any]:
    if candidate_labels is None:
        raise ValueError("candidate_labels is missing; supported: a list of one or more labels")
    if isinstance(candidate_labels, str):  # as in transformers, but with a warning
        warnings.warn(
            f"candidate_labels is the string {candidate_labels!r}: each of its characters is a label. Pass a list of"
            " strings for whole labels.",
            stacklevel=3,
        )
    labels = list(candidate_labels)
    if not labels:
        raise ValueError("candidate_labels is empty; supported: a list of one or more labels")
    return labels
