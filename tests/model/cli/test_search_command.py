"""`siglip search`: results as a table, as JSON and as a contact sheet."""

import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
from command_line import one_line
from PIL import Image

from siglip_model.cli import terminal
from siglip_model.cli.search import split_words
from siglip_model.embed import load_embeddings
from siglip_model.retrieval import Hit


@pytest.fixture
def photos(siglip, images, tmp_path):
    out = tmp_path / "photos.safetensors"
    assert siglip("embed", images, "--out", out).exit_code == 0
    return out


def test_files_are_told_from_texts_by_their_suffix():
    assert split_words(["a.safetensors", "b/", "a red bicycle", "x.png"]) == (
        ["a.safetensors", "b/"],
        ["a red bicycle", "x.png"],
    )
    with pytest.raises(ValueError, match="no embedding file among 'a'"):
        split_words(["a"])


def test_table_json_and_sheet(siglip, images, photos, tmp_path):
    sheet = tmp_path / "sheet.png"
    result = siglip("search", photos, "2 cats", "--top", 3, "--plot", sheet, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "2 cats" and len(lines) == 4 and f"wrote {sheet}" in result.stderr
    report = siglip("search", photos, "2 cats", "--top", 3, "--image", images / "4.png", "--json", "--device", "cpu")
    assert report.stderr == ""
    text, image = json.loads(report.stdout)
    assert (text["query"], text["kind"], image["kind"]) == ("2 cats", "text", "image")
    assert [hit["rank"] for hit in text["results"]] == [1, 2, 3]
    for line, hit in zip(lines[1:], text["results"], strict=True):
        assert line.endswith(hit["name"]) and f"{hit['cosine']:.4f}" in line
    assert image["results"][0]["name"] == str(images / "4.png") and "score" not in image["results"][0]
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # the images
    drawn = np.flatnonzero((pixels != 255).any(axis=(0, 2)))  # columns of pixels
    assert abs(drawn[0] + drawn[-1] - pixels.shape[1]) < 0.02 * pixels.shape[1]  # three images of five are centred


@pytest.mark.parametrize("score", [0.25, None])
def test_columns_have_names_on_a_terminal(monkeypatch, score):
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for on_terminal in (False, True):
        monkeypatch.setattr(stdout, "isatty", lambda on_terminal=on_terminal: on_terminal)
        terminal.print_found("2 cats", [Hit("/cats.jpg", 0.125, score)])
    query, hit, same, header, again = stdout.getvalue().splitlines()
    assert (query, hit) == (same, again)
    assert header.split() == ["rank", *(["score"] if score else []), "cosine", "name"]
    assert header.index("cosine") + len("cosine") == hit.index("0.1250") + len("0.1250")
    assert header.index("name") == hit.index("/cats.jpg")


def test_the_sheet_draws_images_within_shards_and_tables(siglip, images, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(images / "0.png", "0.png")
    pictures = [(images / f"{number}.png").read_bytes() for number in (1, 2)]
    table = pyarrow.table({"image": pictures, "thumbnail": [b"x", b"y"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    out, sheet = tmp_path / "photos.npy", tmp_path / "sheet.png"
    options = ["--column", "image"]
    assert siglip("embed", tmp_path / "a.tar", tmp_path / "b.parquet", "--out", out, *options).exit_code == 0
    for path in images.iterdir():
        path.unlink()
    assert siglip("search", out, "2 cats", "--plot", sheet, "--device", "cpu", *options).exit_code == 0
    with Image.open(sheet) as opened:
        assert len(np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0)) > 1000  # the images


def test_an_image_that_is_gone_leaves_a_box(siglip, images, photos, tmp_path):
    for path in images.iterdir():
        path.unlink()
    sheet = tmp_path / "sheet.svg"
    result = siglip("search", photos, "2 cats", "--plot", sheet, "--device", "cpu")
    assert result.exit_code == 0 and sheet.exists()


def test_the_index_prints_its_recall(siglip, photos):
    pytest.importorskip("usearch", reason="the extra `search` is not installed")
    first = siglip("search", photos, "2 cats", "--approximate", "--top", 2, "--device", "cpu")
    assert (
        first.exit_code == 0 and f"building {photos}" in first.stderr and "recall@2 of the index: 1.000" in first.stderr
    )
    second = siglip("search", photos, "2 cats", "--approximate", "--top", 2, "--device", "cpu")
    assert second.stderr == "" and second.stdout == first.stdout
    third = siglip("search", photos, "2 cats", "--approximate", "--recall", "--top", 2, "--device", "cpu")
    assert "recall@2" in third.stderr and "building" not in third.stderr


def test_wrong_use_ends_with_2(siglip, images, photos, tmp_path):
    for words, message in (
        (["search", photos], "there is no query"),
        (["search", photos, "a cat", " "], "a text is empty; supported: texts with words"),
        (["search", "2 cats"], "no embedding file"),
        (["search", tmp_path / "gone.safetensors", "2 cats"], "gone.safetensors: No such file or directory\n"),
        (["search", photos, "2 cats", "--recall"], "--approximate"),
        (["search", photos, "2 cats", "--column", "image"], "--column is for --plot"),
        (["search", photos, "2 cats", "--plot", "x.abc"], "--plot"),
        (["search", photos, "--image", "gone.png"], "gone.png: no such file"),
    ):
        result = siglip(*words)
        assert result.exit_code == 2 and one_line(result.stderr) and message in result.stderr, result.stderr


def test_a_relative_checkpoint_is_found_from_any_folder(siglip, images, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    monkeypatch.chdir(checkpoint.parent)
    assert siglip("embed", images, "--out", out, "--model", checkpoint.name).exit_code == 0
    assert load_embeddings(out).settings["model_name"] == os.path.abspath(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert siglip("search", out, "2 cats", "--device", "cpu").exit_code == 0
