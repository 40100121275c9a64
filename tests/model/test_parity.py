"""The model against transformers: every output field and every gradient, in fp32, within 1e-5."""

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from image_samples import NEW_ENOUGH
from oracle import (
    BASE_LIKE,
    SO400M_LIKE,
    TINY_TEXT,
    TINY_VISION,
    project_model,
    randomised,
    same_weights,
    transformers_model,
    worst_difference,
)

import siglip_model
from siglip_model import backends, layers

TOLERANCE = 1e-5
SHAPES = {"tiny": (TINY_TEXT, TINY_VISION), "base": BASE_LIKE, "so400m": SO400M_LIKE}
EVERYTHING = {"return_loss": True, "output_hidden_states": True, "output_attentions": True}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def batch(peer: transformers.SiglipModel, size: int = 3) -> dict[str, torch.Tensor]:
    text, vision = peer.config.text_config, peer.config.vision_config
    return {
        "input_ids": torch.randint(0, text.vocab_size, (size, text.max_position_embeddings)),
        "pixel_values": torch.randn(size, 3, vision.image_size, vision.image_size),
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_output_field(shape: str, backend: str) -> None:
    peer = transformers_model(*SHAPES[shape])
    project = project_model(peer, backend)
    inputs = batch(peer)
    with torch.no_grad():
        assert worst_difference(project(**inputs, **EVERYTHING), peer(**inputs, **EVERYTHING)) < TOLERANCE


@pytest.mark.skipif(not NEW_ENOUGH, reason="transformers 5.17 returns all hidden states")
@pytest.mark.parametrize("asked", [[0], [-1, 1], (2, 9, -9), 1, [7]], ids=str)
def test_chosen_hidden_states(asked: int | list[int]) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    inputs = batch(peer)
    ours, theirs = (model(**inputs, output_hidden_states=asked) for model in (project, peer))
    assert worst_difference(ours, theirs) < TOLERANCE
    for tower in ("text_model_output", "vision_model_output"):
        here, there = (output[tower].hidden_states for output in (ours, theirs))
        assert [state is None for state in here] == [state is None for state in there]


def test_refused_hidden_states() -> None:
    project = project_model(transformers_model(TINY_TEXT, TINY_VISION), "sdpa")
    with pytest.raises(ValueError, match="output_hidden_states is 'last'; supported: True, False, an index or a list"):
        project.text_model(torch.zeros(1, 3, dtype=torch.long), output_hidden_states="last")


def test_inference_keeps_one_hidden_state() -> None:
    encoder = project_model(transformers_model(TINY_TEXT, TINY_VISION), "sdpa").vision_model.encoder
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def record(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.append(weakref.ref(output))
        alive.append(sum(state() is not None for state in seen))

    for layer in encoder.layers:
        layer.register_forward_hook(record)
    for asked, expected in ((False, 2), (True, len(encoder.layers)), ([0], 2)):
        seen.clear()
        alive.clear()
        with torch.no_grad():
            encoder(torch.randn(1, 9, TINY_VISION["hidden_size"]), output_hidden_states=asked)
        assert max(alive) == expected == alive[-1]  # a layer's input and its output, or all outputs


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["tiny", "so400m"])
def test_gradient_of_every_parameter(shape: str, backend: str) -> None:
    peer = transformers_model(*SHAPES[shape])
    project = project_model(peer, backend)
    inputs = batch(peer)
    for model in (project, peer):
        model(**inputs, return_loss=True).loss.backward()
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert {name for name, _ in project.named_parameters()} == expected.keys()
    for name, parameter in project.named_parameters():
        # Tokens are small here (see `randomised`), so gradients behind them are large: relative where above 1.
        bound = TOLERANCE * max(1.0, expected[name].abs().max().item())
        assert (parameter.grad - expected[name]).abs().max() < bound, name


def text_masks(batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    padded = torch.ones(batch_size, tokens, dtype=torch.long)
    padded[0, tokens // 2 :] = 0
    holes = padded.clone()
    holes[1, ::3] = 0
    dense = torch.zeros(batch_size, 1, tokens, tokens).masked_fill(
        torch.rand(batch_size, 1, tokens, tokens) < 0.3, -1e4
    )
    return {"padded": padded, "padded bool": padded.bool(), "holes": holes, "float": holes.float(), "dense": dense}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["padded", "padded bool", "holes", "float", "dense"])
def test_attention_mask(kind: str, backend: str) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION, backend)
    project = project_model(peer, backend)
    inputs = batch(peer)
    inputs["attention_mask"] = text_masks(3, inputs["input_ids"].shape[1])[kind]
    with torch.no_grad():
        assert worst_difference(project(**inputs), peer(**inputs)) < TOLERANCE
        unmasked = project(**{**inputs, "attention_mask": None})
    assert (unmasked.logits_per_text - project(**inputs).logits_per_text).abs().max() > 1e-4


def test_position_ids_and_shorter_texts() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    ids = torch.randint(0, 99, (2, 7))
    positions = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    for given in (None, positions):
        expected = peer.get_text_features(ids, position_ids=given)
        assert worst_difference(project.get_text_features(ids, position_ids=given), expected) < TOLERANCE


@pytest.mark.parametrize("size", [(48, 48), (64, 80), (96, 96), (50, 47), (24, 96), (17, 40)])
def test_interpolated_position_embedding(size: tuple[int, int]) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    pixels = torch.randn(2, 3, *size)
    expected = peer.get_image_features(pixels, interpolate_pos_encoding=True)
    assert worst_difference(project.get_image_features(pixels, interpolate_pos_encoding=True), expected) < TOLERANCE


def test_images_not_a_multiple_of_the_patch_are_cropped_as_there() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    pixels = torch.randn(2, 3, 63, 50)
    assert (
        worst_difference(project_model(peer, "sdpa").get_image_features(pixels), peer.get_image_features(pixels))
        < TOLERANCE
    )


@pytest.mark.parametrize("use_head", [True, False])
def test_vision_model_alone(use_head: bool) -> None:
    config = transformers.SiglipVisionConfig(**TINY_VISION, vision_use_head=use_head)
    peer = randomised(transformers.SiglipVisionModel(config))
    project = siglip_model.SiglipVisionModel(siglip_model.SiglipVisionConfig.from_dict(config.to_dict()))
    same_weights(project, peer)
    pixels = torch.randn(2, 3, 48, 48)
    output = project(pixels, output_hidden_states=True)
    assert worst_difference(output, peer(pixels, output_hidden_states=True)) < TOLERANCE
    assert (output.pooler_output is None) == (not use_head)
    assert len(output) == len(peer(pixels, output_hidden_states=True))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "relu", "gelu_fast", "silu"])
def test_other_activations(activation: str) -> None:
    peer = transformers_model({**TINY_TEXT, "hidden_act": activation}, {**TINY_VISION, "hidden_act": activation})
    inputs = batch(peer)
    with torch.no_grad():
        assert worst_difference(project_model(peer, "sdpa")(**inputs), peer(**inputs)) < TOLERANCE


LABELS = {
    "regression": (1, torch.randn(3)),
    "single_label_classification": (5, torch.tensor([4, 0, -100])),
    "multi_label_classification": (5, (torch.rand(3, 5) > 0.5).float()),
}


@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("given", [True, False])
def test_classification(problem: str, given: bool) -> None:
    count, labels = LABELS[problem]
    config = transformers.SiglipConfig(
        text_config=TINY_TEXT, vision_config=TINY_VISION, num_labels=count, problem_type=problem if given else None
    )
    peer = randomised(transformers.SiglipForImageClassification(config))
    project = siglip_model.SiglipForImageClassification(siglip_model.SiglipConfig.from_dict(config.to_dict()))
    same_weights(project, peer)
    pixels = torch.randn(3, 3, 48, 48)
    outputs = [model(pixels, labels=labels, output_hidden_states=True) for model in (project, peer)]
    assert worst_difference(*outputs) < TOLERANCE
    for model in (project, peer):
        model.loss_function = lambda labels, logits, config: logits.sum() * config.num_labels + labels.sum()
    outputs = [model(pixels, labels=labels) for model in (project, peer)]
    assert worst_difference(*outputs) < TOLERANCE and len(outputs[0]) == 2
    assert project.config.problem_type == problem
    for output in outputs:
        output.loss.backward()
    expected = dict(peer.named_parameters())
    for name, parameter in project.named_parameters():
        if expected[name].grad is None:  # the pooling head is not used
            assert parameter.grad is None, name
        else:
            bound = TOLERANCE * max(1.0, expected[name].grad.abs().max().item())
            assert (parameter.grad - expected[name].grad).abs().max() < bound, name


def test_regression_of_several_values() -> None:
    config = siglip_model.SiglipConfig(
        text_config=TINY_TEXT, vision_config=TINY_VISION, num_labels=4, problem_type="regression"
    )
    model = siglip_model.SiglipForImageClassification(config)
    labels = torch.randn(2, 4)
    output = model(torch.randn(2, 3, 48, 48), labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits, labels))


def test_outputs_index_as_transformers_do() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    inputs = batch(peer)
    for asked in ({}, {"return_loss": True}):
        mine, other = project(**inputs, **asked), peer(**inputs, **asked)
        assert list(mine.keys()) == list(other.keys())
        assert list(mine) == list(other) and len(mine) == len(other)
        assert [type(part) is tuple for part in mine.to_tuple()] == [type(part) is tuple for part in other.to_tuple()]
        assert torch.equal(mine[0], mine["logits_per_image" if not asked else "loss"])
        assert torch.equal(mine[:2][1], mine.to_tuple()[1])
        plain = project(**inputs, **asked, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == len(peer(**inputs, **asked, return_dict=False))
        assert isinstance(plain[-1], tuple)
    with pytest.raises(KeyError):
        project(**inputs)["loss"]


def test_tuples_where_the_configuration_wants_them() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    inputs = batch(peer)
    for model in (project, peer):
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple)
        assert isinstance(model.get_text_features(inputs["input_ids"]), tuple)
        assert isinstance(model.get_image_features(inputs["pixel_values"]), tuple)
        assert not isinstance(model.get_image_features(inputs["pixel_values"], return_dict=True), tuple)
    with torch.no_grad():
        assert worst_difference(project(**inputs), peer(**inputs)) < TOLERANCE


def test_attention_weights_come_from_the_reference_path_under_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    inputs = batch(peer)
    expected = peer(**inputs, output_attentions=True)
    assert worst_difference(project_model(peer, "sdpa")(**inputs, output_attentions=True), expected) < TOLERANCE


def test_gradient_checkpointing_changes_nothing() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    inputs = batch(peer)
    gradients = []
    for arguments in (None, {}, {"use_reentrant": True}, {"preserve_rng_state": False}):
        project = project_model(peer, "sdpa").train()
        if arguments is not None:
            project.activation_checkpointing_enable(arguments, every_n_layers=len(arguments) + 1)
        assert project.is_gradient_checkpointing == (arguments is not None)
        project(**inputs, return_loss=True).loss.backward()
        gradients.append([parameter.grad for parameter in project.parameters()])
    for kept, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(kept, again) for again in recomputed)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_behind_frozen_embeddings_learn_when_checkpointed(use_reentrant: bool) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa").train()
    inputs = batch(peer)
    for tower in (project.text_model, project.vision_model):
        tower.embeddings.requires_grad_(False)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            project.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        project.zero_grad()
        project(**inputs, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in project.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in project.named_parameters() if p.requires_grad}
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
    project.vision_model.requires_grad_(False)
    assert not project.get_image_features(
        inputs["pixel_values"]
    ).last_hidden_state.requires_grad  # and costs no backward


def test_every_second_layer_is_recomputed() -> None:
    project = project_model(transformers_model(TINY_TEXT, TINY_VISION), "sdpa").vision_model.train()
    calls: list[int] = []
    for number, layer in enumerate(project.encoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    project.gradient_checkpointing_enable(every_n_layers=2)
    project(torch.randn(1, 3, 48, 48)).pooler_output.sum().backward()
    assert sorted(calls) == [0, 0, 1, 2, 2]
    calls.clear()
    project.gradient_checkpointing_disable()
    project(torch.randn(1, 3, 48, 48)).pooler_output.sum().backward()
    assert calls == [0, 1, 2]
    with pytest.raises(ValueError, match="offload is True; supported: False"):
        project.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="every_n_layers is 0; supported: 1 and more"):
        project.activation_checkpointing_enable(every_n_layers=0)


def test_trainer_of_transformers(tmp_path: Path) -> None:
    pairs = [{"input_ids": torch.full((16,), n), "pixel_values": torch.randn(3, 48, 48)} for n in range(4)]

    def collate(chosen: list[dict[str, torch.Tensor]]) -> dict:
        stacked = {name: torch.stack([pair[name] for pair in chosen]) for name in chosen[0]}
        return {**stacked, "return_loss": True}

    peer = transformers_model(TINY_TEXT, TINY_VISION)
    model = project_model(peer, "sdpa")
    assert model.num_parameters(exclude_embeddings=True) == peer.num_parameters(exclude_embeddings=True)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, bf16=True, use_cpu=True,
        save_strategy="no", report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=pairs, data_collator=collate)
    before = model.logit_bias.item()
    assert 0 < trainer.train().training_loss < 100
    assert model.is_gradient_checkpointing and model.logit_bias.item() != before


def test_bf16_loss_is_fp32_as_there() -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION).bfloat16()
    inputs = batch(peer)
    loss = project_model(peer, "eager").bfloat16()(**inputs, return_loss=True).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, peer(**inputs, return_loss=True).loss, rtol=2e-2, atol=0)


# The parity tests must fail when the model is wrong ------------------------------------------------------------------


def wrong_gelu(monkeypatch: pytest.MonkeyPatch, model: siglip_model.SiglipModel) -> None:
    def mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual):
        return residual + F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    for module in model.modules():
        if isinstance(module, layers.MLP):
            module.ops = backends.replace(module.ops, mlp=mlp)


def wrong_eps(monkeypatch: pytest.MonkeyPatch, model: siglip_model.SiglipModel) -> None:
    model.vision_model.encoder.layers[0].layer_norm1.eps = 1e-5


def wrong_pooling_token(monkeypatch: pytest.MonkeyPatch, model: siglip_model.SiglipModel) -> None:
    encode = model.text_model.final_layer_norm.forward
    monkeypatch.setattr(model.text_model.final_layer_norm, "forward", lambda x: encode(x).roll(1, dims=1))


def wrong_scale(monkeypatch: pytest.MonkeyPatch, model: siglip_model.SiglipModel) -> None:
    def attention(q, k, v, **kwargs):
        return backends.SDPA.attention(q, k, v, scale=k.shape[-1] ** -0.51)

    model.vision_model.encoder.layers[0].self_attn.ops = backends.replace(backends.SDPA, attention=attention)


def wrong_head_eps(monkeypatch: pytest.MonkeyPatch, model: siglip_model.SiglipModel) -> None:
    model.vision_model.head.layernorm.eps = 1e-5


@pytest.mark.parametrize("mutate", [wrong_gelu, wrong_eps, wrong_pooling_token, wrong_scale, wrong_head_eps])
def test_a_changed_constant_is_seen(mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = transformers_model(TINY_TEXT, TINY_VISION)
    project = project_model(peer, "sdpa")
    inputs = batch(peer)
    with torch.no_grad():
        expected = peer(**inputs)
        assert worst_difference(project(**inputs), expected) < TOLERANCE
        mutate(monkeypatch, project)
        assert worst_difference(project(**inputs), expected) > TOLERANCE


def test_text_model_alone() -> None:
    config = transformers.SiglipTextConfig(**TINY_TEXT, projection_size=40)
    peer = randomised(transformers.SiglipTextModel(config))
    project = siglip_model.SiglipTextModel(siglip_model.SiglipTextConfig.from_dict(config.to_dict()))
    same_weights(project, peer)
    ids = torch.randint(0, 99, (2, 16))
    output = project(ids, output_hidden_states=True)
    assert output.pooler_output.shape == (2, 40)
    assert worst_difference(output, peer(ids, output_hidden_states=True)) < TOLERANCE


def test_empty_batches() -> None:
    model = project_model(transformers_model(TINY_TEXT, TINY_VISION), "sdpa")
    output = model(torch.zeros(0, 16, dtype=torch.long), torch.zeros(2, 3, 48, 48))
    assert output.logits_per_image.shape == (2, 0)
    assert model.get_image_features(torch.zeros(0, 3, 48, 48)).pooler_output.shape == (0, 64)
