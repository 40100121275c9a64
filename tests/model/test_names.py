"""Names that users and libraries ask for: on models, configurations and Auto classes."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import naflex
import peft
import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION
from torch import nn

import siglip_model
from siglip_model import auto as auto_module
from siglip_model.checkpoints import files
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.demo import CHECKPOINT
from siglip_model.pretrained import PreTrainedModel

IDS = torch.randint(0, TINY_TEXT["vocab_size"], (2, 7))
PIXELS = torch.randn(2, 3, TINY_VISION["image_size"], TINY_VISION["image_size"])
KINDS = ("Model", "TextModel", "VisionModel", "ForImageClassification")
NAMES = tuple(f"{family}{kind}" for family in ("Siglip", "Siglip2") for kind in KINDS)


def config(library: Any = siglip_model, family: str = "Siglip", **fields: Any) -> Any:
    vision = dict(TINY_VISION if family == "Siglip" else naflex.VISION)
    return getattr(library, f"{family}Config")(text_config=dict(TINY_TEXT), vision_config=vision, **fields)


def build(name: str, library: Any = siglip_model) -> Any:
    family = "Siglip2" if name.startswith("Siglip2") else "Siglip"
    whole = config(library, family)
    towers = {"TextModel": whole.text_config, "VisionModel": whole.vision_config}
    return getattr(library, name)(towers.get(name.removeprefix(family), whole)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(name: str) -> None:
    ours, theirs = build(name), build(name, transformers)
    for attribute in (
        "base_model_prefix",
        "main_input_name",
        "input_modalities",
        "supports_gradient_checkpointing",
        "is_gradient_checkpointing",
        "is_activation_checkpointing",
        "_supports_sdpa",
        "name_or_path",
        "dtype",
        "device",
        *(("num_labels",) if name.endswith("ForImageClassification") else ()),
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.base_model is ours and theirs.base_model is theirs
    ours.config.name_or_path = theirs.config.name_or_path = "a-name"
    assert ours.name_or_path == theirs.name_or_path
    assert ours.can_generate() is type(ours).can_generate() is theirs.can_generate() is False
    assert ours.get_output_embeddings() is theirs.get_output_embeddings() is None
    assert ours.get_memory_footprint() == 4 * ours.num_parameters() == theirs.get_memory_footprint(return_buffers=False)
    ours.activation_checkpointing_enable()
    assert ours.is_gradient_checkpointing and ours.is_activation_checkpointing
    blocks = {type(module).__name__ for module in ours.modules()}
    assert blocks & set(ours._no_split_modules)


@pytest.mark.parametrize("part", ["text_model", "vision_model"])
def test_sizes_of_parts_are_those_of_transformers(part: str) -> None:
    ours, theirs = (getattr(build("SiglipModel", library), part) for library in (siglip_model, transformers))
    names = {
        "encoder.layers.0.self_attn": ("embed_dim", "num_heads", "head_dim", "scale", "dropout", "is_causal"),
        "encoder.layers.0": ("embed_dim",),
        "embeddings": ("embed_dim", "image_size", "patch_size", "num_patches", "num_positions")[: 5 * ("v" in part)],
    }
    for path, attributes in names.items():
        for attribute in attributes:
            here, there = (getattr(model.get_submodule(path), attribute) for model in (ours, theirs))
            assert here == there, (path, attribute)
    assert ours.encoder.config is ours.encoder.layers[1].self_attn.config is ours.config
    assert torch.equal(ours.embeddings.position_ids, theirs.embeddings.position_ids)
    assert ours.to("meta").embeddings.position_ids.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_dummy_inputs_fit_the_model(name: str) -> None:
    model = build(name).half()
    inputs = model.dummy_inputs
    images = {"pixel_values", "spatial_shapes"} if "2" in name else {"pixel_values"}
    texts = {"input_ids"}
    expected = {"text": texts, "image": images}.get("".join(model.input_modalities), texts | images)
    assert set(inputs) == expected
    assert len(model(**inputs)[0]) == 3


def test_adapters_are_added_by_peft() -> None:
    model = build("SiglipModel")
    with pytest.raises(NotImplementedError, match=r"add_adapter; supported: peft.get_peft_model\(model, config\)"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match=r"supported: peft.PeftModel.from_pretrained\(model, path\)"):
        model.load_adapter("folder")


@pytest.mark.parametrize("name", NAMES)
def test_input_embeddings(name: str) -> None:
    ours, theirs = build(name), build(name, transformers)
    embeddings = ours.get_input_embeddings()
    assert type(embeddings) is type(theirs.get_input_embeddings())
    place = next(path for path, module in theirs.named_modules() if module is theirs.get_input_embeddings())
    assert ours.get_submodule(place) is embeddings
    other = copy.deepcopy(embeddings)
    ours.set_input_embeddings(other)
    assert ours.get_input_embeddings() is ours.get_submodule(place) is other


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_frozen_models_require_gradients(name: str) -> None:
    model = build(name).requires_grad_(False)
    inputs = model.dummy_inputs
    expected = model(**inputs)[0]
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # does not hook twice
    found = model(**inputs)[0]
    assert found.requires_grad and not expected.requires_grad
    torch.testing.assert_close(found, expected)
    copy.deepcopy(model)
    model.disable_input_require_grads()
    assert not model(**inputs)[0].requires_grad
    model.disable_input_require_grads()


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipTextModel"])
def test_resized_tokens(name: str) -> None:
    model = build(name)
    text = model if name == "SiglipTextModel" else model.text_model
    old = model.get_input_embeddings().weight.detach().clone()
    expected = text(IDS).pooler_output
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    table = model.resize_token_embeddings(len(old) + 2, pad_to_multiple_of=8)
    assert table is model.get_input_embeddings() and len(table.weight) == text.config.vocab_size == 104
    assert torch.equal(table.weight[: len(old)], old) and text(IDS).pooler_output.equal(expected)
    torch.testing.assert_close(table.weight[len(old) :], old.mean(0).expand(5, -1))
    text(torch.full((1, 3), 103))
    drawn = model.half().resize_token_embeddings(200, mean_resizing=False).weight
    assert drawn.dtype == torch.float16 and drawn[104:].std() > 0.05 and torch.equal(drawn[:99], old.half())
    assert len(model.resize_token_embeddings(50).weight) == text.config.vocab_size == 50
    assert model.vocab_size == 50
    with pytest.raises(ValueError, match="new_num_tokens is 0"):
        model.resize_token_embeddings(0)
    with pytest.raises(ValueError, match="pad_to_multiple_of is 1.3; supported: an integer"):
        model.resize_token_embeddings(60, pad_to_multiple_of=1.3)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "SiglipForImageClassification"])
def test_images_have_no_tokens(name: str) -> None:
    with pytest.raises(ValueError, match="resize_token_embeddings needs a text tower"):
        build(name).resize_token_embeddings(3)


def test_dtype_of_the_configuration_follows_the_model(tmp_path: Path) -> None:
    model = build("SiglipModel")
    assert model.config.dtype == model.config.text_config.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.config.dtype == model.config.torch_dtype == model.vision_model.config.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = siglip_model.SiglipModel.from_pretrained(tmp_path)
    assert loaded.config.dtype == loaded.dtype == loaded.text_model.config.dtype == torch.bfloat16
    wider = siglip_model.SiglipModel.from_pretrained(tmp_path, dtype="float32")
    assert wider.config.dtype == wider.vision_model.config.dtype == torch.float32


def test_adapters_name_their_base_model(tmp_path: Path) -> None:
    build("SiglipVisionModel").save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    model = siglip_model.SiglipVisionModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")


# Configurations ------------------------------------------------------------------------------------------------------


def test_configuration_files(tmp_path: Path) -> None:
    ours = config(initializer_factor=0.5)
    ours.to_json_file(tmp_path / "mine.json")
    assert type(ours).from_json_file(tmp_path / "mine.json") == ours
    assert transformers.SiglipConfig.from_json_file(tmp_path / "mine.json").vision_config.hidden_size == 64
    config(transformers).to_json_file(tmp_path / "theirs.json")
    assert type(ours).from_json_file(tmp_path / "theirs.json").text_config.vocab_size == TINY_TEXT["vocab_size"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match="bad.json is not valid JSON"):
        type(ours).from_json_file(tmp_path / "bad.json")
    ours.save_pretrained(tmp_path)
    content, others = type(ours).get_config_dict(tmp_path, output_attentions=True, revision=None)
    assert content == ours.to_dict() and others == {"output_attentions": True}
    found, unused = type(ours).from_dict(ours.to_dict(), output_attentions=True, foo=1, return_unused_kwargs=True)
    assert found.output_attentions and unused == {"foo": 1} and not hasattr(found, "return_unused_kwargs")
    found, unused = type(ours).from_pretrained(tmp_path, output_attentions=True, foo=1, return_unused_kwargs=True)
    assert found.output_attentions and unused == {"foo": 1} and not hasattr(found, "foo")


def test_saving_refuses_arguments_that_name_nothing(tmp_path: Path) -> None:
    model = build("SiglipModel")
    for part in (model.config, model.config.text_config, model):
        with pytest.raises(TypeError, match="foo"):
            part.save_pretrained(tmp_path, foo=1)
        with pytest.raises(TypeError, match="foo"):
            part.push_to_hub("owner/name", foo=1)
    assert not list(tmp_path.iterdir())


def test_difference_from_the_defaults() -> None:
    assert siglip_model.SiglipTextConfig().to_diff_dict() == {"model_type": "siglip_text_model"}
    ours = siglip_model.SiglipConfig(vision_config={"image_size": 384}, note="mine")
    difference = ours.to_diff_dict()
    assert difference == {"model_type": "siglip", "vision_config": {"image_size": 384}, "note": "mine"}
    assert json.loads(ours.to_json_string(use_diff=True)) == difference
    assert type(ours)(**difference) == ours


def test_reading_and_updating() -> None:
    ours = config()
    assert ours.get_text_config() is ours.text_config and ours.text_config.get_text_config() is ours.text_config
    assert {"text_config", "vision_config", "initializer_factor", "id2label"} <= set(ours)
    assert ours.architectures is None and siglip_model.AutoConfig.from_pretrained(CHECKPOINT).architectures == [
        "SiglipModel"
    ]
    assert ours.sub_configs == {
        "text_config": siglip_model.SiglipTextConfig,
        "vision_config": siglip_model.SiglipVisionConfig,
    }
    ours.vision_config.update({"image_size": 96, "note": 1})
    assert ours.vision_config.image_size == 96 and ours.vision_config.note == 1
    ours.update({"num_labels": 3, "vision_config": {"image_size": 112}})
    assert ours.num_labels == len(ours.label2id) == 3
    assert (ours.vision_config.image_size, ours.vision_config.hidden_size) == (112, 64)
    ours.vision_config.image_size = 96
    with pytest.raises(ValueError, match="image_size 8 is smaller than patch_size"):
        ours.vision_config.update({"image_size": 8, "hidden_size": 128})
    assert (ours.vision_config.image_size, ours.vision_config.hidden_size) == (96, 64)


def test_nested_arguments_name_what_changes(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    found = siglip_model.SiglipConfig.from_pretrained(tmp_path, vision_config={"image_size": 96})
    assert (found.vision_config.image_size, found.vision_config.num_hidden_layers) == (96, 3)
    whole = siglip_model.SiglipVisionConfig(image_size=32)
    assert siglip_model.SiglipConfig.from_pretrained(tmp_path, vision_config=whole).vision_config is whole


# Auto classes --------------------------------------------------------------------------------------------------------


def test_auto_classes(tmp_path: Path) -> None:
    build("SiglipModel").save_pretrained(tmp_path)
    for auto, name in (
        ("AutoModel", "SiglipModel"),
        ("AutoModelForZeroShotImageClassification", "SiglipModel"),
        ("AutoModelForImageClassification", "SiglipForImageClassification"),
        ("AutoConfig", "SiglipConfig"),
    ):
        assert type(getattr(siglip_model, auto).from_pretrained(tmp_path)).__name__ == name
    small = siglip_model.AutoConfig.from_pretrained(tmp_path, vision_config={"num_hidden_layers": 1})
    loaded = siglip_model.AutoModel.from_pretrained(tmp_path, config=small)
    assert len(loaded.vision_model.encoder.layers) == 1
    assert type(siglip_model.AutoModel.from_pretrained(tmp_path, config=str(tmp_path))) is siglip_model.SiglipModel
    found = siglip_model.AutoConfig.for_model("siglip_vision_model", image_size=96)
    assert type(found) is siglip_model.SiglipVisionConfig and found.image_size == 96
    with pytest.raises(ValueError, match="model_type is 'clip'; supported: siglip, "):
        siglip_model.AutoConfig.for_model("clip")


def test_models_from_a_configuration() -> None:
    asked = config(num_labels=5)
    model = siglip_model.AutoModelForImageClassification.from_config(
        asked, dtype="float16", attn_implementation="eager"
    )
    assert model.num_labels == 5 and model.dtype == torch.float16 and model.vision_model.backend == "eager"
    assert model.config is not asked and asked.dtype is None and model.training
    text = siglip_model.AutoModel.from_config(asked.text_config)
    assert type(text) is siglip_model.SiglipTextModel
    with pytest.raises(ValueError, match="AutoModelForImageClassification: the configuration is a SiglipTextConfig"):
        siglip_model.AutoModelForImageClassification.from_config(asked.text_config)
    with pytest.raises(TypeError, match="unexpected argument 'number'"):
        siglip_model.AutoModel.from_config(asked, number=3)


def test_registered_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class MyConfig(siglip_model.SiglipVisionConfig):
        model_type = "mine"

    class MyModel(siglip_model.SiglipVisionModel):
        config_class = MyConfig

    monkeypatch.setattr(siglip_model.AutoConfig, "classes", dict(siglip_model.AutoConfig.classes))
    monkeypatch.setattr(siglip_model.AutoModel, "classes", dict(siglip_model.AutoModel.classes))
    try:
        siglip_model.AutoConfig.register("mine", MyConfig)
        siglip_model.AutoModel.register(MyConfig, MyModel)
        MyModel(MyConfig(**TINY_VISION)).save_pretrained(tmp_path)
        model = siglip_model.AutoModel.from_pretrained(tmp_path)
        assert type(model) is MyModel and type(model.config) is MyConfig
        for again in (
            lambda: siglip_model.AutoConfig.register("mine", MyConfig),
            lambda: siglip_model.AutoModel.register(MyConfig, MyModel),
        ):
            with pytest.raises(ValueError, match="is registered already"):
                again()
        siglip_model.AutoModel.register(MyConfig, MyModel, exist_ok=True)
    finally:
        files.MODEL_TYPES.remove("mine")
    with pytest.raises(ValueError, match="model_type of MyConfig is 'mine', not 'yours'"):
        siglip_model.AutoConfig.register("yours", MyConfig)
    with pytest.raises(ValueError, match="config_class of SiglipModel is SiglipConfig, not MyConfig"):
        siglip_model.AutoModel.register(MyConfig, siglip_model.SiglipModel)


def test_registered_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own configuration, model and processors, through every Auto class and a pipeline."""
    own = type("OwnConfig", (siglip_model.SiglipConfig,), {"model_type": "own"})
    model = type("OwnModel", (siglip_model.SiglipModel,), {"config_class": own})
    folder = shutil.copytree(CHECKPOINT, tmp_path / "own")
    loaded = siglip_model.SiglipConfig.from_pretrained(CHECKPOINT).to_dict()
    own.from_dict({**loaded, "model_type": "own"}).save_pretrained(folder)
    assert type(model.from_pretrained(folder).config) is own  # what is not registered loads by its own class
    with pytest.raises(CheckpointError, match="model_type is 'own'; supported: siglip"):
        siglip_model.AutoModel.from_pretrained(folder)

    autos = (siglip_model.AutoModel, siglip_model.AutoModelForZeroShotImageClassification)
    for auto in (siglip_model.AutoConfig, *autos):
        monkeypatch.setattr(auto, "classes", dict(auto.classes))
    monkeypatch.setattr(files, "MODEL_TYPES", files.MODEL_TYPES.copy())
    monkeypatch.setattr(auto_module, "MODEL_TYPES", files.MODEL_TYPES)
    siglip_model.AutoConfig.register("own", own)
    for auto in autos:
        auto.register(own, model)
    for auto, base in (
        (siglip_model.AutoProcessor, siglip_model.SiglipProcessor),
        (siglip_model.AutoImageProcessor, siglip_model.SiglipImageProcessorPil),
        (siglip_model.AutoTokenizer, siglip_model.SiglipTokenizer),
    ):
        monkeypatch.setattr(auto, "registered", {})
        assert type(auto.from_pretrained(folder)).__name__ != "Own"
        registered = type("Own", (base,), {})
        auto.register(own, registered)
        assert type(auto.from_pretrained(folder)) is registered
        assert type(auto.from_pretrained(CHECKPOINT)) is not registered
        with pytest.raises(ValueError, match="'own' is registered already"):
            auto.register(own, registered)
        auto.register(own, registered, exist_ok=True)
        with pytest.raises(ValueError, match="config_class is 'own'; supported: a class with a model_type"):
            auto.register("own", registered)
        with pytest.raises(ValueError, match="has no from_pretrained"):
            auto.register(own, nn.Linear)
    built = siglip_model.pipeline("zero-shot-image-classification", folder, device="cpu")
    assert type(built.model) is model
    assert [type(part).__name__ for part in (built.tokenizer, built.image_processor)] == ["Own", "Own"]


def test_a_tower_inside_another_model() -> None:
    """Whatever holds a tower may move and cast it."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower: PreTrainedModel = build("SiglipVisionModel")

    holder = Holder().to(torch.bfloat16)
    assert holder.tower.config.dtype == torch.bfloat16
