"""SigLIP's processor: image processor and tokenizer in one call."""

from __future__ import annotations

import inspect
import os
from typing import Any

from siglip_model.batch import BatchFeature
from siglip_model.checkpoints.files import split_hub_arguments, to_json, write_file
from siglip_model.images.auto import AutoImageProcessor
from siglip_model.images.options import SiglipImageProcessorKwargs
from siglip_model.images.processor import PROCESSOR_NAME, ImageProcessor
from siglip_model.text.auto import load_tokenizer
from siglip_model.text.tokenizer import Tokenizer

__all__ = ["SiglipProcessor"]

_TEXT_ARGUMENTS = frozenset(inspect.signature(Tokenizer.__call__).parameters) - {"self", "text", "text_pair"}
_IMAGE_ARGUMENTS = frozenset(SiglipImageProcessorKwargs.__annotations__)


class SiglipProcessor:
    """`processor(images=..., text=...)`: pixel values and token ids, as transformers 5's SiglipProcessor returns."""

    config_name = PROCESSOR_NAME

    def __init__(self, image_processor: ImageProcessor, tokenizer: Tokenizer) -> None:
        if not isinstance(image_processor, ImageProcessor):
            raise TypeError(
                f"image_processor is a {type(image_processor).__name__}; supported: SiglipImageProcessor(Pil)"
            )
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; supported: SiglipTokenizer, GemmaTokenizer")
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.image_processor!r}, {self.tokenizer!r})"

    @property
    def model_input_names(self) -> list[str]:
        return [*self.image_processor.model_input_names, *self.tokenizer.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        text_kwargs: dict[str, Any] | None = None,
        images_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> BatchFeature:
        """`pixel_values` if images are given; `input_ids` and the tokenizer's other fields if text is given.

        images: as for `SiglipImageProcessor`. text: a string or a list of strings.
        arguments: of the tokenizer (padding=, truncation=, max_length= ...) and of the image processor (size=, device=
        ...), each passed to the component that accepts it; `return_tensors` goes to both. text_kwargs, images_kwargs:
        for one of them only; common_kwargs: for both.

        Raises ValueError if neither images nor text are given, TypeError for an argument that neither accepts.
        """
        if images is None and text is None:
            raise ValueError("SiglipProcessor: neither images nor text is given; supported: one or both")
        if text is not None and not (
            isinstance(text, str) or (isinstance(text, list) and all(isinstance(item, str) for item in text))
        ):
            raise ValueError(f"SiglipProcessor: text is {text!r}; supported: a string or a list of strings")
        for_text = self._arguments("text_kwargs", text_kwargs, _TEXT_ARGUMENTS, common_kwargs, arguments)
        for_images = self._arguments("images_kwargs", images_kwargs, _IMAGE_ARGUMENTS, common_kwargs, arguments)
        unknown = set(arguments) - _TEXT_ARGUMENTS - _IMAGE_ARGUMENTS
        if unknown:
            raise TypeError(f"SiglipProcessor: unknown argument {', '.join(sorted(unknown))}")
        batch = BatchFeature()
        if text is not None:
            batch.update(self.tokenizer(text, **{**self.tokenizer.call_defaults, **for_text}))
        if images is not None:
            batch.update(self.image_processor(images, **for_images))
        return batch

    @staticmethod
    def _arguments(
        name: str,
        own: dict[str, Any] | None,
        known: frozenset[str],
        common: dict[str, Any] | None,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments for one component: common ones, its own, and the flat ones that it accepts."""
        own = own or {}
        flat = {key: value for key, value in arguments.items() if key in known}
        for key in own:
            if key not in known:
                raise TypeError(f"SiglipProcessor: unknown argument {key} in {name}; known: {', '.join(sorted(known))}")
            if key in flat:
                raise ValueError(f"SiglipProcessor: {key} is given twice, as an argument and in {name}")
        return {**(common or {}), **own, **flat}

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*arguments, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*arguments, **options)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        **arguments: Any,
    ) -> SiglipProcessor:
        """Loads image processor and tokenizer from a directory or Hub repository, in transformers 4's or 5's files.

        backend, use_fast: of the image processor, see `AutoImageProcessor`.
        arguments: options of tokenizer or image processor; revision, cache_dir, local_files_only, token.
        """
        hub, given = split_hub_arguments(arguments)
        of_images = {name: value for name, value in given.items() if name in _IMAGE_ARGUMENTS}
        of_text = {name: value for name, value in given.items() if name not in of_images}
        image_processor = AutoImageProcessor.from_pretrained(
            path_or_id, backend=backend, use_fast=use_fast, **hub, **of_images
        )
        return cls(image_processor, load_tokenizer(path_or_id, **hub, **of_text))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Writes the tokenizer's files, processor_config.json and preprocessor_config.json, each atomically.

        transformers 5 reads the image processor from processor_config.json, transformers 4 from
        preprocessor_config.json. Returns the paths.
        """
        content = {"image_processor": self.image_processor.to_dict(), "processor_class": type(self).__name__}
        paths = [*self.tokenizer.save_pretrained(save_directory), *self.image_processor.save_pretrained(save_directory)]
        return [*paths, write_file(save_directory, self.config_name, to_json(content))]
