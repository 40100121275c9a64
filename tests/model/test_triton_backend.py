"""The whole model with the Triton kernels, on a GPU or in the interpreter: the results of `eager`, as accurate."""

import logging
from dataclasses import fields
from typing import Any

import pytest
import torch
from error_budget import check_error
from oracle import TINY_TEXT, TINY_VISION, randomised, worst_difference
from torch import Tensor

import siglip_model
from siglip_kernels.device import interpreting
from siglip_model import backends, encoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
BASE_LIKE = {**TWO_LAYERS, "hidden_size": 128, "intermediate_size": 512}  # head dim 64
SO400M_LIKE = {**TWO_LAYERS, "hidden_size": 144, "intermediate_size": 538}  # head dim 72, and 538 = 144 * 4304 / 1152
CONFIGS = {
    "base": ({**TINY_TEXT, **BASE_LIKE}, {**TINY_VISION, **BASE_LIKE}),
    "so400m": ({**TINY_TEXT, **SO400M_LIKE}, {**TINY_VISION, **SO400M_LIKE, "image_size": 58, "patch_size": 14}),
}
ONE_LAYER = {"num_hidden_layers": 1}

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="needs a GPU or the interpreter")


def model(backend: str, kind: str = "SiglipModel", *, text: dict | None = None, vision: dict | None = None) -> Any:
    """A tiny model with the same random weights under every backend. text, vision: changes of the configuration."""
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **ONE_LAYER, **(text or {})},
        vision_config={**TINY_VISION, **ONE_LAYER, **(vision or {})},
        num_labels=5,
    )
    return randomised(getattr(siglip_model, kind)(config, backend=backend)).to(DEVICE)


def batch(size: int = 3, image_size: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (size, 16), generator=generator)
    pixels = torch.randn(size, 3, image_size, image_size, generator=generator)
    return {"input_ids": ids.to(DEVICE), "pixel_values": pixels.to(DEVICE)}


def padding(size: int = 3) -> Tensor:
    mask = torch.ones(size, 16, dtype=torch.long, device=DEVICE)
    mask[1, 5:] = 0
    return mask


def close(found: object, expected: object, tolerance: float = 1e-5) -> None:
    assert worst_difference(found, expected) < tolerance


def results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, loss and every gradient."""
    output = model(**inputs, return_loss=True)
    output.loss.backward()
    found = {name: output[name].detach() for name in ("loss", "logits_per_image", "text_embeds", "image_embeds")}
    for tower in ("text_model_output", "vision_model_output"):
        found[tower] = output[tower].last_hidden_state.detach()
    return {**found, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize(
    "name, dtype",
    [("base", torch.float32), ("base", torch.bfloat16), ("so400m", torch.float32), ("so400m", torch.float16)],
)
def test_image_text_loss_and_gradients_within_the_budget(name: str, dtype: torch.dtype) -> None:
    """The error budget of outputs, loss and every gradient.

    A scalar is what is left of nine larger terms, and a logit of the terms of a product of unit vectors, which cancel.
    How eager rounds these depends on the CPU.
    """
    text, vision = CONFIGS[name]
    config = siglip_model.SiglipConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    weights = randomised(siglip_model.SiglipModel(config)).to(dtype).state_dict()
    inputs = batch(image_size=vision["image_size"])
    if name == "base":
        inputs["attention_mask"] = padding()
    found = {}
    for backend, precision in (("fp64", torch.float64), ("eager", dtype), ("triton", dtype)):
        project = siglip_model.SiglipModel(config, backend="eager" if backend == "fp64" else backend)
        project.load_state_dict(weights)
        # The pixels are rounded to the weights' dtype for all three.
        pixels = inputs["pixel_values"].to(dtype).to(precision)
        found[backend] = results(project.to(DEVICE, precision).eval(), {**inputs, "pixel_values": pixels})
    scale = weights["logit_scale"].double().exp().item()
    for key, exact in found["fp64"].items():
        assert found["triton"][key].dtype == found["eager"][key].dtype, key
        size = 8.0 if exact.numel() == 1 else 0.0
        if key == "logits_per_image":
            size = scale * exact.numel() ** 0.5
        check_error(found["triton"][key], found["eager"][key], exact, key, dtype=dtype, size=size)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_attention_weights(masked: bool, caplog: pytest.LogCaptureFixture) -> None:
    encoder._warn_once_about_reference_attention.cache_clear()
    inputs = {**batch(), **({"attention_mask": padding()} if masked else {})}
    everything = {**inputs, "output_hidden_states": True, "output_attentions": True, "return_loss": True}
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        project = model("triton")
        close(project(**everything), model("eager")(**everything))
        project(**everything)
    said = [record for record in caplog.records if "triton backend keeps no attention weights" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize("size", [(80, 80), (64, 80), (50, 47)])
def test_interpolated_images(size: tuple[int, int]) -> None:
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outputs = []
    for backend in ("triton", "eager"):
        project = model(backend)
        outputs.append(project.get_image_features(pixels, interpolate_pos_encoding=True))
        outputs[-1].pooler_output.square().sum().backward()
        outputs.append(project.vision_model.embeddings.position_embedding.weight.grad)
    close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3], rtol=1e-4, atol=1e-4)


def test_masks_of_other_kinds_are_refused() -> None:
    project = model("triton")
    for mask, message in (
        (1 - padding(), "valid tokens after padding"),
        (torch.ones(3, 1, 16, 16, device=DEVICE), "attention_mask has 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            project(**batch(), attention_mask=mask)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_mask_of_another_shape_than_the_texts(backend: str) -> None:
    project = model(backend)
    for shape in ((3, 15), (2, 16), (3, 17)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*; supported: \(3, 16\), that of input_ids"):
            project(**batch(), attention_mask=torch.ones(shape, device=DEVICE))
    with torch.no_grad():
        close(
            project(**batch(), attention_mask=padding()[1:2]),
            project(**batch(), attention_mask=padding()[[1, 1, 1]]),
            1e-6,
        )


def test_a_text_without_any_valid_token() -> None:
    mask = padding()
    mask[2] = 0
    found = model("triton")(**batch(), attention_mask=mask)
    assert found.text_embeds.isfinite().all()
    close(found.text_embeds[:2], model("eager")(**batch(), attention_mask=mask).text_embeds[:2])


@pytest.mark.parametrize("kind", ["SiglipTextModel", "SiglipVisionModel"])
def test_towers_alone(kind: str) -> None:
    torch.manual_seed(0)
    text = kind == "SiglipTextModel"
    tiny = {**(TINY_TEXT if text else TINY_VISION), **ONE_LAYER, **({"projection_size": 40} if text else {})}
    config = getattr(siglip_model, kind).config_class(**tiny)
    weights = randomised(getattr(siglip_model, kind)(config)).state_dict()
    outputs = []
    for backend in ("triton", "eager"):
        project = getattr(siglip_model, kind)(config, backend=backend)
        project.load_state_dict(weights)
        with torch.no_grad():
            outputs.append(project.to(DEVICE).eval()(batch()["input_ids" if text else "pixel_values"]))
    close(*outputs)


def test_classification() -> None:
    inputs = {"pixel_values": batch()["pixel_values"], "labels": torch.tensor([4, 0, 2], device=DEVICE)}
    outputs, gradients = [], []
    for backend in ("triton", "eager"):
        project = model(backend, "SiglipForImageClassification")
        outputs.append(project(**inputs))
        outputs[-1].loss.backward()
        gradients.append({name: p.grad for name, p in project.named_parameters() if p.grad is not None})
    close(*outputs)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_new"])
def test_other_activations(activation: str) -> None:
    change = {"hidden_act": activation}
    with torch.no_grad():
        outputs = [model(backend, text=change, vision=change)(**batch()) for backend in ("triton", "eager")]
    close(*outputs)


@pytest.mark.parametrize("images, texts", [(0, 2), (2, 0), (0, 0)])
def test_empty_batches(images: int, texts: int) -> None:
    inputs = {"pixel_values": batch()["pixel_values"][:images], "input_ids": batch()["input_ids"][:texts]}
    outputs = []
    for backend in ("triton", "eager"):
        project = model(backend)
        outputs.append(project(**inputs))
        outputs[-1].logits_per_image.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in project.parameters())
    assert outputs[0].logits_per_image.shape == outputs[1].logits_per_image.shape == (images, texts)
    assert outputs[0].vision_model_output.last_hidden_state.shape == (images, 9, 64)


def test_dropout() -> None:
    dropping = model("triton", text={"attention_dropout": 0.1})
    assert dropping(**batch()).logits_per_image.shape == (3, 3)  # none in evaluation
    with pytest.raises(ValueError, match="attention_dropout is 0.1; supported: 0 in training"):
        dropping.train()(**batch())


def test_gradient_checkpointing_gives_the_same_bits() -> None:
    gradients = []
    for enable in (False, True):
        project = model("triton").train()
        if enable:
            project.gradient_checkpointing_enable()
        assert project.is_gradient_checkpointing == enable
        gradients.append(results(project, batch()))
    project.gradient_checkpointing_disable()
    assert not project.is_gradient_checkpointing
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_only_what_is_trained_gets_gradients() -> None:
    trained = ("vision_model.encoder.layers.0.mlp.fc2.bias", "vision_model.encoder.layers.0.self_attn.k_proj.weight",
               "vision_model.head.probe", "text_model.head.weight", "logit_bias")  # fmt: skip
    gradients = []
    for backend in ("triton", "eager"):
        project = model(backend)
        for name, parameter in project.named_parameters():
            parameter.requires_grad_(name in trained)
        project(**batch(), return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in project.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == set(trained)
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_of_the_pixels() -> None:
    gradients = []
    for backend in ("triton", "eager"):
        pixels = batch()["pixel_values"].requires_grad_()
        model(backend).get_image_features(pixels).pooler_output.square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Results have the dtypes of eager's, and are as close to fp32's."""
    found = {}
    for backend in ("eager", "triton"):
        project = model(backend)
        with torch.autocast(DEVICE, dtype):
            output = project(**batch(), return_loss=True)
        output.loss.backward()
        found[backend] = (output, [p.grad for p in project.parameters()])
    exact = model("eager")(**batch(), return_loss=True)
    exact.loss.backward()
    for field in ("logits_per_image", "image_embeds", "text_embeds", "loss"):
        mine, peer = found["triton"][0][field], found["eager"][0][field]
        assert mine.dtype == peer.dtype, field
        check_error(mine, peer, exact[field], field, dtype=dtype)
    assert {gradient.dtype for gradient in found["triton"][1]} == {torch.float32}
    for mine, peer in zip(found["triton"][1], found["eager"][1], strict=True):
        assert (mine - peer).norm() <= 0.05 * peer.norm() + 1e-3


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    project = model("triton").train()
    optimizer = torch.optim.SGD(project.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = project(**batch(), return_loss=True).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = project.text_model.head.weight.detach().clone()
    step()
    after = project.text_model.head.weight.detach().clone()
    assert not torch.equal(before, after) and after.isfinite().all()
    scaler.update(2.0**100)
    step()
    assert torch.equal(project.text_model.head.weight, after)  # infinite gradients: no step, a lower scale
    assert scaler.get_scale() < 2.0**100


def test_the_backend_changes_at_any_time() -> None:
    project = model("eager")
    with torch.no_grad():
        before = project(**batch())
        project.set_backend("triton")
        close(project(**batch()), before)
        project.set_backend("sdpa")
        close(project(**batch()), before)


def test_every_operation_is_ours() -> None:
    """Each operation is a kernel; none is PyTorch's by mistake."""
    for field in fields(backends.TRITON):
        if field.type == "Operation":
            assert getattr(backends.TRITON, field.name) is not getattr(backends.EAGER, field.name)
            assert getattr(backends.TRITON, field.name) is not getattr(backends.SDPA, field.name)


def test_images_of_one_patch() -> None:
    """transformers adds all positions to it, and so does every backend."""
    pixels = batch(image_size=16)["pixel_values"]
    with torch.no_grad():
        outputs = [model(backend).get_image_features(pixels) for backend in ("triton", "eager")]
    assert outputs[0].last_hidden_state.shape == (3, 9, 64)
    close(*outputs)
