"""One tower on a CPU, in the precisions and runtimes that people use there. Inputs and outputs are fp32 for all.

ONNX Runtime and OpenVINO run files that `siglip_model.onnx.export` writes, once per tower and precision.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.operations import (
    TOWERS,
    Contender,
    Setting,
    image_processor,
    model_setting,
    project_model,
    tower_of,
)
from bench.cases.shapes import ModelShape
from bench.peers.compiled import frozen
from bench.peers.models import transformers_model
from bench.peers.registry import peer
from siglip_model import onednn
from siglip_model.demo import CHECKPOINT, PICTURES

# Relative errors that leave cosines of about 0.9995 and 0.995.
BF16 = dict(precision="bf16", tolerance=0.03)
INT8 = dict(precision="int8", tolerance=0.1)
EXPORTS = "SIGLIP_BENCH_EXPORTS"  # the variable that names the folder of the exported files, also in child processes

_peer = functools.partial(peer, TOWERS, cpu=True, dtypes=("fp32",))
_transformers_peer = functools.partial(_peer, package="transformers", install="pip install 'transformers>=5.17'")
_EXPORT = "pip install onnx onnxscript onnxruntime"
_onnxruntime_peer = functools.partial(_peer, package="onnxruntime", install=_EXPORT, keeps_memory=True)
_openvino_peer = functools.partial(_peer, package="openvino", install=f"{_EXPORT} openvino", keeps_memory=True)


def _project(setting: Setting, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tower_of(project_model(model_setting(setting), "sdpa", dtype), setting)


def _transformers(setting: Setting, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tower_of(transformers_model(model_setting(setting), "sdpa").to(dtype), setting)


def _int8(tower: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that torchao will replace it
        return torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, inplace=True)  # type: ignore[attr-defined]


def _contender(tower: Callable[..., Any]) -> Contender:
    return Contender(lambda **inputs: tower(**inputs).pooler_output)


def _torch(make: Callable[..., nn.Module], dtype: torch.dtype = torch.float32) -> Callable[[Setting], Contender]:
    return lambda setting: _contender(make(setting, dtype))


def _torch_int8(make: Callable[..., nn.Module]) -> Callable[[Setting], Contender]:
    return lambda setting: _contender(_int8(make(setting)))


def _compiled(dtype: torch.dtype) -> Callable[[Setting], Contender]:
    return lambda setting: _contender(frozen(_project(setting, dtype), setting.inputs().arguments()))


@_peer("siglip_model:sdpa", note="this project")
def project(setting: Setting) -> Contender:
    by = "oneDNN" if onednn.is_faster() else "PyTorch's product"
    return replace(_contender(_project(setting)), note=f"linear layers by {by}")


_peer("siglip_model:sdpa:bf16", **BF16)(_torch(_project, torch.bfloat16))
_peer("siglip_model:sdpa:compile", note="with freezing", one_size=True)(_compiled(torch.float32))
_peer("siglip_model:sdpa:compile:bf16", note="with freezing", one_size=True, **BF16)(_compiled(torch.bfloat16))
_peer("siglip_model:sdpa:int8", note="quantize_dynamic", **INT8)(_torch_int8(_project))
_transformers_peer("transformers:sdpa")(_torch(_transformers))
_transformers_peer("transformers:sdpa:bf16", **BF16)(_torch(_transformers, torch.bfloat16))
_transformers_peer("transformers:sdpa:int8", note="quantize_dynamic", **INT8)(_torch_int8(_transformers))


def _exports() -> Path:
    """The folder of exported files, which is deleted when the process that made it ends."""
    if EXPORTS not in os.environ:
        folder = os.environ[EXPORTS] = tempfile.mkdtemp(prefix="onnx-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(os.environ[EXPORTS])


def _exported(setting: Setting, int8: bool = False) -> Path:
    """The file of the setting's tower, with the weights that every contender has."""
    import siglip_model
    from siglip_model import onnx

    both = model_setting(setting)
    assert isinstance(both.shape, ModelShape)
    tower = TOWERS[setting.operation.name]
    folder = _exports() / f"{both.shape.model}-l{both.shape.layers}-{tower}{'-int8' * int8}"
    path = folder / "tower.onnx"
    if not path.exists():
        folder.mkdir()
        model: Any = project_model(both, "sdpa")
        onnx.export(
            model,
            siglip_model.AutoTokenizer.from_pretrained(CHECKPOINT),
            image_processor(both.shape.model),
            path,
            images=sorted(PICTURES.glob("*.png"))[:1],
            texts=["a cat"],
            towers=[tower],
            int8=int8,
            least_cosine=-1,  # the bench judges it
        )
    return path


def _onnxruntime(int8: bool) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        import onnxruntime  # noqa: F401

        from siglip_model import onnx

        model = onnx.load(_exported(setting, int8))
        vision = TOWERS[setting.operation.name] == "vision"
        features: Callable[..., Any] = model.get_image_features if vision else model.get_text_features
        features(**{name: value[:0] for name, value in setting.inputs().constants.items()})  # loads the tower
        return _contender(features)

    return load


_onnxruntime_peer("siglip_model:onnxruntime", note="`siglip export`")(_onnxruntime(int8=False))
_onnxruntime_peer("siglip_model:onnxruntime:int8", note="`siglip export --int8`", **INT8)(_onnxruntime(int8=True))


def _openvino(precision: str) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        import openvino

        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino.compile_model(_exported(setting), "CPU", hints)

        def call(**inputs: Tensor) -> Tensor:
            (features,) = compiled({name: tensor.numpy() for name, tensor in inputs.items()}).values()
            return torch.from_numpy(features)

        return Contender(call)

    return load


_openvino_peer("openvino", note="this project's export")(_openvino("f32"))
_openvino_peer("openvino:bf16", note="this project's export", **BF16)(_openvino("bf16"))
