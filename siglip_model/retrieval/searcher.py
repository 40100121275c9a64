"""`search`: the best rows of embedding files for a text or an image.

The score of a text and an image is σ(t·⟨x, y⟩ + b), as in `zero_shot`: an independent probability. The cosine of two
images, or of two texts, is no input of that sigmoid, so these have cosines alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.loading import load_state_dict
from siglip_model.embed.file import EmbeddingFileError
from siglip_model.embed.run import model_digest, settings_of
from siglip_model.image_pipelines import count, with_patches
from siglip_model.outputs import pooled, unit_length
from siglip_model.retrieval.collection import Collection, describe_model
from siglip_model.zero_shot import TASK, ZeroShotImageClassificationPipeline, pipeline

WHOLE_TEXT = "{}"
LOGITS = "logit_scale", "logit_bias"


@dataclass(frozen=True)
class Hit:
    """A row that was found. name: the image's path or URL, or the text itself.

    score: the probability that text and image match; None where both are images, or texts.
    """

    name: str
    cosine: float
    score: float | None


@dataclass(frozen=True)
class Found:
    """The hits of one query, best first. query: the text, or the image as it was given. kind: "text" or "image"."""

    query: Any
    kind: str
    hits: list[Hit]


class Searcher:
    """Embedding files with the model that made them, to be searched repeatedly; a context manager that closes them.

    files: one or several files that `siglip embed` wrote. model: a checkpoint folder, a Hub id or a zero-shot
    `pipeline`; by default the one that the files name. It is loaded in the dtype of the files' model, but t' and b of
    its scores are not rounded, and at native resolution with their patches per image.
    backend, device: as for `pipeline`.
    Raises EmbeddingFileError for a damaged file and where the files were made with another model.
    """

    def __init__(
        self,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        model: str | os.PathLike[str] | ZeroShotImageClassificationPipeline | None = None,
        backend: str | None = None,
        device: str | int | torch.device | None = None,
    ) -> None:
        self.collection = Collection(files)
        try:
            self._classifier = self._load(model, backend, device)
        except BaseException:
            self.collection.close()
            raise

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.collection.close()

    def _load(self, model: Any, backend: str | None, device: Any) -> ZeroShotImageClassificationPipeline:
        settings, path = self.collection.settings, self.collection.files[0].path
        if isinstance(model, ZeroShotImageClassificationPipeline):
            classifier, name = model, "the given pipeline"
        else:
            name = os.fspath(model) if model is not None else settings.get("model_name", "")
            if not name:
                raise EmbeddingFileError(f"{path} does not name its model; give it as model (--model)")
            try:
                classifier = pipeline(TASK, model=name, backend=backend, dtype=settings["computed_in"], device=device)
            except OSError as error:
                if model is not None:
                    raise
                raise EmbeddingFileError(
                    f"{path} was made with {name}, which cannot be loaded ({error}); give its checkpoint"
                    " as model (--model)"
                ) from error
        digest = model_digest(classifier.model)
        if digest != settings["model"]:
            dtype = str(classifier.dtype).removeprefix("torch.")
            raise EmbeddingFileError(
                f"{path} was made with {describe_model(settings)}, but {name} is another model (weights {digest},"
                f" {dtype}); give the checkpoint that made it as model (--model)"
            )
        if classifier is not model and (most := _max_num_patches(settings)) is not None:
            classifier.image_processor = with_patches(classifier.image_processor, most)
        if classifier is not model and classifier.dtype != torch.float32:
            stored = load_state_dict(name, dtype=torch.float32, device=classifier.device, names=LOGITS)
            classifier.exact_logits = stored[LOGITS[0]], stored[LOGITS[1]]
        return classifier

    def encode_texts(self, texts: Sequence[str], template: str = WHOLE_TEXT) -> Tensor:
        """float32 (texts, width) of unit length."""
        return unit_length(self._classifier.encode_labels(texts, template).float())

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """float32 (images, width) of unit length. Raises UnreadableImageError, and EmbeddingFileError where the image
        processor of the model is not that of the files."""
        path, earlier = self.collection.files[0].path, self.collection.settings.get("image_processor")
        if earlier is not None and settings_of(self._classifier.image_processor) != earlier:
            raise EmbeddingFileError(f"{path} was made with another image processor: {earlier}")
        rows = []
        for image in images:
            inputs = self._classifier.join([self._classifier.prepare(image)])
            rows.append(pooled(self._classifier.encode_images(**inputs)).float())
        return unit_length(torch.cat(rows))

    def find(
        self, text: Any = (), *, image: Any = (), top: int = 10, template: str = WHOLE_TEXT, nearest: Any = None
    ) -> list[Found]:
        """As `search`. nearest: what finds the rows; by default the collection's exact search."""
        texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
        if wrong := [each for each in texts if not isinstance(each, str)]:
            raise unsupported("search", "a text", f"is {wrong[0]!r}", "a text or a list of texts")
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not texts and not images:
            raise ValueError("search: there is no query; give a text or an image")
        if any(not each.strip() for each in texts):
            raise ValueError("search: a text is empty; supported: texts with words")
        count("search: top", top, at_least=1)
        encoded = [self.encode_texts(texts, template)] if texts else []
        encoded += [self.encode_images(images)] if images else []
        embeds = torch.cat(encoded)
        for query, row in zip([*texts, *images], embeds, strict=True):
            if not row.isfinite().all():
                raise ValueError(f"search: the embedding of {query!r} is not finite in {self._classifier.dtype}")
        results = (nearest or self.collection.nearest)(embeds, top)
        names = self.collection.names([row for result in results for _, row in result])
        kinds = ["text"] * len(texts) + ["image"] * len(images)
        return [
            Found(query, kind, [Hit(names[row], cosine, self._score(kind, cosine)) for cosine, row in result])
            for query, kind, result in zip([*texts, *images], kinds, results, strict=True)
        ]

    def _score(self, kind: str, cosine: float) -> float | None:
        if self.collection.settings["content"] == f"{kind}s":
            return None
        scale, bias = (each.double() for each in self._classifier.logit_scale_and_bias)
        return torch.sigmoid(scale.exp() * cosine + bias).item()


def _max_num_patches(settings: dict[str, str]) -> int | None:
    """Patches per image of the files' rows, which `embed` may have been told; None where images have one size."""
    try:
        most = json.loads(settings.get("image_processor", "{}")).get("max_num_patches")
    except (ValueError, AttributeError):  # `encode_images` shows what the files say
        return None
    return most if isinstance(most, int) else None


def search(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    text: str | Sequence[str] = (),
    *,
    image: Any = (),
    top: int = 10,
    template: str = WHOLE_TEXT,
    approximate: bool = False,
    model: str | os.PathLike[str] | ZeroShotImageClassificationPipeline | None = None,
    backend: str | None = None,
    device: str | int | torch.device | None = None,
) -> list[Found]:
    """The `top` best rows of embedding files for each text and then for each image, by their cosines.

    files, model, backend, device: as for `Searcher`, which answers repeated queries without loading the model again.
    text: one or a list. image: a path, URL, base64 string or PIL image, or a list of them. template: the sentence in
    which {} stands for a text. approximate: by an index that is saved beside each file (`ApproximateIndex`) instead
    of comparing every row.
    Raises EmbeddingFileError for a damaged file or another model, UnreadableImageError for an image as query,
    ValueError without a query, ImportError where an index needs a package that is missing.
    """
    with Searcher(files, model=model, backend=backend, device=device) as searcher:
        nearest = None
        if approximate:
            from siglip_model.retrieval.approximate import ApproximateIndex

            nearest = ApproximateIndex(searcher.collection).nearest
        return searcher.find(text, image=image, top=top, template=template, nearest=nearest)
