"""The operations: for each its random inputs, its definition, and this project's kernels.

A contender is called like the definition: by keyword, with the tensors and constants of `Operation.inputs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import siglip_kernels
from bench.cases import fp8, losses, shapes
from bench.cases.photos import photos
from bench.cases.shapes import DEMO, MODELS, Shape
from siglip_kernels import reference
from siglip_model.demo import CHECKPOINT
from siglip_model.images.files import load_image
from siglip_model.images.tensor import SiglipImageProcessor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call. `tensors` are differentiated, `constants` are not.

    samples: the arguments whose first dimension counts independent samples (or rows), like the outputs'; none if
    samples depend on each other.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    samples: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {**self.tensors, **self.constants}

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The arguments with `change` applied to every floating-point tensor."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Inputs(
            {name: change(tensor) for name, tensor in self.tensors.items()},
            {name: changed(value) for name, value in self.constants.items()},
            self.samples,
        )

    def last(self, count: int) -> Inputs:
        """The last `count` samples."""

        def cut(arguments: dict[str, Any]) -> dict[str, Any]:
            return {name: value[-count:] if name in self.samples else value for name, value in arguments.items()}

        return Inputs(cut(self.tensors), cut(self.constants), self.samples)

    def bytes(self) -> int:
        lists = (value if isinstance(value, list) else [value] for value in self.arguments().values())
        tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Contender:
    """Something to measure: a function, and its own weights, which training differentiates.

    environment: environment variables that its calls and their backward read.
    """

    call: Callable[..., Any]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""  # a remark for the row, such as the backend that SDPA selected
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sets its environment variables inside the context."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@dataclass(frozen=True)
class Setting:
    """What a peer is loaded for: one operation on one shape, dtype, device and direction."""

    operation: Operation
    shape: Shape
    dtype: torch.dtype
    device: str
    direction: str

    def inputs(self, seed: int = 0) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.operation.inputs(self.shape, self.dtype, self.device, generator)


@dataclass(frozen=True)
class Operation:
    """One operation of SigLIP, or the whole model.

    definition: makes the definition in plain PyTorch from a Setting and the dtype to compute in.
    directions: those that are measured by default.
    embeds: whether its output is embeddings, whose least cosine to those of fp64 is recorded.
    trains: whether it has gradients.
    dtypes: those of its inputs.
    """

    name: str
    shape_class: type[Shape]
    inputs: Callable[[Any, torch.dtype, str, torch.Generator], Inputs]
    definition: Callable[[Setting, torch.dtype], Contender]
    directions: tuple[str, ...] = ("fwd", "bwd")
    embeds: bool = False
    trains: bool = True
    dtypes: tuple[str, ...] = tuple(reversed(DTYPES))


def _normal(generator: torch.Generator, dtype: torch.dtype, device: str, *sizes: int, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)
    return drawn.mul_(scale).to(dtype)


Draw = Callable[..., Tensor]


def _drawing(make: Callable[[Any, Draw], Inputs]) -> Callable[[Any, torch.dtype, str, torch.Generator], Inputs]:
    """Makes `Operation.inputs` from a function of the shape and `draw(*sizes, scale=1)`."""

    def inputs(shape: Any, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        return make(shape, functools.partial(_normal, generator, dtype, device))

    return inputs


def _weight(draw: Draw, outputs: int, inputs: int) -> Tensor:
    return draw(outputs, inputs, scale=inputs**-0.5)


@_drawing
def _attention_inputs(shape: shapes.AttentionShape, draw: Draw) -> Inputs:
    """Strided views of one packed projection, as in a model.

    Scores of random inputs are so even that no key of a long sequence has much weight. In a trained model some rows are
    peaked, and attention's backward has more work for them: `peaked` per cent of the queries, evenly spread, resemble
    one key each.
    """
    packed = draw(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    q, k, v = packed.unbind(2)
    row = torch.arange(shape.tokens, device=packed.device)
    peaked = row[row * shape.peaked % 100 < shape.peaked]
    keys = k[:, (peaked + shape.tokens // 2) % shape.tokens].float()
    q[:, peaked] = (1.4 * shape.head_dim**0.5 * F.normalize(keys, dim=-1)).to(q.dtype)
    return Inputs({"q": q, "k": k, "v": v}, samples=("q", "k", "v"))


def _sequences(shape: shapes.SequencesShape, device: torch.device) -> Tensor:
    return torch.tensor(shape.lengths(), dtype=torch.int32, device=device)


@_drawing
def _packed_inputs(shape: shapes.SequencesShape, draw: Draw) -> Inputs:
    """Sequences one after the other."""
    q, k, v = draw(sum(shape.lengths()), 3, shape.heads, shape.head_dim).unbind(1)
    boundaries = F.pad(_sequences(shape, q.device).cumsum(0, dtype=torch.int32), (1, 0))
    return Inputs({"q": q, "k": k, "v": v}, {"cu_seqlens": boundaries, "max_seqlen": shape.longest})


@_drawing
def _padded_inputs(shape: shapes.SequencesShape, draw: Draw) -> Inputs:
    q, k, v = draw(shape.sequences, shape.longest, 3, shape.heads, shape.head_dim).unbind(2)
    lengths = _sequences(shape, q.device)
    return Inputs({"q": q, "k": k, "v": v}, {"lengths": lengths}, samples=("q", "k", "v", "lengths"))


@_drawing
def _linear_inputs(shape: shapes.LinearShape, draw: Draw) -> Inputs:
    tensors = {
        "x": draw(shape.rows, shape.inputs),
        "weight": _weight(draw, shape.outputs, shape.inputs),
        "bias": draw(shape.outputs),
    }
    if shape.residual:
        tensors["residual"] = draw(shape.rows, shape.outputs)
    return Inputs(tensors, samples=("x", "residual"))


def _norm_weights(width: int, draw: Draw) -> tuple[Tensor, Tensor]:
    return 1 + draw(width, scale=0.1), draw(width, scale=0.1)


@_drawing
def _qkv_inputs(shape: shapes.QKVShape, draw: Draw) -> Inputs:
    norm_weight, norm_bias = _norm_weights(shape.width, draw)
    tensors = {"x": draw(shape.rows, 1, shape.width), "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name in "qkv":
        tensors[f"{name}_weight"] = _weight(draw, shape.width, shape.width)
        tensors[f"{name}_bias"] = draw(shape.width)
    return Inputs(tensors, {"eps": 1e-6, "num_heads": shape.heads}, ("x",))


@_drawing
def _pre_norm_attention_inputs(shape: shapes.PreNormAttentionShape, draw: Draw) -> Inputs:
    norm_weight, norm_bias = _norm_weights(shape.width, draw)
    x = draw(shape.batch, shape.tokens, shape.width)
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name in ("q", "k", "v", "out"):
        tensors[f"{name}_weight"] = _weight(draw, shape.width, shape.width)
        tensors[f"{name}_bias"] = draw(shape.width)
    return Inputs(tensors, {"eps": 1e-6, "num_heads": shape.heads}, ("x",))


def _mlp_weights(shape: shapes.MLPShape, draw: Draw) -> dict[str, Tensor]:
    return {
        "fc1_weight": _weight(draw, shape.hidden, shape.width),
        "fc1_bias": draw(shape.hidden, scale=0.1),
        "fc2_weight": _weight(draw, shape.width, shape.hidden),
        "fc2_bias": draw(shape.width, scale=0.1),
    }


@_drawing
def _mlp_inputs(shape: shapes.MLPShape, draw: Draw) -> Inputs:
    x, residual = draw(shape.rows, shape.width), draw(shape.rows, shape.width)
    return Inputs({"x": x, **_mlp_weights(shape, draw), "residual": residual}, samples=("x", "residual"))


@_drawing
def _pre_norm_mlp_inputs(shape: shapes.MLPShape, draw: Draw) -> Inputs:
    norm_weight, norm_bias = _norm_weights(shape.width, draw)
    tensors = {"x": draw(shape.rows, shape.width), "norm_weight": norm_weight, "norm_bias": norm_bias}
    return Inputs({**tensors, **_mlp_weights(shape, draw)}, {"eps": 1e-6}, ("x",))


@_drawing
def _norm_inputs(shape: shapes.NormShape, draw: Draw) -> Inputs:
    weight, bias = _norm_weights(shape.width, draw)
    return Inputs({"x": draw(shape.rows, shape.width), "weight": weight, "bias": bias}, {"eps": 1e-6}, ("x",))


@_drawing
def _pool_inputs(shape: shapes.PoolShape, draw: Draw) -> Inputs:
    tensors = {
        "x": draw(shape.batch, shape.tokens, shape.width),
        "probe": draw(1, 1, shape.width),
        "in_proj_weight": _weight(draw, 3 * shape.width, shape.width),
        "in_proj_bias": draw(3 * shape.width, scale=0.1),
        "out_proj_weight": _weight(draw, shape.width, shape.width),
        "out_proj_bias": draw(shape.width, scale=0.1),
    }
    return Inputs(tensors, {"num_heads": shape.heads}, ("x",))


@_drawing
def _patch_inputs(shape: shapes.PatchShape, draw: Draw) -> Inputs:
    fan_in = 3 * shape.patch**2
    tensors = {
        "weight": draw(shape.width, 3, shape.patch, shape.patch, scale=fan_in**-0.5),
        "bias": draw(shape.width, scale=0.1),
        "position": draw(shape.tokens, shape.width),
    }
    return Inputs(tensors, {"pixel_values": draw(shape.batch, 3, shape.image, shape.image)}, ("pixel_values",))


def _loss_inputs(shape: shapes.LossShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Normalised embeddings, and SigLIP's initial scale and bias, in fp32 as in a model; groups and weights."""
    counts = shape.pairs, shape.texts
    embeds = [F.normalize(_normal(generator, torch.float32, device, count, shape.width)) for count in counts]
    tensors = {name: value.to(dtype) for name, value in zip(("image_embeds", "text_embeds"), embeds, strict=True)}
    tensors["logit_scale"] = torch.full((), 10.0, device=device)
    tensors["logit_bias"] = torch.full((), -10.0, device=device)
    constants: dict[str, Any] = {}
    if shape.captions:
        images, texts = (torch.arange(count, device=device) % shape.pairs for count in counts)
        texts[shape.texts - shape.negatives :] = -1
        constants.update(image_groups=images, text_groups=texts)
    elif shape.negatives:
        constants["offset"] = 0  # the further texts are behind those of the pairs
    if shape.weighted:
        weights = [torch.rand(count, generator=generator, device=device) for count in counts]
        constants.update(image_weight=weights[0], text_weight=weights[1], positive_weight=2.0)
    return Inputs(tensors, constants)


def _grouped(shape: shapes.LossShape) -> shapes.LossShape:
    return dataclasses.replace(shape, captions=max(1, shape.captions))


def _image_losses_inputs(
    shape: shapes.LossShape, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Inputs:
    """The same for the loss of each image, with groups, even where each is one pair, of which the first is ignored."""
    inputs = _loss_inputs(_grouped(shape), dtype, device, generator)
    return dataclasses.replace(inputs, constants={**inputs.constants, "ignore": 0, "reduction": "none"})


def _plus_inputs(shape: shapes.LossShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """The same with groups, even where each is one pair."""
    if shape.weighted:
        raise ValueError("siglip_plus_loss has its own weights; supported: weighted=0")
    return _loss_inputs(_grouped(shape), dtype, device, generator)


def _matryoshka_inputs(shape: shapes.LossShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """The same with a scale and a bias for each of `shape.prefixes`."""
    inputs = _loss_inputs(shape, dtype, device, generator)
    tensors = dict(inputs.tensors)
    scales, biases = (tensors.pop(name).repeat(len(shape.prefixes)) for name in ("logit_scale", "logit_bias"))
    tensors.update(logit_scales=scales, logit_biases=biases)
    return Inputs(tensors, {**inputs.constants, "widths": tuple(shape.prefixes)})


def _resize_inputs(shape: shapes.ResizeShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Random levels, and SigLIP's mean and standard deviation. The images lie on the device already."""
    sizes = (3, shape.height, shape.width)
    levels = (torch.randint(0, 256, sizes, generator=generator, device=device) for _ in range(shape.batch))
    half = torch.full((3,), 127.5, device=device)
    constants = {"images": [image.to(torch.uint8) for image in levels], "mean": half, "std": half.clone()}
    more = {"size": (shape.side, shape.side), "mode": "bicubic", "dtype": dtype}
    return Inputs({}, {**constants, **more}, ("images",))


def _model_inputs(shape: shapes.ModelShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Pixels and, if both towers run, texts. The weights belong to the contenders: `model_weights`."""
    image = MODELS[shape.model].vision.image
    constants: dict[str, Any] = {"pixel_values": _normal(generator, dtype, device, shape.batch, 3, image, image)}
    if shape.text:
        constants["input_ids"] = torch.randint(0, 32000, (shape.batch, 64), generator=generator, device=device)
    return Inputs({}, constants, () if isinstance(shape, shapes.TrainShape) else ("pixel_values", "input_ids"))


def _text_inputs(shape: shapes.TextShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    fields = model_config(shape)["text_config"]
    length, vocabulary = fields.get("max_position_embeddings", 64), fields.get("vocab_size", 32000)
    ids = torch.randint(0, vocabulary, (shape.batch, length), generator=generator, device=device)
    return Inputs({}, {"input_ids": ids}, ("input_ids",))


def _embed_inputs(shape: shapes.EmbedShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """The same files for any seed. The weights belong to the contenders."""
    return Inputs({}, {"paths": photos(shape.images, shape.width, shape.height)}, ("paths",))


def _naflex_inputs(shape: shapes.NaFlexShape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Patches padded to the model's number, as the image processor returns them."""
    vision = MODELS[shape.model].vision
    grids = torch.tensor(shape.grids())
    constants = {
        "pixel_values": _normal(generator, dtype, device, shape.batch, vision.tokens, 3 * vision.patch**2),
        "pixel_attention_mask": (torch.arange(vision.tokens) < grids.prod(-1, keepdim=True)).int().to(device),
        "spatial_shapes": grids.to(device),
    }
    return Inputs({}, constants, tuple(constants))


def model_config(shape: shapes.ModelShape) -> dict[str, Any]:
    """config.json of the shape's model, for transformers and for this project."""
    if shape.model == DEMO:
        return json.loads((CHECKPOINT / "config.json").read_text())

    def fields(tower: shapes.Tower) -> dict[str, int]:
        layers = shape.layers or tower.layers
        sizes = dict(hidden_size=tower.width, intermediate_size=tower.hidden)
        return {**sizes, "num_hidden_layers": layers, "num_attention_heads": tower.heads}

    model = MODELS[shape.model]
    vision = {**fields(model.vision), "patch_size": model.vision.patch}
    naflex = isinstance(shape, shapes.NaFlexShape)
    vision |= {"num_patches": model.vision.tokens} if naflex else {"image_size": model.vision.image}
    family = "siglip2" if naflex else "siglip"
    return {"model_type": family, "text_config": fields(model.text), "vision_config": vision}


@functools.lru_cache(maxsize=1)
def _model_weights(shape: shapes.ModelShape, dtype: torch.dtype, device: str) -> Mapping[str, Tensor]:
    import siglip_model

    if shape.model == DEMO:
        return siglip_model.AutoModel.from_pretrained(CHECKPOINT, dtype=dtype, device_map=device).state_dict()
    torch.manual_seed(0)
    with torch.device(device):
        config = siglip_model.AutoConfig.for_model(**model_config(shape))
        return siglip_model.AutoModel.from_config(config, backend="eager", dtype=dtype).state_dict()


def model_weights(setting: Setting) -> Mapping[str, Tensor]:
    """Random weights, or the demo checkpoint's, by transformers' names. All contenders share the tensors."""
    shape = setting.shape
    assert isinstance(shape, shapes.ModelShape)
    kind = shapes.NaFlexShape if isinstance(shape, shapes.NaFlexShape) else shapes.ModelShape
    return _model_weights(kind("", shape.model, 1, shape.layers, True), setting.dtype, setting.device)


def project_model(setting: Setting, backend: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of siglip_model with the shape's weights: both towers, or the vision tower alone."""
    import siglip_model

    shape = setting.shape
    assert isinstance(shape, shapes.ModelShape)
    with torch.device(setting.device):
        config = siglip_model.AutoConfig.for_model(**model_config(shape))
        model: Any = siglip_model.AutoModel.from_config(config, backend=backend)
    model.load_state_dict(model_weights(setting), assign=True)
    whole: nn.Module = model if shape.text else model.vision_model
    return whole.to(dtype or setting.dtype).eval()


def as_contender(
    model: nn.Module, setting: Setting, call: Callable[..., Any] | None = None, note: str = ""
) -> Contender:
    """A contender that runs a model: its outputs are embeddings or, in training, the loss."""
    call = call or model
    training = isinstance(setting.shape, shapes.TrainShape)

    def run(**inputs: Tensor) -> Any:
        if training:
            return call(**inputs, return_loss=True).loss
        out = call(**inputs)
        return (out.image_embeds, out.text_embeds) if "input_ids" in inputs else out.pooler_output

    return Contender(run, dict(model.named_parameters()) if training else {}, note)


def _model_definition(setting: Setting, dtype: torch.dtype) -> Contender:
    return as_contender(project_model(setting, "eager", dtype), setting)


def model_setting(setting: Setting) -> Setting:
    """The setting of both towers of the model of which an EmbedShape or a shape of one tower runs a part."""
    shape = setting.shape
    assert isinstance(shape, (shapes.EmbedShape, shapes.ModelShape))
    layers = shape.layers if isinstance(shape, shapes.ModelShape) else 0
    return dataclasses.replace(setting, shape=shapes.ModelShape("", shape.model, shape.batch, layers, text=True))


TOWERS = {"image_features": "vision", "text_features": "text"}
"""Operation -> the tower that it runs."""


def tower_of(model: nn.Module, setting: Setting) -> nn.Module:
    """The tower of a whole model, this project's or transformers', that an operation of TOWERS runs."""
    tower: nn.Module = getattr(model, f"{TOWERS[setting.operation.name]}_model")
    return tower


def _tower_definition(setting: Setting, dtype: torch.dtype) -> Contender:
    tower = tower_of(project_model(model_setting(setting), "eager", dtype), setting)
    return Contender(lambda **inputs: tower(**inputs).pooler_output)


def image_processor(model: str) -> SiglipImageProcessor:
    """The image processor of a model of MODELS."""
    side = MODELS[model].vision.image
    return SiglipImageProcessor(size={"height": side, "width": side})


def _embed_definition(setting: Setting, dtype: torch.dtype) -> Contender:
    """Unit rows, one image after the other."""
    model: Any = project_model(model_setting(setting), "eager", dtype)
    processor = image_processor(setting.shape.model)  # type: ignore[attr-defined]

    def embed(paths: list[str]) -> Tensor:
        rows = []
        for path in paths:
            pixels = processor(images=load_image(path), return_tensors="pt")["pixel_values"]
            rows.append(model.get_image_features(pixels.to(model.device, dtype)).pooler_output)
        return F.normalize(torch.cat(rows), dim=-1)

    return Contender(embed)


def _resize_definition(setting: Setting, dtype: torch.dtype) -> Contender:
    """In fp64 its result is not rounded to the dtype of the call."""
    return Contender(lambda **inputs: reference.resize_normalize(**{**inputs, "dtype": dtype}))


def _fp8_definition(setting: Setting, dtype: torch.dtype) -> Contender:
    name = setting.operation.name
    return Contender(getattr(reference, name.removeprefix("fp8_")) if dtype == torch.float64 else fp8.DEFINITIONS[name])


def _plain(function: Callable[..., Any]) -> Callable[[Setting, torch.dtype], Contender]:
    return lambda setting, dtype: Contender(function)


_TRAINED = ("fwd", "fwd+bwd")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("attention", shapes.AttentionShape, _attention_inputs, _plain(reference.attention)),
        Operation("packed_attention", shapes.SequencesShape, _packed_inputs, _plain(reference.attention)),
        Operation("padded_attention", shapes.SequencesShape, _padded_inputs, _plain(reference.attention)),
        Operation("linear", shapes.LinearShape, _linear_inputs, _plain(reference.linear)),
        Operation("pre_norm_qkv", shapes.QKVShape, _qkv_inputs, _plain(reference.pre_norm_qkv), _TRAINED),
        Operation(
            "pre_norm_attention",
            shapes.PreNormAttentionShape,
            _pre_norm_attention_inputs,
            _plain(reference.pre_norm_attention),
            _TRAINED,
        ),
        Operation("mlp", shapes.MLPShape, _mlp_inputs, _plain(reference.mlp), _TRAINED),
        Operation("pre_norm_mlp", shapes.MLPShape, _pre_norm_mlp_inputs, _plain(reference.pre_norm_mlp), _TRAINED),
        Operation("layer_norm", shapes.NormShape, _norm_inputs, _plain(reference.layer_norm)),
        Operation("attention_pool", shapes.PoolShape, _pool_inputs, _plain(reference.attention_pool), _TRAINED),
        Operation("patch_embed", shapes.PatchShape, _patch_inputs, _plain(reference.patch_embed), _TRAINED),
        Operation("sigmoid_loss", shapes.LossShape, _loss_inputs, _plain(reference.sigmoid_loss), ("fwd+bwd", "fwd")),
        Operation(
            "image_losses",
            shapes.LossShape,
            _image_losses_inputs,
            _plain(reference.sigmoid_loss),
            ("fwd+bwd",),
            dtypes=("fp16", "bf16"),  # in fp32 the scalars' gradients, sums of both signs, are too close to exact
        ),
        Operation("siglip_plus_loss", shapes.LossShape, _plus_inputs, _plain(losses.siglip_plus_loss), ("fwd+bwd",)),
        Operation(
            "matryoshka_sigmoid_loss",
            shapes.LossShape,
            _matryoshka_inputs,
            _plain(losses.matryoshka_sigmoid_loss),
            ("fwd+bwd",),
        ),
        *(
            Operation(
                f"fp8_{name}", shape_class, inputs, _fp8_definition, ("fwd",), trains=False, dtypes=("fp16", "bf16")
            )
            for name, shape_class, inputs in (
                ("mlp", shapes.MLPShape, _mlp_inputs),
                ("pre_norm_mlp", shapes.MLPShape, _pre_norm_mlp_inputs),
                ("pre_norm_qkv", shapes.QKVShape, _qkv_inputs),
                ("pre_norm_attention", shapes.PreNormAttentionShape, _pre_norm_attention_inputs),
            )
        ),
        Operation("resize_normalize", shapes.ResizeShape, _resize_inputs, _resize_definition, ("fwd",), trains=False),
        Operation("vision_tower", shapes.ModelShape, _model_inputs, _model_definition, ("fwd",), trains=False),
        Operation("naflex_tower", shapes.NaFlexShape, _naflex_inputs, _model_definition, ("fwd",), trains=False),
        Operation("siglip", shapes.ModelShape, _model_inputs, _model_definition, ("fwd",), trains=False),
        Operation(
            "image_features", shapes.ModelShape, _model_inputs, _tower_definition, ("fwd",), embeds=True, trains=False
        ),
        Operation(
            "text_features", shapes.TextShape, _text_inputs, _tower_definition, ("fwd",), embeds=True, trains=False
        ),
        Operation("embed", shapes.EmbedShape, _embed_inputs, _embed_definition, ("fwd",), embeds=True, trains=False),
        Operation("training_step", shapes.TrainShape, _model_inputs, _model_definition, ("fwd+bwd",)),
    )
}


def plus_loss(backend: str) -> Callable[..., Tensor]:
    """This project's SigLIP+, by the parameters of its definition."""
    loss = siglip_kernels.SigLIPPlusLoss(backend=backend)

    def call(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, **groups: Tensor):
        return loss(image_embeds, text_embeds, logit_scale, logit_bias, **groups)

    return call


# Operations that are another one of siglip_kernels with some of its arguments.
_OF_ANOTHER = {"packed_attention": "attention", "padded_attention": "attention", "image_losses": "sigmoid_loss"}


def kernels_for(name: str) -> Callable[..., Any] | None:
    """This project's kernels for an operation; None if siglip_kernels has none."""
    if name == "siglip_plus_loss":
        return plus_loss("triton")
    if name in fp8.DEFINITIONS:
        return getattr(siglip_kernels.fp8, name.removeprefix("fp8_"))  # type: ignore[no-any-return]
    name = _OF_ANOTHER.get(name, name)
    found = getattr(siglip_kernels, name, None)
    return found if callable(found) else None  # a module of that name is no operation
