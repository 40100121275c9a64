"""The command `siglip` in this process, on the tiny checkpoint, and folders of images."""

import pytest
from tiny_checkpoint import random_image, shared_tiny_checkpoint
from typer.testing import CliRunner

from siglip_model.cli import main, precision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch):
    """Whatever the CPU has: `test_precision.py` gives it back."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)


@pytest.fixture
def siglip(checkpoint):
    """Runs the command in this process, on the tiny checkpoint by default."""

    def run(*arguments, stdin=None):
        words = [str(argument) for argument in arguments]
        if words[:1] in (["classify"], ["embed"]) and "--model" not in words:
            words[1:1] = ["--model", str(checkpoint), *([] if "--device" in words else ["--device", "cpu"])]
        return CliRunner().invoke(main.app, words, input=stdin, prog_name="siglip")

    return run


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        random_image(number, size=(40 + number, 50)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(40):
        random_image(index).save(folder / f"{index:02}.png")
    return folder
