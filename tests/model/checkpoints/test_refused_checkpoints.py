"""Loading refuses what is missing, damaged or foreign, and names the file and the tensor."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from checkpoint_files import TENSOR, assert_same_tensors, edit_json, rewrite
from safetensors.torch import load_file, save_file

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import load_config_dict
from siglip_model.checkpoints.loading import load_into, load_state_dict


def fails(folder, *fragments, name="SiglipModel"):
    with pytest.raises(CheckpointError) as caught:
        getattr(siglip_model, name).from_pretrained(folder)
    for fragment in fragments:
        assert str(fragment) in str(caught.value)
    return str(caught.value)


def test_missing_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop(TENSOR))
    message = fails(checkpoint, checkpoint / "model.safetensors", f"missing: {TENSOR} (48, 32)")
    assert "unexpected" not in message and "misshapen" not in message


def test_misshapen_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({TENSOR: torch.ones(32, 48)}))
    fails(checkpoint, "model.safetensors", TENSOR, "has shape (32, 48), expected (48, 32)")
    with pytest.raises(RuntimeError, match="does not fit"):  # what transformers raises
        siglip_model.SiglipModel.from_pretrained(checkpoint)


def test_config_of_another_size(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(vocab_size=60))
    fails(checkpoint, "text_model.embeddings.token_embedding.weight", "(50, 32)", "(60, 32)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_weights(checkpoint, value, dtype):
    def poison(tensors):
        tensors[TENSOR] = tensors[TENSOR].to(dtype)
        tensors[TENSOR].view(-1)[-1] = value

    rewrite(checkpoint, poison)
    fails(checkpoint, checkpoint / "model.safetensors", TENSOR, "(48, 32)", "non-finite")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_other_dtypes(checkpoint, dtype):
    rewrite(checkpoint, lambda tensors: tensors.update({TENSOR: torch.ones(48, 32).to(dtype)}))
    fails(checkpoint, checkpoint / "model.safetensors", TENSOR, "(48, 32)", "dtype")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    fails(checkpoint, path, "truncated or corrupted")


@pytest.mark.parametrize("change", ["length", "header", "appended", "html"])
def test_corrupted_file(checkpoint, change):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    if change == "length":
        content[6] = 255
    elif change == "header":
        content[20:30] = b"\xff" * 10
    elif change == "appended":
        content += b"0" * 64
    else:
        content = bytearray(b"<!DOCTYPE html><html>Not found</html>")
    path.write_bytes(content)
    fails(checkpoint, path, "truncated or corrupted")


def test_git_lfs_pointer(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    fails(checkpoint, path, "git lfs pull")


def test_file_replaced_while_it_is_read(checkpoint, monkeypatch):
    path = checkpoint / "model.safetensors"
    aminmax = torch.Tensor.aminmax

    def replace_then_aminmax(tensor):
        other = checkpoint / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
        return aminmax(tensor)

    monkeypatch.setattr(torch.Tensor, "aminmax", replace_then_aminmax)
    fails(checkpoint, path, "was replaced while it was read")


def test_nothing_is_half_loaded(checkpoint, oracle):
    rewrite(checkpoint, lambda tensors: tensors["vision_model.post_layernorm.weight"].fill_(float("nan")))
    model = siglip_model.SiglipModel.from_pretrained(_saved_beside(oracle, checkpoint))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        load_into(model, checkpoint, dtype=None, device="cpu")
    assert_same_tensors(model.state_dict(), before)


def _saved_beside(model, folder):
    model.save_pretrained(folder / "other")
    return folder / "other"


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    names = list(load_file(shard))
    shard.unlink()
    fails(sharded, sharded / "model.safetensors.index.json", shard.name, names[0])


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    fails(sharded, shard, "truncated or corrupted")


def test_shard_that_lacks_a_tensor_of_the_index(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    fails(sharded, sharded / "model.safetensors.index.json", name, shard.name)


def test_shard_with_a_tensor_that_the_index_has_elsewhere(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second)
    fails(sharded, second, name, first.name)


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff"])
def test_broken_index(sharded, content):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    fails(sharded, index)


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "/etc/passwd", "", "..", "a/b", "a\\b.safetensors", "a.bin", 3, None]
)
def test_index_that_leads_elsewhere(sharded, place):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update(logit_scale=place))
    fails(sharded, index, "logit_scale", repr(place))


class _Pickled:
    def __reduce__(self):
        return os.mkdir, (os.environ["PICKLE_OPENED"],)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "pytorch_model.bin.index.json"])
def test_pickles_are_not_opened(saved, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PICKLE_OPENED", str(tmp_path / "opened"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    (folder / name).write_bytes(pickle.dumps(_Pickled()))
    fails(folder, folder, name, "pickle", "save_file")
    assert not (tmp_path / "opened").exists()


def test_the_advice_on_converting_works(oracle, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    command = fails(tmp_path, "convert it: ").partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert_same_tensors(load_state_dict(tmp_path), oracle.state_dict())


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "renamed.safetensors")
    fails(checkpoint, checkpoint, "neither model.safetensors nor model.safetensors.index.json", "renamed.safetensors")


def test_config(saved):
    assert load_config_dict(saved) == json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"siglip"', b"\xff\xfe", b"[" * 100_000])
def test_broken_config(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    fails(checkpoint, checkpoint / "config.json", "JSON")


def test_missing_config(checkpoint):
    (checkpoint / "config.json").unlink()
    fails(checkpoint, checkpoint, "has no config.json")


@pytest.mark.parametrize("model_type", ["clip", "siglip3", "", None, 3, ["siglip"]])
def test_foreign_model_type(checkpoint, model_type):
    edit_json(checkpoint / "config.json", lambda config: config.update(model_type=model_type))
    for name in ("SiglipModel", "SiglipVisionModel"):
        fails(checkpoint, checkpoint / "config.json", "model_type", repr(model_type), name=name)
