"""Whole models: this project with each backend, transformers with each attention and torch.compile mode, fp8."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

from torch import nn

from bench.cases.operations import Contender, Setting, as_contender, model_config, model_weights, project_model
from bench.cases.shapes import AttentionShape, ModelShape, NaFlexShape
from bench.peers.attention import chosen_backend, has_kernel, pinned
from bench.peers.compiled import MODES, compiled
from bench.peers.registry import FAMILIES, Unsupported, peer, require_fp8, selecting
from siglip_kernels import MissingBackendError

_MODELS = ("vision_tower", "siglip", "training_step")
_WITH_NAFLEX = (*_MODELS, "naflex_tower")
_HALF = ("fp16", "bf16")
_ATTENTION = ("eager", "sdpa", "flash_attention_2")


def _note(setting: Setting, attention: str) -> str:
    """The backend that SDPA selects for the vision tower."""
    shape = setting.shape
    if attention != "sdpa" or isinstance(shape, NaFlexShape):  # masked, or packed
        return ""
    assert isinstance(shape, ModelShape)
    tower = shape.towers()[0]
    attention_shape = AttentionShape("", shape.batch, tower.tokens, tower.heads, tower.head_dim)
    return f"SDPA ran {chosen_backend(attention_shape, setting)}"


def _require(attention: str) -> None:
    """Imports what the attention needs; an ImportError becomes a row that says what is missing."""
    if attention == "flash_attention_2":
        import flash_attn.flash_attn_interface  # noqa: F401


def _project(backend: str, mode: str = "") -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        _require(backend)
        try:
            model = project_model(setting, backend)
        except MissingBackendError as error:
            raise Unsupported(str(error)) from error
        contender = as_contender(model, setting, compiled(model, mode) if mode else None, _note(setting, backend))
        return replace(contender, environment=selecting("triton")) if backend.startswith("triton") else contender

    return load


peer(_WITH_NAFLEX, "triton", package="triton", cuda=True)(_project("triton"))
peer(
    _MODELS, "triton:compile", package="triton", cuda=True, slow=True, one_size=True, note="this project, torch.compile"
)(_project("triton", "compile"))


def _family(name: str) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        FAMILIES[name].require()
        return replace(_project("triton")(setting), environment=selecting(name))

    return load


for _name, _of in FAMILIES.items():
    peer(
        _MODELS,
        _name,
        package="triton",
        cuda=True,
        dtypes=_HALF,
        note=f"this project's kernels for {_of.architecture}",
    )(_family(_name))


def _captured(backend: str) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        shape = setting.shape
        assert isinstance(shape, ModelShape)
        model = project_model(setting, backend)
        with mock.patch.dict(os.environ, selecting("triton")):
            captured = model.capture(shape.batch)  # type: ignore[operator]
        return as_contender(model, setting, captured)

    return load


_FORWARD = ("vision_tower", "siglip")


@peer(
    (*_FORWARD, "naflex_tower"),
    "triton:fp8",
    package="triton",
    cuda=True,
    dtypes=_HALF,
    precision="fp8",
    tolerance=0.3,
    note="this project, backend `triton_fp8`",
)
def triton_fp8(setting: Setting) -> Contender:
    require_fp8(setting)
    return _project("triton_fp8")(setting)


peer(_FORWARD, "triton:graph", package="triton", cuda=True, note="this project, CUDA graph of `model.capture`")(
    _captured("triton")
)
peer(_FORWARD, "siglip_model:sdpa:graph", cuda=True, note="this project, without its kernels, CUDA graph")(
    _captured("sdpa")
)
for _backend in ("sdpa", "eager"):
    peer(_WITH_NAFLEX, f"siglip_model:{_backend}", note="this project, without its kernels")(_project(_backend))
peer(
    _WITH_NAFLEX,
    "siglip_model:flash_attention_2",
    package="flash-attn",
    install="pip install flash-attn --no-build-isolation",
    cuda=True,
    dtypes=_HALF,
)(_project("flash_attention_2"))


def transformers_model(setting: Setting, attention: str) -> nn.Module:
    """transformers' SigLIP with the shape's weights."""
    import torch
    import transformers

    shape = setting.shape
    assert isinstance(shape, ModelShape)
    transformers.logging.set_verbosity_error()
    fields = model_config(shape)
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device(setting.device):
        model = transformers.AutoModel.from_config(config, attn_implementation=attention, dtype=setting.dtype)
    model.load_state_dict(model_weights(setting), assign=True)
    return (model if shape.text else model.vision_model).eval()


def _transformers(attention: str, mode: str = "") -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        _require(attention)
        model = transformers_model(setting, attention)
        return as_contender(model, setting, compiled(model, mode) if mode else None, _note(setting, attention))

    return load


for _attention in _ATTENTION:
    _flash = _attention == "flash_attention_2"
    for _mode in ("", *MODES):
        peer(
            _MODELS if _flash or _mode else _WITH_NAFLEX,  # transformers' Siglip2 has no FlashAttention
            f"transformers:{_attention}" + (f":{_mode}" if _mode else ""),
            package="flash-attn" if _flash else "transformers",
            install="pip install flash-attn --no-build-isolation" if _flash else "pip install 'transformers>=5.17'",
            cuda=_flash or bool(_mode),
            one_size=bool(_mode),
            dtypes=_HALF if _flash else None,
            slow=bool(_mode),
        )(_transformers(_attention, _mode))


def _transformers_pinned(backend: str, mode: str) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        model = transformers_model(setting, "sdpa")
        call = pinned(model, backend)
        contender = as_contender(model, setting, compiled(call, mode) if mode else call)
        ran = has_kernel(contender.call, backend, setting.inputs().arguments())
        return replace(contender, note=ran.note)

    return load


# Which of them SDPA prefers depends on PyTorch's version.
for _pin, _backend in (("flash", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION")):
    for _mode in ("", "compile"):
        peer(
            _MODELS,
            f"transformers:sdpa:{_pin}" + (f":{_mode}" if _mode else ""),
            package="transformers",
            install="pip install 'transformers>=5.17'",
            cuda=True,
            dtypes=_HALF,
            one_size=bool(_mode),
            slow=bool(_mode),
        )(_transformers_pinned(_backend, _mode))


def _quantized(setting: Setting) -> nn.Module:
    """For the forward pass alone: weights quantised in advance, activations dynamically, one scale per row."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    model = transformers_model(setting, "sdpa")
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def _float8_training(setting: Setting) -> nn.Module:
    from torchao.float8 import convert_to_float8_training

    # GEMMs in fp8 need dimensions divisible by 16; the others keep their dtype.
    def divisible(module: nn.Module, name: str) -> bool:
        return not isinstance(module, nn.Linear) or (module.in_features % 16 == 0 and module.out_features % 16 == 0)

    return convert_to_float8_training(transformers_model(setting, "sdpa"), module_filter_fn=divisible)


@peer(
    _MODELS,
    "torchao:float8",
    package="torchao",
    cuda=True,
    dtypes=("bf16",),
    slow=True,
    one_size=True,
    precision="fp8",
    tolerance=0.3,
    note="transformers sdpa, products in fp8, torch.compile",
)
def float8(setting: Setting) -> Contender:
    require_fp8(setting)
    training = setting.operation.name == "training_step"
    model = _float8_training(setting) if training else _quantized(setting)
    return as_contender(model, setting, compiled(model, "compile"))
