"""`siglip demo`: what it reports, and that the bundled demo works."""

import json
import subprocess
import sys

import pytest
from command_line import one_line
from tiny_checkpoint import random_image

from siglip_model.cli import demo as demo_command
from siglip_model.demo import CHECKPOINT


@pytest.fixture
def own_demo(monkeypatch, tmp_path, checkpoint):
    """A demo of three images, two of them equal, so that one of the two is misclassified."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, seed in (("red-apple", 0), ("two-cats", 1), ("a-plane", 1)):
        random_image(seed).save(pictures / f"{name}.png")
    monkeypatch.setattr(demo_command, "PICTURES", pictures)
    return ["demo", "--model", str(checkpoint), "--device", "cpu"]


def test_demo_marks_right_and_wrong_and_shows_a_command(siglip, own_demo, tmp_path):
    report = json.loads(siglip(*own_demo, "--json").stdout)
    assert [picture["name"] for picture in report["pictures"]] == ["a plane", "red apple", "two cats"]
    for picture in report["pictures"]:
        scores = {entry["label"]: entry["score"] for entry in picture["predictions"]}
        assert set(scores) == {"a plane", "red apple", "two cats"}
        assert picture["right"] == (max(scores, key=scores.__getitem__) == picture["name"])
    twins = [picture["predictions"] for picture in report["pictures"] if picture["name"] != "red apple"]
    assert twins[0] == twins[1] and report["right"] == sum(picture["right"] for picture in report["pictures"]) < 3
    result = siglip(*own_demo, "--plot", tmp_path / "demo.png")
    assert result.exit_code == 0 and (tmp_path / "demo.png").stat().st_size > 5000
    assert result.stdout.count("✓") == report["right"] and result.stdout.count("✗") == 3 - report["right"]
    assert f"{report['right']} of 3 right, each among 3 names" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "google/siglip-so400m-patch14-384" in line]
    assert "siglip classify IMAGE --model google/siglip-so400m-patch14-384 --labels" in line


def test_demo_without_images(siglip, own_demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_command, "PICTURES", tmp_path / "none")
    result = siglip(*own_demo)
    assert result.exit_code == 2 and one_line(result.stderr) and "no images in" in result.stderr


@pytest.mark.skipif(not (CHECKPOINT / "config.json").exists(), reason="the demo's checkpoint is not built yet")
def test_the_bundled_demo_is_mostly_right():
    result = subprocess.run(
        [sys.executable, "-m", "siglip_model.cli", "demo", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(result.stdout)
    assert result.stderr == "" and report["of"] >= 5
    assert report["right"] >= 0.7 * report["of"]
