"""Zero-shot accuracy and retrieval against their definitions, and images that cannot be read."""

import json
from pathlib import Path

import pytest
import torch
from captioned import caption, save_folder, save_shard, shard_files
from tiny_checkpoint import random_image, shared_tiny_checkpoint

from siglip_model import SiglipModel, SiglipProcessor, pipeline
from siglip_model.cli import terminal
from siglip_model.training.evaluation import retrieval
from siglip_model.training.evaluation.retrieval import ranks_of_partners
from siglip_model.training.evaluation.run import evaluate_on
from siglip_model.training.evaluation.zero_shot import find_classes
from siglip_model.training.processes import Processes, joined_processes

ALONE = Processes(torch.device("cpu"))
CLASSES = {"cat": range(3), "red_apple": range(3, 6), "dog": range(6, 12), "sky": range(12, 14), "sofa": (), "2": ()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return SiglipModel.from_pretrained(checkpoint), SiglipProcessor.from_pretrained(checkpoint)


@pytest.fixture
def classes(tmp_path):
    for name, numbers in CLASSES.items():
        (tmp_path / name).mkdir()
        for number in numbers:
            random_image(number).save(tmp_path / name / f"{number}.png")
    return tmp_path


def evaluate(data, loaded, **more):
    failures: list = []
    result = evaluate_on(str(data), *loaded, processes=ALONE, on_failure=failures.append, batch_size=4, **more)
    return result, failures


def test_zero_shot_accuracy_is_the_pipelines(classes, loaded, checkpoint):
    (classes / "dog" / "broken.png").write_bytes(b"nothing")
    result, failures = evaluate(classes, loaded, templates=["a photo of {}."])
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint), device="cpu")
    names = [name.replace("_", " ") for name in CLASSES]
    places = []
    for name, numbers in CLASSES.items():
        for number in numbers:
            found = classify(random_image(number), candidate_labels=names, hypothesis_template="a photo of {}.")
            places.append([entry["label"] for entry in found].index(name.replace("_", " ")))
    assert 0 < sum(place < 5 for place in places) < len(places) == 14
    assert result == {
        "task": "zero-shot",
        "classes": 6,
        "images": 14,
        "failed": 1,
        "top1": sum(place < 1 for place in places) / 14,
        "top5": sum(place < 5 for place in places) / 14,
    }
    assert [(Path(name).name, reason) for name, reason in failures] == [
        ("broken.png", "not an image, or in an unsupported format")
    ]


def test_templates_are_averaged_and_classes_may_be_named(classes, loaded):
    from siglip_model.training.evaluation.encoder import Encoder
    from siglip_model.training.evaluation.zero_shot import class_embeddings

    (classes / "classes.json").write_text(json.dumps({name: f"{name} 3" for name in CLASSES}))
    assert list(find_classes(classes).values()) == [f"{name} 3" for name in sorted(CLASSES)]
    (classes / "classes.json").write_text("{")
    with pytest.raises(ValueError, match=r"classes.json is not valid JSON in UTF-8 \(Expecting property name"):
        find_classes(classes)
    (classes / "classes.json").write_text('{"cat": "cat"}')
    with pytest.raises(ValueError, match=r"classes.json does not name '2'; supported: a name for each folder"):
        find_classes(classes)
    encoder = Encoder(*loaded, batch_size=2)
    one, two, both = (class_embeddings(encoder, ["cat", "dog", "sky"], t) for t in (["{}"], ["a {}"], ["{}", "a {}"]))
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))


def recall_by_definition(images, texts, owner):
    """Ranks from the whole matrix; ties count as wrong."""
    scores = images.double() @ texts.double().T
    own = owner == torch.arange(len(images))[:, None]
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    of_images = ((scores >= best - 1e-6) & ~own).sum(1)
    right = scores[owner, torch.arange(len(texts))]
    return of_images, ((scores >= right - 1e-6) & ~own).sum(0)


def test_ranks_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(23, 5, generator=generator), dim=-1)
    owner = torch.arange(23).repeat_interleave(torch.randint(1, 4, (23,), generator=generator))
    texts = images[owner] + 0.8 * torch.randn(len(owner), 5, generator=generator)
    texts[4] = texts[9]  # a tie
    texts = torch.nn.functional.normalize(texts, dim=-1)
    found = ranks_of_partners(images, texts, owner, torch.device("cpu"), ALONE)
    for one, expected in zip(found, recall_by_definition(images, texts, owner), strict=True):
        assert torch.equal(one, expected) and expected.max() > 0


def test_a_model_that_gives_nan_is_never_right(classes, checkpoint, tmp_path_factory):
    model, processor = SiglipModel.from_pretrained(checkpoint), SiglipProcessor.from_pretrained(checkpoint)
    model.vision_model.post_layernorm.weight.data.fill_(torch.nan)
    result, _ = evaluate(classes, (model, processor))
    assert result["images"] == 14 and result["top1"] == result["top5"] == 0
    result, _ = evaluate(save_folder(tmp_path_factory.mktemp("captioned"), 2), (model, processor))
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == 0


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_retrieval_over_captioned_data(kind, tmp_path, loaded):
    if kind == "folder":
        save_folder(tmp_path, 9)
        (tmp_path / "4.png").write_bytes(b"nothing")
        data, per_image = tmp_path, 2
    else:
        pytest.importorskip("webdataset")
        files = shard_files(range(9))
        files["004.jpg"] = b"nothing"
        data, per_image = save_shard(tmp_path / "a.tar", files), 1
    result, failures = evaluate(data, loaded)
    assert (result["task"], result["images"], result["texts"], result["failed"]) == ("retrieval", 8, 8 * per_image, 1)
    assert len(failures) == 1 and "4" in failures[0].name
    model, processor = loaded
    numbers = [number for number in range(9) if number != 4]
    texts = [text for number in numbers for text in [caption(number), f"this is {caption(number)}"][:per_image]]
    if kind == "shards":  # JPEG changed the pixels
        return
    inputs = processor(text=texts, images=[random_image(number) for number in numbers], padding="max_length")
    with torch.no_grad():
        outputs = model(**{name: torch.as_tensor(value) for name, value in inputs.convert_to_tensors("pt").items()})
    owner = torch.arange(8).repeat_interleave(per_image)
    of_images, of_texts = recall_by_definition(outputs.image_embeds, outputs.text_embeds, owner)
    for k in (1, 5, 10):
        assert result[f"image_to_text_r{k}"] == pytest.approx((of_images < k).float().mean().item())
        assert result[f"text_to_image_r{k}"] == pytest.approx((of_texts < k).float().mean().item())


def test_templates_beside_captions_are_refused(tmp_path, loaded):
    save_folder(tmp_path, 2)
    with pytest.raises(ValueError, match=r"template \(--template\) is 'a {}', but .* has captions"):
        evaluate(tmp_path, loaded, templates=["a {}", "{}"])


def test_one_image_without_caption_does_not_make_classes_of_a_captioned_folder(tmp_path, loaded):
    for name in ("a.png", "below/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_image(0).save(tmp_path / name)
    (tmp_path / "below" / "b.txt").write_text("a cat")
    result, failures = evaluate(tmp_path, loaded)
    assert (result["task"], result["images"], result["failed"]) == ("retrieval", 1, 1)
    assert failures == [(str(tmp_path / "a.png"), "has no caption")]


def test_data_of_no_kind_is_refused(tmp_path, loaded):
    with pytest.raises(
        NotADirectoryError,
        match=r"^'.*none' is not a folder; supported: a folder, or shards such as 'a/{000..099}.tar'",
    ):
        evaluate(tmp_path / "none", loaded)
    with pytest.raises(ValueError, match="holds no folders; supported: one folder of images per class"):
        evaluate(tmp_path, loaded)


def test_captions_that_images_share_are_counted(tmp_path, loaded, capsys):
    for number in range(6):
        random_image(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a cat" if number % 2 else "a dog")
    result, _ = evaluate(tmp_path, loaded)
    assert (result["texts"], result["distinct_texts"], result["image_to_text_r1"]) == (6, 2, 0)
    terminal.print_scores(result)
    said = "siglip: 6 texts, 2 distinct: only an image's own caption counts as right, not its like elsewhere\n"
    assert capsys.readouterr().err == said
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"cat {number}")
    result, _ = evaluate(tmp_path, loaded)
    terminal.print_scores(result)
    assert result["distinct_texts"] == 6 and capsys.readouterr().err == ""


def test_without_a_gpu_the_devices_that_are_there_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with (
        pytest.raises(ValueError, match="but PyTorch finds no GPU; supported here: auto, cpu$"),
        joined_processes("cuda"),
    ):
        pass
