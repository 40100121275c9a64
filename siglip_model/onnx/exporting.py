"""`export`: the towers of a model as an ONNX file, checked against the model before it is kept."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.atomic import ordinary_mode
from siglip_model.config import Siglip2VisionConfig
from siglip_model.images import model_inputs
from siglip_model.images.files import load_image
from siglip_model.onnx.file import FLOAT32, INPUTS, INT8, METADATA, OUTPUTS, imported
from siglip_model.onnx.model import OnnxModel, load
from siglip_model.outputs import pooled
from siglip_model.text.padding import as_trained

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel

LEAST_COSINE = 0.999
TOWERS = tuple(INPUTS)


@dataclass(frozen=True)
class Exported:
    """The file that was written, its size in bytes with its weights, and per tower the least cosine to the model."""

    path: Path
    size: int
    cosines: dict[str, float]


def export(
    model: SiglipModel,
    tokenizer: Any,
    image_processor: Any,
    out: str | os.PathLike[str],
    *,
    images: Sequence[Any],
    texts: Sequence[str],
    towers: Sequence[str] = TOWERS,
    int8: bool = False,
    least_cosine: float = LEAST_COSINE,
    overwrite: bool = False,
) -> Exported:
    """Writes `out`, its weights `out`.data, and beside them the tokenizer and the image processor.

    model: float32, of the backend "sdpa" or "eager". out: a file .onnx in a folder that exists.
    The graph takes pixel_values (images, C, H, W) of the configured size and input_ids (texts, length), and returns
    image_features and text_features, (.., width), the towers' pooled outputs before they are scaled to unit length.
    towers: "vision", "text" or both. int8: weights per channel, and activations when the graph runs, are quantised to
    8 bits (onnxruntime's `quantize_dynamic`). Both are unsigned: signed weights saturate on processors without VNNI.
    images, texts: on these, each tower of the file is compared with the model's, and nothing is written where one
    embedding's cosine is below `least_cosine`. images: paths, URLs or PIL images.
    Raises ValueError for that and for unsupported arguments, FileExistsError for a file that is there (unless
    `overwrite`, or with the same content), ImportError without the packages of the extra `onnx`.
    """
    out = Path(out)
    _check(model, out, towers, images, texts)
    names = [out.name, f"{out.name}.data"]
    if not overwrite and (there := next((name for name in names if (out.parent / name).exists()), None)):
        raise FileExistsError(f"{out.parent / there} exists; choose another name, or overwrite (--overwrite)")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        made = Path(folder, out.name)
        _write_float32(model, made if not int8 else made.with_name("float32.onnx"), towers)
        if int8:
            _quantise(made.with_name("float32.onnx"), made)
        _describe(model, made, INT8 if int8 else FLOAT32)
        cosines = measure(model, load(made), tokenizer, image_processor, images, texts)
        for tower, cosine in cosines.items():
            if not cosine >= least_cosine:
                raise ValueError(
                    f"export: the least cosine of {tower} embeddings to the model's is {cosine}; supported: from "
                    f"{least_cosine}, as least_cosine (--least-cosine) says"
                )
        beside = Path(folder, "beside")
        model.config.save_pretrained(beside)
        for tower, part in (("vision", image_processor), ("text", tokenizer)):
            if tower in towers:
                part.save_pretrained(beside)
        _move_beside(beside, out.parent)
        for name in names:
            os.chmod(Path(folder, name), ordinary_mode(out.parent / name))  # onnx creates weights as private
        out.unlink(missing_ok=True)  # first, so that it is never beside the weights of another
        for name in reversed(names):
            os.replace(Path(folder, name), out.parent / name)
    return Exported(out, sum((out.parent / name).stat().st_size for name in names), cosines)


def measure(
    model: SiglipModel, exported: OnnxModel, tokenizer: Any, image_processor: Any, images: Sequence[Any], texts: Any
) -> dict[str, float]:
    """Tower -> the least cosine of its embeddings to the model's."""
    cosines = {}
    for tower in exported.towers:
        if tower == "vision":
            prepared = [model_inputs.prepare(image_processor, load_image(image)) for image in images]
            given = torch.cat([each["pixel_values"] for each in prepared])
        else:
            options = as_trained(model.config.text_config.max_position_embeddings)
            given = tokenizer(list(texts), **options, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            right = embeddings(model, tower, given.to(model.device)).double().cpu()
            found = embeddings(exported, tower, given).double()
        cosines[tower] = nn.functional.cosine_similarity(right, found).min().item()
    return cosines


def embeddings(model: Any, tower: str, given: Tensor) -> Tensor:
    return pooled((model.get_image_features if tower == "vision" else model.get_text_features)(given))


class _Towers(nn.Module):
    def __init__(self, model: SiglipModel, towers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.towers = model, towers

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(embeddings(self.model, *each) for each in zip(self.towers, given, strict=True))


def _check(model: SiglipModel, out: Path, towers: Sequence[str], images: Sequence[Any], texts: Sequence[str]) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        imported(module)
    if out.suffix != ".onnx":
        raise unsupported("export", "out", f"is {str(out)!r}", "a file name that ends in .onnx")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"export: out is in {out.parent}, which is not a folder")
    if not towers or not set(towers) <= set(TOWERS):
        raise unsupported("export", "towers", f"is {list(towers)}", " and ".join(TOWERS))
    if model.dtype != torch.float32:
        raise unsupported("export", "model", f"is in {model.dtype}", "torch.float32: load it with dtype='float32'")
    vision = model.config.vision_config
    if "vision" in towers:
        if isinstance(vision, Siglip2VisionConfig):
            raise unsupported(
                "export", "towers", "has the vision tower of a model at native resolution", "its text tower"
            )
        if not vision.vision_use_head:
            raise unsupported("export", "vision_use_head", "is False, so images have no embedding", "True")
    for tower, name, values in (("vision", "images", images), ("text", "texts", texts)):
        if tower in towers and not len(values):
            raise unsupported("export", name, "is empty", f"some {name} to compare the {tower} tower on")


def _write_float32(model: SiglipModel, path: Path, towers: Sequence[str]) -> None:
    config, was_training = model.config, model.training
    vision, text = config.vision_config, config.text_config
    size = (2, vision.num_channels, vision.image_size, vision.image_size) if "vision" in towers else ()
    length = Dim("length", max=text.max_position_embeddings) if text.max_position_embeddings > 2 else None
    examples = {
        "vision": lambda: (torch.zeros(size, device=model.device), {0: Dim("images")}),
        "text": lambda: (
            torch.zeros(2, text.max_position_embeddings, dtype=torch.long, device=model.device),
            {0: Dim("texts"), **({1: length} if length else {})},
        ),
    }
    given, shapes = zip(*(examples[tower]() for tower in towers), strict=True)
    model.eval()
    try:
        with torch.no_grad(), _without_advice():
            torch.onnx.export(
                _Towers(model, towers),
                given,
                path,
                input_names=[INPUTS[tower] for tower in towers],
                output_names=[OUTPUTS[tower] for tower in towers],
                dynamic_shapes=(shapes,),  # of *given
                dynamo=True,
                external_data=True,
                verbose=False,
            )
    finally:
        model.train(was_training)


def _quantise(path: Path, out: Path) -> None:
    quantization = imported("onnxruntime.quantization")
    with _without_advice():
        quantization.quantize_dynamic(
            path, out, weight_type=quantization.QuantType.QUInt8, per_channel=True, use_external_data_format=True
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silences what the exporter and the quantiser log and warn of: their own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _describe(model: SiglipModel, path: Path, precision: str) -> None:
    onnx = imported("onnx")
    graphs = onnx.load(path, load_external_data=False)
    about = {
        "config": model.config.to_dict(),
        "precision": precision,
        "logit_scale": model.logit_scale.item(),
        "logit_bias": model.logit_bias.item(),
    }
    onnx.helper.set_model_props(graphs, {METADATA: json.dumps(about, default=str)})
    onnx.save(graphs, path)


def _move_beside(made: Path, folder: Path) -> None:
    """The files of the tokenizer and so on. Those of another model in the folder are an error, before any is moved."""
    for path in sorted(made.iterdir()):
        there = folder / path.name
        if there.exists() and not filecmp.cmp(path, there, shallow=False):
            raise FileExistsError(f"{there} exists and differs from the model's; give a folder of its own")
    for path in sorted(made.iterdir()):
        os.replace(path, folder / path.name)
