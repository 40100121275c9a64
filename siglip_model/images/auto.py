"""`AutoImageProcessor`: the image processor of a checkpoint, computed by PyTorch or by Pillow."""

from __future__ import annotations

import os
from typing import Any

from siglip_model.checkpoints.files import split_hub_arguments
from siglip_model.checkpoints.registered import Registry
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor

_CLASSES = {cls.backend: cls for cls in (SiglipImageProcessor, SiglipImageProcessorPil)}


class AutoImageProcessor(Registry):
    """`AutoImageProcessor.from_pretrained(...)` returns a SiglipImageProcessor, or a SiglipImageProcessorPil."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """The image processor of a directory or Hub repository.

        backend: "torchvision" for SiglipImageProcessor, the default whichever class the file names, as in transformers
            5; "pil" for SiglipImageProcessorPil. use_fast: True and False, transformers 4's names for them.
        Other arguments and errors as for `ImageProcessor.from_pretrained`; ValueError if both contradict.
        """
        if own := cls.registered_for(pretrained_model_name_or_path, split_hub_arguments(arguments)[0]):
            return own.from_pretrained(pretrained_model_name_or_path, **arguments)
        older = None if use_fast is None else _backend_of(use_fast)
        if backend is not None and older not in (None, backend):
            raise ValueError(f"use_fast is {use_fast} and backend is {backend!r}; give one of them")
        backend = backend or older or SiglipImageProcessor.backend
        if backend not in _CLASSES:
            raise ValueError(f"backend is {backend!r}; supported: {', '.join(map(repr, _CLASSES))}, None")
        return _CLASSES[backend].from_pretrained(pretrained_model_name_or_path, **arguments)


def _backend_of(use_fast: Any) -> str:
    if not isinstance(use_fast, bool):
        raise ValueError(f"use_fast is {use_fast!r}; supported: True, False, None")
    return (SiglipImageProcessor if use_fast else SiglipImageProcessorPil).backend
