"""Saving writes the files that transformers writes, all or nothing, whenever the process dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import load_config_dict
from siglip_model.checkpoints.loading import load_state_dict
from siglip_model.checkpoints.saving import save_checkpoint

CONFIG = {"model_type": "siglip", "b": [1, 2], "a": {"x": None}}
WHOLE = 10**9


def _small_model():
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**layers, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**layers, "image_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB", "20KB", "4KB", 5000])
def test_same_files_as_transformers(tmp_path, max_shard_size):
    model = _small_model()
    model.save_pretrained(tmp_path / "peer", max_shard_size=max_shard_size)
    config = json.loads((tmp_path / "peer" / "config.json").read_text())
    save_checkpoint(tmp_path / "project", model.state_dict(), config, max_shard_size=max_shard_size)
    peer = {path.name: path.read_bytes() for path in (tmp_path / "peer").iterdir()}
    project = {path.name: path.read_bytes() for path in (tmp_path / "project").iterdir()}
    assert project.keys() == peer.keys()
    assert [name for name in peer if project[name] != peer[name]] == []


def test_metadata_and_config(tmp_path):
    save_checkpoint(tmp_path / "new" / "folder", {"a": torch.ones(2)}, {**CONFIG, "dtype": torch.bfloat16})
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_config_dict(tmp_path / "new" / "folder") == {**CONFIG, "dtype": "bfloat16"}


def test_shared_strided_and_empty_tensors(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:3],
        "column": base[:, 2],
        "expanded": torch.tensor([3.0]).expand(5),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": base.to(torch.bfloat16),
    }
    save_checkpoint(tmp_path, tensors, CONFIG)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in tensors}
    assert all(
        torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    save_checkpoint(tmp_path, tensors, CONFIG, max_shard_size=96)
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in load_state_dict(tmp_path, dtype="float32").items()
    )


def test_saving_what_was_loaded_from_there(tmp_path):
    """The loaded tensors are memory mappings of the files that are replaced."""
    tensors = {f"tensor.{index}": torch.randn(100, 100) for index in range(5)}
    save_checkpoint(tmp_path, tensors, CONFIG)
    for size in ("100KB", "50KB", WHOLE, WHOLE, "50KB"):
        save_checkpoint(tmp_path, load_state_dict(tmp_path), CONFIG, max_shard_size=size)
    loaded = load_state_dict(tmp_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_other_files_stay(tmp_path):
    for name in ("tokenizer_config.json", "model-extra.safetensors", "pytorch_model.bin", ".hidden"):
        (tmp_path / name).write_text(name)
    save_checkpoint(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)}, CONFIG, max_shard_size=400)
    save_checkpoint(tmp_path, {"a": torch.ones(100)}, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer_config.json", "model-extra.safetensors", "pytorch_model.bin", ".hidden",
        "config.json", "model.safetensors",
    }  # fmt: skip


def test_permissions_are_ordinary_or_as_before(tmp_path):
    (tmp_path / "ordinary").touch()
    save_checkpoint(tmp_path, {"a": torch.ones(2)}, CONFIG)
    names = ("config.json", "model.safetensors")
    assert [(tmp_path / name).stat().st_mode for name in names] == [(tmp_path / "ordinary").stat().st_mode] * 2
    (tmp_path / "model.safetensors").chmod(0o640)
    save_checkpoint(tmp_path, {"a": torch.ones(2)}, CONFIG)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", ["5GiB", "", "GB", "-1GB", 0, -5, "0KB", None, 1.5])
def test_bad_shard_size(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        save_checkpoint(tmp_path / "folder", {"a": torch.ones(2)}, CONFIG, max_shard_size=size)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("bad", ["integer", "meta", "config", "nan in config", "file"])
def test_what_cannot_be_saved_changes_nothing(tmp_path, bad):
    folder = tmp_path / "folder"
    save_checkpoint(folder, {"a": torch.zeros(2)}, CONFIG)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors, config, target = {"a": torch.ones(2)}, CONFIG, folder
    if bad == "integer":
        tensors = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}
    elif bad == "meta":
        tensors = {"a": torch.ones(2), "b": torch.ones(2, device="meta")}
    elif bad == "config":
        config = {"a": object()}
    elif bad == "nan in config":
        config = {"a": float("nan")}
    else:
        target = folder / "config.json"
    with pytest.raises((CheckpointError, TypeError, ValueError)):
        save_checkpoint(target, tensors, config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
def test_failing_disk_changes_nothing(tmp_path, monkeypatch, function):
    save_checkpoint(tmp_path, {"a": torch.zeros(2)}, CONFIG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, function, fail)
        save_checkpoint(tmp_path, {"a": torch.ones(2)}, {**CONFIG, "c": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_is_on_the_disk_before_the_commit(tmp_path, monkeypatch):
    """After a power loss the commit must not exist without its files."""
    synced, committed = set(), []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recording_rename(source, target):
        committed.append({path.name: path.stat().st_ino in synced for path in [Path(source), *Path(source).iterdir()]})
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    save_checkpoint(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)}, CONFIG, max_shard_size=400)
    assert len(committed) == 1 and len(committed[0]) == 5 and all(committed[0].values())
    assert tmp_path.stat().st_ino in synced


# Tensors and bytes per shard of the old checkpoint and of the new one; whether config.json is the same.
TRANSITIONS = {
    "the next step of a training": (3, WHOLE, 3, WHOLE, 1),
    "another model": (3, WHOLE, 4, WHOLE, 0),
    "single to sharded": (3, WHOLE, 4, 1000, 0),
    "sharded to single": (4, 1000, 3, WHOLE, 0),
    "sharded to sharded": (5, 1000, 5, 1000, 1),
    "more shards to fewer": (6, 1000, 3, 500, 0),
}


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """What every kill left, by transition. One process forks all children, since importing torch takes long."""
    script = Path(__file__).with_name("kill_while_saving.py")
    numbers = [str(number) for transition in TRANSITIONS.values() for number in transition]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("kills")), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(TRANSITIONS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_killed_at_any_moment_one_checkpoint_is_whole(kills, transition):
    results = kills[transition]
    *killed, last = results
    assert not last["killed"] and len(killed) > 15
    assert {"half of a weights file", "os.rename", "os.mkdir", "os.rmdir"} <= {result["event"] for result in killed}
    states = [result["found"] for result in results]
    assert states == sorted(states, reverse=True)  # old until the commit, new from then on
    assert states[0] == "old" and states[-1] == "new" and set(states) == {"old", "new"}
    plain = [result["plain"] for result in results if "plain" in result]
    assert plain == sorted(plain, reverse=True)
    assert {result["saved_again"] for result in results} == {"new"}
    assert [result["leftovers"] for result in results] == [[]] * len(results)
