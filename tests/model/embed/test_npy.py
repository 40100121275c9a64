"""Embeddings written as .npy: read by numpy alone, resumed, searched, and refused when damaged."""

import json
import os

import numpy as np
import pytest
import torch
from colour_embedder import WIDTH, embed_colours
from embedding_files import write_rows
from PIL import Image

from siglip_model.embed import EmbeddingFileError, load_embeddings
from siglip_model.embed.npy import NpyEmbeddingFile
from siglip_model.retrieval import Collection


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.npy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_holds_what_the_safetensors_file_holds(folder, out, tmp_path, dtype):
    summary = embed_colours([folder], out, dtype=dtype)
    assert (summary.rows, summary.failed, summary.written) == (8, 1, True)
    embed_colours([folder], tmp_path / "out.safetensors", dtype=dtype)
    one, other = load_embeddings(out), load_embeddings(tmp_path / "out.safetensors")
    assert torch.equal(one.embeddings, other.embeddings) and one.embeddings.dtype == dtype
    assert (one.files, one.failed, one.settings) == (other.files, other.failed, other.settings)
    array = np.load(out, mmap_mode="r")
    assert isinstance(array, np.memmap) and array.shape == (8, WIDTH) and array.tolist() == one.embeddings.tolist()
    names = [json.loads(line)["file"] for line in (tmp_path / "out.names.jsonl").read_text().splitlines()]
    assert names == one.files
    with Collection(out) as stored:
        assert stored.names([7, 0, 4]) == {row: one.files[row] for row in (0, 4, 7)}


def test_it_is_resumed_and_grows(folder, out, tmp_path):
    embed_colours([folder], out)
    before = out.read_bytes()
    assert embed_colours([folder], out).skipped == 8 and out.read_bytes() == before
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "3.png")
    assert embed_colours([folder], out).rows == 9
    assert load_embeddings(out).files[-1] == str(folder / "3.png") and load_embeddings(out).failed == {}
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out.npy", "out.names.jsonl", "out.run.jsonl"}
    with pytest.raises(EmbeddingFileError, match="normalize was true and is now false"):
        embed_colours([folder], out, normalize=False)


def test_a_file_that_is_replaced_while_it_is_opened(folder, out, monkeypatch):
    embed_colours([folder], out)
    beside = NpyEmbeddingFile._beside

    def replaced(file, path):
        if path.name == "out.names.jsonl":
            embed_colours([folder], out, overwrite=True)
        return beside(file, path)

    monkeypatch.setattr(NpyEmbeddingFile, "_beside", replaced)
    with pytest.raises(EmbeddingFileError, match="was replaced while it was opened; open it again"):
        NpyEmbeddingFile(out)


def test_a_link_is_followed_to_all_three_files(folder, out, tmp_path):
    (tmp_path / "there").mkdir()
    out.symlink_to(tmp_path / "there" / "target.npy")
    assert embed_colours([folder], out).rows == 8 and out.is_symlink()
    assert embed_colours([folder], out).skipped == 8 and len(load_embeddings(out).files) == 8
    assert len(list((tmp_path / "there").iterdir())) == 3
    embed_colours([folder], out, shard_size=3 * WIDTH * 4)
    assert len(load_embeddings(out).files) == 8 and embed_colours([folder], out).skipped == 8
    out.unlink()
    out.symlink_to(tmp_path / "nothing")
    with pytest.raises(EmbeddingFileError, match=r"is a symbolic link to .*nothing, whose name does not end in .npy"):
        embed_colours([folder], out)


def test_names_of_any_bytes(out):
    names = ["a\nb", "c\u2028d", os.fsdecode(b"/\xff.png"), "é" * 100]
    write_rows(out, torch.ones(4, WIDTH), names=names)
    assert load_embeddings(out).files == names
    with pytest.raises(EmbeddingFileError, match="npy has no bfloat16"):
        write_rows(out.with_name("b.npy"), torch.ones(1, WIDTH), dtype="BF16")


@pytest.mark.parametrize("name", ["out.npy", "out.run.jsonl", "out.names.jsonl"])
def test_damaged_files_are_refused_and_kept(folder, out, name):
    embed_colours([folder], out)
    file = out.with_name(name)
    whole = file.read_bytes()
    others = load_embeddings(out).files
    for damaged in (whole[:-1], whole + b"\n", b"", whole[:20] + b"\0" + whole[21:]):
        file.write_bytes(damaged)
        for use in (load_embeddings, lambda out: embed_colours([folder], out)):
            with pytest.raises(EmbeddingFileError, match=r"out\.(npy|run|names)"):
                use(out)
        assert file.read_bytes() == damaged
    file.unlink()
    if name == "out.npy":
        with pytest.raises(FileNotFoundError):
            load_embeddings(out)
        with pytest.raises(EmbeddingFileError, match="would be replaced, and nothing says that it is of"):
            embed_colours([folder], out)
    else:
        for use in (load_embeddings, lambda out: embed_colours([folder], out)):
            with pytest.raises(EmbeddingFileError, match=f"is incomplete: {name} is missing"):
                use(out)
    file.write_bytes(whole)
    assert load_embeddings(out).files == others


def test_names_that_become_too_long_are_refused_before_any_work(folder, tmp_path):
    out = tmp_path / f"{'n' * 232}.npy"
    with pytest.raises(EmbeddingFileError, match="is too long; supported here: at most 235 bytes"):
        embed_colours([folder], out)
    assert embed_colours([folder], tmp_path / f"{'n' * 230}.npy").written
