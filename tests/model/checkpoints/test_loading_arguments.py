"""Arguments of from_pretrained and save_pretrained that transformers and accelerate document."""

import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from checkpoint_files import TENSOR, TOWERS, assert_same_tensors, rewrite
from safetensors.torch import load_file

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.hub import resolve_file

MODELS = ("SiglipModel", "SiglipTextModel", "SiglipVisionModel", "SiglipForImageClassification")
load = siglip_model.SiglipModel.from_pretrained


@pytest.mark.parametrize("name", MODELS)
def test_subfolder(saved, tmp_path, name):
    shutil.copytree(saved, tmp_path / "part/model")
    cls = getattr(siglip_model, name)
    model = cls.from_pretrained(tmp_path, subfolder="part/model")
    if name != "SiglipForImageClassification":  # whose head is new
        assert_same_tensors(model.state_dict(), cls.from_pretrained(saved).state_dict())
    assert type(siglip_model.AutoModel.from_pretrained(tmp_path, subfolder="part/model")) is siglip_model.SiglipModel
    with pytest.raises(CheckpointError, match=f"there is no directory {tmp_path}/other"):
        cls.from_pretrained(tmp_path, subfolder="other")


def test_errors_name_the_subfolder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "part")
    rewrite(tmp_path / "part", lambda tensors: tensors.pop(TENSOR))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/part/model.safetensors does not fit SiglipModel"):
        load(tmp_path, subfolder="part")


@pytest.mark.parametrize("size", ["50GB", "40KB"])
def test_variant(oracle, saved, tmp_path, size):
    half = transformers.SiglipModel.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    model = load(tmp_path, variant="fp16")
    assert_same_tensors(model.state_dict(), half.state_dict())
    with pytest.raises(CheckpointError, match="has neither model.safetensors nor model.safetensors.index.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="has neither model.bf16.safetensors nor .*index.bf16.json"):
        load(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="variant is '../fp16'; supported: letters"):
        load(tmp_path, variant="../fp16")


def test_saved_variants_live_side_by_side(saved, tmp_path):
    model = load(saved)
    for size in ("40KB", "50GB", "60KB"):  # each replaces its own variant's files
        model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
        model.float().save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        single = size == "50GB"
        assert ("model.fp16.safetensors" in names) == single and "model.safetensors" in names
        assert ("model.safetensors.index.fp16.json" in names) != single
        for load_one in (load, transformers.SiglipModel.from_pretrained):
            assert_same_tensors(
                load_one(tmp_path, variant="fp16").float().state_dict(), model.half().float().state_dict()
            )
        shards = [name for name in names if "-of-" in name]
        assert {name.rpartition("-of-")[2] for name in shards} <= {f"{len(shards):05}.safetensors"}


def test_state_dict_and_config_of_the_caller(saved, tmp_path):
    model = load(saved)
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    loaded = load(None, config=model.config, state_dict=tensors)
    assert_same_tensors(loaded.state_dict(), tensors)
    loaded.logit_scale.data.zero_()  # a copy
    assert tensors["logit_scale"] != 0 and loaded.config is not model.config
    half = load(saved, state_dict=tensors, dtype=torch.float16)
    assert half.dtype == torch.float16 == half.config.dtype
    (tmp_path / "config").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "config")
    shutil.copy(saved / "config.json", tmp_path / "mine.json")
    for where in (tmp_path / "config", tmp_path / "mine.json"):
        assert load(saved, config=str(where)).config == model.config
        assert siglip_model.AutoModel.from_pretrained(saved, config=where).config == model.config
        assert siglip_model.AutoConfig.from_pretrained(where) == siglip_model.AutoConfig.from_pretrained(saved)
    with pytest.raises(OSError, match="is a file; give the directory"):
        load(saved / "config.json")
    tower = siglip_model.SiglipVisionModel.from_pretrained(saved, state_dict=tensors)
    assert torch.equal(tower.state_dict()[TENSOR.removeprefix("vision_model.")], tensors[TENSOR])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(TENSOR), f"state_dict does not fit SiglipModel .*missing: {TENSOR}"),
        (lambda tensors: tensors.update({TENSOR: torch.ones(2)}), "has shape \\(2,\\), expected"),
        (lambda tensors: tensors[TENSOR].fill_(float("nan")), "state_dict: .* has non-finite values"),
        (lambda tensors: tensors.update({TENSOR: torch.ones(48, 32, dtype=torch.int64)}), "has dtype int64"),
        (lambda tensors: tensors.update({"x": 3}), "state_dict has a int as 'x'; supported: tensors"),
    ],
)
def test_state_dicts_that_do_not_fit(saved, change, message):
    tensors = {name: tensor.clone() for name, tensor in load(saved).state_dict().items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(saved, state_dict=tensors)
    with pytest.raises(ValueError, match="pretrained_model_name_or_path is None; supported: None with both"):
        load(None, state_dict=tensors)


def test_unexpected_tensors_are_named_and_left_out(checkpoint, caplog):
    expected = load(checkpoint).state_dict()
    rewrite(checkpoint, lambda tensors: tensors.update({"ema_decay": torch.ones(3, 4), "head.0.weight": torch.ones(1)}))
    for name in MODELS:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _, info = getattr(siglip_model, name).from_pretrained(checkpoint, output_loading_info=True)
        warned = [record.getMessage() for record in caplog.records]
        assert f"model.safetensors has tensors that {name} does not: ema_decay (3, 4), head.0.weight (1,)" in warned[-1]
        assert "text_model" not in warned[-1] and {"ema_decay", "head.0.weight"} <= info["unexpected_keys"]
    assert_same_tensors(load(checkpoint).state_dict(), expected)


@pytest.mark.parametrize(
    "name, overrides",
    [
        *((name, {}) for name in MODELS[:3]),
        ("SiglipVisionModel", {"vision_use_head": False}),
        ("SiglipTextModel", {"num_hidden_layers": 1}),
    ],
)
def test_loading_info_is_that_of_transformers(saved, name, overrides):
    arguments = {"output_loading_info": True, **overrides}
    _, found = getattr(siglip_model, name).from_pretrained(saved, **arguments)
    _, expected = getattr(transformers, name).from_pretrained(saved, **arguments)
    assert found == expected


def test_loading_info_of_new_and_misshapen_tensors(saved, tmp_path):
    cls = siglip_model.SiglipForImageClassification
    model, info = cls.from_pretrained(saved, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["mismatched_keys"]
    model.save_pretrained(tmp_path)
    arguments = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = cls.from_pretrained(tmp_path, **arguments)
    assert info["mismatched_keys"] == {("classifier.weight", (3, 32), (5, 32)), ("classifier.bias", (3,), (5,))}
    assert info["error_msgs"] == []


def test_a_classifier_loads_into_the_vision_tower(saved, tmp_path, caplog):
    model = siglip_model.SiglipForImageClassification.from_pretrained(saved, num_labels=3)
    model.save_pretrained(tmp_path)
    caplog.clear()
    tower = siglip_model.SiglipVisionModel.from_pretrained(tmp_path)
    assert_same_tensors(tower.state_dict(), model.vision_model.state_dict())
    assert not caplog.records


def test_part_of_a_tower(saved, oracle):
    """Without its head or its last layers, as vision-language models take it."""
    pixels = torch.randn(2, 3, 32, 32)
    cls = siglip_model.SiglipVisionModel
    tower = cls.from_pretrained(saved, vision_use_head=False, num_hidden_layers=1)
    assert len(tower.encoder.layers) == 1 and tower(pixels).pooler_output is None
    hidden = cls.from_pretrained(saved)(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels, output_hidden_states=True).hidden_states, hidden[:2])
    whole = load(saved, vision_config={"num_hidden_layers": 1})
    assert len(whole.vision_model.encoder.layers) == 1 and len(whole.text_model.encoder.layers) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": False, "code_revision": "main", "weights_only": True, "force_download": False},
        {"quantization_config": None, "variant": None, "proxies": None, "subfolder": "", "max_memory": None},
        {"tp_plan": None, "device_mesh": None, "key_mapping": None, "use_kernels": False, "adapter_kwargs": {}},
        {"low_cpu_mem_usage": True, "device_map": "cpu", "max_memory": {"cpu": "1GiB", 0: "10GB"}},
    ],
)
def test_arguments_that_ask_for_nothing(saved, arguments):
    assert_same_tensors(load(saved, **arguments).state_dict(), load(saved).state_dict())
    siglip_model.AutoModel.from_pretrained(saved, **arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        ("quantization_config", {"load_in_4bit": True}),
        ("proxies", {"https": "proxy:1"}),
        ("tp_plan", "auto"),
        ("use_kernels", True),
        ("key_mapping", {"a": "b"}),
        ("gguf_file", "model.gguf"),
        ("use_safetensors", False),
        ("offload_folder", "elsewhere"),
        ("max_memory", {"cpu": "1KB"}),
        ("max_memory", {0: "1GB"}),
        ("max_memory", {"cpu": "a lot"}),
    ],
)
def test_arguments_that_cannot_be_honoured(saved, name, value):
    with pytest.raises(ValueError, match=f"{name} .*supported: "):
        load(saved, **{name: value})


def test_code_of_a_checkpoint_is_never_run(saved):
    with pytest.warns(UserWarning, match="trust_remote_code has no effect"):
        load(saved, trust_remote_code=True)


def test_forced_download_and_only_local_files():
    with pytest.raises(ValueError, match="force_download is True, as is local_files_only"):
        resolve_file("owner/name", "config.json", force_download=True, local_files_only=True)


def test_accelerates_saving_call(saved, tmp_path):
    model, tensors = load(saved), {name: tensor + 1 for name, tensor in load(saved).state_dict().items()}
    arguments = {"save_function": torch.save, "state_dict": tensors, "push_to_hub": False, "token": None}
    model.save_pretrained(tmp_path / "other", is_main_process=False, **arguments)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "main", is_main_process=True, **arguments)
    assert sorted(os.listdir(tmp_path / "main")) == ["config.json", "model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "main/model.safetensors"), tensors)
    with pytest.raises(TypeError, match="unexpected arguments: save_functions"):
        model.save_pretrained(tmp_path, save_functions=torch.save)


def test_pushing_uploads_what_was_saved(saved, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(repo_id)
            return type("Url", (), {"repo_id": f"user/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, allow_patterns, **others):
            files = sorted(name for name in os.listdir(folder_path))
            calls.append((repo_id, files, others["commit_message"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = load(saved)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="secret", commit_message="First")
    assert calls == ["secret", "mine", ("user/mine", ["config.json", "model.safetensors"], "First")]
    calls.clear()
    model.push_to_hub("yours")
    model.config.push_to_hub("config")
    files = ["config.json", "model.safetensors"]
    assert [call for call in calls if isinstance(call, tuple)] == [
        ("user/yours", files, "Upload SigLIP"),
        ("user/config", ["config.json"], "Upload SigLIP"),
    ]


def test_where_it_came_from(saved, tmp_path):
    model = load(saved)
    assert model.name_or_path == model.config.name_or_path == str(saved)
    model.save_pretrained(tmp_path)
    assert str(saved) not in (tmp_path / "config.json").read_text()
    for tower in TOWERS.values():
        assert getattr(model, tower).config.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
