"""Configurations have the fields, defaults and files of transformers'."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import siglip_model

PAIRS = [
    (siglip_model.SiglipTextConfig, transformers.SiglipTextConfig),
    (siglip_model.SiglipVisionConfig, transformers.SiglipVisionConfig),
    (siglip_model.SiglipConfig, transformers.SiglipConfig),
]


def in_common(project: dict, peer: dict) -> tuple[dict, dict]:
    """Both without the fields that only one of them writes (transformers adds its version and generic switches)."""
    foreign = {"transformers_version", "architectures", "dtype", "chunk_size_feed_forward", "is_encoder_decoder"}
    foreign |= {"_name_or_path"}

    def plain(values: dict) -> dict:
        values = {k: plain(v) if k.endswith("_config") else v for k, v in values.items() if k not in foreign}
        values["id2label"] = {str(index): label for index, label in values["id2label"].items()}
        return values

    return plain(project), plain(peer)


@pytest.mark.parametrize("project, peer", PAIRS)
def test_defaults_are_those_of_transformers(project: type, peer: type) -> None:
    mine, other = in_common(project().to_dict(), peer().to_dict())
    assert mine == other


@pytest.mark.parametrize("project, peer", PAIRS)
def test_files_travel_both_ways(project: type, peer: type, tmp_path: Path) -> None:
    peer(id2label={0: "cat", 1: "dog", 2: "bird"}, problem_type="single_label_classification").save_pretrained(
        tmp_path / "peer"
    )
    config = project.from_pretrained(tmp_path / "peer")
    assert config.id2label == {0: "cat", 1: "dog", 2: "bird"} and config.num_labels == 3
    assert config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    config.save_pretrained(tmp_path / "project")
    assert json.loads((tmp_path / "project/config.json").read_text())["id2label"] == {
        "0": "cat",
        "1": "dog",
        "2": "bird",
    }
    mine, other = in_common(config.to_dict(), peer.from_pretrained(tmp_path / "project").to_dict())
    assert mine == other


def test_tower_config_from_a_full_one(tmp_path: Path) -> None:
    full = siglip_model.SiglipConfig(text_config={"hidden_size": 96}, vision_config={"patch_size": 14})
    full.save_pretrained(tmp_path)
    assert siglip_model.SiglipTextConfig.from_pretrained(tmp_path).hidden_size == 96
    assert siglip_model.SiglipVisionConfig.from_pretrained(tmp_path).patch_size == 14


def test_from_text_vision_configs_copies() -> None:
    text, vision = siglip_model.SiglipTextConfig(vocab_size=7), siglip_model.SiglipVisionConfig(image_size=32)
    config = siglip_model.SiglipConfig.from_text_vision_configs(text, vision, initializer_factor=0.5)
    assert config.text_config == text and config.vision_config == vision and config.initializer_factor == 0.5
    config.text_config.vocab_size = 8
    assert text.vocab_size == 7


def test_unknown_fields_are_kept() -> None:
    config = siglip_model.SiglipVisionConfig(my_note="kept")
    assert config.my_note == "kept" and config.to_dict()["my_note"] == "kept"
    assert siglip_model.SiglipVisionConfig.from_dict(config.to_dict()) == config


def test_labels() -> None:
    assert siglip_model.SiglipConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    with pytest.raises(ValueError, match="num_labels is 3 but id2label has 1"):
        siglip_model.SiglipConfig(num_labels=3, id2label={0: "a"})


@pytest.mark.parametrize(
    "config, fields, error, message",
    [
        (siglip_model.SiglipTextConfig, {"hidden_size": "768"}, TypeError, "hidden_size is '768'"),
        (siglip_model.SiglipTextConfig, {"hidden_size": True}, TypeError, "hidden_size is True"),
        (siglip_model.SiglipVisionConfig, {"image_size": [224, 224]}, TypeError, "image_size is .*supported: int"),
        (siglip_model.SiglipVisionConfig, {"image_size": 8}, ValueError, "image_size 8 is smaller than patch_size 16"),
        (siglip_model.SiglipTextConfig, {"vocab_size": 0}, ValueError, "vocab_size is 0"),
        (siglip_model.SiglipTextConfig, {"attention_dropout": 1.5}, ValueError, "attention_dropout is 1.5"),
        (siglip_model.SiglipTextConfig, {"num_attention_heads": 0}, ValueError, "num_attention_heads is 0"),
        (siglip_model.SiglipConfig, {"problem_type": "guess"}, ValueError, "problem_type is 'guess'"),
        (siglip_model.SiglipConfig, {"model_type": "clip"}, ValueError, "model_type is 'clip'"),
        (siglip_model.SiglipConfig, {"text_config": 3}, TypeError, "text_config is 3"),
    ],
)
def test_contradictions_are_named(config: type, fields: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        config(**fields)


def test_heads_are_checked_when_a_model_is_built() -> None:
    """As in transformers, where such a configuration may be completed later."""
    config = siglip_model.SiglipVisionConfig(hidden_size=100)
    with pytest.raises(ValueError, match="SiglipVisionConfig: hidden_size 100 is not divisible by .* 12"):
        siglip_model.SiglipVisionModel(config)


def test_dtype_is_written_as_its_name() -> None:
    assert siglip_model.SiglipTextConfig(dtype=torch.bfloat16).to_dict()["dtype"] == "bfloat16"
