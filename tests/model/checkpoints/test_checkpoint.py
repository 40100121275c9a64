"""Loading: the tensors that transformers loads, from every layout it writes; and an error for everything else."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import load_config_dict
from siglip_model.checkpoints.loading import load_into, load_state_dict

HIDDEN = 32
TENSOR = "vision_model.encoder.layers.1.mlp.fc1.weight"
LAYERS = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {"SiglipTextModel": "text_model", "SiglipVisionModel": "vision_model"}


def small_config(**kwargs):
    text = {**LAYERS, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**LAYERS, "image_size": 32, "patch_size": 16}
    return transformers.SiglipConfig(text_config=text, vision_config=vision, **kwargs)


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    return transformers.SiglipModel(small_config()).eval()


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
    """A whole model that transformers saved. Not to be changed: `checkpoint` is a copy that may be."""
    folder = tmp_path_factory.mktemp("saved")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return _copy_of(saved, tmp_path / "checkpoint")


@pytest.fixture
def sharded(oracle, tmp_path):
    oracle.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    return tmp_path / "sharded"


def _copy_of(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def _rewrite(folder, change):
    """Let `change` alter the dict of tensors in model.safetensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# ---- layouts ----


def test_whole_model(saved, oracle):
    model = siglip_model.SiglipModel.from_pretrained(saved)
    assert_same_tensors(model.state_dict(), oracle.state_dict())
    assert_same_tensors(load_state_dict(saved), oracle.state_dict())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shards(sharded, oracle):
    assert_same_tensors(siglip_model.SiglipModel.from_pretrained(sharded).state_dict(), oracle.state_dict())


def test_single_file_counts_where_there_is_an_index_too(sharded, checkpoint, oracle):
    _rewrite(checkpoint, lambda tensors: tensors["logit_scale"].fill_(3.0))
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
    elif layout == "saved again":  # transformers 5 writes the prefix back that it took off
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
    _rewrite(tmp_path, lambda tensors: tensors.pop("classifier.bias"))
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
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_tensors(theirs.state_dict(), model.state_dict())


def test_position_ids_are_ignored(checkpoint, oracle):
    _rewrite(
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

    _rewrite(checkpoint, narrow)
    _edit_json(checkpoint / "config.json", configure)
    model = siglip_model.SiglipModel.from_pretrained(checkpoint, dtype=asked)
    theirs = transformers.SiglipModel.from_pretrained(checkpoint, dtype=asked)
    assert_same_tensors(model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "float8_e4m3fn", "no_such", "nn", 3])
def test_unsupported_dtype(saved, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*supported"):
        load_state_dict(saved, dtype=dtype)


def test_saved_dtype_is_the_only_one(checkpoint, tmp_path):
    _edit_json(checkpoint / "config.json", lambda config: config.update(torch_dtype=config.pop("dtype")))
    siglip_model.SiglipModel.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    config = load_config_dict(tmp_path / "saved")
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_device_that_is_not_there(saved):
    with pytest.raises(ValueError, match="device is meta"):
        load_state_dict(saved, device="meta")
    with pytest.raises(RuntimeError, match="device cuda:99 cannot be used here"):
        load_state_dict(saved, device="cuda:99")


def test_values_that_the_dtype_cannot_hold(checkpoint):
    _rewrite(checkpoint, lambda tensors: tensors[TENSOR].view(-1)[5].fill_(70000.0))
    load_state_dict(checkpoint, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=f"{TENSOR}.*to 70000, which torch.float16 cannot hold"):
        load_state_dict(checkpoint, dtype="float16")


# ---- what is refused ----


def _fails(folder, *fragments, name="SiglipModel"):
    with pytest.raises(CheckpointError) as caught:
        getattr(siglip_model, name).from_pretrained(folder)
    for fragment in fragments:
        assert str(fragment) in str(caught.value)
    return str(caught.value)


def test_missing_tensor(checkpoint):
    _rewrite(checkpoint, lambda tensors: tensors.pop(TENSOR))
    message = _fails(checkpoint, checkpoint / "model.safetensors", f"missing: {TENSOR} (48, 32)")
    assert "unexpected" not in message and "misshapen" not in message


def test_unexpected_tensor(checkpoint):
    _rewrite(checkpoint, lambda tensors: tensors.update({"vision_model.extra": torch.ones(3, 4)}))
    _fails(checkpoint, checkpoint / "model.safetensors", "unexpected: vision_model.extra (3, 4)")
    _fails(checkpoint, "unexpected: vision_model.extra (3, 4)", name="SiglipVisionModel")
    siglip_model.SiglipTextModel.from_pretrained(checkpoint)  # the other tower is not its business


def test_unexpected_tensor_beside_the_towers(checkpoint):
    _rewrite(checkpoint, lambda tensors: tensors.update({"embeddings.patch_embedding.weight": torch.ones(3, 4)}))
    for name in ("SiglipModel", "SiglipVisionModel", "SiglipForImageClassification"):
        _fails(checkpoint, "unexpected: embeddings.patch_embedding.weight (3, 4)", name=name)


def test_misshapen_tensor(checkpoint):
    _rewrite(checkpoint, lambda tensors: tensors.update({TENSOR: torch.ones(32, 48)}))
    _fails(checkpoint, "model.safetensors", TENSOR, "has shape (32, 48), expected (48, 32)")


def test_config_of_another_size(checkpoint):
    _edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(vocab_size=60))
    _fails(checkpoint, "text_model.embeddings.token_embedding.weight", "(50, 32)", "(60, 32)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_weights(checkpoint, value, dtype):
    def poison(tensors):
        tensors[TENSOR] = tensors[TENSOR].to(dtype)
        tensors[TENSOR].view(-1)[-1] = value

    _rewrite(checkpoint, poison)
    _fails(checkpoint, checkpoint / "model.safetensors", TENSOR, "(48, 32)", "non-finite")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_other_dtypes(checkpoint, dtype):
    _rewrite(checkpoint, lambda tensors: tensors.update({TENSOR: torch.ones(48, 32).to(dtype)}))
    _fails(checkpoint, checkpoint / "model.safetensors", TENSOR, "(48, 32)", "dtype")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    _fails(checkpoint, path, "truncated or corrupted")


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
    _fails(checkpoint, path, "truncated or corrupted")


def test_git_lfs_pointer(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    _fails(checkpoint, path, "git lfs pull")


def test_file_replaced_while_it_is_read(checkpoint, monkeypatch):
    path = checkpoint / "model.safetensors"
    aminmax = torch.Tensor.aminmax

    def replace_then_aminmax(tensor):
        other = checkpoint / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
        return aminmax(tensor)

    monkeypatch.setattr(torch.Tensor, "aminmax", replace_then_aminmax)
    _fails(checkpoint, path, "was replaced while it was read")


def test_nothing_is_half_loaded(checkpoint, oracle):
    _rewrite(checkpoint, lambda tensors: tensors["vision_model.post_layernorm.weight"].fill_(float("nan")))
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
    _fails(sharded, sharded / "model.safetensors.index.json", shard.name, names[0])


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    _fails(sharded, shard, "truncated or corrupted")


def test_shard_that_lacks_a_tensor_of_the_index(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    _fails(sharded, sharded / "model.safetensors.index.json", name, shard.name)


def test_shard_with_a_tensor_that_the_index_has_elsewhere(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second)
    _fails(sharded, second, name, first.name)


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff"])
def test_broken_index(sharded, content):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    _fails(sharded, index)


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "/etc/passwd", "", "..", "a/b", "a\\b.safetensors", "a.bin", 3, None]
)
def test_index_that_leads_elsewhere(sharded, place):
    index = sharded / "model.safetensors.index.json"
    _edit_json(index, lambda content: content["weight_map"].update(logit_scale=place))
    _fails(sharded, index, "logit_scale", repr(place))


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
    _fails(folder, folder, name, "pickle", "save_file")
    assert not (tmp_path / "opened").exists()


def test_the_advice_on_converting_works(oracle, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    command = _fails(tmp_path, "convert it: ").partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert_same_tensors(load_state_dict(tmp_path), oracle.state_dict())


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "renamed.safetensors")
    _fails(checkpoint, checkpoint, "neither model.safetensors nor model.safetensors.index.json", "renamed.safetensors")


# ---- config.json ----


def test_config(saved):
    assert load_config_dict(saved) == json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"siglip"', b"\xff\xfe", b"[" * 100_000])
def test_broken_config(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    _fails(checkpoint, checkpoint / "config.json", "JSON")


def test_missing_config(checkpoint):
    (checkpoint / "config.json").unlink()
    _fails(checkpoint, checkpoint, "has no config.json")


@pytest.mark.parametrize("model_type", ["clip", "siglip2", "", None, 3, ["siglip"]])
def test_foreign_model_type(checkpoint, model_type):
    _edit_json(checkpoint / "config.json", lambda config: config.update(model_type=model_type))
    for name in ("SiglipModel", "SiglipVisionModel"):
        _fails(checkpoint, checkpoint / "config.json", "model_type", repr(model_type), name=name)


# ---- memory ----

# Prints how much each load adds to the peak. The smaller comes first, for a peak never falls.
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
