"""`AutoImageProcessor`: the image processor of a checkpoint, computed by PyTorch or by Pillow."""

from __future__ import annotations

import os
from typing import Any

from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.files import StoredObject, split_hub_arguments
from siglip_model.checkpoints.registered import Registry
from siglip_model.images.naflex import Siglip2ImageProcessor, Siglip2ImageProcessorPil
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.processor import ImageProcessor, kind_of, read_settings
from siglip_model.images.tensor import SiglipImageProcessor

_CLASSES: dict[str, type[ImageProcessor]] = {
    cls.backend: cls for cls in (SiglipImageProcessor, SiglipImageProcessorPil)
}
_NAFLEX: dict[str, type[ImageProcessor]] = {
    cls.backend: cls for cls in (Siglip2ImageProcessor, Siglip2ImageProcessorPil)
}


class AutoImageProcessor(Registry):
    """`AutoImageProcessor.from_pretrained(...)` returns a Siglip(2)ImageProcessor, or a Siglip(2)ImageProcessorPil."""

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

        backend: "torchvision" for the class that computes with PyTorch, the default whichever the file names, as in
            transformers 5; "pil" for the one with Pillow. use_fast: True and False, transformers 4's names for them.
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
        hub, given = split_hub_arguments(supported_arguments("AutoImageProcessor", arguments))
        settings = _read(pretrained_model_name_or_path, hub)
        return _class_for(settings, backend)._from_settings(settings, given)

    @classmethod
    def kinds(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> tuple[str, ...]:
        """The names of the class that the files of a directory or Hub repository ask for: its `kinds`."""
        if own := cls.registered_for(pretrained_model_name_or_path, hub):
            return getattr(own, "kinds", ())
        settings = _read(pretrained_model_name_or_path, hub)
        return _class_for(settings, SiglipImageProcessor.backend).kinds


def _read(path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> StoredObject:
    return read_settings(path_or_id, hub, (*SiglipImageProcessor.kinds, *Siglip2ImageProcessor.kinds))


def _class_for(settings: StoredObject, backend: str) -> type[ImageProcessor]:
    return (_NAFLEX if kind_of(settings) in Siglip2ImageProcessor.kinds else _CLASSES)[backend]


def _backend_of(use_fast: Any) -> str:
    if not isinstance(use_fast, bool):
        raise ValueError(f"use_fast is {use_fast!r}; supported: True, False, None")
    return (SiglipImageProcessor if use_fast else SiglipImageProcessorPil).backend
