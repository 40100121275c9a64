"""SigLIP's processor: image processor and tokenizer in one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from siglip_model.batch import BatchFeature
from siglip_model.checkpoints.arguments import split_unused, supported_arguments
from siglip_model.checkpoints.files import split_hub_arguments, to_json, write_file
from siglip_model.checkpoints.upload import check_upload_arguments, save_and_upload, upload
from siglip_model.images.auto import AutoImageProcessor
from siglip_model.images.naflex import Siglip2ImageProcessor
from siglip_model.images.processor import PROCESSOR_NAME, ImageProcessor
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.text.auto import AutoTokenizer
from siglip_model.text.padding import TRAINED_TOKENS, Lengths, as_trained, warn_unless_as_trained
from siglip_model.text.tokenizer import Tokenizer
from siglip_model.text.tokenizer_config import CALL_ARGUMENTS, SETTINGS

__all__ = ["Siglip2Processor", "SiglipProcessor"]

_TEXT_ARGUMENTS = frozenset(inspect.signature(Tokenizer.encode_texts).parameters) - {"self", "text"}
_TEXT_ARGUMENTS |= {"text_target", "text_pair_target"}
_TOKENIZER_SETTINGS = frozenset((*SETTINGS, *CALL_ARGUMENTS))


class SiglipProcessor:
    """`processor(images=..., text=...)`: pixel values and token ids, as transformers 5's SiglipProcessor returns."""

    config_name = PROCESSOR_NAME
    chat_template = None  # which models that chat have
    image_processor_class: ClassVar[type[ImageProcessor]] = SiglipImageProcessor  # or its twin with Pillow
    text_defaults: ClassVar[Mapping[str, Any]] = {}  # arguments of the tokenizer

    def __init__(self, image_processor: ImageProcessor, tokenizer: Tokenizer) -> None:
        kinds = self.image_processor_class.kinds
        if not isinstance(image_processor, ImageProcessor) or image_processor.kinds != kinds:
            raise TypeError(f"image_processor is a {type(image_processor).__name__}; supported: {kinds[0]}(Pil)")
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; supported: SiglipTokenizer, GemmaTokenizer")
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.image_processor!r}, {self.tokenizer!r})"

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The names of both components."""
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.image_processor.model_input_names, *self.tokenizer.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: None = None,
        audio: None = None,
        *,
        text_kwargs: dict[str, Any] | None = None,
        images_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> BatchFeature:
        """`pixel_values` if images are given; `input_ids` and the tokenizer's other fields if text is given.

        images: as for `SiglipImageProcessor`. text: a string, a list of strings, or lists of words with
        is_split_into_words=True. videos, audio: None, accepted for compatibility.
        arguments: of the tokenizer (padding=, truncation=, max_length= ...) and of the image processor (size=, device=
        ...), each passed to the component that accepts it; `return_tensors` goes to both. text_kwargs, images_kwargs:
        for one of them only; common_kwargs: for both.

        Raises ValueError if neither images nor text are given, or videos or audio are, TypeError for an argument that
        neither component accepts.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{type(self).__name__}: {name} is a {type(value).__name__}; supported: None")
        for_text = self._arguments("text_kwargs", text_kwargs, _TEXT_ARGUMENTS, common_kwargs, arguments)
        of_images = self._image_arguments()
        for_images = self._arguments("images_kwargs", images_kwargs, of_images, common_kwargs, arguments)
        if images is None and text is None and for_text.get("text_target") is None:
            raise ValueError(f"{type(self).__name__}: neither images nor text is given; supported: one or both")
        if text is not None and not _are_texts(text, bool(for_text.get("is_split_into_words"))):
            raise ValueError(f"{type(self).__name__}: text is {text!r}; supported: a string or a list of strings")
        unknown = set(arguments) - _TEXT_ARGUMENTS - of_images
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown argument {', '.join(sorted(unknown))}")
        batch = BatchFeature()
        if text is not None or for_text.get("text_target") is not None:
            for_text = {**self.text_defaults, **self.tokenizer.call_defaults, **for_text}
            batch.update(self.tokenizer(text, **for_text))
            self._check_padding(for_text)
        if images is not None:
            batch.update(self.image_processor(images, **for_images))
        return batch

    @classmethod
    def _image_arguments(cls) -> frozenset[str]:
        return frozenset(cls.image_processor_class.valid_kwargs.__annotations__)

    def _check_padding(self, arguments: Mapping[str, Any]) -> None:
        """Warns if the tokenizer's arguments pad texts otherwise than in training, unless the tokenizer does."""

    @classmethod
    def _arguments(
        cls,
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
                supported = ", ".join(sorted(known))
                raise TypeError(f"{cls.__name__}: unknown argument {key} in {name}; known: {supported}")
            if key in flat:
                raise ValueError(f"{cls.__name__}: {key} is given twice, as an argument and in {name}")
        return {**(common or {}), **own, **flat}

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*arguments, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*arguments, **options)

    # ---- files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        image_processor: ImageProcessor | None = None,
        tokenizer: Tokenizer | None = None,
        backend: str | None = None,
        use_fast: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """Loads image processor and tokenizer from a directory or Hub repository, in transformers 4's or 5's files.

        image_processor, tokenizer: instead of the stored one. backend, use_fast: of the image processor, see
        `AutoImageProcessor`. arguments: options of tokenizer or image processor; those of `resolve_file`.
        return_unused_kwargs: return the other arguments beside the processor, as a dict, instead of raising TypeError.
        Raises like `ImageProcessor.from_pretrained` and `SiglipTokenizer.from_pretrained`.
        """
        where = pretrained_model_name_or_path
        hub, given = split_hub_arguments(supported_arguments(cls.__name__, arguments))
        of_images = {name: given.pop(name) for name in list(given) if name in cls._image_arguments()}
        given, unused = split_unused(given, _TOKENIZER_SETTINGS)
        if image_processor is None:
            image_processor = AutoImageProcessor.from_pretrained(
                where, backend=backend, use_fast=use_fast, **hub, **of_images
            )
        elif of_images or backend is not None or use_fast is not None:
            raise ValueError(
                f"{cls.__name__}: image_processor is given with options of the stored one; give one of both"
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(where, **hub, **given)
        elif given:
            raise ValueError(f"{cls.__name__}: tokenizer is given with options of the stored one; give one of both")
        processor = cls(image_processor, tokenizer)  # type: ignore[arg-type]  # both were loaded
        return processor if unused is None else (processor, unused)

    def to_dict(self) -> dict[str, Any]:
        """The content of processor_config.json. The tokenizer has its own files."""
        return {"image_processor": self.image_processor.to_dict(), "processor_class": type(self).__name__}

    def to_json_string(self) -> str:
        """`to_dict` in JSON."""
        return to_json(self.to_dict()).decode()

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string` atomically."""
        path = Path(json_file_path)
        write_file(path.parent, path.name, to_json(self.to_dict()))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **upload_arguments: Any
    ) -> list[str]:
        """Writes the tokenizer's files, processor_config.json and preprocessor_config.json, each atomically.

        transformers 5 reads the image processor from processor_config.json, transformers 4 from
        preprocessor_config.json. push_to_hub: also upload the files; its arguments in upload_arguments. Returns the
        paths.
        """
        check_upload_arguments(push_to_hub, upload_arguments)
        paths = [*self.tokenizer.save_pretrained(save_directory), *self.image_processor.save_pretrained(save_directory)]
        paths.append(write_file(save_directory, self.config_name, to_json(self.to_dict())))
        if push_to_hub:
            upload(save_directory, [os.path.basename(path) for path in paths], **upload_arguments)
        return paths

    def push_to_hub(self, repo_id: str, **upload_arguments: Any) -> Any:
        """Writes the files to a repository of the Hub. Arguments: see `checkpoints.upload.upload`."""
        return save_and_upload(self.save_pretrained, repo_id, **upload_arguments)


class Siglip2Processor(SiglipProcessor):
    """SigLIP 2's at native resolution: patches of images, and texts that are padded or cut to 64 tokens by default.

    A call also returns pixel_attention_mask and spatial_shapes. patch_size and max_num_patches are the image
    processor's, unless they are given. (transformers takes 16 and 256 whatever the checkpoint says.) Padding texts
    otherwise than in training changes every score, so that it is warned of.
    """

    image_processor_class = Siglip2ImageProcessor
    text_defaults: ClassVar[Mapping[str, Any]] = as_trained(TRAINED_TOKENS)

    def _check_padding(self, arguments: Mapping[str, Any]) -> None:
        if self.tokenizer.warns_of_padding(arguments["padding"], arguments.get("return_tensors")):
            return
        lengths = Lengths.resolve(
            arguments["padding"],
            arguments.get("truncation"),
            arguments["max_length"],
            arguments.get("pad_to_multiple_of"),
            arguments.get("padding_side") or self.tokenizer.padding_side,
            model_max_length=self.tokenizer.model_max_length,
        )
        warn_unless_as_trained("Siglip2Processor", lengths, self.tokenizer.padding_side)


def _are_texts(text: Any, words: bool) -> bool:
    if words:
        return isinstance(text, (list, tuple))
    return isinstance(text, str) or (isinstance(text, list) and all(isinstance(item, str) for item in text))
