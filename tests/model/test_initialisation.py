"""New weights have the distribution of transformers': the same standard deviation for every tensor."""

import pytest
import torch
import transformers

import siglip_model

TEXT = dict(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
VISION = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, image_size=160)


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipForImageClassification"])
def test_spread_of_every_tensor(name: str) -> None:
    torch.manual_seed(0)
    config = {"text_config": TEXT, "vision_config": VISION, "num_labels": 200}
    project = getattr(siglip_model, name)(siglip_model.SiglipConfig(**config)).state_dict()
    peer = getattr(transformers, name)(transformers.SiglipConfig(**config)).state_dict()
    assert {key: value.shape for key, value in project.items()} == {key: value.shape for key, value in peer.items()}
    for key, value in peer.items():
        if value.numel() == 1 or value.eq(value.flatten()[0]).all():  # a constant
            assert torch.equal(project[key], value), key
        else:
            tolerance = 5 * (0.5 / value.numel()) ** 0.5  # five standard errors of a standard deviation, twice
            assert abs(project[key].std() / value.std() - 1) < 2 * tolerance, key


def test_a_seed_repeats() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=TEXT, vision_config=VISION)))
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)


SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
PUBLISHED = {
    "base-patch16-224": ({}, {}, 203_155_970),
    "so400m-patch14-384": (SO400M, {**SO400M, "image_size": 384, "patch_size": 14}, 877_960_498),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    """Names and shapes of all tensors of two published checkpoints, on the meta device."""
    text, vision, parameters = PUBLISHED[name]
    with torch.device("meta"):
        project = siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=text, vision_config=vision))
        peer = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    assert project.num_parameters() == parameters
    assert {key: value.shape for key, value in project.state_dict().items()} == {
        key: value.shape for key, value in peer.state_dict().items()
    }
