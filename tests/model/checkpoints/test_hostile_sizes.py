"""Sizes that a small file only claims are refused before anything of that size is allocated, built or parsed."""

import json
import struct

import pytest
import torch
from bounded import bounded
from checkpoint_files import edit_json, rewrite
from safetensors.torch import save_file

import siglip_model
from siglip_model.checkpoints import weights
from siglip_model.checkpoints.errors import CheckpointError

SIZES = {
    "text_config": ("vocab_size", "max_position_embeddings", "projection_size"),
    "vision_config": ("image_size", "patch_size", "num_channels"),
}
FIELDS = [
    (tower, field)
    for tower, own in SIZES.items()
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *own)
]
VALUES = [2**40, 10**9, -1, 32.0, 1e9, True, "64", float("nan"), float("inf"), [32], {"size": 32}]


def refusal(folder, name="SiglipModel", **arguments):
    with bounded(), pytest.raises(CheckpointError) as caught:
        getattr(siglip_model, name).from_pretrained(folder, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("tower, field", FIELDS)
def test_sizes_of_the_configuration(checkpoint, tower, field):
    whole = json.loads((checkpoint / "config.json").read_text())
    for value in VALUES:
        (checkpoint / "config.json").write_text(json.dumps({**whole, tower: {**whole[tower], field: value}}))
        for arguments in ({}, {"ignore_mismatched_sizes": True}):
            message = refusal(checkpoint, **arguments)
            assert str(checkpoint / "config.json") in message and f"{field} is " in message and "supported" in message


@pytest.mark.parametrize("tower", SIZES)
def test_sizes_of_a_tower_alone(checkpoint, tower):
    edit_json(checkpoint / "config.json", lambda config: config[tower].update(hidden_size=2**40))
    name = {"text_config": "SiglipTextModel", "vision_config": "SiglipVisionModel"}[tower]
    assert "hidden_size is 1099511627776" in refusal(checkpoint, name)


@pytest.mark.parametrize(
    "tower, field, value, stored",
    [
        ("text_config", "vocab_size", 10**7, 50),
        ("text_config", "max_position_embeddings", 10**7, 16),
        ("text_config", "projection_size", 10**5, 32),
        ("text_config", "hidden_size", 2**17, 32),
        ("text_config", "intermediate_size", 10**6, 48),
        ("text_config", "num_hidden_layers", 10_000, 2),
        ("text_config", "num_hidden_layers", 1, 2),
        ("vision_config", "hidden_size", 2**17, 32),
        ("vision_config", "num_hidden_layers", 10_000, 2),
        ("vision_config", "patch_size", 32, 16),
        ("vision_config", "num_channels", 1000, 3),
    ],
)
def test_sizes_that_are_not_those_of_the_weights(checkpoint, tower, field, value, stored):
    """Sizes that a model could have: the error names the field, its value and the weights'."""
    edit_json(checkpoint / "config.json", lambda config: config[tower].update({field: value}))
    message = refusal(checkpoint)
    assert str(checkpoint / "model.safetensors") in message
    assert f"{tower}.{field} of config.json is {value}, of the weights {stored}" in message


def test_labels_that_are_not_those_of_the_weights(tmp_path, checkpoint):
    config = siglip_model.SiglipConfig.from_pretrained(checkpoint, num_labels=3)
    siglip_model.SiglipForImageClassification(config).save_pretrained(tmp_path / "classifier")
    edit_json(tmp_path / "classifier/config.json", lambda config: config["id2label"].pop("1"))
    message = refusal(tmp_path / "classifier", "SiglipForImageClassification")
    assert f"does not fit SiglipForImageClassification with {tmp_path}/classifier/config.json; misshapen" in message
    assert "num_labels of config.json is 2, of the weights 3" in message


def test_image_size_is_compared_in_patches(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config["vision_config"].update(image_size=60_000))
    assert "vision_config.patches (image_size // patch_size squared) of config.json is 14062500, of the weights 4" in (
        refusal(checkpoint)
    )


@pytest.mark.parametrize("field, value", [("vocab_size", 10**7), ("projection_size", 2**17)])
def test_a_checkpoint_cannot_ask_for_large_new_tensors(checkpoint, field, value):
    def change(config):
        config["text_config"].update({"hidden_size": 2**10, "num_attention_heads": 1, field: value})

    edit_json(checkpoint / "config.json", change)
    message = refusal(checkpoint, ignore_mismatched_sizes=True)
    assert str(checkpoint) in message and "values; supported: at most 67,108,864" in message


def test_a_caller_can_ask_for_new_tensors_of_any_size(checkpoint, monkeypatch):
    monkeypatch.setattr("siglip_model.pretrained.MOST_NEW_VALUES", 100)
    config = siglip_model.SiglipTextConfig.from_pretrained(checkpoint, vocab_size=80)
    model = siglip_model.SiglipTextModel.from_pretrained(checkpoint, config=config, ignore_mismatched_sizes=True)
    assert model.embeddings.token_embedding.weight.shape == (80, 32)
    edit_json(checkpoint / "config.json", lambda whole: whole["text_config"].update(vocab_size=80))
    with pytest.raises(CheckpointError, match="give the configuration as config="):
        siglip_model.SiglipTextModel.from_pretrained(checkpoint, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("value", [2**40, -1, 1.5, "3", [3], True])
def test_number_of_labels(checkpoint, value):
    def change(config):
        config.pop("id2label", None)
        config.pop("label2id", None)
        config["num_labels"] = value

    edit_json(checkpoint / "config.json", change)
    for name in ("SiglipModel", "SiglipForImageClassification"):
        assert "config.json: SiglipConfig: num_labels is " in refusal(checkpoint, name)


def test_a_large_model_without_a_checkpoint():
    """Larger than any SigLIP: built on the meta device, since only its sizes matter here."""
    layers = {"hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64, "num_hidden_layers": 2}
    config = siglip_model.SiglipConfig(
        text_config={**layers, "vocab_size": 10**6, "max_position_embeddings": 10**5},
        vision_config={**layers, "image_size": 4096, "patch_size": 14},
    )
    with torch.device("meta"):
        model = siglip_model.SiglipModel(config)
    assert model.text_model.embeddings.token_embedding.weight.shape == (10**6, 8192)


def _pad_header(path, spaces):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length] + b" " * spaces
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def test_padded_header(checkpoint):
    _pad_header(checkpoint / "model.safetensors", 90_000_000)
    message = refusal(checkpoint)
    assert str(checkpoint / "model.safetensors") in message and "header has 90,0" in message and "supported" in message


def test_header_is_parsed_once(checkpoint, oracle):
    """4 MB for each of 88 tensors would take seconds."""
    _pad_header(checkpoint / "model.safetensors", 4_000_000)
    with bounded(seconds=1.0):
        model = siglip_model.SiglipModel.from_pretrained(checkpoint)
    expected = oracle.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("claim", [2**63, 2**62, 10**9])
def test_header_longer_than_the_file(checkpoint, claim):
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + path.read_bytes()[8:])
    assert f"{path} " in refusal(checkpoint)


def test_tensors_of_any_alignment_and_without_values(tmp_path):
    """What safetensors reads is read, also behind a header that is not padded to eight bytes."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    _pad_header(tmp_path / "model.safetensors", 3)
    from siglip_model.checkpoints.loading import load_state_dict

    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_state_dict(tmp_path, dtype=dtype)
        assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in tensors.items())


def test_index_of_many_shards(sharded, monkeypatch):
    def change(content):
        content["weight_map"] = {f"tensor{number}": f"shard{number}.safetensors" for number in range(5000)}

    edit_json(sharded / "model.safetensors.index.json", change)
    monkeypatch.setattr(weights, "resolve_file", _without_shards(weights.resolve_file))
    message = refusal(sharded)
    assert (
        str(sharded / "model.safetensors.index.json") in message and "5,000 shards; supported: at most 1,000" in message
    )


def test_headers_of_all_shards_together(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    for shard in shards:
        _pad_header(shard, 2_000_000)
    message = refusal(sharded)
    assert f"{shards[2]}: its header has 2,00" in message
    assert "supported: at most 4,194,304 bytes, 4,00" in message and "of them in other shards" in message


def _without_shards(resolve):
    def resolve_file(path_or_id, name, **hub):
        assert not name.startswith("shard"), "a shard was looked for"
        return resolve(path_or_id, name, **hub)

    return resolve_file


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_of_any_size(sharded, name):
    path = sharded / name
    path.write_bytes(b'{"a": [' + b"[]," * 10_000_000 + b"[]]}")
    message = refusal(sharded)
    assert f"{path} has 30,000,0" in message and "supported: at most 4,194,304" in message


def warning(folder, caplog):
    with bounded():
        siglip_model.SiglipModel.from_pretrained(folder)
    [record] = caplog.records
    return record.getMessage()


def test_names_of_any_length(checkpoint, sharded, caplog):
    """The message names the file, and leaves out the middle of what the file holds."""
    rewrite(checkpoint, lambda tensors: tensors.update({"x" * 10**6: torch.ones(1), "y" * 10**6: torch.ones(1)}))
    message = warning(checkpoint, caplog)
    assert "does not: xxx" in message and "yyy (1,)" in message and len(message) < 3000
    edit_json(sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({"x" * 10**6: "y"}))
    assert len(refusal(sharded)) < 2000
    edit_json(checkpoint / "config.json", lambda config: config.update({"id2label": {"0": "a", "z" * 10**6: "b"}}))
    message = refusal(checkpoint)
    assert "config.json: SiglipConfig: id2label is " in message and len(message) < 2000


def test_file_of_many_tensors(checkpoint, caplog):
    rewrite(checkpoint, lambda tensors: tensors.update({f"extra.{n}": torch.ones(1) for n in range(20_000)}))
    message = warning(checkpoint, caplog)
    assert "does not: extra.0 (1,)" in message and "19950 more" in message and len(message) < 3000
