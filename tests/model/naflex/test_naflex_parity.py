"""SigLIP 2 at native resolution against transformers: every output field and every gradient, in fp32, within 1e-5."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from naflex import MIXED, VISION, images, peer_config, peer_model, project_model, texts
from oracle import leaves, randomised, same_weights, worst_difference

import siglip_model
from siglip_model.naflex import layout as naflex_layout
from siglip_model.naflex.embeddings import resized_positions

TOLERANCE = 1e-5
BATCHES = {
    "mixed": (MIXED, 24),
    "full": (((4, 4), (2, 8)), 16),
    "one patch": (((1, 1),), 1),
    "nearly empty": (((1, 1), (1, 2), (2, 2)), 40),
    "long": (((20, 3), (3, 20), (7, 9), (1, 63)), 64),
    "empty": ((), 4),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def without_padding(output: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tensor of an output, with zeros as the tokens of padding."""
    tensors = leaves(output)
    tokens = (len(mask), mask.shape[1], VISION["hidden_size"])
    return {
        name: tensor * mask[..., None] if tuple(tensor.shape) == tokens and "text" not in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "empty"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_output_field(kind: str, implementation: str) -> None:
    peer = peer_model(implementation)
    inputs = {**images(*BATCHES[kind]), **texts(len(BATCHES[kind][0]))}
    asked = {"return_loss": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = peer(**inputs, **asked)
        eager = project_model(peer, "eager")(**inputs, **asked)
        output = project_model(peer, "sdpa")(**inputs, **asked)
    assert worst_difference(eager, expected) < TOLERANCE  # padding included
    assert list(output) == list(expected) and isinstance(output, type(expected))
    mask = inputs["pixel_attention_mask"]
    assert worst_difference(without_padding(output, mask), without_padding(expected, mask)) < TOLERANCE
    assert worst_difference(without_padding(output, mask), leaves(output)) == 0  # tokens of padding are zeros


@pytest.mark.parametrize("asked", [[0], [-1, 1], 1], ids=str)
def test_chosen_hidden_states(asked: int | list[int]) -> None:
    peer = peer_model("eager")
    inputs = {**images(MIXED, 24), **texts(len(MIXED))}
    ours, theirs = (
        model(**inputs, output_hidden_states=asked).vision_model_output
        for model in (project_model(peer, "eager"), peer)
    )
    assert worst_difference(ours, theirs) < TOLERANCE
    assert [state is None for state in ours.hidden_states] == [state is None for state in theirs.hidden_states]


def test_names_of_transformers() -> None:
    peer = peer_model("eager")
    project = project_model(peer, "eager")
    ours, theirs = (model.vision_model.embeddings for model in (project, peer))
    for name in ("embed_dim", "patch_size", "num_patches", "position_embedding_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    for model in (project, project.vision_model, siglip_model.Siglip2ForImageClassification(project.config)):
        assert len(model(**model.dummy_inputs)[0]) == 3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_weights(backend: str) -> None:
    peer = peer_model()
    inputs = {**images(), **texts()}
    asked = {"output_attentions": True}
    output, expected = project_model(peer, backend)(**inputs, **asked), peer(**inputs, **asked)
    mask = inputs["pixel_attention_mask"].bool()
    for mine, other in zip(output.vision_model_output.attentions, expected.vision_model_output.attentions, strict=True):
        valid = mask[:, None, :, None].expand_as(mine)
        assert (mine - other)[valid].abs().max() < TOLERANCE
    assert worst_difference(output.logits_per_image, expected.logits_per_image) < TOLERANCE


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["mixed", "full"])
def test_gradient_of_every_parameter(kind: str, backend: str) -> None:
    peer = peer_model()
    project = project_model(peer, backend)
    inputs = {**images(*BATCHES[kind]), **texts(len(BATCHES[kind][0]))}
    gradients = []
    for model in (project, peer):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        model(**{**inputs, "pixel_values": pixels}, return_loss=True).loss.backward()
        gradients.append({"pixels": pixels.grad, **{name: each.grad for name, each in model.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        bound = TOLERANCE * max(1.0, expected.abs().max().item())
        assert (gradients[0][name] - expected).abs().max() < bound, name


@pytest.mark.parametrize("side", [1, 4, 16])
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (16, 16), (3, 5), (40, 2), (7, 31), (64, 64), (1, 13)])
def test_positions_are_those_of_interpolate(side: int, shape: tuple[int, int]) -> None:
    table = torch.randn(side**2, 6)
    square = table.T.reshape(1, 6, side, side)
    expected = F.interpolate(square, shape, mode="bilinear", align_corners=False, antialias=True).flatten(2)[0].T
    padded = shape[0] * shape[1] + 3
    resized = resized_positions(table, torch.tensor([[shape]]), torch.arange(padded))[0]
    assert (resized[:-3] - expected).abs().max() < TOLERANCE
    assert (resized[-3:] - expected[:1]).abs().max() < TOLERANCE  # padding


@pytest.mark.parametrize("rows", [2, 5, 40])
def test_positions_of_one_column_are_those_of_one_row(rows: int) -> None:
    # On the CPU, interpolate gives all rows of such a grid the value of the first (torch 2.13), and so transformers.
    table = torch.randn(4, 4, 6)
    row = table.permute(2, 1, 0)[None]
    expected = F.interpolate(row, (1, rows), mode="bilinear", align_corners=False, antialias=True)[0, :, 0].T
    resized = resized_positions(table.flatten(0, 1), torch.tensor([[(rows, 1)]]), torch.arange(rows))[0]
    assert (resized - expected).abs().max() < TOLERANCE


def test_positions_in_half_precision() -> None:
    table = torch.randn(256, 8)
    shapes, numbers = torch.tensor([[[7, 9]]]), torch.arange(63)
    expected = resized_positions(table.bfloat16().float(), shapes, numbers)
    resized = resized_positions(table.bfloat16(), shapes, numbers)
    assert resized.dtype == torch.bfloat16 and torch.equal(resized, expected.bfloat16())


@pytest.mark.parametrize("use_head", [True, False])
def test_vision_model_alone(use_head: bool) -> None:
    config = transformers.Siglip2VisionConfig(**VISION, vision_use_head=use_head)
    peer = randomised(transformers.Siglip2VisionModel(config))
    project = same_weights(
        siglip_model.Siglip2VisionModel(siglip_model.Siglip2VisionConfig.from_dict(config.to_dict())), peer
    )
    inputs = images()
    output, expected, mask = project(**inputs), peer(**inputs), inputs["pixel_attention_mask"]
    assert worst_difference(without_padding(output, mask), without_padding(expected, mask)) < TOLERANCE
    assert (output.pooler_output is None) == (not use_head)


def test_text_model_alone() -> None:
    peer = randomised(transformers.Siglip2TextModel(peer_config().text_config))
    config = siglip_model.Siglip2TextConfig.from_dict(peer.config.to_dict())
    project = same_weights(siglip_model.Siglip2TextModel(config), peer)
    assert worst_difference(project(**texts()), peer(**texts())) > TOLERANCE  # other texts
    inputs = texts()
    assert worst_difference(project(**inputs), peer(**inputs)) < TOLERANCE


def test_features() -> None:
    peer = peer_model()
    project = project_model(peer, "sdpa")
    inputs, ids = images(), texts()
    expected = peer.get_image_features(**inputs).pooler_output
    assert worst_difference(project.get_image_features(**inputs).pooler_output, expected) < TOLERANCE
    assert worst_difference(project.get_text_features(**ids), peer.get_text_features(**ids)) < TOLERANCE


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1, 0, 2]), torch.rand(5, 3)])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_classifier(labels: torch.Tensor, backend: str) -> None:
    config = peer_config()
    config.num_labels = 3
    peer = randomised(transformers.Siglip2ForImageClassification(config))
    project = same_weights(
        siglip_model.Siglip2ForImageClassification(
            siglip_model.Siglip2Config.from_dict(config.to_dict()), backend=backend
        ),
        peer,
    )
    inputs = images()
    output, expected = project(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert worst_difference(output, expected) < TOLERANCE
    output.loss.backward(), expected.loss.backward()
    for (name, mine), (_, other) in zip(project.named_parameters(), peer.named_parameters(), strict=True):
        assert (mine.grad is None) == ("head" in name), name
        if mine.grad is not None:
            assert (mine.grad - other.grad).abs().max() < TOLERANCE * max(1.0, other.grad.abs().max().item()), name


def test_a_classifier_averages_what_its_mask_marks() -> None:
    config = siglip_model.Siglip2Config.from_dict(peer_config(num_hidden_layers=1).to_dict())
    model = randomised(siglip_model.Siglip2ForImageClassification(config))
    inputs = images()
    expected, mask = model(**inputs).logits, inputs.pop("pixel_attention_mask")
    for other in (mask.bool(), mask * torch.arange(1, 25), mask.double()):  # any number but zero marks a patch
        assert torch.equal(model(**inputs, pixel_attention_mask=other).logits, expected)


def test_without_a_mask_all_patches_are_valid() -> None:
    peer = peer_model()
    inputs = images(*BATCHES["full"])
    del inputs["pixel_attention_mask"]
    expected = peer.get_image_features(**inputs)
    assert worst_difference(project_model(peer, "sdpa").get_image_features(**inputs), expected) < TOLERANCE


def test_no_images() -> None:
    for backend in ("eager", "sdpa"):
        inputs = images((), 4)
        inputs["spatial_shapes"] = inputs["spatial_shapes"].reshape(0, 2).long()
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].reshape(0, 4)
        output = project_model(peer_model(), backend).get_image_features(**inputs)
        assert output.last_hidden_state.shape == (0, 4, VISION["hidden_size"])


def test_each_image_is_as_alone() -> None:
    model = project_model(peer_model(), "sdpa")
    inputs = images()
    together = model.get_image_features(**inputs).pooler_output
    for index, (height, width) in enumerate(MIXED):
        alone = {name: value[index : index + 1] for name, value in inputs.items()}
        alone["pixel_values"] = alone["pixel_values"][:, : height * width]
        alone["pixel_attention_mask"] = alone["pixel_attention_mask"][:, : height * width]
        assert worst_difference(model.get_image_features(**alone).pooler_output[0], together[index]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    peer = peer_model()
    inputs = images()
    expected = project_model(peer, "sdpa").double().get_image_features(**inputs).pooler_output
    models = [project_model(peer, backend).to(dtype) for backend in ("eager", "sdpa")]
    errors = [(model.get_image_features(**inputs).pooler_output - expected).norm() for model in models]
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("kind", ["Siglip2Model", "Siglip2VisionModel", "Siglip2TextModel"])
def test_checkpoints_both_ways(kind: str, tmp_path: Path) -> None:
    peer = peer_model()
    peer = {"Siglip2VisionModel": peer.vision_model, "Siglip2TextModel": peer.text_model}.get(kind, peer)
    inputs = {"Siglip2VisionModel": images(), "Siglip2TextModel": texts()}.get(kind, {**images(), **texts()})
    peer.save_pretrained(tmp_path / "there")
    project = siglip_model.AutoModel.from_pretrained(tmp_path / "there", backend="eager")
    assert type(project).__name__ == kind
    assert worst_difference(project(**inputs), peer(**inputs)) < TOLERANCE
    project.save_pretrained(tmp_path / "here")
    back = getattr(transformers, kind).from_pretrained(tmp_path / "here", attn_implementation="eager")
    assert worst_difference(project(**inputs), back(**inputs)) < TOLERANCE
    assert project.config.to_dict() == siglip_model.AutoModel.from_pretrained(tmp_path / "here").config.to_dict()
    if kind == "Siglip2Model":
        tower = siglip_model.Siglip2VisionModel.from_pretrained(tmp_path / "here")
        assert torch.equal(tower.head.probe, project.vision_model.head.probe)
        classifier = siglip_model.AutoModelForImageClassification.from_pretrained(tmp_path / "here", num_labels=4)
        assert type(classifier).__name__ == "Siglip2ForImageClassification"
        zero_shot = siglip_model.AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "here")
        assert type(zero_shot).__name__ == "Siglip2Model"


def test_defaults_and_initial_weights_are_those_of_transformers() -> None:
    for name in ("Siglip2Config", "Siglip2TextConfig", "Siglip2VisionConfig"):
        mine, other = getattr(siglip_model, name)(), getattr(transformers, name)()
        for field in type(mine)._field_types():
            if not field.endswith("_config"):
                assert getattr(mine, field) == getattr(other, field), (name, field)
        assert mine.model_type == other.model_type
    peer = transformers.Siglip2Model(peer_config())
    project = siglip_model.Siglip2Model(siglip_model.Siglip2Config.from_dict(peer.config.to_dict()))
    expected = dict(peer.named_parameters())
    assert dict(project.named_parameters()).keys() == expected.keys()
    for name, parameter in project.named_parameters():
        assert parameter.shape == expected[name].shape, name
        if parameter.numel() > 1000:
            assert 0.85 < parameter.std() / expected[name].std() < 1.15, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_deterministic(checkpointing: bool) -> None:
    model = project_model(peer_model(), "sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = {**images(), **texts()}
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        runs.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *runs))


REFUSED = {
    "no patches": ({"spatial_shapes": torch.tensor([[4, 4], [0, 3]])}, "0 × 3 patches for image 1; supported: "),
    "negative": ({"spatial_shapes": torch.tensor([[4, 4], [-2, -3]])}, "-2 × -3 patches for image 1"),
    "too many": ({"spatial_shapes": torch.tensor([[4, 4], [5, 5]])}, "5 × 5 patches for image 1; .* at most the 16"),
    "other mask": ({"pixel_attention_mask": torch.ones(2, 16)}, "pixel_attention_mask does not mark .* image 1"),
    "no mask": ({"pixel_attention_mask": None}, "pixel_attention_mask is None, so all are valid, .* 2 × 3 patches"),
    "hole": ({"pixel_attention_mask": torch.arange(16).expand(2, 16) % 3}, "pixel_attention_mask does .* image 0"),
    "mask of another size": ({"pixel_attention_mask": torch.ones(2, 15)}, r"pixel_attention_mask has shape \(2, 15\)"),
    "mask of lists": ({"pixel_attention_mask": [[1]]}, "pixel_attention_mask is list"),
    "no shapes": ({"spatial_shapes": None}, "spatial_shapes is NoneType"),
    "floating shapes": ({"spatial_shapes": torch.ones(2, 2)}, "spatial_shapes has .* dtype torch.float32"),
    "shapes of another batch": ({"spatial_shapes": torch.ones(3, 2).long()}, r"spatial_shapes has shape \(3, 2\)"),
    "pictures": ({"pixel_values": torch.rand(2, 3, 64, 64)}, r"pixel_values has shape \(2, 3, 64, 64\)"),
    "other patches": ({"pixel_values": torch.rand(2, 16, 588)}, r"supported: .* \(batch, patches, 768\)"),
    "no pixels": ({"pixel_values": None}, "pixel_values is None"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, backend: str) -> None:
    model = siglip_model.Siglip2VisionModel(siglip_model.Siglip2VisionConfig(**VISION), backend=backend)
    changed, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model(**{**images(((4, 4), (2, 3)), 16), **changed})


VALUES_REFUSED = ("no patches", "negative", "too many", "other mask", "no mask", "hole")


@pytest.mark.parametrize("case", VALUES_REFUSED)
def test_refused_where_the_host_reads_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an assertion, which a GPU checks on its own: beside tensors on a GPU, compiled, and exported."""
    monkeypatch.setattr("siglip_model.naflex.layout.can_read_values", lambda tensor: False)
    model = siglip_model.Siglip2VisionModel(siglip_model.Siglip2VisionConfig(**VISION))
    with pytest.raises(RuntimeError, match="spatial_shapes and pixel_attention_mask contradict each other"):
        model(**{**images(((4, 4), (2, 3)), 16), **REFUSED[case][0]})


def test_a_mask_on_another_device_than_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = images(((4, 4), (2, 3)), 16)
    mask, shapes = inputs["pixel_attention_mask"], inputs["spatial_shapes"]
    checked_on: list[torch.device] = []
    monkeypatch.setattr(naflex_layout, "_check_on_device", lambda *arguments: checked_on.append(arguments[-1]))
    for device in ("meta", "cpu"):  # meta for a GPU, which checks its mask on its own
        assert naflex_layout.check_values(mask.to(device), shapes, 16, mask.device, read=True) == [16, 6]
    assert checked_on == [torch.device("meta")]

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    shapes = shapes.as_subclass(OnGpu)
    assert naflex_layout.check_values(mask, shapes, 16, shapes.device, read=True) == [16, 6]
    with pytest.raises(ValueError, match="pixel_attention_mask does not mark .* image 1"):
        naflex_layout.check_values(torch.ones_like(mask), shapes, 16, shapes.device, read=True)


def test_on_the_meta_device() -> None:
    model = project_model(peer_model(num_hidden_layers=1), "sdpa").vision_model.to("meta")
    inputs = images()
    pixels = inputs["pixel_values"].to("meta")
    for each in (inputs, {name: tensor.to("meta") for name, tensor in inputs.items()}):
        assert model(**{**each, "pixel_values": pixels}).pooler_output.shape == (len(MIXED), VISION["hidden_size"])


def test_refused_configurations() -> None:
    with pytest.raises(ValueError, match="num_patches is 15; supported: squares"):
        siglip_model.Siglip2VisionConfig(num_patches=15)
    with pytest.raises(TypeError, match="text_config is a Siglip2TextConfig; supported: SiglipTextConfig"):
        siglip_model.SiglipConfig(text_config=siglip_model.Siglip2TextConfig())
    with pytest.raises(TypeError, match=r"\(SiglipVisionConfig\); supported: Siglip2VisionConfig"):
        siglip_model.Siglip2Config(vision_config=siglip_model.SiglipVisionConfig())
