"""ONNX by both of torch's exporters: onnxruntime returns what the model returns, for batches of another size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import CALLS, COMPARED, EXPORTED, inputs, model
from oracle import leaves
from torch import Tensor, nn
from torch.export import Dim

from siglip_kernels.errors import UnsupportedInputError

pytest.importorskip("onnx", reason="the extra `test` installs it")
pytest.importorskip("onnxscript", reason="the extra `test` installs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` installs it")

TOLERANCE = 3e-5
EXPORTERS = ["legacy", "dynamo"]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def export(model: Any, arguments: dict[str, Tensor], path: Path, exporter: str, sizes: dict[int, Any]) -> None:
    """sizes: the dimensions of every argument that may vary."""
    if exporter == "legacy":
        axes = {name: {axis: str(axis) for axis in sizes} for name in arguments}
        options: dict[str, Any] = dict(dynamo=False, opset_version=17, dynamic_axes=axes)
    else:
        options = dict(dynamo=True, verbose=False, dynamic_shapes=dict.fromkeys(arguments, sizes))
    torch.onnx.export(model, (), path, kwargs=arguments, input_names=list(arguments), **options)


def run(path: Path, arguments: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(arguments)
    return [torch.as_tensor(found) for found in session.run(None, {name: t.numpy() for name, t in arguments.items()})]


def assert_same(found: list[Tensor], output: Any) -> None:
    for tensor, expected in zip(found, leaves(output).values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=TOLERANCE)


def proofs() -> list[Any]:
    """By default each exporter meets each backend and each model once; the rest is thorough."""
    default = {
        ("SiglipModel", "sdpa", "legacy"),
        ("SiglipTextModel", "eager", "legacy"),
        ("SiglipVisionModel", "sdpa", "dynamo"),
        ("SiglipForImageClassification", "eager", "dynamo"),
    }
    every = [(kind, backend, exporter) for kind in CALLS for backend in ("eager", "sdpa") for exporter in EXPORTERS]
    return [pytest.param(*case, marks=[] if case in default else pytest.mark.thorough) for case in every]


@pytest.mark.parametrize("kind, backend, exporter", proofs())
def test_models(kind: str, backend: str, exporter: str, tmp_path: Path) -> None:
    original, given = model(kind, backend), inputs(kind, COMPARED)
    export(original, inputs(kind, EXPORTED), tmp_path / "model.onnx", exporter, {0: Dim("batch")})
    assert_same(run(tmp_path / "model.onnx", given), original(**given))


class ImageEmbeds(nn.Module):
    """What libraries export: one tensor."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output


@pytest.mark.parametrize("exporter", ["legacy", pytest.param("dynamo", marks=pytest.mark.thorough)])
def test_images_of_any_size(exporter: str, tmp_path: Path) -> None:
    embeds = ImageEmbeds(model("SiglipModel", "sdpa"))
    sizes = {0: Dim("batch"), 2: 16 * Dim("rows", min=2, max=9), 3: 16 * Dim("columns", min=2, max=9)}
    path, other = tmp_path / "model.onnx", torch.randn(3, 3, 96, 48)
    export(embeds, {"pixel_values": torch.randn(2, 3, 64, 80)}, path, exporter, sizes)
    (found,) = run(path, {"pixel_values": other})
    torch.testing.assert_close(found, embeds(other), rtol=0, atol=TOLERANCE)


def test_a_backend_without_onnx_is_refused(tmp_path: Path) -> None:
    text, path = model("SiglipTextModel", "triton"), tmp_path / "model.onnx"
    with pytest.raises(UnsupportedInputError, match="ONNX export: backend is 'triton', .*supported: eager, sdpa"):
        export(text, inputs("SiglipTextModel", 2), path, "legacy", {})
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:  # retried by a tracer that does not know of ONNX
        export(text, inputs("SiglipTextModel", 2), path, "dynamo", {})
    assert "siglip_kernels.pre_norm_attention" in str(caught.value)
    assert not path.exists()
    text.set_backend("sdpa")
    export(text, inputs("SiglipTextModel", 2), path, "legacy", {})
    assert path.exists()
