"""`pipeline("image-classification")` and `pipeline("image-feature-extraction")` against transformers'."""

import pytest
import torch
import transformers
from tiny_checkpoint import random_image, shared_tiny_checkpoint

from siglip_model import SiglipForImageClassification, SiglipModel, SiglipVisionModel, pipeline
from siglip_model.images.files import UnreadableImageError
from siglip_model.processor import SiglipProcessor

IMAGES = [random_image(seed, size=(20 + 7 * seed, 50 - 5 * seed)) for seed in range(3)]
CLASSES, FEATURES = "image-classification", "image-feature-extraction"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def classifier(checkpoint, tmp_path_factory):
    """A checkpoint of a classifier for seven labels, with its processor."""
    folder = tmp_path_factory.mktemp("classifier")
    SiglipForImageClassification.from_pretrained(checkpoint, num_labels=7).save_pretrained(folder)
    SiglipProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def reference(task, folder, cls):
    processor = transformers.SiglipImageProcessor.from_pretrained(folder)
    return transformers.pipeline(task, model=cls.from_pretrained(folder), image_processor=processor, device=-1)


@pytest.mark.parametrize(
    "arguments", [{}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "NONE"}]
)
def test_classes_equal_transformers(classifier, arguments):
    expected = reference(CLASSES, classifier, transformers.SiglipForImageClassification)(IMAGES, **arguments)
    built = pipeline(CLASSES, model=classifier, device="cpu", **arguments)
    for got in (built(IMAGES, batch_size=2), pipeline(CLASSES, model=classifier, device=-1)(IMAGES, **arguments)):
        for result, other in zip(got, expected, strict=True):
            assert [each["label"] for each in result] == [each["label"] for each in other]
            assert [each["score"] for each in result] == pytest.approx([each["score"] for each in other], abs=1e-5)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_problem_chooses_the_function(classifier, kind):
    model = SiglipForImageClassification.from_pretrained(classifier)
    model.config.problem_type = kind
    processor = SiglipProcessor.from_pretrained(classifier)
    name = "none" if kind == "regression" else "sigmoid"
    got, expected = (
        pipeline(CLASSES, model=model, processor=processor, **options)(IMAGES[0])
        for options in ({}, {"function_to_apply": name})
    )
    assert got == expected


@pytest.mark.parametrize("pool", [False, True])
def test_features_equal_transformers(checkpoint, pool):
    expected = reference(FEATURES, checkpoint, transformers.SiglipVisionModel)(IMAGES, pool=pool)
    extract = pipeline(FEATURES, model=checkpoint, device="cpu")
    got = extract(IMAGES, pool=pool, batch_size=2, num_workers=2)
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)
    tensor = extract(IMAGES[0], pool=pool, return_tensors=True)
    assert torch.allclose(tensor, torch.tensor(got[0]), atol=1e-6)
    streamed = list(extract((image for image in IMAGES), pool=pool))
    assert torch.allclose(torch.tensor(streamed), torch.tensor(got), atol=1e-6)


def test_features_of_models_that_are_loaded(checkpoint):
    processor = SiglipProcessor.from_pretrained(checkpoint)
    both, alone = SiglipModel.from_pretrained(checkpoint), SiglipVisionModel.from_pretrained(checkpoint)
    first, second = (pipeline(FEATURES, model=model, processor=processor)(IMAGES[0]) for model in (both, alone))
    assert first == second
    small = {"size": {"height": 32, "width": 32}, "do_normalize": False}
    assert pipeline(FEATURES, model=alone, processor=processor, image_processor_kwargs=small)(IMAGES[0]) != first


def test_zero_shot_takes_top_k_and_arguments_of_loading(checkpoint):
    labels = ["a cat", "a dog", "a plane"]
    classify = pipeline(model=checkpoint, device="cpu", framework="pt", local_files_only=True, top_k=2)
    assert len(classify(IMAGES[0], candidate_labels=labels)) == 2
    best = classify(IMAGES[0], candidate_labels=labels, top_k=1)
    assert best == classify(IMAGES[0], candidate_labels=labels)[:1]


def test_errors(checkpoint, classifier, tmp_path):
    classify = pipeline(CLASSES, model=classifier, device="cpu")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"text\.png"):
        classify([IMAGES[0], str(tmp_path / "text.png")])
    for arguments, message in (
        ({"top_k": 0}, "top_k is 0"), ({"function_to_apply": "tanh"}, "function_to_apply is 'tanh'"),
        ({"images": IMAGES[0]}, "inputs and images were all given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            classify(IMAGES[0], **arguments)
    for task, arguments, error, message in (
        (CLASSES, {"framework": "tf"}, ValueError, "framework is 'tf'"),
        (CLASSES, {"tokenizer": "x"}, ValueError, "tokenizer is given"),
        (CLASSES, {"candidate_labels": ["a"]}, TypeError, "candidate_labels"),
        ("image-to-text", {}, ValueError, "task is 'image-to-text'"),
    ):
        with pytest.raises(error, match=message):
            pipeline(task, model=classifier, **arguments)
    model = SiglipVisionModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="image_processor is missing"):
        pipeline(FEATURES, model=model)
    torch.nn.init.constant_(model.post_layernorm.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipeline(FEATURES, model=model, processor=SiglipProcessor.from_pretrained(checkpoint))(IMAGES[0])


def test_pool_needs_a_head(checkpoint):
    config = SiglipVisionModel.from_pretrained(checkpoint).config
    config.vision_use_head = False
    processor = SiglipProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="pool is True"):
        pipeline(FEATURES, model=SiglipVisionModel(config), processor=processor)(IMAGES[0], pool=True)


def test_saved_pipelines_load_again(checkpoint, classifier, tmp_path):
    for task, source, arguments in (
        (CLASSES, classifier, {}),
        (FEATURES, checkpoint, {"return_tensors": True}),
        ("zero-shot-image-classification", checkpoint, {"candidate_labels": ["a cat", "a dog"]}),
    ):
        built = pipeline(task, model=source, device_map={"": "cpu"}, **arguments)
        expected = built(IMAGES)
        built.save_pretrained(tmp_path / task)
        again = pipeline(task, model=tmp_path / task, device_map="balanced", **arguments)
        for result in (built.predict(IMAGES), built.transform(IMAGES), again(IMAGES)):
            assert str(result) == str(expected)
        with pytest.raises(TypeError, match="foo"):
            built.save_pretrained(tmp_path / task, foo=1)
        with pytest.raises(TypeError, match="foo"):
            built.push_to_hub("owner/name", foo=1)
    theirs = transformers.pipeline(CLASSES, model=str(tmp_path / CLASSES), device=-1)(IMAGES[0])
    ours = pipeline(CLASSES, model=tmp_path / CLASSES, device="cpu")(IMAGES[0])
    assert [row["label"] for row in theirs] == [row["label"] for row in ours]


def test_maps_of_one_device(checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="device_map is .*; supported: one device for the whole model"):
        pipeline(FEATURES, model=checkpoint, device_map={"encoder": "cpu", "head": "meta"})
    with pytest.raises(ValueError, match="device='cpu' and device_map='meta'"):
        pipeline(FEATURES, model=checkpoint, device="cpu", device_map={"": "meta"})
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for spread in ("balanced", "balanced_low_0", "sequential"):
        with pytest.raises(ValueError, match=f"device_map is {spread!r}; supported: one device for the whole model"):
            pipeline(FEATURES, model=checkpoint, device_map=spread)
        with pytest.raises(ValueError, match=f"device_map is {spread!r}"):
            SiglipModel.from_pretrained(checkpoint, device_map=spread)
