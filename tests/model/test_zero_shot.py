"""The zero-shot pipeline against transformers', on a checkpoint saved by transformers."""

import base64
import io
import json
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoint import random_image, save_tiny_checkpoint, shared_tiny_checkpoint

from siglip_model.devices import resolve_device
from siglip_model.images.files import UnreadableImageError, load_image
from siglip_model.model import SiglipModel
from siglip_model.processor import SiglipProcessor
from siglip_model.zero_shot import LABELS_AT_ONCE, TASK, pipeline, rank

LABELS = ["2 cats", "a plane", "a remote", "2 cats"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(checkpoint):
    pillow = transformers.SiglipImageProcessor.from_pretrained(checkpoint)
    return transformers.pipeline(TASK, model=str(checkpoint), image_processor=pillow, device=-1)


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return pipeline(task=TASK, model=checkpoint, device="cpu")


def assert_same(result, expected, tolerance=1e-5):
    """Equal labels, sorted by score, with scores within `tolerance`; labels closer than that may swap places."""
    assert sorted(entry["label"] for entry in result) == sorted(entry["label"] for entry in expected)
    assert all(set(entry) == {"score", "label"} for entry in result)
    scores = [entry["score"] for entry in result]
    assert scores == sorted(scores, reverse=True)
    expected_scores = {entry["label"]: entry["score"] for entry in expected}
    assert scores == pytest.approx([expected_scores[entry["label"]] for entry in result], abs=tolerance)


def assert_all_same(results, expected):
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert_same(result, other)


def spread(results):
    scores = [entry["score"] for result in results for entry in result]
    return max(scores) - min(scores)


def test_one_image_equals_transformers(classifier, reference):
    image = random_image(0)
    result = classifier(image, candidate_labels=LABELS)
    assert_same(result, reference(image, candidate_labels=LABELS))
    assert isinstance(result, list) and all(isinstance(entry["score"], float) for entry in result)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lists_equal_transformers_in_any_batching(classifier, reference, batch_size, num_workers):
    images = [random_image(seed, size=(20 + 7 * seed, 50 - 5 * seed)) for seed in range(5)]
    result = classifier(images, candidate_labels=LABELS, batch_size=batch_size, num_workers=num_workers)
    assert_all_same(result, reference(images, candidate_labels=LABELS))
    assert spread(result) > 0.05  # scores differ between images and labels, so the comparison is meaningful
    assert_all_same(classifier(tuple(images), LABELS), result)
    assert classifier([], LABELS) == []


@pytest.mark.parametrize("template", ["{}", "a {} on the sofa", "{0} and {0}", "{{a}} {}"])
def test_templates_equal_transformers(classifier, reference, template):
    image = random_image(1)
    labels = ["a cat", "{} with {braces}", "red ball, round"]
    result = classifier(image, labels, hypothesis_template=template)
    assert_same(result, reference(image, candidate_labels=labels, hypothesis_template=template))
    plain = {entry["label"]: entry["score"] for entry in classifier(image, labels)}
    assert any(abs(plain[entry["label"]] - entry["score"]) > 1e-4 for entry in result)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_equals_transformers(classifier, reference, mode):
    image = random_image(2, mode=mode)
    if mode == "RGBA":
        image.putalpha(100)  # dropped, not composited, as in transformers' pipeline
    assert_same(classifier(image, LABELS), reference(image, candidate_labels=LABELS))


def test_orientation_in_exif_is_applied(classifier, reference, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    random_image(3).save(path, exif=exif)
    result = classifier(str(path), LABELS)
    assert_same(result, reference(str(path), candidate_labels=LABELS))
    lying = classifier(Image.open(path).convert("RGB").copy(), LABELS)
    upright = load_image(str(path))
    assert upright.size == (40, 48) and lying is not None
    assert_same(classifier(upright, LABELS), result)


def test_paths_urls_and_base64_are_the_same_image(classifier, reference, tmp_path):
    path = tmp_path / "bild mit ünïcode.png"
    image = random_image(4)
    image.save(path)
    expected = reference(str(path), candidate_labels=LABELS)
    encoded = base64.b64encode(path.read_bytes()).decode()
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/bild%20mit%20%C3%BCn%C3%AFcode.png"
        for source in (image, path, str(path), encoded, f"data:image/png;base64,{encoded}", url):
            assert_same(classifier(source, LABELS, timeout=10), expected)
        with pytest.raises(UnreadableImageError, match=r"missing\.png: HTTP Error 404"):
            classifier(url.rpartition("/")[0] + "/missing.png", LABELS)
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_datasets_and_generators_are_read_lazily(classifier, reference):
    images = [random_image(seed) for seed in range(5)]
    expected = reference(images, candidate_labels=LABELS)
    drawn = []

    def stream():
        for index, image in enumerate(images):
            drawn.append(index)
            yield image

    results = classifier(stream(), LABELS, batch_size=2)
    assert drawn == []
    assert_same(next(results), expected[0])
    assert drawn == [0, 1]
    assert_all_same(list(results), expected[1:])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index]

    assert_all_same(list(classifier(Images(), LABELS, batch_size=2)), expected)
    assert_all_same(list(classifier(iter(images), LABELS)), expected)
    with pytest.raises(ValueError, match="candidate_labels is empty"):  # at the call, not at the first result
        classifier(stream(), [])


def test_more_labels_than_go_through_the_text_tower_at_once(classifier, reference):
    labels = [f"{number} cats" for number in range(LABELS_AT_ONCE + 3)]
    image = random_image(5)
    assert_same(classifier(image, labels), reference(image, candidate_labels=labels))


def test_labels_are_encoded_once_per_call(classifier, monkeypatch):
    calls = []
    encode = classifier.model.get_text_features
    monkeypatch.setattr(
        classifier.model, "get_text_features", lambda **tokens: calls.append(tokens) or encode(**tokens)
    )
    classifier([random_image(seed) for seed in range(6)], LABELS, batch_size=2)
    assert len(calls) == 1
    assert calls[0]["input_ids"].shape == (len(LABELS), 64)


def test_old_names_of_the_image_argument(classifier):
    image = random_image(6)
    expected = classifier(image, LABELS)
    assert classifier(images=image, candidate_labels=LABELS) == expected
    assert classifier(inputs=image, candidate_labels=LABELS) == expected
    assert classifier(images=[image], candidate_labels=LABELS) == [expected]
    with pytest.raises(ValueError, match="image and images were all given"):
        classifier(image, LABELS, images=image)
    with pytest.raises(ValueError, match="no image was given"):
        classifier(candidate_labels=LABELS)


def test_defaults_of_a_call_can_be_given_to_the_pipeline(checkpoint, reference):
    image = random_image(7)
    classifier = pipeline(
        TASK, checkpoint, candidate_labels=LABELS, hypothesis_template="{}", batch_size=3, device="cpu"
    )
    assert_same(classifier(image), reference(image, candidate_labels=LABELS, hypothesis_template="{}"))
    assert_same(classifier(image, hypothesis_template="a {}."), reference(image, LABELS, hypothesis_template="a {}."))


def test_tokenizer_kwargs_override_the_padding(classifier):
    image = random_image(8)
    usual = {entry["label"]: entry["score"] for entry in classifier(image, LABELS)}
    shorter = {
        entry["label"]: entry["score"] for entry in classifier(image, LABELS, tokenizer_kwargs={"max_length": 16})
    }
    assert max(abs(usual[label] - shorter[label]) for label in usual) > 1e-4


def test_equal_scores_keep_the_order_of_the_labels():
    ranked = rank([0.2, 0.5, 0.2, 0.5], ["a", "b", "c", "d"])
    assert [entry["label"] for entry in ranked] == ["b", "d", "a", "c"]


def test_a_loaded_model_with_its_components(checkpoint, classifier):
    image = random_image(9)
    expected = classifier(image, LABELS)
    model = SiglipModel.from_pretrained(checkpoint)
    processor = SiglipProcessor.from_pretrained(checkpoint)
    assert_same(pipeline(TASK, model, processor=processor)(image, LABELS), expected)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    assert_same(pipeline(TASK, model, **parts)(image, LABELS), expected)
    assert_same(pipeline(TASK, model, tokenizer=str(checkpoint), feature_extractor=checkpoint)(image, LABELS), expected)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        pipeline(TASK, model, image_processor=processor.image_processor)
    with pytest.raises(ValueError, match="image_processor is missing"):
        pipeline(TASK, model, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="backend, dtype given with a model that is already loaded"):
        pipeline(TASK, model, processor=processor, backend="eager", dtype="float32")


def test_backend_and_dtype_reach_the_model(checkpoint, classifier):
    image = random_image(10)
    expected = classifier(image, LABELS)
    eager = pipeline(TASK, checkpoint, backend="eager", device="cpu")
    assert eager.model.backend == "eager"
    assert_same(eager(image, LABELS), expected)
    assert pipeline(TASK, checkpoint, attn_implementation="sdpa", device=-1).model.backend == "sdpa"
    rough = pipeline(TASK, checkpoint, torch_dtype=torch.bfloat16, device="cpu")
    assert rough.dtype == torch.bfloat16
    scores = {entry["label"]: entry["score"] for entry in rough(image, LABELS)}
    assert all(abs(scores[entry["label"]] - entry["score"]) < 0.05 for entry in expected)
    with pytest.raises(ValueError, match="dtype"):
        pipeline(TASK, checkpoint, dtype=torch.float16, torch_dtype=torch.float32)


def test_a_text_tower_with_fewer_positions_than_64(tmp_path):
    short = save_tiny_checkpoint(tmp_path / "short", text_positions=12)
    config = json.loads((short / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == 12
    result = pipeline(TASK, short, device="cpu")(random_image(0), ["a cat", "a " + "very " * 40 + "long label"])
    assert len(result) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "image-to-text"}, ValueError, f"task is 'image-to-text'; supported: '{TASK}'"),
        ({"task": TASK, "model": None}, ValueError, "model is missing"),
        ({"task": TASK, "truncate": True}, TypeError, "truncate"),
        ({"task": TASK, "batch_size": 0}, ValueError, "batch_size is 0"),
        ({"task": TASK, "device": "cpu", "device_map": "cuda"}, ValueError, "device='cpu' and device_map='cuda'"),
        ({"task": TASK, "device": 1.5}, ValueError, "device is 1.5"),
        ({"task": TASK, "tokenizer": ("folder", {"use_fast": True})}, TypeError, "tokenizer is a tuple; supported"),
    ],
)
def test_invalid_arguments_of_the_factory(checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(**{"model": checkpoint, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"candidate_labels": []}, ValueError, "candidate_labels is empty"),
        ({"candidate_labels": None}, ValueError, "candidate_labels is missing"),
        (
            {"candidate_labels": LABELS, "hypothesis_template": "a photo"},
            ValueError,
            "hypothesis_template .* is 'a photo'",
        ),
        (
            {"candidate_labels": LABELS, "hypothesis_template": "{label}"},
            ValueError,
            "hypothesis_template .* is '{label}'",
        ),
        ({"candidate_labels": LABELS, "hypothesis_template": "{} }"}, ValueError, "hypothesis_template .* is '{} }'"),
        ({"candidate_labels": LABELS, "batch_size": 0}, ValueError, "batch_size is 0"),
        ({"candidate_labels": LABELS, "num_workers": -1}, ValueError, "num_workers is -1"),
        ({"candidate_labels": LABELS, "top_k": 0}, ValueError, "top_k is 0"),
        ({"candidate_labels": LABELS, "top_n": 2}, TypeError, "top_n"),
    ],
)
def test_invalid_arguments_of_a_call(classifier, arguments, error, message):
    with pytest.raises(error, match=message):
        classifier(random_image(0), **arguments)


def test_unreadable_images(classifier, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    random_image(0, size=(200, 200)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    for source in (text, cut, tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(UnreadableImageError, match=source.name) as caught:
            classifier(str(source), LABELS)
        assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    with pytest.raises(UnreadableImageError, match=r"AAAA\.\.\. \(4000 characters\)"):
        classifier("A" * 4000, LABELS)
    for source in (3, b"bytes", np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), {"image": 1}):
        with pytest.raises(TypeError, match="supported: a path, a URL"):
            classifier(source, LABELS)
    with pytest.raises(UnreadableImageError, match="nowhere"):
        classifier([random_image(0), str(tmp_path / "nowhere.png")], LABELS, num_workers=2)


def test_a_string_of_labels_is_its_characters_as_in_transformers_with_a_warning(classifier, reference):
    image = random_image(0)
    with pytest.warns(UserWarning, match="each of its characters is a label"):
        result = classifier(image, "ab")
    assert_same(result, reference(image, candidate_labels="ab"))


def test_an_ordinal_without_an_accelerator_is_the_cpu_with_a_warning():
    if torch.accelerator.is_available():
        assert resolve_device(0).index == 0
    else:
        with pytest.warns(UserWarning, match="no accelerator"):
            assert resolve_device(0) == torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device(-1) == torch.device("cpu")
        assert resolve_device("cpu") == torch.device("cpu")
        assert (resolve_device(None).type == "cpu") is not torch.accelerator.is_available()


def test_an_image_that_is_not_decoded_yet_can_be_reused(classifier):
    written = io.BytesIO()
    random_image(0).save(written, "png")
    image = Image.open(written)
    assert classifier(image, LABELS) == classifier(image, LABELS)


@pytest.mark.parametrize("num_workers", [0, 8])
def test_max_pixels_refuses_files_and_processes_larger_pil_images_alone(checkpoint, classifier, tmp_path, num_workers):
    images = [random_image(seed, size=(40, 30)) for seed in range(20)]
    paths = []
    for index, image in enumerate(images):
        paths.append(str(tmp_path / f"{index}.png"))
        image.save(paths[-1])
    expected = classifier(images, LABELS)
    tight = pipeline(model=checkpoint, device="cpu", max_pixels=1200, num_workers=num_workers)
    assert_all_same(tight(paths, LABELS, batch_size=16), expected)
    tighter = pipeline(model=checkpoint, device="cpu", max_pixels=1199, num_workers=num_workers)
    assert_all_same(tighter(images, LABELS, batch_size=16), expected)
    for source in (paths[0], paths, iter(paths)):
        with pytest.raises(UnreadableImageError, match="0.png: 40 x 30 pixels exceed the limit of 1,199; raise it"):
            list(tighter(source, LABELS))
    with pytest.raises(ValueError, match="max_pixels is 0; supported: a whole number from 1"):
        pipeline(model=checkpoint, device="cpu", max_pixels=0)
