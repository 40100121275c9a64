"""Embedding with Ray Data: the rows of `embed_images`, also when an actor is killed."""

import io
import os
import signal
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_model.embed import embed_images, load_embeddings
from siglip_model.retrieval import Collection

pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
from siglip_model.embed import ray as embed_ray


def picture(number):
    levels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def png(number):
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


def column(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(16):
        (folder / f"{number:02}.png").write_bytes(png(number))
    return folder


@pytest.fixture(scope="module")
def expected(photos, checkpoint, model, image_processor):
    """By path, the rows of `embed_images`."""
    out = photos.parent / "expected.safetensors"
    embed_images(model, image_processor, [photos], out)
    stored = load_embeddings(out)
    return dict(zip(stored.files, stored.embeddings, strict=True))


def by_name(table):
    return {row["path"]: row for row in table.to_pylist()}


def test_a_batch_of_files_has_the_rows_of_embed_images_and_names_what_is_broken(photos, checkpoint, expected):
    embedder = embed_ray.ImageEmbedder(checkpoint)
    paths = [str(photos / f"{number:02}.png") for number in range(3)]
    content = [Path(path).read_bytes() for path in paths]
    rows = by_name(embedder({"bytes": column([content[0], b"broken", content[2]]), "path": column(paths)}))
    assert list(rows) == paths
    for path in (paths[0], paths[2]):
        torch.testing.assert_close(torch.tensor(rows[path]["embedding"]), expected[path], atol=1e-5, rtol=0)
        assert rows[path]["error"] is None
    assert rows[paths[1]]["embedding"] is None and "not an image" in rows[paths[1]]["error"]


def test_a_part_of_a_table_is_written_with_its_own_rows(photos, checkpoint, expected, tmp_path):
    embedder = embed_ray.ImageEmbedder(checkpoint)
    paths = [str(photos / f"{number:02}.png") for number in range(4)]
    content = [b"broken", *(Path(path).read_bytes() for path in paths[1:])]
    part = embedder({"bytes": column(content), "path": column(paths)}).slice(2, 2)
    files = embed_ray.EmbeddingFiles(str(tmp_path), embedder.settings)
    with open(tmp_path / "x.parquet", "wb") as file:
        files.write_block_to_file(SimpleNamespace(to_arrow=lambda: part), file)
    stored = load_embeddings(tmp_path / "x.parquet")
    assert stored.files == paths[2:] and not stored.failed
    torch.testing.assert_close(
        stored.embeddings, torch.stack([expected[path] for path in paths[2:]]), atol=1e-5, rtol=0
    )


def test_a_job_leaves_one_row_per_path_and_says_that_it_has_ended(photos, checkpoint, expected, tmp_path):
    """What Ray calls: a write in each task, then `on_write_complete` on the driver."""
    embedder, out = embed_ray.ImageEmbedder(checkpoint), tmp_path / "out"
    paths = [str(photos / f"{number:02}.png") for number in range(4)]
    tasks = [[paths[0], paths[1], paths[0], "broken"], [paths[2]], [paths[1], paths[3], paths[3]], ["worse"]]
    files = embed_ray.EmbeddingFiles(str(out), embedder.settings)
    files.on_write_start()
    task = SimpleNamespace(kwargs={embed_ray.ray.data._internal.planner.plan_write_op.WRITE_UUID_KWARG_NAME: "u"})
    returned = [files.write([embed_ray.pyarrow.table({})], task)]
    for number, names in enumerate(tasks):
        content = [Path(name).read_bytes() if name in paths else b"x" for name in names]
        task.task_idx = number
        returned.append(files.write([embedder({"bytes": column(content), "path": column(names)})], task))
    unfinished = load_embeddings(out / sorted(path.name for path in out.iterdir())[1])
    assert unfinished.settings["complete"] == "false" and not (out / "_SUCCESS").exists()
    files.on_write_complete(SimpleNamespace(num_rows=9, write_returns=returned[::-1]))
    assert (files.embedded, files.skipped, files.failed) == (4, 3, 2) and (out / "_SUCCESS").exists()
    stored = load_embeddings(out)
    assert stored.files == [paths[0], paths[1], paths[2], paths[3]] and set(stored.failed) == {"broken", "worse"}
    wanted = torch.stack([expected[path] for path in stored.files])
    torch.testing.assert_close(stored.embeddings, wanted, atol=1e-5, rtol=0)


def test_a_place_that_cannot_be_used_is_named(checkpoint, tmp_path):
    settings = embed_ray.ImageEmbedder(checkpoint).settings
    (tmp_path / "file").write_text("x")
    for place, message in (("file", "which is a file; supported: a folder"), ("", "which is not empty")):
        with pytest.raises(ValueError, match=f"^embed_dataset: out is .*, {message}"):
            embed_ray.EmbeddingFiles(str(tmp_path / place), settings)


def test_arrays_of_read_images_and_members_of_read_webdataset(photos, checkpoint, expected):
    embedder = embed_ray.ImageEmbedder(checkpoint, dtype=torch.float16)
    path = str(photos / "04.png")
    arrays = {"image": np.asarray(picture(4))[None], "path": column([path])}
    members = {"png": column([png(4)]), "__url__": column(["a.tar"]), "__key__": column(["x/4"]), "txt": column(["4"])}
    for batch, name in ((arrays, path), (members, "a.tar#x/4.png")):
        row = by_name(embedder(batch))[name]
        torch.testing.assert_close(torch.tensor(row["embedding"]), expected[path], atol=1e-3, rtol=0)


def test_columns_and_arguments_that_cannot_be_used_are_named(checkpoint, tmp_path):
    embedder = embed_ray.ImageEmbedder(checkpoint)
    with pytest.raises(ValueError, match="read_binary_files"):
        embedder({"bytes": column([png(1)])})
    with pytest.raises(ValueError, match="name one of text, path"):
        embedder({"text": column(["a"]), "path": column(["b"])})
    with pytest.raises(ValueError, match="no column 'photo'"):
        embed_ray.ImageEmbedder(checkpoint, column="photo")({"image": column([png(1)]), "path": column(["b"])})
    grey = embedder({"image": np.zeros((1, 8, 8), dtype=np.uint8), "path": column(["b"])})
    assert 'mode="RGB"' in grey["error"][0].as_py()
    with pytest.raises(ValueError, match="parquet supports torch.float32 and torch.float16"):
        embed_ray.ImageEmbedder(checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"actors is \(2, 1\)"):
        embed_ray.embed_dataset(None, checkpoint, str(tmp_path / "out"), actors=(2, 1))


def test_an_actor_with_another_model_than_the_driver_is_refused(checkpoint):
    settings = {**embed_ray.ImageEmbedder(checkpoint).settings, "model": "another"}
    with pytest.raises(ValueError, match="another checkpoint on this node: its model is"):
        embed_ray.ImageEmbedder(checkpoint, expected=settings)


@pytest.fixture(scope="module")
def local_ray():
    """Ray on this machine, with CPUs for two actors and for what reads and writes; starts in about ten seconds."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
        yield ray
        ray.shutdown()


@pytest.mark.thorough
def test_every_image_has_one_row_when_one_of_two_actors_is_killed(
    local_ray, photos, checkpoint, expected, tmp_path, monkeypatch
):
    killed, calls = tmp_path / "killed", tmp_path / "calls"
    calls.mkdir()

    class KilledOnce(embed_ray.ImageEmbedder):
        def __call__(self, batch):
            table = super().__call__(batch)
            (calls / f"{os.getpid()}-{os.urandom(4).hex()}").touch()
            if any(path.endswith("07.png") for path in batch["path"]) and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return table

    monkeypatch.setattr(embed_ray, "ImageEmbedder", KilledOnce)
    dataset = local_ray.data.read_binary_files(str(photos), include_paths=True, override_num_blocks=8)
    out = tmp_path / "embeddings"
    summary = embed_ray.embed_dataset(
        dataset, checkpoint, str(out), actors=(2, 2), batch_size=2, rows_per_file=4, num_workers=1
    )
    assert killed.exists() and len({path.name.partition("-")[0] for path in calls.iterdir()}) >= 2
    assert (summary.embedded, summary.failed, summary.rows) == (16, 0, 16)
    assert (out / "_SUCCESS").exists()
    files = sorted(out.glob("*.parquet"))
    names = [name for file in files for name in load_embeddings(file).files]
    assert sorted(names) == sorted(expected)
    with Collection(files) as collection:
        rows = collection.rows(range(len(names)))
    torch.testing.assert_close(rows, torch.stack([expected[name] for name in names]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="which is not empty"):
        embed_ray.embed_dataset(dataset, checkpoint, str(out))


@pytest.mark.thorough
def test_shards_of_webdataset_become_files_that_search_reads(local_ray, photos, checkpoint, expected, tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for number in range(6):
            archive.add(photos / f"{number:02}.png", f"{number:02}.png")
    dataset = local_ray.data.read_webdataset(str(shard), decoder=None)
    summary = embed_ray.embed_dataset(dataset, checkpoint, str(tmp_path / "out"), actors=(1, 2), batch_size=4)
    (file,) = (tmp_path / "out").glob("*.parquet")
    stored = load_embeddings(file)
    assert summary.rows == 6 and stored.files == [f"{shard}#{number:02}.png" for number in range(6)]
    wanted = torch.stack([expected[str(photos / f"{number:02}.png")] for number in range(6)])
    torch.testing.assert_close(stored.embeddings, wanted, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_a_dataset_without_rows_writes_no_file(local_ray, checkpoint, tmp_path):
    dataset = local_ray.data.from_items([{"path": "a", "bytes": b"x"}]).filter(lambda row: False)
    summary = embed_ray.embed_dataset(dataset, checkpoint, str(tmp_path / "out"), actors=(1, 1))
    assert (summary.rows, summary.failed, summary.written) == (0, 0, False)
    assert not list(tmp_path.glob("out/*"))
