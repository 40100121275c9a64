"""Loading: the tensors that transformers loads, from every layout that it writes, in any dtype, in little memory."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_files import HIDDEN, TENSOR, TOWERS, assert_same_tensors, edit_json, rewrite, small_config
from safetensors.torch import load_file, save_file

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import load_config_dict
from siglip_model.checkpoints.loading import load_into, load_state_dict


def test_whole_model(saved, oracle):
    model = siglip_model.SiglipModel.from_pretrained(saved)
    assert_same_tensors(model.state_dict(), oracle.state_dict())
    assert_same_tensors(load_state_dict(saved), oracle.state_dict())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shards(sharded, oracle):
    assert_same_tensors(siglip_model.SiglipModel.from_pretrained(sharded).state_dict(), oracle.state_dict())


def test_single_file_counts_where_there_is_an_index_too(sharded, checkpoint, oracle):
    rewrite(checkpoint, lambda tensors: tensors["logit_scale"].fill_(3.0))
    (sharded / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert load_state_dict(sharded)["logit_scale"] == 3.0
    assert transformers.SiglipModel.from_pretrained(sharded).logit_scale == 3.0


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layout", ["whole", "flat", "prefixed", "saved again"])
def test_tower(name, layout, saved, oracle, tmp_path):
    tower = getattr(oracle, TOWERS[name])
    folder = tmp_path / "tower"
    if layout == "whole":
        folder = saved
    elif layout == "saved again":  # transformers 5 restores the prefix that it removed
        getattr(transformers, name).from_pretrained(saved).save_pretrained(folder)
    else:
        tower.save_pretrained(folder)
        if layout == "prefixed":  # as transformers 4 saved it
            prefixed = {
                f"{TOWERS[name]}.{key}": value for key, value in load_file(folder / "model.safetensors").items()
            }
            save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    model = getattr(siglip_model, name).from_pretrained(folder)
    assert_same_tensors(model.state_dict(), tower.state_dict())


def test_vision_tower_of_a_classifier(tmp_path):
    classifier = transformers.SiglipForImageClassification(small_config())
    classifier.save_pretrained(tmp_path)
    model = siglip_model.SiglipVisionModel.from_pretrained(tmp_path)
    assert_same_tensors(model.state_dict(), classifier.vision_model.state_dict())


def test_classifier(tmp_path):
    classifier = transformers.SiglipForImageClassification(small_config(num_labels=5))
    classifier.save_pretrained(tmp_path)
    model = siglip_model.SiglipForImageClassification.from_pretrained(tmp_path)
    assert_same_tensors(model.state_dict(), classifier.state_dict())


def test_new_classifier_on_a_whole_model(saved, oracle, caplog):
    with caplog.at_level(logging.WARNING):
        model = siglip_model.SiglipForImageClassification.from_pretrained(saved, num_labels=7)
    assert "classifier.weight, classifier.bias" in caplog.text and str(saved) in caplog.text
    assert_same_tensors(model.vision_model.state_dict(), oracle.vision_model.state_dict())
    assert model.classifier.weight.shape == (7, HIDDEN)
    assert 0.5 * HIDDEN**-0.5 < model.classifier.weight.std() < 2 * HIDDEN**-0.5
    assert (model.classifier.bias == 0).all()


def test_half_a_classifier_is_not_new(tmp_path):
    transformers.SiglipForImageClassification(small_config()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias \(2,\)"):
        siglip_model.SiglipForImageClassification.from_pretrained(tmp_path)


def test_classifier_of_another_number_of_labels(tmp_path):
    transformers.SiglipForImageClassification(small_config(num_labels=5)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"classifier\.bias in model.safetensors has shape \(5,\), expected \(3,\)"
    ):
        siglip_model.SiglipForImageClassification.from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize(
    "name", ["SiglipModel", "SiglipTextModel", "SiglipVisionModel", "SiglipForImageClassification"]
)
@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
def test_transformers_loads_what_we_save(name, max_shard_size, saved, tmp_path):
    model = getattr(siglip_model, name).from_pretrained(saved)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    peer, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_tensors(peer.state_dict(), model.state_dict())


def test_position_ids_are_ignored(checkpoint, oracle):
    rewrite(
        checkpoint,
        lambda tensors: tensors.update(
            {f"{tower}.embeddings.position_ids": torch.arange(16)[None] for tower in TOWERS.values()}
        ),
    )
    assert_same_tensors(siglip_model.SiglipModel.from_pretrained(checkpoint).state_dict(), oracle.state_dict())
    siglip_model.SiglipTextModel.from_pretrained(checkpoint)
    assert_same_tensors(load_state_dict(checkpoint), oracle.state_dict())


class _WithBuffer(torch.nn.Module):
    def __init__(self, buffer="position_ids"):
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.register_buffer(buffer, torch.arange(5).expand((1, -1)), persistent=False)


def test_position_ids_of_a_model_on_meta_are_computed(tmp_path):
    save_file(_WithBuffer().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model, other = _WithBuffer(), _WithBuffer("table")
    load_into(model, tmp_path, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(model.position_ids, torch.arange(5).expand(1, 5)) and "position_ids" not in model.state_dict()
    assert model.linear.weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="table"):
        load_into(other, tmp_path, dtype=None, device="cpu")


def test_loaded_weights_are_private(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    model = siglip_model.SiglipModel.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_model_survives_saving_over_its_own_checkpoint(checkpoint, oracle):
    model = siglip_model.SiglipModel.from_pretrained(checkpoint)
    siglip_model.SiglipModel(model.config).save_pretrained(checkpoint)
    assert_same_tensors(model.state_dict(), oracle.state_dict())
    model.save_pretrained(checkpoint)
    assert_same_tensors(load_state_dict(checkpoint), oracle.state_dict())


# ---- dtypes ----


@pytest.mark.parametrize("configured", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["all float16", "mixed"])
@pytest.mark.parametrize("asked", ["auto", "float32", torch.float16, torch.float64])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_one_dtype_as_in_transformers(checkpoint, configured, stored, asked, key):
    def narrow(tensors):
        for name in list(tensors)[:: 1 if stored == "all float16" else 2]:
            tensors[name] = tensors[name].to(torch.float16)

    def configure(config):
        del config["dtype"]
        if configured is not None:
            config[key] = configured

    rewrite(checkpoint, narrow)
    edit_json(checkpoint / "config.json", configure)
    model = siglip_model.SiglipModel.from_pretrained(checkpoint, dtype=asked)
    peer = transformers.SiglipModel.from_pretrained(checkpoint, dtype=asked)
    assert_same_tensors(model.state_dict(), peer.state_dict())


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "float8_e4m3fn", "no_such", "nn", 3])
def test_unsupported_dtype(saved, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*supported"):
        load_state_dict(saved, dtype=dtype)


def test_saved_dtype_is_the_only_one(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", lambda config: config.update(torch_dtype=config.pop("dtype")))
    siglip_model.SiglipModel.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    config = load_config_dict(tmp_path / "saved")
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_device_that_is_not_there(saved):
    with pytest.raises(ValueError, match="device is meta"):
        load_state_dict(saved, device="meta")
    with pytest.raises(RuntimeError, match="device cuda:99 cannot be used here"):
        load_state_dict(saved, device="cuda:99")


def test_values_that_the_dtype_cannot_hold(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors[TENSOR].view(-1)[5].fill_(70000.0))
    load_state_dict(checkpoint, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=f"{TENSOR}.*to 70000, which torch.float16 cannot hold"):
        load_state_dict(checkpoint, dtype="float16")


# ---- memory ----

# Prints how much each load adds to the peak. The smaller one is first, since a peak never falls.
_MEASURE = """
import re, sys
import safetensors, torch
from siglip_model.checkpoints.loading import load_into
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.ones(4096).to(torch.bfloat16).aminmax()
before = peak()
for dtype in ("bfloat16", "float32"):
    with torch.device("meta"):
        model = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(int(sys.argv[2])))
    load_into(model, sys.argv[1], dtype=dtype, device="cpu")
    del model
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the peak")
def test_peak_memory(tmp_path):
    layers = 16  # of 16 MiB in float32
    save_file({f"{layer}.weight": torch.ones(2048, 2048) for layer in range(layers)}, tmp_path / "model.safetensors")
    arguments = [sys.executable, "-c", _MEASURE, str(tmp_path), str(layers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    for peak, bytes_per_value in zip(map(int, done.stdout.split()), (2, 4), strict=True):
        weights = layers * 2048 * 2048 * bytes_per_value
        assert 0.9 * weights < peak < weights + 60 * 2**20
