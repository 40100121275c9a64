"""An output of several files: ranks share the inputs, and any number of ranks resumes what others left."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from colour_embedder import WIDTH, ColourModel, embed_colours, save_colours
from PIL import Image

from siglip_model.embed import EmbeddingFileError, load_embeddings
from siglip_model.embed.journal import EmbeddingJournal
from siglip_model.embed.run import model_digest
from siglip_model.embed.shards import open_shards, shard_files
from siglip_model.retrieval import Collection

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    save_colours(tmp_path / "images", 40)
    (tmp_path / "images" / "7.png").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def rows_of(out):
    rows = {}
    for file in shard_files(out):
        stored = load_embeddings(file)
        assert stored.files == sorted(stored.files), "rows are in input order"
        assert not rows.keys() & set(stored.files)
        rows.update(zip(stored.files, stored.embeddings.tolist(), strict=True))
    return rows


def one_file(folder):
    out = folder.parent / "one.safetensors"
    embed_colours([folder], out)
    stored = load_embeddings(out)
    return dict(zip(stored.files, stored.embeddings.tolist(), strict=True))


def test_failures_are_kept_in_files_without_a_row(folder, out):
    broken = [path for path in folder.iterdir() if path.name != "8.png"]
    for path in broken:
        path.write_text("no image")
    assert embed_colours([folder], out, shards=8).rows == 1
    stored = load_embeddings(out)
    assert len(stored.files) == 1 and stored.failed.keys() == {str(path) for path in broken}
    with Collection(out) as collection:
        assert len(collection) == 1
    shutil.rmtree(folder)
    save_colours(folder, 40)
    assert embed_colours([folder], out).rows == 40 and not load_embeddings(out).failed


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_write_what_one_process_writes(folder, out, world_size):
    summaries = [embed_colours([folder], out, shards=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(summary.rows for summary in summaries) == 39 and sum(summary.failed for summary in summaries) == 1
    assert all(summary.written for summary in summaries)
    assert rows_of(out) == one_file(folder)
    assert 4 <= len(shard_files(out)) <= 8 and len(json.loads(Path(f"{out}.json").read_text())["files"]) == 8
    assert not list(out.parent.glob("*.part"))
    summary = embed_colours([folder], out)  # on one rank, by the manifest
    assert (summary.embedded, summary.skipped, summary.failed) == (0, 39, 1)
    with Collection(out) as stored:
        assert len(stored) == 39


def test_a_shard_of_images_is_read_by_one_rank(folder, out, tmp_path):
    for name in "abcdef":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for number in range(3):
                shard.add(folder / f"{number}.png", f"{number}.png")
    shards = [tmp_path / f"{name}.tar" for name in "abcdef"]
    summaries = [embed_colours(shards, out, shards=4, rank=rank, world_size=2) for rank in range(2)]
    assert sum(summary.rows for summary in summaries) == 18 and all(summary.rows % 3 == 0 for summary in summaries)
    for file in shard_files(out):
        names = load_embeddings(file).files
        assert len(names) == 3 * len({name.partition("#")[0] for name in names})


KILLED = """
import os, signal, sys
from colour_embedder import embed_colours
from siglip_model.embed import run
run.COMMIT_SECONDS = -1.0
seen = []
def on_image(*_):
    seen.append(_)
    if len(seen) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
embed_colours([sys.argv[1]], sys.argv[2], rank=rank, world_size=world_size, shards=6, on_image=on_image)
"""


def test_two_ranks_of_torchrun_that_were_killed_are_resumed_by_one(folder, out, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    killed = subprocess.run(
        [*torchrun, str(script), str(folder), str(out)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert list(tmp_path.glob("*.part")) and shard_files(out) == []
    summary = embed_colours([folder], out)
    assert summary.skipped >= 6 and summary.embedded + summary.skipped == 39 and summary.complete
    assert rows_of(out) == one_file(folder)
    assert not list(tmp_path.glob("*.part"))


def test_two_writers_of_one_file_and_other_counts_are_errors(folder, out):
    embed_colours([folder], out, shards=3)
    settings = {"model": model_digest(ColourModel()), "dtype": "F32", "width": str(WIDTH)}
    settings = {**load_embeddings(shard_files(out)[1]).settings, **settings}
    for name in ("format", "producer", "complete"):
        del settings[name]
    journal = EmbeddingJournal(shard_files(out)[1], settings)
    try:
        with pytest.raises(EmbeddingFileError, match="00001-of-00003.safetensors: another run is writing it"):
            embed_colours([folder], out)
        assert embed_colours([folder], out, rank=0, world_size=3).complete  # of other files
    finally:
        journal.close()
    with pytest.raises(EmbeddingFileError, match="names 3 files, not 4"):
        embed_colours([folder], out, shards=4)
    with pytest.raises(EmbeddingFileError, match="has 3 files for 5 ranks"):
        embed_colours([folder], out, rank=4, world_size=5)
    with pytest.raises(ValueError, match="shards is 0"):
        open_shards(out.with_name("other.safetensors"), 0)
    Path(f"{out}.json").write_text("{}")
    with pytest.raises(EmbeddingFileError, match="is not the manifest of an output"):
        embed_colours([folder], out)


def test_rows_that_a_run_adds_from_another_place_of_the_model_are_read_with_the_rest(folder, out):
    embed_colours([folder], out, shards=3, model_name="a")
    Image.new("RGB", (1, 1)).save(folder / "new.png")
    embed_colours([folder], out, model_name="b")
    assert {load_embeddings(file).settings["model_name"] for file in shard_files(out)} == {"a", "b"}
    assert len(load_embeddings(out).files) == 40


def test_one_file_is_not_divided(folder, out):
    embed_colours([folder], out)
    with pytest.raises(EmbeddingFileError, match="is one file, which is not divided"):
        embed_colours([folder], out, rank=0, world_size=2)
    assert torch.equal(load_embeddings(out).embeddings, load_embeddings(shard_files(out)[0]).embeddings)
