"""An output above a size: numbered files in the order of the inputs, which are read, searched and replaced as one."""

import json

import pytest
import torch
from colour_embedder import WIDTH, embed_colours, save_colours
from PIL import Image

from siglip_model.cli.embed import bytes_of
from siglip_model.embed import EmbeddingFileError, load_embeddings
from siglip_model.embed.shards import shard_files
from siglip_model.retrieval import Collection

ROW = WIDTH * 4


@pytest.fixture
def folder(tmp_path):
    save_colours(tmp_path / "images", 9)
    (tmp_path / "images" / "3.png").write_text("no image")
    return tmp_path / "images"


@pytest.fixture(params=[".safetensors", ".npy", ".parquet"])
def out(request, tmp_path):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    return tmp_path / f"out{request.param}"


def outputs(out):
    return sorted(path.name for path in out.parent.iterdir() if path.suffix in (out.suffix, ".json", ".part"))


def test_files_in_order_hold_what_one_file_holds(folder, out):
    one = out.with_name(f"one{out.suffix}")
    embed_colours([folder], one)
    summary = embed_colours([folder], out, shard_size=3 * ROW + 1)
    assert (summary.rows, summary.written) == (8, True)
    files = [out.with_name(f"out-{number:05}-of-00003{out.suffix}") for number in range(3)]
    manifest = out.with_name(f"{out.name}.json")
    assert shard_files(out) == files and json.loads(manifest.read_text())["rows"] == 3
    assert [len(load_embeddings(file).files) for file in files] == [3, 3, 2]
    whole = load_embeddings(one)
    for path in (out, manifest):
        stored = load_embeddings(path)
        assert torch.equal(stored.embeddings, whole.embeddings)
        assert (stored.files, stored.failed, stored.settings) == (whole.files, whole.failed, whole.settings)
        with Collection(path) as rows:
            assert rows.names([2, 3, 7]) == {row: whole.files[row] for row in (2, 3, 7)}


def test_it_grows_shrinks_and_is_joined(folder, out):
    embed_colours([folder], out, shard_size=2**20)
    assert outputs(out) == [out.name], "below the size it is one file"
    embed_colours([folder], out, shard_size=4 * ROW)
    numbered = [f"out-{number:05}-of-00002{out.suffix}" for number in range(2)]
    assert outputs(out) == [*numbered, f"{out.name}.json"]
    for number in (3, 20):
        Image.new("RGB", (1, 1), (number, 9, 9)).save(folder / f"{number}.png")
    embed_colours([folder], out)  # cut as before
    assert outputs(out) == [*(f"out-{number:05}-of-00003{out.suffix}" for number in range(3)), f"{out.name}.json"]
    assert len(load_embeddings(out).files) == 10
    before = {path: path.stat() for path in out.parent.glob("out*")}
    assert embed_colours([folder], out).skipped == 10
    assert {path: path.stat() for path in out.parent.glob("out*")} == before, "nothing has changed or was written"
    embed_colours([folder / "1.png"], out, overwrite=True)
    assert outputs(out) == [out.name] and len(load_embeddings(out).files) == 1


def test_what_is_in_the_way_or_missing_is_named(folder, tmp_path):
    out = tmp_path / "model.safetensors"
    stranger = tmp_path / "model-00001-of-00003.safetensors"
    stranger.write_text("weights")
    with pytest.raises(EmbeddingFileError, match=r"model-00001-of-00003.safetensors would be replaced"):
        embed_colours([folder], out, shard_size=ROW)
    assert stranger.read_text() == "weights" and len(list(tmp_path.iterdir())) == 2
    stranger.unlink()
    embed_colours([folder], out, shard_size=3 * ROW)
    stranger.unlink()
    uses = [
        (load_embeddings, out),
        (Collection, out),
        (Collection, tmp_path),
        (lambda out: embed_colours([folder], out), out),
    ]
    for use, place in uses:
        with pytest.raises(EmbeddingFileError, match="model-00001-of-00003.safetensors is missing, which"):
            use(place)


def test_it_is_not_shared_by_ranks(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="shard_size cuts the output of one process"):
        embed_colours([folder], out, shard_size=ROW, shards=2)
    with pytest.raises(ValueError, match="shard_size is 0"):
        embed_colours([folder], out, shard_size=0)
    with pytest.raises(ValueError, match=r"shard_size is 1\.5; supported: a whole number from 1"):
        embed_colours([folder], out, shard_size=1.5)
    embed_colours([folder], out, shard_size=ROW)
    with pytest.raises(EmbeddingFileError, match="cut by size, which ranks cannot share"):
        embed_colours([folder], out, rank=0, world_size=2)
    shared = tmp_path / "shared.safetensors"
    embed_colours([folder], shared, shards=2)
    with pytest.raises(EmbeddingFileError, match="which are not cut by size"):
        embed_colours([folder], shared, shard_size=ROW)


@pytest.mark.parametrize(
    ("size", "count"),
    [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100), ("64kb", 64_000), ("1B", 1), ("3TiB", 3 * 2**40)],
)
def test_sizes_in_words(size, count):
    assert bytes_of(size) == count
    for wrong in (f"-{size}", f"{size}s", "GB", "", "0", "0.5", "1.5", "1.5 B"):
        with pytest.raises(ValueError, match="--shard-size is .*supported: a whole number of bytes"):
            bytes_of(wrong)
