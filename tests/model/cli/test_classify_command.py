"""`siglip classify`: scores, labels, failures and interruption."""

import json
import os
import signal

import pytest
import torch
import transformers
from command_line import LABELS, one_line

from siglip_model.cli import classify
from siglip_model.plot import format_score
from siglip_model.zero_shot import ZeroShotImageClassificationPipeline


def test_classify_in_json_equals_transformers(siglip, images, checkpoint):
    paths = sorted(images.iterdir())
    result = siglip("classify", *paths, "--labels", *LABELS, "--json", "--batch-size", 2)
    assert result.exit_code == 0 and result.stderr == ""
    pillow = transformers.SiglipImageProcessor.from_pretrained(checkpoint)
    task = "zero-shot-image-classification"
    reference = transformers.pipeline(task, model=str(checkpoint), image_processor=pillow, device=-1)
    expected = reference([str(path) for path in paths], candidate_labels=LABELS)
    entries = json.loads(result.stdout)
    assert [entry["image"] for entry in entries] == [str(path) for path in paths]
    for entry, predictions in zip(entries, expected, strict=True):
        assert [one["label"] for one in entry["predictions"]] == [one["label"] for one in predictions]
        scores = [one["score"] for one in predictions]
        assert [one["score"] for one in entry["predictions"]] == pytest.approx(scores, abs=1e-5)


def test_classify_in_fp8(siglip, images, caplog):
    """The check refuses this checkpoint: its large random weights are far from those of a trained model."""
    words = ("classify", images / "0.png", "--labels", *LABELS, "--json")
    in_fp8 = ("--backend", "triton_fp8", "--dtype", "bfloat16")
    with caplog.at_level("INFO"):
        found = siglip(*words, *in_fp8)
    assert found.exit_code == 0, found.stderr
    assert "26 projections in fp8" in caplog.text and found.stdout != siglip(*words).stdout
    in_float32 = siglip(*words, *in_fp8[:2])
    assert in_float32.exit_code == 2 and one_line(in_float32.stderr) and "--dtype bfloat16" in in_float32.stderr
    for backend, reason in ((in_fp8, "a cosine of 0.9"), ((), "--check compares --backend triton_fp8")):
        refused = siglip(*words, *backend, "--check")
        assert refused.exit_code == 2 and one_line(refused.stderr) and reason in refused.stderr


def test_classify_prints_every_image_with_its_labels_best_first(siglip, images):
    as_json = json.loads(siglip("classify", images, "--labels", *LABELS, "--json").stdout)
    shown = siglip("classify", images, "--labels", *LABELS, "--top-k", 2).stdout
    lines = shown.splitlines()
    for entry in as_json:
        start = lines.index(os.path.basename(entry["image"]))
        for line, prediction in zip(lines[start + 1 : start + 3], entry["predictions"][:2], strict=True):
            assert prediction["label"] in line and format_score(prediction["score"]) in line
    assert len([line for line in lines if "░" in line or "█" in line]) == 2 * 5


@pytest.mark.parametrize(
    "words",
    [
        ["IMAGE", "--labels", "2 cats", "a plane", "a remote"],
        ["IMAGE", "--labels", "2 cats,a plane, a remote,"],
        ["IMAGE", "--labels", "2 cats", "--labels", "a plane", "--labels=a remote"],
        ["--labels", "2 cats", "--labels", "a plane,a remote", "IMAGE"],
        ["--labels", "2 cats,a plane,a remote", "IMAGE"],
        ["--labels", "2 cats,a plane,a remote", "--", "IMAGE"],
        ["--top-k", "3", "IMAGE", "--labels", "2 cats", "a plane", "--batch-size", "1", "--labels", "a remote"],
        ["IMAGE", "--labels", "2 cats", "a plane", "a remote", "a plane"],
    ],
)
def test_ways_to_write_labels(siglip, images, words):
    image = str(images / "0.png")
    result = siglip("classify", "--json", *[image if word == "IMAGE" else word for word in words])
    assert result.exit_code == 0, result.stderr
    (entry,) = json.loads(result.stdout)
    assert entry["image"] == image
    assert {one["label"] for one in entry["predictions"]} == set(LABELS)


def test_a_label_taken_for_an_image_is_noticed(siglip, images):
    result = siglip("classify", "--labels", "a", "b", images / "0.png", "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)) == 2
    assert "'b' is not a file; if it is a label: --labels takes several words only after the images" in result.stderr
    assert "is a label" not in siglip("classify", "--labels", "a", "gone.png", images / "0.png", "--json").stderr


def test_commas_within_labels_and_template():
    assert classify.split_labels(["red\\, round, a dog", "a cat", " ", "a dog"]) == ["red, round", "a dog", "a cat"]


def test_the_template_reaches_the_model(siglip, images):
    image = images / "0.png"
    scores = []
    for template in ("This is a photo of {}.", "{}", "{{on}} the sofa: {}"):
        result = siglip("classify", image, "--labels", "a {cat}", "--template", template, "--json")
        scores.append(json.loads(result.stdout)[0]["predictions"][0]["score"])
    assert len({round(score, 5) for score in scores}) == 3
    result = siglip("classify", image, "--labels", "a cat", "--template", "no place")
    assert (
        result.exit_code == 2
        and one_line(result.stderr)
        and "hypothesis_template (--template) is 'no place'" in result.stderr
    )


def test_one_unreadable_image_among_many(siglip, images):
    (images / "2.png").write_text("no image")
    arguments = ("classify", images, images / "gone.png", images / "0.png", "--labels", *LABELS, "--batch-size", 4)
    result = siglip(*arguments, "--json")
    assert result.exit_code == 1
    entries = json.loads(result.stdout)
    assert [os.path.basename(entry["image"]) for entry in entries] == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "gone.png", "0.png",
    ]  # fmt: skip
    assert [index for index, entry in enumerate(entries) if "error" in entry] == [2, 5]
    first, again = entries[0]["predictions"], entries[6]["predictions"]
    assert [one["label"] for one in first] == [one["label"] for one in again]
    assert [one["score"] for one in first] == pytest.approx([one["score"] for one in again], abs=1e-6)
    shown = siglip(*arguments)
    assert shown.exit_code == 1
    for text in (result.stderr, shown.stderr):
        assert "2.png: not an image" in text and "gone.png: no such file" in text
        assert "2 of 7 images failed" in text and "Traceback" not in text
    assert "2.png" not in shown.stdout


def test_ctrl_c_while_classifying_prints_the_finished_results(siglip, many, monkeypatch):
    score = classify._ClassifyRun._score

    def score_and_interrupt(run, *arguments):
        score(run, *arguments)
        if len(run.results) >= 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(classify._ClassifyRun, "_score", score_and_interrupt)
    result = siglip("classify", many, "--labels", "a", "--batch-size", 2, "--json")
    assert result.exit_code == 130 and "interrupted after 4 of 40 images" in result.stderr
    names = [os.path.basename(entry["image"]) for entry in json.loads(result.stdout)]
    assert names == ["00.png", "01.png", "02.png", "03.png"]


def test_threads_that_decode_leave_the_cores_to_the_model(siglip, images, monkeypatch):
    before, found = torch.get_num_threads(), {}

    def noting(name):
        method = getattr(ZeroShotImageClassificationPipeline, name)

        def noted(self, *arguments, **options):
            found.setdefault(name, set()).add(torch.get_num_threads())
            return method(self, *arguments, **options)

        monkeypatch.setattr(ZeroShotImageClassificationPipeline, name, noted)

    noting("prepare")
    noting("score")
    try:
        torch.set_num_threads(3)
        assert siglip("classify", images, "--labels", *LABELS).exit_code == 0
        assert found == {"prepare": {1}, "score": {3}} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
