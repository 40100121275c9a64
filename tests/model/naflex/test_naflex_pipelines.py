"""Pipelines, `embed` and `classify` on a checkpoint at native resolution, against transformers' pipelines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import randomised
from rerun_recorder import RerunRecorder
from tiny_checkpoint import WORDS, random_image
from typer.testing import CliRunner

import siglip_model
from siglip_model import pipeline
from siglip_model.automatic_capture import CapturesRepeats
from siglip_model.cli.main import app
from siglip_model.demo import CHECKPOINT
from siglip_model.embed import embed_images, load_embeddings
from siglip_model.images.batches import Batch, read_batches

LABELS = ["a Cat", "two dogs", "the red ball"]
SIZES = [(70, 30), (16, 16), (120, 20), (31, 90), (64, 64), (300, 20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    vocabulary = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *sorted(set("".join(WORDS))),
        "A",
        ".",
        "p",
        "h",
        "f",
    ]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], padding_side="right",
        model_max_length=64, model_input_names=["input_ids"],
    )  # fmt: skip
    images = transformers.Siglip2ImageProcessor(max_num_patches=24, patch_size=8, do_convert_rgb=True)
    transformers.Siglip2Processor(images, tokenizer).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        text_config={**layers, "vocab_size": len(vocabulary)},
        vision_config={**layers, "num_patches": 16, "patch_size": 8},
    )
    model = randomised(transformers.Siglip2Model(config))
    with torch.no_grad():
        model.vision_model.embeddings.patch_embedding.weight.mul_(50)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        random_image(number, size).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(SIZES))]


def components(checkpoint: Path) -> dict[str, Any]:
    return {"image_processor": transformers.AutoImageProcessor.from_pretrained(checkpoint)}


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"token_budget": 50}, {"token_budget": 1, "num_workers": 2}]
)
def test_zero_shot(checkpoint: Path, pictures: list[str], options: dict[str, Any]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    task = "zero-shot-image-classification"
    peer = transformers.pipeline(task, str(checkpoint), tokenizer=tokenizer, device="cpu", **components(checkpoint))
    project = pipeline(task, checkpoint, device="cpu", **options)
    assert type(project.model) is siglip_model.Siglip2Model
    expected = peer(pictures, candidate_labels=LABELS)
    found = project(pictures, candidate_labels=LABELS)
    for mine, other in zip(found, expected, strict=True):
        assert [each["label"] for each in mine] == [each["label"] for each in other]
        assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(mine, other, strict=True))
    assert list(project(iter(pictures), candidate_labels=LABELS)) == found


def test_features_and_classes(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    task = "image-feature-extraction"
    peer = transformers.pipeline(task, str(checkpoint), device="cpu", **components(checkpoint))
    project = pipeline(task, checkpoint, device="cpu", batch_size=3)
    assert type(project.model) is siglip_model.Siglip2VisionModel
    vision = transformers.Siglip2VisionModel.from_pretrained(checkpoint)
    for picture, tokens in zip(pictures, project(pictures, return_tensors=True), strict=True):
        inputs = peer.image_processor(siglip_model.images.files.load_image(picture), return_tensors="pt")
        expected = vision(**inputs).last_hidden_state * inputs["pixel_attention_mask"][..., None]
        assert tokens.shape == (1, 24, 32) and (tokens - expected).abs().max() < 1e-5
        pooled = vision(**inputs).pooler_output
        assert (project(picture, pool=True, return_tensors=True) - pooled).abs().max() < 1e-5

    classifier = transformers.Siglip2ForImageClassification.from_pretrained(checkpoint, num_labels=3)
    classifier.save_pretrained(tmp_path)
    components(checkpoint)["image_processor"].save_pretrained(tmp_path)
    other = transformers.pipeline("image-classification", str(tmp_path), device="cpu", **components(tmp_path))(pictures)
    mine = pipeline("image-classification", tmp_path, device="cpu", token_budget=40)(pictures)
    for row, expected_row in zip(mine, other, strict=True):
        assert [each["label"] for each in row] == [each["label"] for each in expected_row]
        assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(row, expected_row, strict=True))


def test_embed(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    model = siglip_model.Siglip2Model.from_pretrained(checkpoint)
    processor = siglip_model.AutoImageProcessor.from_pretrained(checkpoint)
    images: list[int] = []  # of each forward pass
    model.vision_model.register_forward_pre_hook(lambda module, arguments: images.append(len(arguments[0])))
    rows = {}
    for name, options in (("one", {"batch_size": 1}), ("all", {"batch_size": 16}), ("budget", {"token_budget": 48})):
        embed_images(model, processor, pictures, tmp_path / f"{name}.safetensors", **options)
        loaded = load_embeddings(tmp_path / f"{name}.safetensors")
        assert loaded.files == pictures
        rows[name] = loaded.embeddings
    assert images == [1] * 6 + [6] + [2, 2, 2]
    assert (rows["one"] - rows["all"]).abs().max() < 1e-5 and (rows["one"] - rows["budget"]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="token_budget is given with a SiglipImageProcessor"):
        one_size = siglip_model.SiglipImageProcessor()
        embed_images(model, one_size, pictures, tmp_path / "x.safetensors", token_budget=4)
    with pytest.raises(ValueError, match="embed_images: batch_size=16 and token_budget=4 both say .*; give one"):
        embed_images(model, processor, pictures, tmp_path / "x.safetensors", batch_size=16, token_budget=4)


def test_commands(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    def siglip(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [*map(str, arguments)])

    shared = ["--model", checkpoint, "--device", "cpu", "--json"]
    plain = siglip("classify", *pictures, "--labels", *LABELS, *shared)
    budget = siglip("classify", *pictures, "--labels", *LABELS, *shared, "--token-budget", 48)
    assert plain.exit_code == budget.exit_code == 0, plain.output
    for one, other in zip(json.loads(plain.stdout), json.loads(budget.stdout), strict=True):
        assert one["image"] == other["image"]
        assert abs(one["predictions"][0]["score"] - other["predictions"][0]["score"]) < 1e-5
    fewer = siglip("classify", *pictures, "--labels", *LABELS, *shared, "--max-num-patches", 4)
    assert fewer.exit_code == 0 and fewer.stdout != plain.stdout
    out = tmp_path / "x.safetensors"
    embedded = siglip("embed", *pictures, "--out", out, *shared, "--token-budget", 48, "--max-num-patches", 9)
    assert embedded.exit_code == 0 and len(load_embeddings(out).files) == len(pictures)
    like = json.loads(siglip("search", out, "--image", pictures[2], "--device", "cpu", "--json").stdout)
    best = like[0]["results"][0]
    assert best["name"] == pictures[2] and abs(best["cosine"] - 1) < 1e-5  # prepared as the rows of the file were
    for option in ("--token-budget", "--max-num-patches"):
        refused = siglip("classify", *pictures, "--labels", "a", option, 9)  # the demo's images have one size
        assert refused.exit_code == 2 and "native resolution" in refused.stderr
    for command in (("classify", *pictures, "--labels", *LABELS), ("embed", *pictures, "--out", tmp_path / "y.npy")):
        refused = siglip(*command, *shared, "--batch-size", 16, "--token-budget", 48)  # 16 is also the default
        assert refused.exit_code == 2
        assert "--batch-size 16 and --token-budget 48 both say how many images a batch has" in refused.stderr


@pytest.mark.parametrize("options", [{}, {"token_budget": 20}])
def test_other_patches_per_image(checkpoint: Path, pictures: list[str], options: dict[str, Any]) -> None:
    processor = siglip_model.AutoImageProcessor.from_pretrained(checkpoint, max_num_patches=9)
    expected = pipeline(model=checkpoint, device="cpu", image_processor=processor)(pictures, candidate_labels=LABELS)
    fewer = pipeline(model=checkpoint, device="cpu", max_num_patches=9, **options)
    for mine, other in zip(fewer(pictures, candidate_labels=LABELS), expected, strict=True):
        assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(mine, other, strict=True))
    features = pipeline("image-feature-extraction", checkpoint, device="cpu", max_num_patches=9, **options)
    assert features(pictures[0], return_tensors=True).shape == (1, 9, 32)
    with pytest.raises(ValueError, match="max_num_patches is 0; supported: a positive int"):
        pipeline(model=checkpoint, device="cpu", max_num_patches=0)
    with pytest.raises(ValueError, match="max_num_patches is given with a SiglipImageProcessor, whose images have one"):
        pipeline(model=str(CHECKPOINT), device="cpu", max_num_patches=9)


def test_a_processor_of_another_kind_is_refused(checkpoint: Path) -> None:
    tokenizer = siglip_model.AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="is a SiglipImageProcessor; supported by the model: Siglip2ImageProcessor"):
        pipeline(model=checkpoint, tokenizer=tokenizer, image_processor=siglip_model.SiglipImageProcessor())
    with pytest.raises(ValueError, match="patch_size is 16; supported: the model's, 8"):
        pipeline(model=checkpoint, tokenizer=tokenizer, image_processor=siglip_model.Siglip2ImageProcessor())


def test_batches_have_one_measure(checkpoint: Path, pictures: list[str]) -> None:
    with pytest.raises(ValueError, match="batch_size=4 and token_budget=48 both say .*; give one of them"):
        pipeline(model=checkpoint, device="cpu", batch_size=4, token_budget=48)
    budget = pipeline(model=checkpoint, device="cpu", token_budget=48)
    with pytest.raises(ValueError, match="batch_size=2 and token_budget=48 both say"):
        budget(pictures, candidate_labels=LABELS, batch_size=2)


def test_graphs_of_similar_batches_are_replayed(checkpoint: Path, pictures: list[str]) -> None:
    recorder = RerunRecorder()
    classify = pipeline(model=checkpoint, device="cpu")
    expected = classify([pictures[4]] * 6 + pictures, candidate_labels=LABELS)
    classify.encode_images = CapturesRepeats(classify.model, recorder=lambda device: recorder)
    assert classify([pictures[4]] * 6 + pictures, candidate_labels=LABELS) == expected
    assert recorder.recorded >= 1 and recorder.replays >= 3


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_to_a_budget(workers: int) -> None:
    costs = [3, 3, 4, 1, 20, 2, 9, 9, 1]
    batches = read_batches(costs, lambda cost: cost, batch_size=10, workers=workers, cost=lambda cost: cost, ahead=3)
    values = [batch.values for batch in batches if isinstance(batch, Batch)]
    assert values == [[3, 3, 4], [1], [20], [2], [9], [9, 1]]
