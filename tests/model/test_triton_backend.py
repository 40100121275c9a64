"""The whole model with our kernels: outputs and gradients equal to sdpa's, on the GPU or in Triton's interpreter."""

import pytest
import torch
from oracle import TINY_TEXT, TINY_VISION, randomised

import siglip_model
from siglip_kernels.device import interpreting

HEAD_DIM_72 = dict(hidden_size=144, intermediate_size=200, num_hidden_layers=2, num_attention_heads=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="needs a GPU or the interpreter")


def model(backend: str, text: dict, vision: dict) -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(text_config={**TINY_TEXT, **text}, vision_config={**TINY_VISION, **vision})
    return randomised(siglip_model.SiglipModel(config, backend=backend)).to(DEVICE)


def batch(image_size: int = 48) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (3, 16), generator=generator)
    pixels = torch.randn(3, 3, image_size, image_size, generator=generator)
    return {"input_ids": ids.to(DEVICE), "pixel_values": pixels.to(DEVICE)}


@pytest.mark.parametrize("shape", [{}, HEAD_DIM_72], ids=["head dim 32", "head dim 72"])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients(shape: dict, masked: bool) -> None:
    inputs = batch()
    if masked:
        inputs["attention_mask"] = torch.ones(3, 16, dtype=torch.long, device=DEVICE)
        inputs["attention_mask"][1, 5:] = 0
    models = {name: model(name, shape, shape) for name in ("sdpa", "triton")}
    outputs = {name: each(**inputs, return_loss=True) for name, each in models.items()}
    for output in outputs.values():
        output.loss.backward()
    for field in ("loss", "logits_per_image", "text_embeds", "image_embeds"):
        torch.testing.assert_close(outputs["triton"][field], outputs["sdpa"][field], rtol=1e-5, atol=1e-5)
    expected = dict(models["sdpa"].named_parameters())
    for name, parameter in models["triton"].named_parameters():
        scale = max(1.0, expected[name].grad.abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_interpolated_images_and_hidden_states() -> None:
    pixels = batch(80)["pixel_values"]
    kwargs = {"interpolate_pos_encoding": True, "output_hidden_states": True}
    with torch.no_grad():
        ours, expected = (model(name, {}, {}).get_image_features(pixels, **kwargs) for name in ("triton", "sdpa"))
    for left, right in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_attention_weights_and_dropout() -> None:
    ours = model("triton", {}, {})
    assert len(ours(**batch(), output_attentions=True).vision_model_output.attentions) == 3
    dropping = model("triton", {"attention_dropout": 0.1}, {})
    assert dropping(**batch()).logits_per_image.shape == (3, 3)  # no dropout in evaluation
    with pytest.raises(ValueError, match="attention_dropout is 0.1"):
        dropping.train()(**batch())


def test_a_mask_with_holes_is_refused() -> None:
    mask = torch.ones(3, 16, device=DEVICE)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask has valid tokens after padding"):
        model("triton", {}, {})(**batch(), attention_mask=mask)
