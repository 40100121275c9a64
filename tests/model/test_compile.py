"""torch.compile(fullgraph=True) of the whole model: no graph break, same results and gradients."""

from typing import Any

import pytest
import torch
from oracle import TINY_TEXT, TINY_VISION, randomised, worst_difference
from torch._dynamo.testing import CompileCounterWithBackend

import siglip_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def model(backend: str, kind: str = "SiglipModel") -> Any:
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER}, num_labels=3
    )
    return randomised(getattr(siglip_model, kind)(config, backend=backend)).to(DEVICE)


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (size, 16), generator=generator)
    pixels = torch.randn(size, 3, 48, 48, generator=generator)
    return {"input_ids": ids.to(DEVICE), "pixel_values": pixels.to(DEVICE)}


def padding() -> torch.Tensor:
    mask = torch.ones(3, 16, dtype=torch.long, device=DEVICE)
    mask[1, 5:] = 0
    return mask


def gradients(model: Any, run: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    run(**inputs, return_loss=True).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("backend, masked", [("sdpa", False), ("triton", False), ("triton", True)])
def test_training(backend: str, masked: bool) -> None:
    original = model(backend).train()
    compiled = torch.compile(original, fullgraph=True, backend="aot_eager")
    inputs = {**batch(), **({"attention_mask": padding()} if masked else {})}
    expected = gradients(original, original, inputs)
    for found, wanted in zip(gradients(original, compiled, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_inference(backend: str) -> None:
    original = model(backend)
    compiled = torch.compile(original, fullgraph=True, backend="aot_eager")
    everything = {**batch(), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        assert worst_difference(compiled(**everything), original(**everything)) < 1e-5
    for method, argument in (("get_image_features", "pixel_values"), ("get_text_features", "input_ids")):
        run = torch.compile(getattr(original, method), fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            assert worst_difference(run(batch()[argument]), getattr(original, method)(batch()[argument])) < 1e-5


def test_batches_of_any_size_from_one_compilation() -> None:
    original, compiler = model("triton").vision_model, CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(original, fullgraph=True, backend=compiler, dynamic=True)
    compilations = []
    with torch.no_grad():
        for size in (4, 2, 5):  # not 3, the number of channels: equal sizes share a symbol
            pixels = batch(size)["pixel_values"]
            assert worst_difference(compiled(pixels), original(pixels)) < 1e-5
            compilations.append(compiler.frame_count)
    assert compilations[0] == compilations[1] == compilations[2]


def test_a_wrong_mask_is_refused_there_too() -> None:
    compiled = torch.compile(model("triton").text_model, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="attention_mask has valid tokens after padding"):
        compiled(batch()["input_ids"], 1 - padding())


def test_classification_and_checkpointing() -> None:
    original = model("triton", "SiglipForImageClassification").train()
    original.vision_model.gradient_checkpointing_enable()
    compiled = torch.compile(original, fullgraph=True, backend="aot_eager")
    pixels, labels = batch()["pixel_values"], torch.tensor([0, 2, 1], device=DEVICE)
    results = []
    for run in (original, compiled):
        original.zero_grad()
        run(pixels, labels=labels).loss.backward()
        results.append({name: p.grad for name, p in original.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-5)


def test_the_default_compiler() -> None:
    """Inductor with its generated code: once, for inference, since its C++ takes long to compile."""
    layer = model("sdpa").vision_model.encoder.layers[0]
    x = torch.randn(2, 9, 64, device=DEVICE)
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_default_compiler_on_a_gpu(backend: str, mode: str) -> None:
    original = model(backend).train()
    compiled = torch.compile(original, fullgraph=True, mode=mode)
    expected = gradients(original, original, batch())
    for _ in range(3):  # the third replays a CUDA graph
        found = gradients(original, compiled, batch())
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)
