"""Accelerated models under PyTorch's exporters: the kernels where a graph can hold them, and the library for ONNX."""

from pathlib import Path
from typing import Any

import pytest
import tiny_timm
import tiny_transformers
import torch
from oracle import leaves, worst_difference
from torch import Tensor, nn
from torch.export import Dim

from siglip_kernels.device import interpreting
from siglip_kernels.integrations import timm as for_timm
from siglip_kernels.integrations import transformers as for_transformers

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="on the CPU, in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def images(batch: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


LIBRARIES: dict[str, tuple[Any, Any, Any]] = {
    "transformers": (tiny_transformers.siglip, for_transformers.accelerate, tiny_transformers.inputs),
    "timm": (tiny_timm.tower, for_timm.accelerate, images),
}


class AsTuple(nn.Module):
    """Returns the tensors of a model's output, which the tracer can name."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaves(self.model(**dict(zip(self.names, tensors, strict=True)))).values())


@pytest.fixture(params=LIBRARIES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Any]:
    """An accelerated model, inputs of two batch sizes, and what the library computes for the second."""
    make, accelerate, inputs = LIBRARIES[request.param]
    model, given = make().requires_grad_(False), inputs(batch=3)
    expected = model(**given)
    assert accelerate(model).replaced
    return model, inputs(batch=2), given, expected


def test_torch_export(case: Any) -> None:
    model, exported, given, expected = case
    sizes = {name: {0: Dim("batch")} for name in exported}
    program = torch.export.export(model, (), exported, dynamic_shapes=sizes, strict=True)
    assert worst_difference(program.module()(**given), expected) < 1e-5
    assert any("siglip_kernels" in str(node.target) for node in program.graph.nodes)


def test_torch_jit_trace(case: Any) -> None:
    model, exported, given, expected = case
    model = AsTuple(model, list(given))
    traced = torch.jit.trace(model, tuple(exported.values()), strict=False, check_trace=False)
    for found, wanted in zip(traced(*given.values()), leaves(expected).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert any("siglip_kernels" in node.kind() for node in traced.inlined_graph.nodes())


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_onnx_has_the_operators_of_the_library(dynamo: bool, case: Any, tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library, reason="the extra `test` installs it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` installs it")
    model, exported, given, expected = case
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = dict(dynamo=False, opset_version=17)
    options["dynamic_axes"] = {name: {0: "batch"} for name in exported}
    if dynamo:
        options = dict(dynamo=True, verbose=False, dynamic_shapes={name: {0: Dim("batch")} for name in exported})
    torch.onnx.export(model, (), path, kwargs=exported, input_names=list(exported), **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    for found, wanted in zip(results, leaves(expected).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=3e-5)
