"""Every error about a checkpoint's JSON files is a CheckpointError that names the file and the field."""

import json
import os
import shutil

import pytest
import torch
from bounded import bounded
from PIL import Image
from tiny_checkpoint import shared_tiny_checkpoint

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.images.auto import AutoImageProcessor
from siglip_model.text.auto import AutoTokenizer
from siglip_model.zero_shot import TASK, pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def change(path, **fields):
    """Sets fields of a JSON file, which may not exist yet."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def refusal(load, path, field=None):
    """The message of the CheckpointError, which names the file, and the field with what it supports."""
    with bounded(), pytest.raises(CheckpointError) as caught:
        load(path.parent)
    message = str(caught.value)
    assert str(path) in message and len(message) < 3000
    if field is not None:
        assert f"{field} is " in message and "supported: " in message
    return message


def load_model(folder):
    return siglip_model.SiglipModel.from_pretrained(folder)


# Values of every JSON type; a field's test leaves out those that it supports.
ANY = [True, 3, -1, 10**400, 1.5, float("nan"), "x", "9" * 5000, "\ud800", [1, 2], [[]], {"a": 1}, {"a": {}}]


def of_other_types(*supported):
    return [value for value in ANY if type(value) not in supported]


@pytest.mark.parametrize(
    "field, values",
    [
        ("id2label", [*of_other_types(), {"0": 1}, {"x": "cat"}, {"-1": "cat"}, {"1.5": "cat"}, {"9" * 5000: "cat"}]),
        ("label2id", [*of_other_types(dict), {"cat": "x"}, {"cat": None}]),
        ("output_attentions", of_other_types(bool)),
        ("output_hidden_states", of_other_types(bool)),
        ("return_dict", of_other_types(bool)),
        ("problem_type", ANY),
        ("initializer_factor", [value for value in ANY if value not in (3, -1, 1.5)]),
        ("text_config", of_other_types(dict)),
        ("vision_config", of_other_types(dict)),
        ("model_type", ANY),
        ("attn_implementation", [3, [1], {"text_config": 3}]),
        ("dtype", ["float8", "int64", "Tensor", "load", 3, [1], {}]),
    ],
)
def test_fields_of_config_json(checkpoint, field, values):
    original = (checkpoint / "config.json").read_text()
    for value in values:
        (checkpoint / "config.json").write_text(original)
        change(checkpoint / "config.json", **{field: value})
        if field == "dtype":
            assert f"dtype in config.json is {value!r}" in refusal(load_model, checkpoint / "model.safetensors")
        else:
            refusal(load_model, checkpoint / "config.json", field)


@pytest.mark.parametrize("value", ["foo", "", {"": "foo"}, {"text_config": "foo"}])
def test_unknown_backends_of_config_json(checkpoint, value):
    change(checkpoint / "config.json", attn_implementation=value)
    refusal(load_model, checkpoint / "config.json", "backend")
    siglip_model.SiglipModel.from_pretrained(checkpoint, backend="eager")


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
@pytest.mark.parametrize("field", ["layer_norm_eps", "attention_dropout", "hidden_act", "id2label", "model_type"])
def test_fields_of_a_tower(checkpoint, tower, field):
    whole = json.loads((checkpoint / "config.json").read_text())
    for value in (value for value in ANY if value != 3 or field != "layer_norm_eps"):
        if field == "layer_norm_eps" and value == 1.5:
            continue
        change(checkpoint / "config.json", **{tower: {**whole[tower], field: value}})
        refusal(load_model, checkpoint / "config.json", field)


@pytest.mark.parametrize(
    "field",
    ["self", "to_dict", "use_return_dict", "__class__", "__dict__", "_validate", "base_config_key"],
)
def test_keys_that_are_no_fields(checkpoint, field):
    """A key that has the name of a method would replace it."""
    for value in (3, {}, "x"):
        change(checkpoint / "config.json", **{field: value})
        if field == "self":
            load_model(checkpoint)
        else:
            assert f"{field} is not a field" in refusal(load_model, checkpoint / "config.json")


NO_TOKENS = [value for value in ANY if value not in ("x", "9" * 5000)]
NO_TOKENS += [{"content": 3}, {"content": "a", "lstrip": "x"}]
TOKENIZER_FIELDS = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token"), NO_TOKENS),
    "unk_token": [3, [1], {}, None],
    "additional_special_tokens": [3, "x", [3], [{"content": None}], ["\ud800"]],
    "extra_special_tokens": [3, "x", [3], {"a": 3}],
    "added_tokens_decoder": [3, "x", [3], {"x": "a"}, {"-1": "a"}, {"1": 3}, {"9" * 5000: "a"}, {"99999999999": "a"}],
    "model_max_length": [*of_other_types(int), -1, 0, 10**400, 2**40, 10**9, float("inf")],
    "padding_side": ANY,
    "truncation_side": ANY,
    "model_input_names": [3, "x", [3], {}, ["attention_mask"]],
    "clean_up_tokenization_spaces": of_other_types(bool),
    "split_special_tokens": of_other_types(bool),
    "do_lower_case": of_other_types(bool),
    "legacy": of_other_types(bool),
    "sp_model_kwargs": [
        3, "x", [], {"model_file": "/etc/passwd"}, {"model_proto": "x"}, {"out_type": "str"}, {"num_threads": 10**9},
        {"unknown": 1}, {"nbest_size": 10**9}, {"alpha": "x"}, {"alpha": float("nan")}, {"enable_sampling": 1},
    ],
    "tokenizer_class": ANY,
    "processor_class": of_other_types(str),
    "padding": of_other_types(bool),
    "truncation": of_other_types(bool),
    "max_length": [*of_other_types(int), 0, 2**40],
    "stride": [*of_other_types(int), -1, 2**40],
    "pad_to_multiple_of": [*of_other_types(int), 0, 2**40],
    "return_attention_mask": of_other_types(bool),
    "add_special_tokens": of_other_types(bool),
}  # fmt: skip


@pytest.mark.parametrize("field", TOKENIZER_FIELDS)
def test_fields_of_tokenizer_config_json(checkpoint, field):
    original = (checkpoint / "tokenizer_config.json").read_text()
    for value in TOKENIZER_FIELDS[field]:
        (checkpoint / "tokenizer_config.json").write_text(original)
        change(checkpoint / "tokenizer_config.json", **{field: value})
        refusal(AutoTokenizer.from_pretrained, checkpoint / "tokenizer_config.json", field)


def test_settings_choose_no_file(checkpoint):
    ids = AutoTokenizer.from_pretrained(checkpoint)("a cat")["input_ids"]
    change(checkpoint / "tokenizer_config.json", vocab_file="/etc/passwd", tokenizer_file=3, self=1, path_or_id="x")
    assert AutoTokenizer.from_pretrained(checkpoint)("a cat")["input_ids"] == ids


def test_known_options_of_sentencepiece_pass(checkpoint):
    options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    change(checkpoint / "tokenizer_config.json", sp_model_kwargs=options)
    assert AutoTokenizer.from_pretrained(checkpoint).sp_model_kwargs == options


def test_arguments_of_the_caller_are_not_blamed_on_the_file(checkpoint):
    for arguments in ({"model_max_length": "x"}, {"padding_side": "top"}, {"sp_model_kwargs": {"model_file": "x"}}):
        with pytest.raises(ValueError, match="supported: ") as caught:
            AutoTokenizer.from_pretrained(checkpoint, **arguments)
        assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(ValueError, match="hidden_size is -33") as caught:
        siglip_model.SiglipTextConfig.from_pretrained(checkpoint, hidden_size=-33)
    assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(ValueError, match="size is ") as caught:
        AutoImageProcessor.from_pretrained(checkpoint, size=-1)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    "name, content, field",
    [
        ("special_tokens_map.json", {"eos_token": 3}, "eos_token"),
        ("special_tokens_map.json", {"additional_special_tokens": [[]]}, "additional_special_tokens"),
        ("added_tokens.json", {"<a>": "x"}, "<a>"),
        ("added_tokens.json", {"<a>": -1}, "<a>"),
        ("added_tokens.json", {"<a>": []}, "<a>"),
        ("tokenizer.json", {"added_tokens": {}}, "added_tokens"),
        ("tokenizer.json", {"added_tokens": [3]}, "added_tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": "x", "content": "<a>"}]}, "added_tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": 3}]}, "added_tokens"),
        ("tokenizer.json", {"padding": "Left"}, "padding"),
        ("tokenizer.json", {"padding": {"direction": 3}}, "padding"),
    ],
)
def test_fields_of_older_tokenizer_files(checkpoint, name, content, field):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (checkpoint / name).write_text(json.dumps(content))
    refusal(AutoTokenizer.from_pretrained, checkpoint / name, field)


IMAGE_FIELDS = {
    "size": [
        3.5, -1, 0, "x", [], [1, 2, 3], {"height": 32}, {"height": 1e9, "width": 32}, {"height": True, "width": 32},
        {"height": 40_000, "width": 40_000}, {"height": 10**9, "width": 10**9}, {"shortest_edge": 10**9},
        {"max_height": 10**9, "max_width": 10**9}, {"height": 10**400, "width": 1}, 40_000, float("nan"),
    ],
    "resample": [99, "x", 1.5, [], {}, True, 10**400],
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "default_to_square",
                     "do_center_crop", "do_pad", "disable_grouping"), of_other_types(bool)),
    "crop_size": ["x", 0, -1, [1], {"shortest_edge": 4}, {"height": 4}, 40_000],
    "pad_size": ["x", 0, -1, [1], {"shortest_edge": 4}, {"height": 4}, 40_000],
    "rescale_factor": ["x", [], {}, True, float("nan"), float("inf"), 10**400, 0],
    "image_mean": ["x", [], {}, True, float("nan"), [float("inf")], ["x"], 10**400],
    "image_std": ["x", [], {}, True, float("nan"), [0.5, 0, 0.5], 0, ["x"], 10**400, [0.5, 0.5]],
    "image_processor_type": ["x", 3, [1], {"a": 1}],
}  # fmt: skip


@pytest.mark.parametrize("field", IMAGE_FIELDS)
@pytest.mark.parametrize("nested", [False, True])
def test_fields_of_the_image_processor(checkpoint, field, nested):
    path = checkpoint / ("processor_config.json" if nested else "preprocessor_config.json")
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    for value in IMAGE_FIELDS[field]:
        content = {**settings, field: value}
        path.write_text(json.dumps({"image_processor": content} if nested else content))
        for load in (AutoImageProcessor.from_pretrained, siglip_model.SiglipProcessor.from_pretrained):
            refusal(load, path, field)


@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_image_processor_that_is_no_object(checkpoint, value):
    change(checkpoint / "processor_config.json", image_processor=value)
    refusal(AutoImageProcessor.from_pretrained, checkpoint / "processor_config.json", "image_processor")


def test_a_size_that_depends_on_the_image_is_bounded(checkpoint):
    change(checkpoint / "preprocessor_config.json", size={"shortest_edge": 4000})
    for use_fast in (False, True):
        processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=use_fast)
        with bounded(), pytest.raises(ValueError, match="supported: at most 16,777,216 pixels"):
            processor(Image.new("RGB", (5000, 5)))


def test_a_size_that_the_model_does_not_take(checkpoint):
    """Refused before any image is prepared, which would take memory for each of them."""
    change(checkpoint / "preprocessor_config.json", size={"height": 4000, "width": 4000})
    with bounded(), pytest.raises(CheckpointError) as caught:
        pipeline(TASK, model=checkpoint)
    path = checkpoint / "preprocessor_config.json"
    assert f"{path}: size is {{'height': 4000, 'width': 4000}}, 250,000 patches" in str(caught.value)
    assert "supported: {'height': 32, 'width': 32}" in str(caught.value)
    change(checkpoint / "preprocessor_config.json", size={"height": 39, "width": 33})  # as many patches
    pipeline(TASK, model=checkpoint)


def test_the_centre_needs_a_size(checkpoint):
    change(checkpoint / "preprocessor_config.json", do_center_crop=True)
    refusal(AutoImageProcessor.from_pretrained, checkpoint / "preprocessor_config.json", "crop_size")
    change(checkpoint / "preprocessor_config.json", do_center_crop=True, crop_size=48)
    with pytest.raises(CheckpointError, match="crop_size is .*48.* patches of the model"):
        pipeline(TASK, model=checkpoint)


def test_a_filter_that_pytorch_does_not_have(checkpoint):
    change(checkpoint / "preprocessor_config.json", resample=4)
    message = refusal(siglip_model.SiglipImageProcessor.from_pretrained, checkpoint / "preprocessor_config.json")
    assert "resample is 4: SiglipImageProcessor supports 0 (nearest)" in message


@pytest.mark.parametrize("value", [[0.5], [0.5] * 6])
def test_numbers_per_channel_that_the_model_does_not_have(checkpoint, value):
    change(checkpoint / "preprocessor_config.json", image_mean=value, image_std=value)
    with pytest.raises(CheckpointError, match="image_mean is .*each of the model's 3 channels") as caught:
        pipeline(TASK, model=checkpoint)
    assert str(checkpoint / "preprocessor_config.json") in str(caught.value)


@pytest.mark.parametrize("field", ["eos_token", "pad_token"])
def test_a_tokenizer_whose_ids_the_model_does_not_have(checkpoint, field):
    """On a GPU such an id is a device-side assertion."""
    change(checkpoint / "tokenizer_config.json", **{field: "<new>"})
    size = AutoTokenizer.from_pretrained(checkpoint).vocab_size
    with pytest.raises(CheckpointError) as caught:
        pipeline(TASK, model=checkpoint)
    assert str(checkpoint / "tokenizer_config.json") in str(caught.value)
    assert f"{field} reaches id {size}; supported: ids below the model's vocab_size, {size}" in str(caught.value)


def test_an_added_token_whose_id_the_model_does_not_have(checkpoint):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    added = {**settings["added_tokens_decoder"], "1000000": {"content": "cat"}}
    change(checkpoint / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(
        CheckpointError, match="added_tokens_decoder reaches id 1000000; supported: ids below"
    ) as caught:
        pipeline(TASK, model=checkpoint)
    assert str(checkpoint / "tokenizer_config.json") in str(caught.value)


def test_added_tokens_are_short_and_few(checkpoint):
    """Each is searched for in every text."""
    path = checkpoint / "tokenizer_config.json"
    original = path.read_text()
    change(path, unk_token="a b" * 10**6)
    assert "a string of at most 1000 letters" in refusal(AutoTokenizer.from_pretrained, path, "unk_token")
    path.write_text(original)
    change(path, added_tokens_decoder={str(index): {"content": f"x{index}"} for index in range(2**14 + 1)})
    assert "at most 16384 tokens" in refusal(AutoTokenizer.from_pretrained, path, "added_tokens_decoder")


def test_a_normalizer_that_multiplies_the_text(tmp_path):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    write_tokenizer(tmp_path, {"type": "Sequence", "normalizers": [step] * 4})
    message = refusal(AutoTokenizer.from_pretrained, tmp_path / "tokenizer.json")
    assert "can make a text 1,000,000,000,000 times as long; supported: at most 1000 times" in message


def test_a_regular_expression_that_does_not_end(tmp_path):
    """The library panics, with an exception that does not derive from Exception."""
    write_tokenizer(tmp_path, {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        tokenizer("a" * 40 + "c")
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def write_tokenizer(folder, normalizer):
    model = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    content = {"version": "1.0", "normalizer": normalizer, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_processor_that_does_not_resize(checkpoint):
    change(checkpoint / "preprocessor_config.json", do_resize=False)
    classify = pipeline(TASK, model=checkpoint)
    with pytest.raises(CheckpointError, match="do_resize is False, and the image has 40 x 48 .* 32 x 32") as caught:
        classify(Image.new("RGB", (48, 40)), candidate_labels=["cat"])
    assert str(checkpoint / "preprocessor_config.json") in str(caught.value)
    assert classify(Image.new("RGB", (32, 32)), candidate_labels=["cat"])[0]["label"] == "cat"


@pytest.mark.parametrize("field, value", [("image_std", 1e-320), ("image_mean", -1e300), ("rescale_factor", 1e300)])
def test_numbers_that_make_no_finite_pixels(checkpoint, field, value):
    change(checkpoint / "preprocessor_config.json", **{field: value})
    refusal(AutoImageProcessor.from_pretrained, checkpoint / "preprocessor_config.json", field)


def test_a_sentencepiece_model_of_any_size(checkpoint):
    with (checkpoint / "spiece.model").open("r+b") as file:
        file.truncate(3 * 2**30)  # a hole, which takes no space on the disk
    message = refusal(AutoTokenizer.from_pretrained, checkpoint / "spiece.model")
    assert "has 3,221,225,472 bytes; supported: at most 16,777,216" in message


def test_a_tokenizer_that_cannot_pad(checkpoint):
    change(checkpoint / "tokenizer_config.json", pad_token=None)
    with pytest.raises(CheckpointError, match="tokenizer_config.json: pad_token is None; supported") as caught:
        pipeline(TASK, model=checkpoint)
    assert str(checkpoint) in str(caught.value)
    with pytest.raises(ValueError, match=f"tokenizer_config.json of {checkpoint} names none"):
        AutoTokenizer.from_pretrained(checkpoint)(["a", "a cat"], padding=True)


def test_auto_model_without_a_model_type(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["model_type"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refusal(siglip_model.AutoModel.from_pretrained, checkpoint / "config.json")
    assert "model_type is missing; supported: siglip, " in message


FILES = {
    "config.json": load_model,
    "preprocessor_config.json": AutoImageProcessor.from_pretrained,
    "processor_config.json": AutoImageProcessor.from_pretrained,
    "tokenizer_config.json": AutoTokenizer.from_pretrained,
    "special_tokens_map.json": AutoTokenizer.from_pretrained,
    "added_tokens.json": AutoTokenizer.from_pretrained,
    "tokenizer.json": AutoTokenizer.from_pretrained,
    "spiece.model": AutoTokenizer.from_pretrained,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": "\xff"}',
     b'{"a": ' + b"9" * 5000 + b"}", b"\x00" * 100],
    ids=["empty", "open", "list", "null", "number", "string", "utf16", "deep", "deep_keys", "latin1", "digits", "nul"],
)  # fmt: skip
def test_damaged_files(checkpoint, name, content):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)  # else the older files are not read
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (checkpoint / name).write_bytes(content)
    refusal(FILES[name], checkpoint / name)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_a_byte_order_mark_changes_nothing(checkpoint, name):
    if (checkpoint / name).exists():
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
        FILES[name](checkpoint)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "spiece.model", "model.safetensors"])
def test_a_directory_in_place_of_a_file(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{checkpoint} has .*{name}"):
        FILES.get(name, load_model)(checkpoint)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads any file")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "spiece.model", "model.safetensors"])
def test_a_file_without_permission(checkpoint, name):
    (checkpoint / name).chmod(0)
    refusal(FILES.get(name, load_model), checkpoint / name)


def test_a_file_that_vanishes(checkpoint, monkeypatch):
    """Whatever opening or reading raises names the file."""
    from siglip_model.checkpoints import files

    path = checkpoint / "config.json"

    def unreadable(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "read_bytes", unreadable)
    assert "Permission denied" in refusal(load_model, path)


def test_missing_tokenizer_config_is_said(checkpoint, caplog):
    AutoTokenizer.from_pretrained(checkpoint)
    assert not caplog.messages
    (checkpoint / "tokenizer_config.json").unlink()
    AutoTokenizer.from_pretrained(checkpoint)
    assert caplog.messages == [
        f"{checkpoint} has no tokenizer_config.json: the defaults of SiglipTokenizer apply, which return an attention "
        "mask"
    ]


def test_scores_that_are_not_finite(checkpoint, tmp_path):
    classifier = pipeline(TASK, model=checkpoint, device="cpu")
    image = Image.new("RGB", (32, 32))
    path = tmp_path / "image.png"
    image.save(path)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            classifier.model.logit_bias.fill_(value)
        if value == float("inf"):  # the sigmoid of infinity is 1
            assert classifier(image, ["a"])[0]["score"] == 1.0
            continue
        for source in (image, [image], str(path), [str(path)]):
            with pytest.raises(ValueError, match="scores are not finite in torch.float32"):
                classifier(source, ["a", "b"])
        with pytest.raises(ValueError, match=f"{path}: its scores are not finite"):
            list(classifier((name for name in [str(path)]), ["a"]))
