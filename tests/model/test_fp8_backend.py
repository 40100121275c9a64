"""The whole model in fp8: near the embeddings without, inference only, and nothing about the model changes."""

import logging
from pathlib import Path
from typing import Any

import machines
import naflex
import pytest
import torch
import torch.nn.functional as F
from oracle import TINY_TEXT, TINY_VISION, randomised
from safetensors.torch import load_file
from torch import Tensor, nn

import siglip_model
from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels.device import interpreting
from siglip_kernels.fp8.weights import quantised_bytes
from siglip_model import backends, fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_LAYERS = {"num_hidden_layers": 2}

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="needs a GPU or the interpreter")


def model(backend: str = "triton_fp8", dtype: torch.dtype = torch.bfloat16, **vision: Any) -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **TWO_LAYERS}, vision_config={**TINY_VISION, **TWO_LAYERS, **vision}
    )
    return randomised(siglip_model.SiglipModel(config)).to(DEVICE, dtype).eval()


def with_fp8(**options: Any) -> siglip_model.SiglipModel:
    made = model(**options)
    made.set_backend("triton_fp8")
    return made


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, pixels = torch.randint(0, 99, (3, 16), generator=generator), torch.randn(3, 3, 48, 48, generator=generator)
    return {"input_ids": ids.to(DEVICE), "pixel_values": pixels.to(DEVICE)}


@torch.no_grad()
def embeddings(found: siglip_model.SiglipModel, **options: Any) -> Tensor:
    output = found(**batch(), **options)
    return torch.cat([output.text_embeds, output.image_embeds]).float()


def check_near(found: Tensor, wanted: Tensor) -> None:
    """But not equal: equal ones were not computed in fp8."""
    cosine = F.cosine_similarity(found, wanted)
    assert cosine.min() > 0.99 and not torch.equal(found, wanted)


def test_embeddings_are_near_those_without_fp8() -> None:
    found = with_fp8()
    assert found.backend == "triton_fp8" and found.vision_model.ops is backends.TRITON_FP8
    report = fp8.report(found)
    assert report.projections == 2 * 2 * 6 + 2 and report.left == {}  # and the MLP of the pooling head
    weights = 4 * (4 * 64 * 64 + 2 * 64 * 144) + 2 * 64 * 144
    assert weights < report.bytes < 1.2 * weights
    check_near(embeddings(found), embeddings(model()))


def test_padded_texts() -> None:
    mask = torch.ones(3, 16, dtype=torch.long, device=DEVICE)
    mask[1, 5:] = 0
    check_near(embeddings(with_fp8(), attention_mask=mask), embeddings(model(), attention_mask=mask))


def test_a_part_of_the_model() -> None:
    found = model()
    found.set_backend({"vision_config": "triton_fp8"})
    found_embeddings, wanted = embeddings(found), embeddings(model())
    assert torch.equal(found_embeddings[:3], wanted[:3])
    check_near(found_embeddings[3:], wanted[3:])


def test_attention_weights_are_those_of_the_reference() -> None:
    with torch.no_grad():
        output = with_fp8().vision_model(batch()["pixel_values"], output_attentions=True)
        wanted = model().vision_model(batch()["pixel_values"], output_attentions=True)
    for found, expected in zip(output.attentions, wanted.attentions, strict=True):
        assert (found - expected).abs().max() < 0.05


def test_images_of_different_sizes_are_packed() -> None:
    torch.manual_seed(0)
    peer = naflex.peer_model()
    inputs = {name: tensor.to(DEVICE) for name, tensor in naflex.images().items()}
    results = []
    for backend in ("sdpa", "triton_fp8"):
        found = naflex.project_model(peer, "sdpa").to(DEVICE, torch.bfloat16).eval()
        found.set_backend(backend)
        with torch.no_grad():
            results.append(found.get_image_features(**inputs).pooler_output.float())
    check_near(*results)


# Inference only -------------------------------------------------------------------------------------------------------


def test_training_mode_raises() -> None:
    found = with_fp8().train()
    supported = r"supported: model.eval\(\), or eager, sdpa, flash_attention_2, triton to train"
    for tower, name in ((found.vision_model, "pixel_values"), (found.text_model, "input_ids")):
        with pytest.raises(UnsupportedInputError, match=rf"backend is 'triton_fp8', .* {supported}"):
            tower(batch()[name])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_raise(compiled: bool) -> None:
    found = with_fp8(num_hidden_layers=1)
    tower = torch.compile(found.vision_model, backend="aot_eager") if compiled else found.vision_model
    pooled = tower(batch()["pixel_values"]).pooler_output
    with pytest.raises(UnsupportedInputError, match=r"x needs gradients; supported: inference"):
        pooled.sum().backward()


def test_fp32_models_need_autocast() -> None:
    found = with_fp8(dtype=torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"has dtype torch.float32; supported: float16 and bfloat16"):
        embeddings(found)
    with torch.autocast(DEVICE, torch.bfloat16):
        check_near(embeddings(found), embeddings(model(dtype=torch.float32)))


@torch.no_grad()
def test_compiled_without_graph_breaks() -> None:
    found = with_fp8(num_hidden_layers=1)
    compiled = torch.compile(found.vision_model, fullgraph=True, backend="aot_eager")
    pixels = batch()["pixel_values"]
    assert torch.equal(compiled(pixels).pooler_output, found.vision_model(pixels).pooler_output)


# The model stays as it is ---------------------------------------------------------------------------------------------


def test_the_original_weights_are_saved(tmp_path: Path) -> None:
    plain, found = model(), with_fp8()
    embeddings(found)
    assert found.state_dict().keys() == plain.state_dict().keys()
    found.save_pretrained(tmp_path)
    assert "fp8" not in (tmp_path / "config.json").read_text()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, plain.state_dict()[name].cpu()) and tensor.dtype == torch.bfloat16
    loaded = siglip_model.SiglipModel.from_pretrained(tmp_path, backend="triton_fp8", device_map=DEVICE)
    assert loaded.backend == "triton_fp8" and torch.equal(embeddings(loaded), embeddings(found))


def test_weights_that_change_are_quantised_again() -> None:
    found, other = (with_fp8(num_hidden_layers=1).vision_model for _ in range(2))
    before = pooled(found)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found.load_state_dict(other.state_dict())
    assert torch.equal(pooled(found), pooled(other)) and not torch.equal(pooled(found), before)
    for mine, others in zip(found.parameters(), other.parameters(), strict=True):
        mine.data.mul_(1.5)  # which nothing notices
        others.data = others.data * 1.5
    found.set_backend("triton_fp8")
    assert torch.equal(pooled(found), pooled(other))


@torch.no_grad()
def pooled(tower: siglip_model.SiglipVisionModel) -> Tensor:
    found: Tensor = tower(batch()["pixel_values"]).pooler_output
    return found


def test_the_backend_changes_at_any_time() -> None:
    found = model()
    before = embeddings(found)
    found.set_backend("triton_fp8")
    embeddings(found)
    found.set_backend("sdpa")
    assert torch.equal(embeddings(found), before)


# What is left, and why ------------------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """As LoRA's, with an adapter that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_layers_of_others_are_called_and_named(caplog: pytest.LogCaptureFixture) -> None:
    found = model()
    layers = found.vision_model.encoder.layers
    layers[0].self_attn.q_proj.__class__ = Adapted
    calls = []
    layers[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING):
        found.set_backend("triton_fp8")
    prefix = "not in fp8 because of vision_model.encoder.layers"
    not_torchs = f"it is a {__name__}.Adapted, not a torch.nn.modules.linear.Linear"
    assert f"{prefix}.0.self_attn.q_proj: {not_torchs}" in caplog.text
    assert f"{prefix}.1.mlp.fc1: it has hooks or a forward of its own" in caplog.text
    assert fp8.report(found).projections == 26 - 4 - 2
    check_near(embeddings(found), embeddings(model()))
    assert calls == [1]


def test_what_is_beside_wrapped_and_hooked_layers_is_counted() -> None:
    found = model()
    layers = found.vision_model.encoder.layers
    layers[0].self_attn.out_proj.__class__ = Adapted
    layers[0].mlp.register_forward_hook(lambda *_: None)
    layers[1].layer_norm2.register_forward_hook(lambda *_: None)
    found.set_backend("triton_fp8")
    report = fp8.report(found)
    assert report.projections == 26 - 1 and list(report.left) == ["vision_model.encoder.layers.0.self_attn.out_proj"]
    embeddings(found)
    quantised = quantised_bytes(found.parameters())
    assert quantised == report.bytes + 8 * (26 - 1 - 2 * 4)  # the bounds of each product; q, k and v are one


def test_other_activations_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = with_fp8(hidden_act="gelu")
    assert "vision_model.encoder.layers.1.mlp: it has the activation 'gelu', not GELU by tanh" in caplog.text
    check_near(embeddings(found), embeddings(model(hidden_act="gelu")))


def test_older_gpus_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    machines.report(monkeypatch, machines.A100, machines.H100)
    message = "backend 'triton_fp8' cannot run here: NVIDIA A100.* has compute capability 8.0; products of fp8 need 8.9"
    with pytest.raises(MissingBackendError, match=message):
        backends.resolve("triton_fp8", torch.device("cuda", 0))
    assert backends.resolve("triton_fp8", torch.device("cuda", 1)) is backends.TRITON_FP8


# The check at load ----------------------------------------------------------------------------------------------------


def test_the_check_accepts_the_demo_checkpoint() -> None:
    from siglip_model.demo import CHECKPOINT

    found = siglip_model.SiglipModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16, device_map=DEVICE)
    found.set_backend("triton_fp8")
    assert 0.995 < fp8.check(found) < 1
    assert found.backend == found.vision_model.backend == "triton_fp8"


def test_the_demo_checkpoint_agrees_with_fp32() -> None:
    """As the recipe judges it on the whole of the unseen design, here on the bundled pictures of it."""
    from PIL import Image

    from siglip_model.demo import CHECKPOINT, PICTURES
    from siglip_model.demo.recipe.fp8 import compare, embed

    paths = sorted(PICTURES.glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in (*paths, *paths[:2])]  # ten-way needs ten
    names = [*(path.stem.replace("-", " ") for path in paths), "fire engine", "umbrella"]
    exact = embed(CHECKPOINT, pictures, names, "sdpa", torch.float32)
    found = embed(CHECKPOINT, pictures, names, fp8.BACKEND, torch.bfloat16, DEVICE)
    compared = compare(found, exact, torch.tensor([*range(8), 0, 1]))
    assert compared.problems() == [] and compared.same_first == 1
    assert compared.score.top1 == 1 and max(cosine.max() for cosine in compared.cosines) < 1 - 1e-6


def test_the_check_takes_images_at_native_resolution() -> None:
    torch.manual_seed(0)
    found = naflex.project_model(naflex.peer_model(), "sdpa").to(DEVICE, torch.bfloat16).eval()
    found.set_backend("triton_fp8")
    assert 0.98 < fp8.check(found, least_cosine=0.98) < 1


def test_the_check_refuses_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_fp8()
    with pytest.raises(
        UnsupportedInputError, match=r"check: backend is 'triton_fp8', .* a cosine of 0.99\d\d to those"
    ):
        fp8.check(found, least_cosine=1.01)
    assert found.vision_model.backend == "triton_fp8"
    found.save_pretrained(tmp_path)
    monkeypatch.setattr(fp8, "_embeddings", lambda tower, pictures: torch.randn(8, 64))
    with pytest.raises(UnsupportedInputError, match="use the backend 'triton'"):
        siglip_model.SiglipModel.from_pretrained(tmp_path, backend="triton_fp8", check=True, device_map=DEVICE)


@pytest.mark.parametrize(
    ("kind", "backend", "reason"),
    [
        ("SiglipModel", "sdpa", "has an image tower with the backend 'sdpa'"),
        ("SiglipTextModel", "triton_fp8", "has no"),
    ],
)
def test_the_check_needs_images_in_fp8(kind: str, backend: str, reason: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedInputError, match=f"check: model {reason}"):
        getattr(siglip_model, kind).from_pretrained(tmp_path, backend=backend, check=True, device_map=DEVICE)
