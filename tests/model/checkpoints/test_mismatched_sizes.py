"""`ignore_mismatched_sizes=True` initialises exactly the tensors whose shape differs, as in a new model."""

from pathlib import Path

import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION

import siglip_model
from siglip_model.checkpoints.loading import load_state_dict

SMALL = {"num_hidden_layers": 1}
MODELS = {
    # class: (what the configuration changes, the tensors that this changes)
    "SiglipModel": (
        {"vision_config": {**TINY_VISION, **SMALL, "image_size": 64, "patch_size": 8}},
        {"vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight"},
    ),
    "SiglipTextModel": (
        {**TINY_TEXT, **SMALL, "vocab_size": 120, "projection_size": 40},
        {"embeddings.token_embedding.weight", "head.weight", "head.bias"},
    ),
    "SiglipVisionModel": ({**TINY_VISION, **SMALL, "image_size": 96}, {"embeddings.position_embedding.weight"}),
    "SiglipForImageClassification": ({"num_labels": 7}, {"classifier.weight", "classifier.bias"}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **SMALL}, vision_config={**TINY_VISION, **SMALL}, num_labels=3
    )
    model = siglip_model.SiglipForImageClassification(config)
    whole = siglip_model.SiglipModel(config)
    whole.logit_bias.data.fill_(-3.0)
    whole.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path


def changed_config(name: str, change: dict) -> siglip_model.SiglipConfig:
    kind = getattr(siglip_model, name).config_class
    if kind is not siglip_model.SiglipConfig:
        return kind(**change)
    return kind(**{"text_config": {**TINY_TEXT, **SMALL}, "vision_config": {**TINY_VISION, **SMALL}, **change})


@pytest.mark.parametrize("name", MODELS)
def test_only_other_shapes_are_initialised_again(name: str, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, expected_new = MODELS[name]
    path = checkpoint / ("classifier" if "Classification" in name else "whole")
    kind, config = getattr(siglip_model, name), changed_config(name, change)
    with pytest.raises(ValueError, match="misshapen .ignore_mismatched_sizes=True re-initialises them."):
        kind.from_pretrained(path, config=config)
    torch.manual_seed(1)
    model = kind.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
    prefix = {"SiglipTextModel": "text_model.", "SiglipVisionModel": "vision_model."}.get(name, "")
    stored = load_state_dict(path)
    new = {key for key, value in model.state_dict().items() if not torch.equal(value, stored[prefix + key])}
    # What the checkpoint holds is loaded: only the named tensors are new.
    assert new == expected_new
    for key in expected_new:
        assert prefix + key in caplog.text
        assert model.state_dict()[key].isfinite().all()
    fresh = kind(config).state_dict()
    for key in expected_new:  # five standard errors of a standard deviation
        tolerance = 5 * fresh[key].numel() ** -0.5
        assert abs(model.state_dict()[key].std() - fresh[key].std()) <= tolerance * fresh[key].std(), key


def test_a_classifier_for_other_labels_as_in_transformers(checkpoint: Path) -> None:
    path = checkpoint / "classifier"
    peer = transformers.SiglipForImageClassification.from_pretrained(path, num_labels=7, ignore_mismatched_sizes=True)
    project = siglip_model.SiglipForImageClassification.from_pretrained(
        path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert project.classifier.weight.shape == peer.classifier.weight.shape == (7, 64)
    for (name, mine), other in zip(project.state_dict().items(), peer.state_dict().values(), strict=False):
        assert name.startswith("classifier.") or mine.shape == other.shape
    pixels = torch.randn(2, 3, 48, 48)
    tokens = project.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(tokens, peer.vision_model(pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_every_weight_has_an_initialisation(checkpoint: Path) -> None:
    """Even for a model of another width no memory stays uninitialised, and LayerNorms are 1 and 0."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **tower}, vision_config={**TINY_VISION, **tower, "image_size": 32}
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        model = siglip_model.SiglipModel.from_pretrained(
            checkpoint / "whole", config=config, ignore_mismatched_sizes=True
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
    assert model.logit_bias.item() == -3.0


def test_missing_weights_stay_an_error(checkpoint: Path) -> None:
    config = changed_config("SiglipVisionModel", {**TINY_VISION, "num_hidden_layers": 2})
    with pytest.raises(OSError, match="missing: .*encoder.layers.1"):
        siglip_model.SiglipVisionModel.from_pretrained(
            checkpoint / "whole", config=config, ignore_mismatched_sizes=True
        )


def test_auto_model_passes_it_on(checkpoint: Path) -> None:
    vision = {**TINY_VISION, **SMALL, "image_size": 96}
    model = siglip_model.AutoModel.from_pretrained(
        checkpoint / "whole", config=changed_config("SiglipModel", {"vision_config": vision}),
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    assert model.get_image_features(torch.zeros(1, 3, 96, 96)).last_hidden_state.shape == (1, 36, 64)
